/* The loops of colour.c, 16 pixels at a time with AVX2: the same operations in the same order on eight lanes of 32 bits. */
#include "colour.h"

#if WITH_AVX2
#include <immintrin.h>

#define STEP 16

AVX2 INLINE __m256i load8(const uint8_t *values) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)values));
}

/* Two times eight numbers as bytes, cut to 0 .. 255. */
AVX2 INLINE void store16(uint8_t *values, __m256i first, __m256i second) {
    const __m256i words = _mm256_packs_epi32(first, second);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), order);
    _mm_storeu_si128((__m128i *)values, _mm256_castsi256_si128(bytes));
}

/* Numbers that store16() has yet to cut. */
AVX2 INLINE __m256i blend8(__m256 base, __m256 value, __m256 factor) {
    return _mm256_cvttps_epi32(_mm256_add_ps(base, _mm256_mul_ps(factor, _mm256_sub_ps(value, base))));
}

AVX2 void towards_avx2(uint8_t *values, size_t count, float base, float factor) {
    const __m256 bases = _mm256_set1_ps(base), factors = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + STEP <= count; i += STEP)
        store16(values + i, blend8(bases, _mm256_cvtepi32_ps(load8(values + i)), factors),
                blend8(bases, _mm256_cvtepi32_ps(load8(values + i + 8)), factors));
    towards_portable(values + i, count - i, base, factor);
}

AVX2 void saturate_avx2(PLANES, size_t count, float factor) {
    const __m256 factors = _mm256_set1_ps(factor);
    size_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        __m256i reds[2], greens[2], blues[2];
        for (int half = 0; half < 2; half++) {
            const __m256 r = _mm256_cvtepi32_ps(load8(red + i + 8 * half));
            const __m256 g = _mm256_cvtepi32_ps(load8(green + i + 8 * half));
            const __m256 b = _mm256_cvtepi32_ps(load8(blue + i + 8 * half));
            /* sums below 2^24 are exact in 32-bit floating point */
            __m256 luma = _mm256_add_ps(_mm256_mul_ps(r, _mm256_set1_ps(19595)), _mm256_mul_ps(g, _mm256_set1_ps(38470)));
            luma = _mm256_add_ps(luma, _mm256_mul_ps(b, _mm256_set1_ps(7471)));
            luma = _mm256_mul_ps(_mm256_add_ps(luma, _mm256_set1_ps(32768)), _mm256_set1_ps(1.0f / 65536));
            luma = _mm256_floor_ps(luma);
            reds[half] = blend8(luma, r, factors);
            greens[half] = blend8(luma, g, factors);
            blues[half] = blend8(luma, b, factors);
        }
        store16(red + i, reds[0], reds[1]);
        store16(green + i, greens[0], greens[1]);
        store16(blue + i, blues[0], blues[1]);
    }
    saturate_portable(red + i, green + i, blue + i, count - i, factor);
}

/* One channel of full colour: `lack` tells, of 255, how much of its hue's brightest channel it lacks. */
AVX2 INLINE __m256i channel8(__m256 value, __m256 saturation, __m256i lack) {
    lack = _mm256_min_epi32(_mm256_max_epi32(lack, _mm256_setzero_si256()), _mm256_set1_epi32(255));
    const __m256 rest = _mm256_sub_ps(_mm256_set1_ps(65025), _mm256_mul_ps(saturation, _mm256_cvtepi32_ps(lack)));
    const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(value, rest), _mm256_set1_ps(1.0f / 65025.0f));
    return _mm256_cvttps_epi32(_mm256_add_ps(scaled, _mm256_set1_ps(0.5f)));
}

AVX2 INLINE __m256i distance8(__m256i place, int to) {
    return _mm256_abs_epi32(_mm256_sub_epi32(place, _mm256_set1_epi32(to)));
}

