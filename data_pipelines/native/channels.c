/* The antialiased resize of images of any number of channels, 8 or 16 bits, in single precision: along rows, then along
 * columns, rounded once at the end. Pillow's own resize of such images sums in double precision, so that one level in a
 * few thousand pixels differs.
 *
 * Channels are laid out in groups that fill vectors, so that all loops run over numbers that lie side by side; each sum
 * adds the same numbers in the same order in both forms. */
#include "weights.h"

#include <math.h>
#include <string.h>

#define GROUP 8 /* channels that are summed together */

typedef struct {
    ptrdiff_t channels, padded; /* numbers of a pixel, and those with the zeros behind them */
} Pixel;

/* A row of `count` pixels as floats. */
INLINE void widen_row_body(const unsigned char *row, Kind kind, ptrdiff_t pixel_stride, ptrdiff_t count, Pixel pixel,
                           float *restrict out) {
    for (ptrdiff_t x = 0; x < count; x++, row += pixel_stride, out += pixel.padded) {
        if (kind == BYTES) {
            for (ptrdiff_t c = 0; c < pixel.channels; c++)
                out[c] = (float)row[c];
        } else {
            const uint16_t *words = (const uint16_t *)row;
            for (ptrdiff_t c = 0; c < pixel.channels; c++)
                out[c] = (float)words[c];
        }
    }
}
TWO_FORMS(widen_row,
          (const unsigned char *row, Kind kind, ptrdiff_t pixel_stride, ptrdiff_t count, Pixel pixel, float *restrict out),
          row, kind, pixel_stride, count, pixel, out)

INLINE void sum_group(const float *pixels, ptrdiff_t padded, ptrdiff_t count, const float *weights, const ptrdiff_t width,
                      float *restrict out) {
    float sums[GROUP] = {0};
    for (ptrdiff_t k = 0; k < count; k++)
        for (ptrdiff_t c = 0; c < width; c++)
            sums[c] += weights[k] * pixels[k * padded + c];
    for (ptrdiff_t c = 0; c < width; c++)
        out[c] = sums[c];
}

/* One row of pixels to one of `width` pixels. */
INLINE void shrink_row_body(const float *restrict row, const Axis *across, ptrdiff_t width, ptrdiff_t padded,
                            float *restrict out) {
    for (ptrdiff_t x = 0; x < width; x++, out += padded) {
        const float *pixels = row + across->start[x] * padded, *weights = across->float_weights + x * across->max_weights;
        const ptrdiff_t count = across->num_weights[x];
        if (padded == 1)
            sum_group(pixels, 1, count, weights, 1, out);
        else if (padded == 4)
            sum_group(pixels, 4, count, weights, 4, out);
        else
            for (ptrdiff_t c = 0; c < padded; c += GROUP)
                sum_group(pixels + c, padded, count, weights, GROUP, out + c);
    }
}
TWO_FORMS(shrink_row,
          (const float *restrict row, const Axis *across, ptrdiff_t width, ptrdiff_t padded, float *restrict out), row,
          across, width, padded, out)

/* `count` numbers of one row from rows that lie `stride` numbers apart, cut to 0 .. `full`. */
#define CHUNK 32
INLINE void mix_floats_body(const float *restrict rows, ptrdiff_t stride, ptrdiff_t num_weights,
                            const float *restrict weights, ptrdiff_t count, float full, float *restrict out) {
    ptrdiff_t i = 0;
    for (; i + CHUNK <= count; i += CHUNK) {
        float sums[CHUNK] = {0};
        for (ptrdiff_t k = 0; k < num_weights; k++)
            for (ptrdiff_t j = 0; j < CHUNK; j++)
                sums[j] += weights[k] * rows[k * stride + i + j];
        for (ptrdiff_t j = 0; j < CHUNK; j++) {
            const float low = sums[j] > 0.0f ? sums[j] : 0.0f;
            out[i + j] = low < full ? low : full;
        }
    }
    for (; i < count; i++) {
        float sum = 0.0f;
        for (ptrdiff_t k = 0; k < num_weights; k++)
            sum += weights[k] * rows[k * stride + i];
        sum = sum > 0.0f ? sum : 0.0f;
        out[i] = sum < full ? sum : full;
    }
}
TWO_FORMS(mix_floats,
          (const float *restrict rows, ptrdiff_t stride, ptrdiff_t num_weights, const float *restrict weights,
           ptrdiff_t count, float full, float *restrict out),
          rows, stride, num_weights, weights, count, full, out)

