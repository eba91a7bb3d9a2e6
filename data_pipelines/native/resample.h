/* The two passes of the resize, in both forms. */
#ifndef SELFSIGHT_RESAMPLE_H
#define SELFSIGHT_RESAMPLE_H

#include "weights.h"

#define CHUNK 32 /* rows that pass from the first pass to the second are so many bytes long, or a multiple */

/* One channel, or RGB: the box of an image, or what the first pass made of it. */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t height, width, channels;
    ptrdiff_t row_stride, pixel_stride, channel_stride;
} Region;

/* Along rows, into planes with rows `stride` bytes long, of which the first `width` are the result. */
void resize_rows_portable(const Region *region, const Axis *across, ptrdiff_t width, uint8_t *planes, ptrdiff_t stride);

/* Along columns: `width` bytes of one row, from `num_weights` rows `stride` bytes apart. */
void mix_rows_portable(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights, const int16_t *weights,
                       int32_t precision, ptrdiff_t width, uint8_t *out);

#if WITH_AVX2
/* Of RGB whose pixels lie 3 or 4 bytes apart, in memory of its own, block_bytes(). */
void resize_rows_avx2(const Region *region, const Axis *across, ptrdiff_t width, uint8_t *planes, ptrdiff_t stride,
                      unsigned char *memory);
size_t block_bytes(ptrdiff_t region_width, ptrdiff_t stride);

void mix_rows_avx2(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights, const int16_t *weights,
                   int32_t precision, ptrdiff_t width, uint8_t *out);
#endif

#endif
