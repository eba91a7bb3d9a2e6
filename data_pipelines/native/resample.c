/* The antialiased resize, as Pillow defines it: a filter that widens with the shrinking, first along rows, then along
 * columns, rounded to 8 bits between. Weights are 16-bit integers, of as many binary places as they allow.
 *
 * Rows are resized 16 at a time. Their pixels are first laid out so that one vector holds the same two neighbouring
 * pixels of many rows; a multiply-and-add of pairs then serves all these rows with the weights of one output pixel.
 */
#include "kernel.h"

#include <math.h>
#include <string.h>
#if WITH_AVX2
#include <immintrin.h>
#endif

#define ROWS 16
#define CHUNK 32          /* px of a row that the vertical pass makes at a time */
#define MAX_PRECISION 20

/* Where row r of a block lies in a vector, so that packing sums to bytes brings them into order. */
static const uint8_t SLOT[ROWS] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};

/* How the pixels [first, first + count) along one axis make the output's. */
typedef struct {
    ptrdiff_t first, count;
    ptrdiff_t max_pairs;
    int32_t *start;     /* (out) first pixel read, counted from `first` */
    int32_t *num_pairs; /* (out) of weights used */
    int32_t *precision; /* (out) binary places of the weights */
    int16_t *weights;   /* (out, max_pairs, 2) */
} Axis;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) { /* Keys 1981, a = -1/2 */
    x = fabs(x);
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0 : 0.0;
}

static double lanczos(double x) {
    if (x == 0.0)
        return 1.0;
    if (fabs(x) >= 3.0)
        return 0.0;
    const double angle = x * 3.14159265358979323846;
    return 3.0 * sin(angle) * sin(angle / 3.0) / (angle * angle);
}

static double (*const FILTERS[NUM_FILTERS])(double) = {bilinear, bicubic, lanczos};
static const double SUPPORTS[NUM_FILTERS] = {1.0, 2.0, 3.0};

static size_t align(size_t size) { return (size + 63) & ~(size_t)63; }

static double support_of(Filter filter, double scale) { return SUPPORTS[filter] * fmax(scale, 1.0); }

/* Fills in the counts; the arrays come from place_axis(). */
static Axis plan_axis(Filter filter, double low, double high, ptrdiff_t size, ptrdiff_t out) {
    Axis axis = {0};
    axis.first = (ptrdiff_t)floor(low);
    ptrdiff_t end = (ptrdiff_t)ceil(high);
    axis.count = (end > size ? size : end) - axis.first;
    const double taps = 2.0 * ceil(support_of(filter, (high - low) / (double)out)) + 2.0;
    ptrdiff_t most = taps < (double)axis.count ? (ptrdiff_t)taps : axis.count;
    axis.max_pairs = most / 2 + 2; /* an even start costs one pixel more, an odd number of taps another */
    return axis;
}

static size_t axis_bytes(const Axis *axis, ptrdiff_t out) {
    return 3 * align((size_t)out * sizeof(int32_t)) +
           align((size_t)out * (size_t)axis->max_pairs * 2 * sizeof(int16_t)) +
           align((size_t)axis->max_pairs * 2 * sizeof(double));
}

/* Weights of one output pixel, which sum to `sum`, as integers that sum to 2^precision exactly: their running sum is
 * rounded, not each of them. */
static int32_t quantise(const double *weights, ptrdiff_t count, double sum, int16_t *out) {
    double largest = 0.0, total = 0.0;
    for (ptrdiff_t i = 0; i < count; i++) {
        const double size = fabs(weights[i] / sum);
        largest = size > largest ? size : largest;
        total += size;
    }
    int32_t precision = MAX_PRECISION; /* ends above 10, as place_axis() lets no `total` above 10 come here */
    while (largest * (double)(1 << precision) > 32766.0 || total * (double)(1 << precision) > 8e6)
        precision--;
    const double unit = (double)(1 << precision);
    double running = 0.0;
    int32_t before = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        running += weights[i] / sum;
        const int32_t now = i == count - 1 ? 1 << precision : (int32_t)floor(running * unit + 0.5);
        out[i] = (int16_t)(now - before);
        before = now;
    }
    return precision;
}

/* Computes the weights into `memory`, of axis_bytes(); returns the first byte after it. Each output's first pixel is a
 * multiple of `step`, weights of zero filling up. `reverse` makes the output's last pixel first. */
