/* The Gaussian blur of Pillow, to the bit: three passes of a box whose ends count in part (Gwosdek et al. 2011,
 * "Theoretical foundations of Gaussian convolution by extended box filtering"), along rows, then along columns, each
 * pass rounded to 8 bits, the pixels at the border repeated beyond it. */
#include "kernel.h"

#include <math.h>
#include <string.h>
#if WITH_AVX2
#include <immintrin.h>
#endif

#define PASSES 3
#define STRIP 32 /* px of a row that go through the passes along columns together */

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

/* One pass over `count` neighbouring lines, or along one line, where a box has one or three whole pixels: `far` are
 * those beyond them. */
INLINE void small_box_body(const uint16_t *near_left, const uint16_t *middle, const uint16_t *near_right,
                           const uint16_t *far_left, const uint16_t *far_right, bool three, Box box, ptrdiff_t count,
                           uint16_t *out) {
    for (ptrdiff_t i = 0; i < count; i++) {
        const uint32_t near = three ? (uint32_t)near_left[i] + middle[i] + near_right[i] : middle[i];
        const uint32_t far = (uint32_t)far_left[i] + far_right[i];
        out[i] = (uint16_t)((near * box.whole + far * box.part + (1u << 23)) >> 24);
    }
}

static void small_box_portable(const uint16_t *near_left, const uint16_t *middle, const uint16_t *near_right,
                               const uint16_t *far_left, const uint16_t *far_right, bool three, Box box,
                               ptrdiff_t count, uint16_t *out) {
    small_box_body(near_left, middle, near_right, far_left, far_right, three, box, count, out);
}

#if WITH_AVX2
/* The product with 24-bit weights from two with 12 bits, modulo 2^32 as above. */
AVX2 static void small_box_avx2(const uint16_t *near_left, const uint16_t *middle, const uint16_t *near_right,
                                const uint16_t *far_left, const uint16_t *far_right, bool three, Box box,
                                ptrdiff_t count, uint16_t *out) {
    const __m256i high = _mm256_set1_epi32((int)((box.part >> 12) << 16 | box.whole >> 12));
    const __m256i low = _mm256_set1_epi32((int)((box.part & 4095) << 16 | (box.whole & 4095)));
    const __m256i half = _mm256_set1_epi32(1 << 23);
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256i near = _mm256_loadu_si256((const __m256i *)(middle + i));
        if (three) {
            near = _mm256_add_epi16(near, _mm256_loadu_si256((const __m256i *)(near_left + i)));
            near = _mm256_add_epi16(near, _mm256_loadu_si256((const __m256i *)(near_right + i)));
        }
        const __m256i far = _mm256_add_epi16(_mm256_loadu_si256((const __m256i *)(far_left + i)),
                                             _mm256_loadu_si256((const __m256i *)(far_right + i)));
        __m256i sums[2] = {_mm256_unpacklo_epi16(near, far), _mm256_unpackhi_epi16(near, far)};
        for (int j = 0; j < 2; j++) {
            const __m256i upper = _mm256_slli_epi32(_mm256_madd_epi16(sums[j], high), 12);
            const __m256i lower = _mm256_add_epi32(_mm256_madd_epi16(sums[j], low), half);
            sums[j] = _mm256_srli_epi32(_mm256_add_epi32(upper, lower), 24);
        }
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_packs_epi32(sums[0], sums[1]));
    }
    small_box_body(near_left + i, middle + i, near_right + i, far_left + i, far_right + i, three, box, count - i,
                   out + i);
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

/* All passes over one row; `lines` are two of width + 4 with room for two pixels before and behind. */
static void blur_row(uint8_t *row, ptrdiff_t width, Box box, uint16_t *const lines[2], bool wide) {
    for (ptrdiff_t x = 0; x < width; x++)
        lines[0][x + 2] = row[x];
    for (int pass = 0; pass < PASSES; pass++) {
        uint16_t *in = lines[pass % 2] + 2, *out = lines[(pass + 1) % 2] + 2;
        if (box.radius > 1) {
            any_box(in, width, 1, box, out);
            continue;
        }
        in[-2] = in[-1] = in[0];
        in[width] = in[width + 1] = in[width - 1];
        const ptrdiff_t far = box.radius + 1;
        CHOOSE(wide, small_box)(in - 1, in, in + 1, in - far, in + far, box.radius == 1, box, width, out);
    }
    for (ptrdiff_t x = 0; x < width; x++)
        row[x] = (uint8_t)lines[PASSES % 2][x + 2];
}

/* All passes over a strip of `width` <= STRIP columns; `strips` are two of (height, STRIP). */
static void blur_columns(uint8_t *plane, ptrdiff_t height, ptrdiff_t stride, ptrdiff_t width, Box box,
                         uint16_t *const strips[2], bool wide) {
    for (ptrdiff_t y = 0; y < height; y++)
        for (ptrdiff_t x = 0; x < width; x++)
            strips[0][y * STRIP + x] = plane[y * stride + x];
    for (int pass = 0; pass < PASSES; pass++) {
        const uint16_t *in = strips[pass % 2];
        uint16_t *out = strips[(pass + 1) % 2];
        if (box.radius > 1) {
            for (ptrdiff_t x = 0; x < width; x++)
                any_box(in + x, height, STRIP, box, out + x);
            continue;
        }
        for (ptrdiff_t y = 0; y < height; y++) {
#define ROW(i) (in + ((i) < 0 ? 0 : (i) >= height ? height - 1 : (i)) * STRIP)
            const ptrdiff_t far = box.radius + 1;
            CHOOSE(wide, small_box)
            (ROW(y - 1), ROW(y), ROW(y + 1), ROW(y - far), ROW(y + far), box.radius == 1, box, width, out + y * STRIP);
#undef ROW
        }
    }
    for (ptrdiff_t y = 0; y < height; y++)
        for (ptrdiff_t x = 0; x < width; x++)
            plane[y * stride + x] = (uint8_t)strips[PASSES % 2][y * STRIP + x];
}

bool blur(uint8_t *planes, ptrdiff_t channels, ptrdiff_t height, ptrdiff_t width, double radius, Scratch *scratch,
          bool wide) {
    const Box box = box_of(radius);
    const size_t line = (size_t)width + 4, strip = (size_t)height * STRIP;
    const size_t length = line > strip ? line : strip;
    uint16_t *memory = reserve(scratch, 2 * length * sizeof(uint16_t));
    if (memory == NULL)
        return false;
    uint16_t *const lines[2] = {memory, memory + length};
    for (ptrdiff_t channel = 0; channel < channels; channel++) {
        uint8_t *plane = planes + channel * height * width;
        for (ptrdiff_t y = 0; y < height; y++)
            blur_row(plane + y * width, width, box, lines, wide);
        for (ptrdiff_t x = 0; x < width; x += STRIP)
            blur_columns(plane + x, height, width, width - x < STRIP ? width - x : STRIP, box, lines, wide);
    }
    return true;
}
