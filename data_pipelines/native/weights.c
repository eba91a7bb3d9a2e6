/* Pillow's filters, widened by as much as the crop shrinks the box; weights as 16-bit integers, of as many binary places
 * as they allow. */
#include "weights.h"

#include <math.h>
#include <string.h>

#define MAX_PRECISION 20

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

static double support_of(Filter filter, double scale) { return SUPPORTS[filter] * fmax(scale, 1.0); }

Axis plan_axis(Filter filter, double low, double high, ptrdiff_t size, ptrdiff_t out) {
    Axis axis = {0};
    axis.first = (ptrdiff_t)floor(low);
    ptrdiff_t end = (ptrdiff_t)ceil(high);
    axis.count = (end > size ? size : end) - axis.first;
    const double taps = 2.0 * ceil(support_of(filter, (high - low) / (double)out)) + 2.0;
    ptrdiff_t most = taps < (double)axis.count ? (ptrdiff_t)taps : axis.count;
    axis.max_weights = (most + 3) / 2 * 2; /* an even start costs one more, and zeros follow an odd number */
    return axis;
}

size_t axis_bytes(const Axis *axis, ptrdiff_t out) {
    return 3 * align((size_t)out * sizeof(int32_t)) +
           align((size_t)out * (size_t)axis->max_weights * sizeof(int16_t)) +
           align((size_t)axis->max_weights * sizeof(double));
}

/* Weights of one output pixel, which sum to `sum`, as integers that sum to 2^precision exactly: their running sum is
 * rounded, not each of them. */
static int32_t quantise(const double *weights, ptrdiff_t count, double sum, int16_t *out) {
    const double share = 1.0 / sum;
    double largest = 0.0, total = 0.0;
    for (ptrdiff_t i = 0; i < count; i++) {
        const double size = fabs(weights[i]);
        largest = size > largest ? size : largest;
        total += size;
    }
    int32_t precision = MAX_PRECISION; /* ends above 10, as place_axis() lets no `total` above 10 come here */
    while (largest * share * (double)(1 << precision) > 32766.0 || total * share * (double)(1 << precision) > 8e6)
        precision--;
    const double unit = share * (double)(1 << precision);
    double running = 0.0;
    int32_t before = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        running += weights[i];
        const int32_t now = i == count - 1 ? 1 << precision : (int32_t)lrint(running * unit);
        out[i] = (int16_t)(now - before);
        before = now;
    }
    return precision;
}

/* How the filter lies over one axis. */
typedef struct {
    double (*weigh)(double);
    double scale, support, shrink, offset;
    ptrdiff_t count;
} Pixels;

static Pixels pixels_of(Filter filter, double low, double high, ptrdiff_t out, const Axis *axis) {
    Pixels pixels = {.weigh = FILTERS[filter], .scale = (high - low) / (double)out, .count = axis->count};
    pixels.support = support_of(filter, pixels.scale);
    pixels.shrink = 1.0 / fmax(pixels.scale, 1.0);
    pixels.offset = low - (double)axis->first;
    return pixels;
}

/* The pixels [from, to) that make output pixel `i`, with their weights, the sum of these and of their sizes. */
static void weigh(const Pixels *pixels, ptrdiff_t i, ptrdiff_t *from, ptrdiff_t *to, double *exact, double *sum,
                  double *total) {
    const double center = pixels->offset + ((double)i + 0.5) * pixels->scale;
    const double begin = center - pixels->support + 0.5, end = center + pixels->support + 0.5;
    *from = begin < 0 ? 0 : (ptrdiff_t)begin;
    *to = (ptrdiff_t)end > pixels->count ? pixels->count : (ptrdiff_t)end;
    *from = *from >= *to ? *to - 1 : *from;
    *sum = *total = 0.0;
    for (ptrdiff_t pixel = *from; pixel < *to; pixel++) {
        const double weight = pixels->weigh(((double)pixel - center + 0.5) * pixels->shrink);
        exact[pixel - *from] = weight;
        *sum += weight;
        *total += fabs(weight);
    }
}

size_t float_axis_bytes(const Axis *axis, ptrdiff_t out) {
    return 2 * align((size_t)out * sizeof(int32_t)) + align((size_t)out * (size_t)axis->max_weights * sizeof(float)) +
           align((size_t)axis->max_weights * sizeof(double));
}

unsigned char *place_float_axis(Axis *axis, unsigned char *memory, Filter filter, double low, double high,
                                ptrdiff_t out, bool reverse) {
    axis->start = (int32_t *)memory;
    axis->num_weights = (int32_t *)(memory += align((size_t)out * sizeof(int32_t)));
    axis->float_weights = (float *)(memory += align((size_t)out * sizeof(int32_t)));
    memory += align((size_t)out * (size_t)axis->max_weights * sizeof(float));
    double *exact = (double *)memory;
    const Pixels pixels = pixels_of(filter, low, high, out, axis);
    for (ptrdiff_t i = 0; i < out; i++) {
        double sum, total;
        ptrdiff_t from, to;
        weigh(&pixels, reverse ? out - 1 - i : i, &from, &to, exact, &sum, &total);
        float *weights = axis->float_weights + i * axis->max_weights;
        for (ptrdiff_t k = 0; k < to - from; k++)
            weights[k] = (float)(exact[k] / sum);
        axis->start[i] = (int32_t)from;
        axis->num_weights[i] = (int32_t)(to - from);
    }
    return memory + align((size_t)axis->max_weights * sizeof(double));
}

unsigned char *place_axis(Axis *axis, unsigned char *memory, Filter filter, double low, double high, ptrdiff_t out,
                          ptrdiff_t step, bool reverse) {
    const size_t per_output = align((size_t)out * sizeof(int32_t));
    axis->start = (int32_t *)memory;
    axis->num_weights = (int32_t *)(memory += per_output);
    axis->precision = (int32_t *)(memory += per_output);
    axis->weights = (int16_t *)(memory += per_output);
    const size_t num_weights = (size_t)out * (size_t)axis->max_weights;
    double *exact = (double *)(memory += align(num_weights * sizeof(int16_t)));
    memset(axis->weights, 0, num_weights * sizeof(int16_t));

    const Pixels pixels = pixels_of(filter, low, high, out, axis);
    for (ptrdiff_t i = 0; i < out; i++) {
        double sum, total;
        ptrdiff_t from, to;
        weigh(&pixels, reverse ? out - 1 - i : i, &from, &to, exact, &sum, &total);
        if (!(sum > 0.1 * total)) { /* not met by these filters; the integers' range rests on it */
            exact[0] = sum = 1.0;
            to = from + 1;
        }
        const ptrdiff_t before = from % step;
        int16_t *weights = axis->weights + i * axis->max_weights;
        axis->precision[i] = quantise(exact, to - from, sum, weights + before);
        axis->start[i] = (int32_t)(from - before);
        axis->num_weights[i] = (int32_t)(before + to - from);
    }
    return memory + align((size_t)axis->max_weights * sizeof(double));
}