static unsigned char *place_axis(Axis *axis, unsigned char *memory, Filter filter, double low, double high,
                                 ptrdiff_t out, ptrdiff_t step, bool reverse) {
    const size_t per_output = align((size_t)out * sizeof(int32_t));
    axis->start = (int32_t *)memory;
    axis->num_pairs = (int32_t *)(memory += per_output);
    axis->precision = (int32_t *)(memory += per_output);
    axis->weights = (int16_t *)(memory += per_output);
    const size_t num_weights = (size_t)out * (size_t)axis->max_pairs * 2;
    double *exact = (double *)(memory += align(num_weights * sizeof(int16_t)));
    memset(axis->weights, 0, num_weights * sizeof(int16_t));

    double (*const weigh)(double) = FILTERS[filter];
    const double scale = (high - low) / (double)out, support = support_of(filter, scale);
    const double shrink = 1.0 / fmax(scale, 1.0), offset = low - (double)axis->first;
    for (ptrdiff_t i = 0; i < out; i++) {
        const double center = offset + ((double)(reverse ? out - 1 - i : i) + 0.5) * scale;
        const double begin = center - support + 0.5, end = center + support + 0.5;
        ptrdiff_t from = begin < 0 ? 0 : (ptrdiff_t)begin, to = (ptrdiff_t)end;
        to = to > axis->count ? axis->count : to;
        from = from >= to ? to - 1 : from;
        double sum = 0.0, total = 0.0;
        for (ptrdiff_t pixel = from; pixel < to; pixel++) {
            exact[pixel - from] = weigh(((double)pixel - center + 0.5) * shrink);
            sum += exact[pixel - from];
            total += fabs(exact[pixel - from]);
        }
        if (!(sum > 0.1 * total)) { /* not met by these filters; the integers' range rests on it */
            exact[0] = sum = 1.0;
            to = from + 1;
        }
        const ptrdiff_t before = from % step;
        int16_t *weights = axis->weights + i * axis->max_pairs * 2;
        axis->precision[i] = quantise(exact, to - from, sum, weights + before);
        axis->start[i] = (int32_t)(from - before);
        axis->num_pairs[i] = (int32_t)((before + to - from + 1) / 2);
    }
    return memory + align((size_t)axis->max_pairs * 2 * sizeof(double));
}

/* ---- Rows into pairs: staged[pair][channel][slot of the row][2] ---- */

/* Of any strides. A pixel beyond the box has no weight and is left as it is in the last pair: zero. */
static void stage_any(const uint8_t *const rows[ROWS], const Image *image, ptrdiff_t channels, ptrdiff_t count,
                      int16_t *staged) {
    if (count % 2)
        memset(staged + count / 2 * channels * 2 * ROWS, 0, (size_t)channels * 2 * ROWS * sizeof(int16_t));
    for (ptrdiff_t row = 0; row < ROWS; row++) {
        for (ptrdiff_t channel = 0; channel < channels; channel++) {
            const uint8_t *pixel = rows[row] + channel * image->channel_stride;
            int16_t *target = staged + (channel * ROWS + SLOT[row]) * 2;
            for (ptrdiff_t i = 0; i < count; i++, pixel += image->pixel_stride)
                target[(i / 2) * channels * 2 * ROWS + i % 2] = *pixel;
        }
    }
}

#if WITH_AVX2
/* Of RGB or RGBX pixels, 4 at a time. `readable` bytes follow the start of each row, which is where the image's row
 * ends. Writes an even number of pairs. */