AVX2 void turn_hue_avx2(PLANES, size_t count, int32_t shift) {
    const __m256i one = _mm256_set1_epi32(1), all = _mm256_set1_epi32(255);
    size_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        __m256i reds[2], greens[2], blues[2];
        for (int half = 0; half < 2; half++) {
            const __m256i r = load8(red + i + 8 * half), g = load8(green + i + 8 * half), b = load8(blue + i + 8 * half);
            const __m256i high = _mm256_max_epi32(_mm256_max_epi32(r, g), b);
            const __m256i spread = _mm256_sub_epi32(high, _mm256_min_epi32(_mm256_min_epi32(r, g), b));
            const __m256i is_red = _mm256_cmpeq_epi32(r, high), is_green = _mm256_cmpeq_epi32(g, high);

            __m256i difference = _mm256_blendv_epi8(_mm256_sub_epi32(r, g), _mm256_sub_epi32(b, r), is_green);
            difference = _mm256_blendv_epi8(difference, _mm256_sub_epi32(g, b), is_red);
            __m256i sixths = _mm256_blendv_epi8(_mm256_set1_epi32(4), _mm256_set1_epi32(2), is_green);
            sixths = _mm256_andnot_si256(is_red, sixths);
            const __m256 part =
                _mm256_div_ps(_mm256_cvtepi32_ps(difference), _mm256_cvtepi32_ps(_mm256_max_epi32(spread, one)));
            __m256 turned = _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(sixths), part), _mm256_set1_ps(42.5f));
            const __m256 negative = _mm256_cmp_ps(turned, _mm256_setzero_ps(), _CMP_LT_OQ);
            turned = _mm256_add_ps(turned, _mm256_and_ps(negative, _mm256_set1_ps(255.0f)));
            const __m256i hue =
                _mm256_and_si256(_mm256_add_epi32(_mm256_cvttps_epi32(turned), _mm256_set1_epi32(shift)), all);
            const __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(255.0f), _mm256_cvtepi32_ps(spread));
            const __m256 saturation = _mm256_floor_ps(
                _mm256_div_ps(scaled, _mm256_cvtepi32_ps(_mm256_max_epi32(high, one))));

            const __m256i place = _mm256_add_epi32(_mm256_slli_epi32(hue, 2), _mm256_slli_epi32(hue, 1));
            const __m256 value = _mm256_cvtepi32_ps(high);
            reds[half] =
                channel8(value, saturation, _mm256_sub_epi32(_mm256_set1_epi32(510), distance8(place, 765)));
            greens[half] = channel8(value, saturation, _mm256_sub_epi32(distance8(place, 510), all));
            blues[half] = channel8(value, saturation, _mm256_sub_epi32(distance8(place, 1020), all));
        }
        store16(red + i, reds[0], reds[1]);
        store16(green + i, greens[0], greens[1]);
        store16(blue + i, blues[0], blues[1]);
    }
    turn_hue_portable(red + i, green + i, blue + i, count - i, shift);
}

AVX2 uint32_t sum_luma_avx2(const uint8_t *red, const uint8_t *green, const uint8_t *blue, size_t count) {
    /* green's weight does not fit into 16 bits: half of it goes with red, half with blue */
    const __m256i red_green = _mm256_set1_epi32(19235 << 16 | 19595), blue_green = _mm256_set1_epi32(19235 << 16 | 7471);
    const __m256i half = _mm256_set1_epi32(32768);
    __m256i sums = _mm256_setzero_si256();
    size_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        const __m256i r = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(red + i)));
        const __m256i g = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(green + i)));
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(blue + i)));
        const __m256i low = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpacklo_epi16(r, g), red_green),
                                             _mm256_madd_epi16(_mm256_unpacklo_epi16(b, g), blue_green));
        const __m256i high = _mm256_add_epi32(_mm256_madd_epi16(_mm256_unpackhi_epi16(r, g), red_green),
                                              _mm256_madd_epi16(_mm256_unpackhi_epi16(b, g), blue_green));
        sums = _mm256_add_epi32(sums, _mm256_srli_epi32(_mm256_add_epi32(low, half), 16));
        sums = _mm256_add_epi32(sums, _mm256_srli_epi32(_mm256_add_epi32(high, half), 16));
    }
    uint32_t lanes[8], sum = sum_luma_portable(red + i, green + i, blue + i, count - i);
    _mm256_storeu_si256((__m256i *)lanes, sums);
    for (int lane = 0; lane < 8; lane++)
        sum += lanes[lane];
    return sum;
}
#endif
