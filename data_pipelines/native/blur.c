/* The Gaussian blur of Pillow, to the bit: three passes of a box whose ends count in part (Gwosdek et al. 2011,
 * "Theoretical foundations of Gaussian convolution by extended box filtering"), along rows, then along columns, each
 * pass rounded to 8 bits, the pixels at the border repeated beyond it. Between the passes values are 16-bit integers. */
#include "kernel.h"

#include <math.h>
#if WITH_AVX2
#include <immintrin.h>
#endif

#define PASSES 3

/* 2 * radius + 1 whole pixels, one more at each end in part; weights with 24 binary places. */
typedef struct {
    ptrdiff_t radius;
    uint32_t whole, part;
} Box;

static Box box_of(double deviation) {
    const float sigma = (float)deviation, variance = sigma * sigma / PASSES;
    const float length = sqrtf((float)(12.0 * variance + 1.0));
    const float whole = floorf((float)((length - 1.0) / 2.0));
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    const float radius = whole + part;
    Box box = {.radius = (ptrdiff_t)radius};
    box.whole = (uint32_t)((float)(1 << 24) / (radius * 2 + 1));
    box.part = ((1u << 24) - (uint32_t)(box.radius * 2 + 1) * box.whole) / 2;
    return box;
}

/* Five neighbours of every one of `count` values: of a row shifted, or of five rows. */
typedef struct {
    const uint16_t *far_left, *left, *middle, *right, *far_right;
} Five;

/* One pass where a box has one whole pixel, or three; `far_left` and `far_right` are those beyond them. */
static void small_box_portable(const Five *at, const Box *box, ptrdiff_t count, uint16_t *out) {
    const bool three = box->radius == 1;
    for (ptrdiff_t i = 0; i < count; i++) {
        const uint32_t whole = three ? (uint32_t)at->left[i] + at->middle[i] + at->right[i] : at->middle[i];
        const uint32_t part = (uint32_t)at->far_left[i] + at->far_right[i];
        out[i] = (uint16_t)((whole * box->whole + part * box->part + (1u << 23)) >> 24);
    }
}

#if WITH_AVX2
/* The product with 24-bit weights from two with 12 bits, modulo 2^32 as above. */
AVX2 static void small_box_avx2(const Five *at, const Box *box, ptrdiff_t count, uint16_t *out) {
    const bool three = box->radius == 1;
    const __m256i high = _mm256_set1_epi32((int)((box->part >> 12) << 16 | box->whole >> 12));
    const __m256i low = _mm256_set1_epi32((int)((box->part & 4095) << 16 | (box->whole & 4095)));
    const __m256i half = _mm256_set1_epi32(1 << 23);
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256i whole = _mm256_loadu_si256((const __m256i *)(at->middle + i));
        if (three) {
            whole = _mm256_add_epi16(whole, _mm256_loadu_si256((const __m256i *)(at->left + i)));
            whole = _mm256_add_epi16(whole, _mm256_loadu_si256((const __m256i *)(at->right + i)));
        }
        const __m256i part = _mm256_add_epi16(_mm256_loadu_si256((const __m256i *)(at->far_left + i)),
                                              _mm256_loadu_si256((const __m256i *)(at->far_right + i)));
        __m256i sums[2] = {_mm256_unpacklo_epi16(whole, part), _mm256_unpackhi_epi16(whole, part)};
        for (int j = 0; j < 2; j++) {
            const __m256i upper = _mm256_slli_epi32(_mm256_madd_epi16(sums[j], high), 12);
            const __m256i lower = _mm256_add_epi32(_mm256_madd_epi16(sums[j], low), half);
            sums[j] = _mm256_srli_epi32(_mm256_add_epi32(upper, lower), 24);
        }
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_packs_epi32(sums[0], sums[1]));
    }
    const Five rest = {at->far_left + i, at->left + i, at->middle + i, at->right + i, at->far_right + i};
    small_box_portable(&rest, box, count - i, out + i);
}
#endif

