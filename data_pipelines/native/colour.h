/* The loops of the colour operations, in both forms. */
#ifndef SELFSIGHT_COLOUR_H
#define SELFSIGHT_COLOUR_H

#include "kernel.h"

#define PLANES uint8_t *restrict red, uint8_t *restrict green, uint8_t *restrict blue

/* All values towards `base` (factor 0), or away from it (above 1). */
void towards_portable(uint8_t *values, size_t count, float base, float factor);
/* The same towards each pixel's luma. */
void saturate_portable(PLANES, size_t count, float factor);
/* Hue turned by `shift` of 256, in 8-bit hue, saturation and value. */
void turn_hue_portable(PLANES, size_t count, int32_t shift);
/* The sum over at most 2^16 pixels. */
uint32_t sum_luma_portable(const uint8_t *red, const uint8_t *green, const uint8_t *blue, size_t count);

#if WITH_AVX2
void towards_avx2(uint8_t *values, size_t count, float base, float factor);
void saturate_avx2(PLANES, size_t count, float factor);
void turn_hue_avx2(PLANES, size_t count, int32_t shift);
uint32_t sum_luma_avx2(const uint8_t *red, const uint8_t *green, const uint8_t *blue, size_t count);
#endif

#endif