/* To the nearest whole number, ties to the even one, of 0 .. 65535. */
INLINE int32_t rounded(float value) { return (int32_t)((value + 8388608.0f) - 8388608.0f); }

/* A row of pixels to the row of each channel, `plane` numbers apart. */
INLINE void part_row_body(const float *restrict row, ptrdiff_t width, Pixel pixel, Kind kind, unsigned char *restrict out,
                          ptrdiff_t plane) {
    for (ptrdiff_t c = 0; c < pixel.channels; c++) {
        if (kind == BYTES)
            for (ptrdiff_t x = 0; x < width; x++)
                out[c * plane + x] = (uint8_t)rounded(row[x * pixel.padded + c]);
        else if (kind == WORDS)
            for (ptrdiff_t x = 0; x < width; x++)
                ((uint16_t *)out)[c * plane + x] = (uint16_t)rounded(row[x * pixel.padded + c]);
        else
            for (ptrdiff_t x = 0; x < width; x++)
                ((float *)out)[c * plane + x] = row[x * pixel.padded + c];
    }
}
TWO_FORMS(part_row,
          (const float *restrict row, ptrdiff_t width, Pixel pixel, Kind kind, unsigned char *restrict out,
           ptrdiff_t plane),
          row, width, pixel, kind, out, plane)

bool resample_channels(const Image *image, Kind kind, const Job *job, Kind out_kind, Scratch *scratch, bool wide) {
    const ptrdiff_t channels = image->channels;
    const Pixel pixel = {.channels = channels,
                         .padded = channels == 1  ? 1
                                   : channels < 5 ? 4
                                                  : (channels + GROUP - 1) / GROUP * GROUP};
    Axis across = plan_axis(job->filter, job->left, job->right, image->width, job->width);
    Axis down = plan_axis(job->filter, job->top, job->bottom, image->height, job->height);
    const size_t row_bytes = align((size_t)(across.count * pixel.padded) * sizeof(float));
    const ptrdiff_t stride = job->width * pixel.padded; /* numbers of a row of the result */
    const size_t out_row_bytes = align((size_t)stride * sizeof(float));
    unsigned char *memory = reserve(scratch, float_axis_bytes(&across, job->width) + float_axis_bytes(&down, job->height) +
                                                 row_bytes + out_row_bytes * (size_t)(down.count + 1));
    if (memory == NULL)
        return false;
    memory = place_float_axis(&across, memory, job->filter, job->left, job->right, job->width, job->flip);
    memory = place_float_axis(&down, memory, job->filter, job->top, job->bottom, job->height, false);
    float *row = (float *)memory, *mixed = (float *)(memory + row_bytes);
    float *rows = (float *)(memory + row_bytes + out_row_bytes);
    const ptrdiff_t row_stride = (ptrdiff_t)(out_row_bytes / sizeof(float));
    memset(row, 0, row_bytes); /* the zeros behind a pixel stay */

    const unsigned char *first = image->pixels + down.first * image->row_stride + across.first * image->pixel_stride;
    for (ptrdiff_t y = 0; y < down.count; y++) {
        CHOOSE(wide, widen_row)(first + y * image->row_stride, kind, image->pixel_stride, across.count, pixel, row);
        CHOOSE(wide, shrink_row)(row, &across, job->width, pixel.padded, rows + y * row_stride);
    }
    const float full = kind == BYTES ? 255.0f : 65535.0f;
    const size_t item = out_kind == BYTES ? 1 : out_kind == WORDS ? sizeof(uint16_t) : sizeof(float);
    for (ptrdiff_t y = 0; y < job->height; y++) {
        CHOOSE(wide, mix_floats)(rows + down.start[y] * row_stride, row_stride, down.num_weights[y],
                                 down.float_weights + y * down.max_weights, stride, full, mixed);
        CHOOSE(wide, part_row)(mixed, job->width, pixel, out_kind, job->out + (size_t)(y * job->width) * item,
                               job->height * job->width);
    }
    return true;
}
