/* Which pixels make a pixel of the crop along one axis, and with what weights. */
#ifndef SELFSIGHT_WEIGHTS_H
#define SELFSIGHT_WEIGHTS_H

#include "kernel.h"

/* How the pixels [first, first + count) along one axis make the output's. */
typedef struct {
    ptrdiff_t first, count;
    ptrdiff_t max_weights; /* an even number */
    int32_t *start;        /* (out) first pixel read, counted from `first` */
    int32_t *num_weights;  /* (out) pixels read */
    int32_t *precision;    /* (out) binary places of the weights, 1 .. 20 */
    int16_t *weights;      /* (out, max_weights), zeros after those used */
    float *float_weights;  /* (out, max_weights), of place_float_axis() instead of the two above */
} Axis;

/* For a box from `low` to `high` on an axis of `size` pixels; without the arrays, which place_axis() fills in. */
Axis plan_axis(Filter filter, double low, double high, ptrdiff_t size, ptrdiff_t out);

/* What place_axis() needs. */
size_t axis_bytes(const Axis *axis, ptrdiff_t out);

/* Computes the weights into `memory`; returns the first byte after it. Each output's first pixel is a multiple of
 * `step`, weights of zero filling up. `reverse` makes the output's last pixel the first. */
unsigned char *place_axis(Axis *axis, unsigned char *memory, Filter filter, double low, double high, ptrdiff_t out,
                          ptrdiff_t step, bool reverse);

/* The same with weights that are not rounded to integers; any first pixel. */
size_t float_axis_bytes(const Axis *axis, ptrdiff_t out);
unsigned char *place_float_axis(Axis *axis, unsigned char *memory, Filter filter, double low, double high,
                                ptrdiff_t out, bool reverse);

/* The next multiple of 64. */
static inline size_t align(size_t size) { return (size + 63) & ~(size_t)63; }

#endif