AVX2 static void stage_avx2(const uint8_t *const rows[ROWS], ptrdiff_t readable, ptrdiff_t pixel_stride,
                            ptrdiff_t count, int16_t *staged) {
    const char s = (char)pixel_stride;
    const __m128i pair = _mm_setr_epi8(0, -1, s, -1, 1, -1, s + 1, -1, 2, -1, s + 2, -1, -1, -1, -1, -1);
    const __m128i step = _mm_setr_epi8(2 * s, 0, 2 * s, 0, 2 * s, 0, 2 * s, 0, 2 * s, 0, 2 * s, 0, 0, 0, 0, 0);
    const __m256i masks[2] = {_mm256_broadcastsi128_si256(pair), _mm256_broadcastsi128_si256(_mm_add_epi8(pair, step))};
    uint8_t ends[ROWS][16];
    for (ptrdiff_t pixel = 0; pixel < count; pixel += 4) {
        const ptrdiff_t offset = pixel * pixel_stride, left = readable - offset;
        __m256i loaded[8]; /* rows i and i + 8 */
        if (left >= 16) {
            for (int i = 0; i < 8; i++)
                loaded[i] = _mm256_inserti128_si256(
                    _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[i] + offset))),
                    _mm_loadu_si128((const __m128i *)(rows[i + 8] + offset)), 1);
        } else {
            memset(ends, 0, sizeof ends);
            for (int i = 0; i < ROWS; i++)
                memcpy(ends[i], rows[i] + offset, (size_t)left);
            for (int i = 0; i < 8; i++)
                loaded[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)ends[i])),
                                                    _mm_loadu_si128((const __m128i *)ends[i + 8]), 1);
        }
        for (int half = 0; half < 2; half++) {
            for (int group = 0; group < 2; group++) { /* rows 0-3, 8-11, then 4-7, 12-15: a transpose of 4 by 4 */
                const __m256i a = _mm256_shuffle_epi8(loaded[4 * group], masks[half]);
                const __m256i b = _mm256_shuffle_epi8(loaded[4 * group + 1], masks[half]);
                const __m256i c = _mm256_shuffle_epi8(loaded[4 * group + 2], masks[half]);
                const __m256i d = _mm256_shuffle_epi8(loaded[4 * group + 3], masks[half]);
                const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
                const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
                __m256i *target = (__m256i *)staged + group;
                _mm256_storeu_si256(target, _mm256_unpacklo_epi64(ab, cd));
                _mm256_storeu_si256(target + 2, _mm256_unpackhi_epi64(ab, cd));
                _mm256_storeu_si256(target + 4, _mm256_unpacklo_epi64(ab_high, cd_high));
            }
            staged += 3 * 2 * ROWS;
        }
    }
}
#endif

/* ---- Along rows: columns[channel][output pixel][row], the 16 rows in order ---- */

static void resize_rows_portable(const int16_t *staged, const Axis *axis, ptrdiff_t channels, ptrdiff_t width,
                                 ptrdiff_t stride, uint8_t *columns) {
    for (ptrdiff_t x = 0; x < width; x++) {
        const int16_t *weights = axis->weights + x * axis->max_pairs * 2;
        const int32_t precision = axis->precision[x];
        for (ptrdiff_t channel = 0; channel < channels; channel++) {
            const int16_t *pairs = staged + (axis->start[x] / 2 * channels + channel) * 2 * ROWS;
            int32_t sums[ROWS];
            for (int slot = 0; slot < ROWS; slot++)
                sums[slot] = 1 << (precision - 1);
            for (int32_t k = 0; k < axis->num_pairs[x]; k++, pairs += channels * 2 * ROWS)
                for (int slot = 0; slot < ROWS; slot++)
                    sums[slot] += weights[2 * k] * pairs[2 * slot] + weights[2 * k + 1] * pairs[2 * slot + 1];
            uint8_t *out = columns + (channel * stride + x) * ROWS;
            for (int row = 0; row < ROWS; row++) {
                const int32_t value = sums[SLOT[row]] >> precision;
                out[row] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
            }
        }
    }
}

#if WITH_AVX2
AVX2 INLINE void resize_rows_of(const int16_t *staged, const Axis *axis, const int channels, ptrdiff_t width,
                                ptrdiff_t stride, uint8_t *columns) {
    for (ptrdiff_t x = 0; x < width; x++) {
        const int16_t *weights = axis->weights + x * axis->max_pairs * 2;
        const int32_t precision = axis->precision[x];
        const __m256i *pairs = (const __m256i *)(staged + (ptrdiff_t)(axis->start[x] / 2) * channels * 2 * ROWS);
        __m256i sums[6];
        for (int i = 0; i < 2 * channels; i++)
            sums[i] = _mm256_set1_epi32(1 << (precision - 1));
        for (int32_t k = 0; k < axis->num_pairs[x]; k++, pairs += 2 * channels) {
            int32_t two;
            memcpy(&two, weights + 2 * k, sizeof two);
            const __m256i weight = _mm256_set1_epi32(two);
            for (int i = 0; i < 2 * channels; i++)
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_loadu_si256(pairs + i), weight));
        }
        const __m128i shift = _mm_cvtsi32_si128(precision);
        for (int channel = 0; channel < channels; channel++) {
            const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(sums[2 * channel], shift),
                                                     _mm256_sra_epi32(sums[2 * channel + 1], shift));
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
            _mm_storeu_si128((__m128i *)(columns + (channel * stride + x) * ROWS), _mm256_castsi256_si128(bytes));
        }
    }
}

