/* The antialiased resize, as Pillow defines it: a filter that widens with the shrinking, along rows and along columns,
 * rounded to 8 bits between. Rows come first, but where the height shrinks by more than twice the pixels of the width
 * (Pillow 13's rule; the second pass has less to do).
 *
 * Rows are resized 16 at a time. Their pixels are first laid out so that one vector holds the same two neighbouring
 * pixels of many rows; a multiply-and-add of pairs then serves all these rows with the weights of one output pixel.
 */
#include "weights.h"

#include <math.h>
#include <string.h>
#if WITH_AVX2
#include <immintrin.h>
#endif

#define ROWS 16
#define CHUNK 32 /* bytes of a row that the pass along columns makes at a time */

/* Where row r of a block lies in a vector, so that packing sums to bytes brings them into order. */
static const uint8_t SLOT[ROWS] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};

/* ---- Rows into pairs: staged[pair][channel][slot of the row][2] ---- */

/* Of any strides. A pixel beyond the box has no weight and is left as it is in the last pair: zero. */
static void stage_any(const uint8_t *const rows[ROWS], ptrdiff_t pixel_stride, ptrdiff_t channel_stride,
                      ptrdiff_t channels, ptrdiff_t count, int16_t *staged) {
    if (count % 2)
        memset(staged + count / 2 * channels * 2 * ROWS, 0, (size_t)channels * 2 * ROWS * sizeof(int16_t));
    for (ptrdiff_t row = 0; row < ROWS; row++) {
        for (ptrdiff_t channel = 0; channel < channels; channel++) {
            const uint8_t *pixel = rows[row] + channel * channel_stride;
            int16_t *target = staged + (channel * ROWS + SLOT[row]) * 2;
            for (ptrdiff_t i = 0; i < count; i++, pixel += pixel_stride)
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

static void resize_block_portable(const int16_t *staged, const Axis *axis, ptrdiff_t channels, ptrdiff_t width,
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
AVX2 INLINE void resize_block_of(const int16_t *staged, const Axis *axis, const int channels, ptrdiff_t width,
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

AVX2 static void resize_block_avx2(const int16_t *staged, const Axis *axis, ptrdiff_t channels, ptrdiff_t width,
                                  ptrdiff_t stride, uint8_t *columns) {
    if (channels == 3)
        resize_block_of(staged, axis, 3, width, stride, columns);
    else
        resize_block_of(staged, axis, 1, width, stride, columns);
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

/* ---- Along columns: `width` bytes of one row, from rows `stride` bytes apart ---- */

INLINE void resize_chunk(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights, const int16_t *weights,
                         int32_t precision, const ptrdiff_t length, uint8_t *out) {
    int32_t sums[CHUNK];
    for (ptrdiff_t i = 0; i < length; i++)
        sums[i] = 1 << (precision - 1);
    for (ptrdiff_t k = 0; k < num_weights; k++)
        for (ptrdiff_t i = 0; i < length; i++)
            sums[i] += weights[k] * rows[k * stride + i];
    for (ptrdiff_t i = 0; i < length; i++) {
        const int32_t value = sums[i] >> precision;
        out[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

static void mix_rows_portable(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights,
                                    const int16_t *weights, int32_t precision, ptrdiff_t width, uint8_t *out) {
    ptrdiff_t x = 0;
    for (; x + CHUNK <= width; x += CHUNK)
        resize_chunk(rows + x, stride, num_weights, weights, precision, CHUNK, out + x);
    resize_chunk(rows + x, stride, num_weights, weights, precision, width - x, out + x);
}

#if WITH_AVX2
AVX2 static void mix_rows_avx2(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights,
                                     const int16_t *weights, int32_t precision, ptrdiff_t width, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    ptrdiff_t x = 0;
    for (; x + CHUNK <= width; x += CHUNK) {
        __m256i sums[4] = {half, half, half, half};
        for (ptrdiff_t k = 0; k < num_weights; k += 2) {
            const uint8_t *row = rows + k * stride + x, *next = k + 1 < num_weights ? row + stride : row;
            const __m256i a = _mm256_loadu_si256((const __m256i *)row), b = _mm256_loadu_si256((const __m256i *)next);
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            int32_t two; /* the second is zero where `next` is no further row */
            memcpy(&two, weights + k, sizeof two);
            const __m256i weight = _mm256_set1_epi32(two);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
        }
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_sra_epi32(sums[i], shift);
        _mm256_storeu_si256(
            (__m256i *)(out + x),
            _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3])));
    }
    resize_chunk(rows + x, stride, num_weights, weights, precision, width - x, out + x);
}
#endif

/* ---- Both ---- */

/* One channel, or RGB: the box of an image, or what the first pass made of it. */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t height, width, channels;
    ptrdiff_t row_stride, pixel_stride, channel_stride;
} Region;

/* Whether all bytes from a row's first pixel to its last may be read as one run, little more than its pixels. */
static bool is_run(const Region *region) {
    return region->channels == 1 ? region->pixel_stride == 1
                                 : region->channel_stride == 1 && (region->pixel_stride == 3 || region->pixel_stride == 4);
}

static ptrdiff_t bytes_of_run(const Region *region) {
    return (region->width - 1) * region->pixel_stride + region->channels;
}

/* Rows of `region` into planes of rows `stride` bytes long, a multiple of CHUNK. */
static void resize_rows(const Region *region, const Axis *across, ptrdiff_t width, int16_t *staged, uint8_t *columns,
                        uint8_t *planes, ptrdiff_t stride, bool wide) {
    const ptrdiff_t channels = region->channels;
    for (ptrdiff_t top = 0; top < region->height; top += ROWS) {
        const int num_rows = (int)(region->height - top < ROWS ? region->height - top : ROWS);
        const uint8_t *rows[ROWS];
        for (int i = 0; i < ROWS; i++) /* a last block is filled up with its last row */
            rows[i] = region->pixels + (top + (i < num_rows ? i : num_rows - 1)) * region->row_stride;
#if WITH_AVX2
        if (wide && channels == 3 && is_run(region))
            stage_avx2(rows, bytes_of_run(region), region->pixel_stride, region->width, staged);
        else
#endif
            stage_any(rows, region->pixel_stride, region->channel_stride, channels, region->width, staged);
        CHOOSE(wide, resize_block)(staged, across, channels, width, stride, columns);
        for (ptrdiff_t channel = 0; channel < channels; channel++)
            CHOOSE(wide, to_rows)(columns + channel * stride * ROWS, stride,
                                  planes + (channel * region->height + top) * stride, stride, num_rows);
    }
}

/* `width` bytes of each of `height` rows. */
static void resize_columns(const uint8_t *rows, ptrdiff_t stride, const Axis *down, ptrdiff_t height, ptrdiff_t width,
                           uint8_t *out, ptrdiff_t out_stride, bool wide) {
    for (ptrdiff_t y = 0; y < height; y++) {
        const ptrdiff_t left = down->count - down->start[y], num_weights = 2 * (ptrdiff_t)down->num_pairs[y];
        CHOOSE(wide, mix_rows)(rows + down->start[y] * stride, stride, num_weights < left ? num_weights : left,
                               down->weights + y * down->max_pairs * 2, down->precision[y], width, out + y * out_stride);
    }
}

/* The same pixels, one after the other in `packed`. */
static Region pack(const Region *from, uint8_t *packed) {
    Region to = *from;
    to.pixels = packed;
    to.channel_stride = 1;
    to.pixel_stride = from->channels;
    to.row_stride = from->channels * from->width;
    for (ptrdiff_t y = 0; y < from->height; y++)
        for (ptrdiff_t x = 0; x < from->width; x++)
            for (ptrdiff_t channel = 0; channel < from->channels; channel++)
                packed[y * to.row_stride + x * to.pixel_stride + channel] =
                    from->pixels[y * from->row_stride + x * from->pixel_stride + channel * from->channel_stride];
    return to;
}

bool resample(const Image *image, const Job *job, Scratch *scratch, bool wide) {
    Axis across = plan_axis(job->filter, job->left, job->right, image->width, job->width);
    Axis down = plan_axis(job->filter, job->top, job->bottom, image->height, job->height);
    const double narrower = job->right - job->left - (double)job->width;
    const bool columns_first = job->bottom - job->top - (double)job->height > 2.0 * fmax(narrower, 0.0);

    const ptrdiff_t together = image->channels == 3 ? 3 : 1; /* the channels of other images one by one */
    const ptrdiff_t stride = (job->width + CHUNK - 1) / CHUNK * CHUNK;
    const size_t height = (size_t)(columns_first ? job->height : down.count), pixels = (size_t)(down.count * across.count);
    const size_t staged_bytes = align(((size_t)across.count + 3) / 4 * 2 * (size_t)together * 2 * ROWS * sizeof(int16_t));
    const size_t columns_bytes = align((size_t)(together * stride) * ROWS);
    const size_t planes_bytes = align((size_t)(together * stride) * height);
    const size_t short_bytes = columns_first ? align((size_t)across.count * 4 * height) : 0;
    const size_t packed_bytes = columns_first ? align(pixels * (size_t)together) : 0;
    unsigned char *memory = reserve(scratch, axis_bytes(&across, job->width) + axis_bytes(&down, job->height) +
                                                 staged_bytes + columns_bytes + planes_bytes + short_bytes + packed_bytes);
    if (memory == NULL)
        return false;
    memory = place_axis(&across, memory, job->filter, job->left, job->right, job->width, 2, job->flip);
    memory = place_axis(&down, memory, job->filter, job->top, job->bottom, job->height, 1, false);
    int16_t *staged = (int16_t *)memory;
    uint8_t *columns = memory + staged_bytes, *planes = columns + columns_bytes;
    uint8_t *shortened = planes + planes_bytes, *packed = shortened + short_bytes;
    memset(columns, 0, columns_bytes); /* those beyond the crop's width are carried along */

    for (ptrdiff_t channel = 0; channel < image->channels; channel += together) {
        Region region = {image->pixels + down.first * image->row_stride + across.first * image->pixel_stride +
                             channel * image->channel_stride,
                         down.count, across.count, together, image->row_stride, image->pixel_stride, image->channel_stride};
        uint8_t *out = job->out + channel * job->height * job->width;
        if (columns_first) {
            if (!is_run(&region))
                region = pack(&region, packed);
            const ptrdiff_t bytes = bytes_of_run(&region);
            resize_columns(region.pixels, region.row_stride, &down, job->height, bytes, shortened, bytes, wide);
            region.pixels = shortened;
            region.row_stride = bytes;
            region.height = job->height;
        }
        resize_rows(&region, &across, job->width, staged, columns, planes, stride, wide);
        if (columns_first)
            for (ptrdiff_t row = 0; row < together * job->height; row++)
                memcpy(out + row * job->width, planes + row * stride, (size_t)job->width);
        else
            for (ptrdiff_t plane = 0; plane < together; plane++)
                resize_columns(planes + plane * down.count * stride, stride, &down, job->height, job->width,
                               out + plane * job->height * job->width, job->width, wide);
    }
    return true;
}