/* One pass of any box along a line; `in` and `out` are `step` apart from pixel to pixel. */
static void any_box(const uint16_t *in, ptrdiff_t length, ptrdiff_t step, Box box, uint16_t *out) {
    const ptrdiff_t last = length - 1;
#define AT(i) in[((i) < 0 ? 0 : (i) > last ? last : (i)) * step]
    uint32_t near = 0;
    for (ptrdiff_t i = -box.radius; i <= box.radius; i++)
        near += AT(i);
    for (ptrdiff_t i = 0; i < length; i++) {
        const uint32_t far = (uint32_t)AT(i - box.radius - 1) + AT(i + box.radius + 1);
        out[i * step] = (uint16_t)((near * box.whole + far * box.part + (1u << 23)) >> 24);
        near += (uint32_t)AT(i + box.radius + 1) - AT(i - box.radius);
    }
#undef AT
}

INLINE void widen_body(const uint8_t *restrict from, ptrdiff_t count, uint16_t *restrict to) {
    for (ptrdiff_t i = 0; i < count; i++)
        to[i] = from[i];
}
TWO_FORMS(widen, (const uint8_t *restrict from, ptrdiff_t count, uint16_t *restrict to), from, count, to)

INLINE void narrow_body(const uint16_t *restrict from, ptrdiff_t count, uint8_t *restrict to) {
    for (ptrdiff_t i = 0; i < count; i++)
        to[i] = (uint8_t)from[i];
}
TWO_FORMS(narrow, (const uint16_t *restrict from, ptrdiff_t count, uint8_t *restrict to), from, count, to)

/* All passes over one row into `out`; `lines` are two with MARGIN pixels of room before and behind. */
#define MARGIN 2
static void blur_row(const uint8_t *row, ptrdiff_t width, Box box, uint16_t *const lines[2], uint16_t *out, bool wide) {
    CHOOSE(wide, widen)(row, width, lines[0] + MARGIN);
    for (int pass = 0; pass < PASSES; pass++) {
        uint16_t *in = lines[pass % 2] + MARGIN, *to = pass == PASSES - 1 ? out : lines[(pass + 1) % 2] + MARGIN;
        if (box.radius > 1) {
            any_box(in, width, 1, box, to);
            continue;
        }
        in[-2] = in[-1] = in[0];
        in[width] = in[width + 1] = in[width - 1];
        const ptrdiff_t far = box.radius + 1;
        const Five shifted = {in - far, in - 1, in, in + 1, in + far};
        CHOOSE(wide, small_box)(&shifted, &box, width, to);
    }
}

/* One pass over all columns. */
static void blur_columns(const uint16_t *in, ptrdiff_t height, ptrdiff_t width, Box box, uint16_t *out, bool wide) {
    if (box.radius > 1) {
        for (ptrdiff_t x = 0; x < width; x++)
            any_box(in + x, height, width, box, out + x);
        return;
    }
    const ptrdiff_t far = box.radius + 1, last = height - 1;
    for (ptrdiff_t y = 0; y < height; y++) {
        const Five rows = {in + (y > far ? y - far : 0) * width, in + (y > 1 ? y - 1 : 0) * width, in + y * width,
                           in + (y < last ? y + 1 : last) * width, in + (y < last - far ? y + far : last) * width};
        CHOOSE(wide, small_box)(&rows, &box, width, out + y * width);
    }
}

bool blur(uint8_t *planes, ptrdiff_t channels, ptrdiff_t height, ptrdiff_t width, double radius, Scratch *scratch,
          bool wide) {
    const Box box = box_of(radius);
    const ptrdiff_t line = width + 2 * MARGIN, plane = height * width;
    uint16_t *memory = reserve(scratch, 2 * (size_t)(line + plane) * sizeof(uint16_t));
    if (memory == NULL)
        return false;
    uint16_t *const lines[2] = {memory, memory + line};
    uint16_t *const whole[2] = {memory + 2 * line, memory + 2 * line + plane};
    for (ptrdiff_t channel = 0; channel < channels; channel++, planes += plane) {
        for (ptrdiff_t y = 0; y < height; y++)
            blur_row(planes + y * width, width, box, lines, whole[0] + y * width, wide);
        for (int pass = 0; pass < PASSES; pass++)
            blur_columns(whole[pass % 2], height, width, box, whole[(pass + 1) % 2], wide);
        CHOOSE(wide, narrow)(whole[PASSES % 2], plane, planes);
    }
    return true;
}