AVX2 static void resize_rows_avx2(const int16_t *staged, const Axis *axis, ptrdiff_t channels, ptrdiff_t width,
                                  ptrdiff_t stride, uint8_t *columns) {
    if (channels == 3)
        resize_rows_of(staged, axis, 3, width, stride, columns);
    else
        resize_rows_of(staged, axis, 1, width, stride, columns);
}
#endif

/* ---- Columns of 16 back to rows; width is a multiple of 16 ---- */

static void to_rows_portable(const uint8_t *columns, ptrdiff_t width, uint8_t *rows, ptrdiff_t stride, int num_rows) {
    for (int row = 0; row < num_rows; row++)
        for (ptrdiff_t x = 0; x < width; x++)
            rows[row * stride + x] = columns[x * ROWS + row];
}

#if WITH_AVX2
AVX2 static void to_rows_avx2(const uint8_t *columns, ptrdiff_t width, uint8_t *rows, ptrdiff_t stride, int num_rows) {
    for (ptrdiff_t x = 0; x < width; x += 16) {
        __m128i a[16], b[16];
        for (int i = 0; i < 16; i++)
            a[i] = _mm_loadu_si128((const __m128i *)(columns + (x + i) * ROWS));
        for (int round = 0; round < 2; round++) { /* interleaving i with i + 8 four times transposes */
            for (int i = 0; i < 8; i++) {
                b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
                b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
            }
            for (int i = 0; i < 8; i++) {
                a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
                a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
            }
        }
        for (int row = 0; row < num_rows; row++)
            _mm_storeu_si128((__m128i *)(rows + row * stride + x), a[row]);
    }
}
#endif

/* ---- Along columns: one row of the crop from rows of `stride` bytes, a multiple of CHUNK ---- */

