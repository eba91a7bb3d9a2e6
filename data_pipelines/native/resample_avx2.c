/* The passes of the resize with AVX2. Rows are resized 16 at a time. Their pixels are first laid out so that one vector
 * holds the same two neighbouring pixels of many rows; a multiply-and-add of pairs then serves all these rows with the
 * weights of one output pixel. */
#include "resample.h"

#include <string.h>

#if WITH_AVX2
#include <immintrin.h>

#define ROWS 16
#define BLOCK (2 * 3 * ROWS) /* numbers that two neighbouring pixels of all rows make */

size_t block_bytes(ptrdiff_t region_width, ptrdiff_t stride) {
    return align(((size_t)region_width + 3) / 4 * 2 * BLOCK * sizeof(int16_t)) + align(3 * (size_t)stride * ROWS);
}

/* Rows to staged[pair of pixels][channel][row][2], rows in the order 0-3, 8-11, 4-7, 12-15, which packing sums to bytes
 * puts right. Takes 4 pixels at a time, and writes zeros or what lies beyond for those that are not there. */
AVX2 static void stage(const uint8_t *const rows[ROWS], ptrdiff_t pixel_stride, ptrdiff_t count, int16_t *staged) {
    const ptrdiff_t readable = (count - 1) * pixel_stride + 3; /* bytes, and not one more */
    const char s = (char)pixel_stride;
    const __m128i pair = _mm_setr_epi8(0, -1, s, -1, 1, -1, s + 1, -1, 2, -1, s + 2, -1, -1, -1, -1, -1);
    const __m128i step = _mm_setr_epi8(2 * s, 0, 2 * s, 0, 2 * s, 0, 2 * s, 0, 2 * s, 0, 2 * s, 0, 0, 0, 0, 0);
    const __m256i masks[2] = {_mm256_broadcastsi128_si256(pair), _mm256_broadcastsi128_si256(_mm_add_epi8(pair, step))};
    uint8_t ends[ROWS][16]; /* the last pixels, with room to read beyond */
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
            for (int group = 0; group < 2; group++) { /* a transpose of 4 by 4 */
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
            staged += BLOCK;
        }
    }
}

/* A staged block to columns[channel][output pixel][row], the rows in order. */
AVX2 static void resize_block(const int16_t *staged, const Axis *axis, ptrdiff_t width, ptrdiff_t stride,
                              uint8_t *columns) {
    for (ptrdiff_t x = 0; x < width; x++) {
        const int16_t *weights = axis->weights + x * axis->max_weights;
        const __m256i *pairs = (const __m256i *)(staged + (ptrdiff_t)(axis->start[x] / 2) * BLOCK);
        __m256i sums[6];
        for (int i = 0; i < 6; i++)
            sums[i] = _mm256_set1_epi32(1 << (axis->precision[x] - 1));
        for (int32_t k = 0; k < axis->num_weights[x]; k += 2, pairs += 6) {
            int32_t two; /* after an odd number comes a zero */
            memcpy(&two, weights + k, sizeof two);
            const __m256i weight = _mm256_set1_epi32(two);
            for (int i = 0; i < 6; i++)
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_loadu_si256(pairs + i), weight));
        }
        const __m128i shift = _mm_cvtsi32_si128(axis->precision[x]);
        for (int channel = 0; channel < 3; channel++) {
            const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(sums[2 * channel], shift),
                                                     _mm256_sra_epi32(sums[2 * channel + 1], shift));
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
            _mm_storeu_si128((__m128i *)(columns + (channel * stride + x) * ROWS), _mm256_castsi256_si128(bytes));
        }
    }
}

/* Columns of 16 back to rows; width is a multiple of 16. */
AVX2 static void to_rows(const uint8_t *columns, ptrdiff_t width, uint8_t *rows, ptrdiff_t stride, int num_rows) {
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

void resize_rows_avx2(const Region *region, const Axis *across, ptrdiff_t width, uint8_t *planes, ptrdiff_t stride,
                      unsigned char *memory) {
    int16_t *staged = (int16_t *)memory;
    uint8_t *columns = memory + align(((size_t)region->width + 3) / 4 * 2 * BLOCK * sizeof(int16_t));
    memset(columns, 0, 3 * (size_t)stride * ROWS); /* those beyond `width` are carried along */
    for (ptrdiff_t top = 0; top < region->height; top += ROWS) {
        const int num_rows = (int)(region->height - top < ROWS ? region->height - top : ROWS);
        const uint8_t *rows[ROWS];
        for (int i = 0; i < ROWS; i++) /* a last block is filled up with its last row */
            rows[i] = region->pixels + (top + (i < num_rows ? i : num_rows - 1)) * region->row_stride;
        stage(rows, region->pixel_stride, region->width, staged);
        resize_block(staged, across, width, stride, columns);
        for (ptrdiff_t channel = 0; channel < 3; channel++)
            to_rows(columns + channel * stride * ROWS, stride, planes + (channel * region->height + top) * stride, stride,
                    num_rows);
    }
}

AVX2 void mix_rows_avx2(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights, const int16_t *weights,
                        int32_t precision, ptrdiff_t width, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    ptrdiff_t x = 0;
    for (; x + CHUNK <= width; x += CHUNK) {
        __m256i sums[4] = {half, half, half, half};
        for (ptrdiff_t k = 0; k < num_weights; k += 2) {
            const uint8_t *row = rows + k * stride + x, *next = k + 1 < num_weights ? row + stride : row;
            const __m256i a = _mm256_loadu_si256((const __m256i *)row), b = _mm256_loadu_si256((const __m256i *)next);
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            int32_t two; /* after an odd number comes a zero */
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
    mix_rows_portable(rows + x, stride, num_weights, weights, precision, width - x, out + x);
}
#endif