INLINE void resize_columns_body(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_rows, const int16_t *weights,
                                int32_t num_pairs, int32_t precision, ptrdiff_t width, uint8_t *out) {
    for (ptrdiff_t x = 0; x < width; x += CHUNK) {
        int32_t sums[CHUNK];
        for (int i = 0; i < CHUNK; i++)
            sums[i] = 1 << (precision - 1);
        for (ptrdiff_t k = 0; k < 2 * (ptrdiff_t)num_pairs && k < num_rows; k++)
            for (int i = 0; i < CHUNK; i++)
                sums[i] += weights[k] * rows[k * stride + x + i];
        const ptrdiff_t length = width - x < CHUNK ? width - x : CHUNK;
        for (ptrdiff_t i = 0; i < length; i++) {
            const int32_t value = sums[i] >> precision;
            out[x + i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
        }
    }
}

static void resize_columns_portable(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_rows, const int16_t *weights,
                                    int32_t num_pairs, int32_t precision, ptrdiff_t width, uint8_t *out) {
    resize_columns_body(rows, stride, num_rows, weights, num_pairs, precision, width, out);
}

#if WITH_AVX2
AVX2 static void resize_columns_avx2(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_rows, const int16_t *weights,
                                     int32_t num_pairs, int32_t precision, ptrdiff_t width, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    for (ptrdiff_t x = 0; x < width; x += CHUNK) {
        __m256i sums[4] = {half, half, half, half};
        for (int32_t k = 0; k < num_pairs; k++) {
            const uint8_t *row = rows + 2 * k * stride + x;
            const uint8_t *next = 2 * k + 1 < num_rows ? row + stride : row; /* beyond the last row: no weight */
            const __m256i a = _mm256_loadu_si256((const __m256i *)row), b = _mm256_loadu_si256((const __m256i *)next);
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            int32_t two;
            memcpy(&two, weights + 2 * k, sizeof two);
            const __m256i weight = _mm256_set1_epi32(two);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
        }
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_sra_epi32(sums[i], shift);
        const __m256i bytes =
            _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
        if (width - x >= CHUNK) {
            _mm256_storeu_si256((__m256i *)(out + x), bytes);
        } else {
            uint8_t tail[CHUNK];
            _mm256_storeu_si256((__m256i *)tail, bytes);
            memcpy(out + x, tail, (size_t)(width - x));
        }
    }
}
#endif

/* `channels` (1 or 3) neighbouring channels of the image, from `first_channel`, into planes of the crop. */
static void resample_channels(const Image *image, const Job *job, const Axis *across, const Axis *down,
                              ptrdiff_t first_channel, ptrdiff_t channels, int16_t *staged, uint8_t *columns,
                              uint8_t *narrow, ptrdiff_t stride, bool wide) {
    const uint8_t *origin = image->pixels + down->first * image->row_stride + across->first * image->pixel_stride +
                            first_channel * image->channel_stride;
    for (ptrdiff_t top = 0; top < down->count; top += ROWS) {
        const uint8_t *rows[ROWS];
        for (ptrdiff_t i = 0; i < ROWS; i++) /* a last block is filled up with its last row */
            rows[i] = origin + (top + i < down->count ? top + i : down->count - 1) * image->row_stride;
        const int num_rows = (int)(down->count - top < ROWS ? down->count - top : ROWS);
#if WITH_AVX2
        const bool packed = image->channel_stride == 1 && (image->pixel_stride == 3 || image->pixel_stride == 4);
        if (wide && channels == 3 && packed) {
            const ptrdiff_t readable = (image->width - across->first - 1) * image->pixel_stride + 3;
            stage_avx2(rows, readable, image->pixel_stride, across->count, staged);
        } else
#endif
            stage_any(rows, image, channels, across->count, staged);
        CHOOSE(wide, resize_rows)(staged, across, channels, job->width, stride, columns);
        for (ptrdiff_t channel = 0; channel < channels; channel++)
            CHOOSE(wide, to_rows)
            (columns + channel * stride * ROWS, stride, narrow + (channel * down->count + top) * stride, stride,
             num_rows);
    }
    for (ptrdiff_t channel = 0; channel < channels; channel++) {
        const uint8_t *plane = narrow + channel * down->count * stride;
        uint8_t *out = job->out + (first_channel + channel) * job->height * job->width;
        for (ptrdiff_t y = 0; y < job->height; y++)
            CHOOSE(wide, resize_columns)
            (plane + down->start[y] * stride, stride, down->count - down->start[y],
             down->weights + y * down->max_pairs * 2, down->num_pairs[y], down->precision[y], job->width,
             out + y * job->width);
    }
}

bool resample(const Image *image, const Job *job, Scratch *scratch, bool wide) {
    Axis across = plan_axis(job->filter, job->left, job->right, image->width, job->width);
    Axis down = plan_axis(job->filter, job->top, job->bottom, image->height, job->height);
    const ptrdiff_t together = image->channels == 3 ? 3 : 1;
    const ptrdiff_t stride = (job->width + CHUNK - 1) / CHUNK * CHUNK;
    const size_t num_pairs = ((size_t)across.count + 3) / 4 * 2;
    const size_t staged_bytes = align(num_pairs * (size_t)together * 2 * ROWS * sizeof(int16_t));
    const size_t columns_bytes = align((size_t)together * (size_t)stride * ROWS);
    const size_t narrow_bytes = align((size_t)together * (size_t)down.count * (size_t)stride);
    unsigned char *memory = reserve(scratch, axis_bytes(&across, job->width) + axis_bytes(&down, job->height) +
                                                 staged_bytes + columns_bytes + narrow_bytes);
    if (memory == NULL)
        return false;
    memory = place_axis(&across, memory, job->filter, job->left, job->right, job->width, 2, job->flip);
    memory = place_axis(&down, memory, job->filter, job->top, job->bottom, job->height, 1, false);
    int16_t *staged = (int16_t *)memory;
    uint8_t *columns = memory + staged_bytes, *narrow = columns + columns_bytes;
    memset(columns, 0, columns_bytes); /* the columns beyond the crop's width are carried along */
    for (ptrdiff_t channel = 0; channel < image->channels; channel += together)
        resample_channels(image, job, &across, &down, channel, together, staged, columns, narrow, stride, wide);
    return true;
}
