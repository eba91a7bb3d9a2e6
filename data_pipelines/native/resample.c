/* The antialiased resize, as Pillow defines it: a filter that widens with the shrinking, along rows and along columns,
 * rounded to 8 bits between. Rows come first, but where the height shrinks by more than twice the pixels of the width
 * (Pillow 13's rule; the second pass has less to do). */
#include "resample.h"

#include <math.h>
#include <string.h>

INLINE uint8_t to_byte(int32_t sum, int32_t precision) {
    const int32_t value = sum >> precision;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

INLINE void resize_rows_of(const Region *region, const Axis *across, ptrdiff_t width, const ptrdiff_t channels,
                           const ptrdiff_t channel_stride, uint8_t *planes, ptrdiff_t stride) {
    for (ptrdiff_t y = 0; y < region->height; y++) {
        const uint8_t *row = region->pixels + y * region->row_stride;
        for (ptrdiff_t x = 0; x < width; x++) {
            const int16_t *weights = across->weights + x * across->max_weights;
            const uint8_t *pixel = row + across->start[x] * region->pixel_stride;
            const int32_t half = 1 << (across->precision[x] - 1);
            int32_t sums[3] = {half, half, half};
            for (int32_t k = 0; k < across->num_weights[x]; k++, pixel += region->pixel_stride)
                for (ptrdiff_t channel = 0; channel < channels; channel++)
                    sums[channel] += weights[k] * pixel[channel * channel_stride];
            for (ptrdiff_t channel = 0; channel < channels; channel++)
                planes[(channel * region->height + y) * stride + x] = to_byte(sums[channel], across->precision[x]);
        }
    }
}

void resize_rows_portable(const Region *region, const Axis *across, ptrdiff_t width, uint8_t *planes, ptrdiff_t stride) {
    if (region->channels == 3 && region->channel_stride == 1)
        resize_rows_of(region, across, width, 3, 1, planes, stride);
    else if (region->channels == 3)
        resize_rows_of(region, across, width, 3, region->channel_stride, planes, stride);
    else
        resize_rows_of(region, across, width, 1, 1, planes, stride);
}

INLINE void mix_chunk(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights, const int16_t *weights,
                      int32_t precision, const ptrdiff_t length, uint8_t *out) {
    int32_t sums[CHUNK];
    for (ptrdiff_t i = 0; i < length; i++)
        sums[i] = 1 << (precision - 1);
    for (ptrdiff_t k = 0; k < num_weights; k++)
        for (ptrdiff_t i = 0; i < length; i++)
            sums[i] += weights[k] * rows[k * stride + i];
    for (ptrdiff_t i = 0; i < length; i++)
        out[i] = to_byte(sums[i], precision);
}

void mix_rows_portable(const uint8_t *rows, ptrdiff_t stride, ptrdiff_t num_weights, const int16_t *weights,
                       int32_t precision, ptrdiff_t width, uint8_t *out) {
    ptrdiff_t x = 0;
    for (; x + CHUNK <= width; x += CHUNK)
        mix_chunk(rows + x, stride, num_weights, weights, precision, CHUNK, out + x);
    mix_chunk(rows + x, stride, num_weights, weights, precision, width - x, out + x);
}

/* Whether all bytes from a row's first pixel to its last may be read as one run, little more than its pixels. */
static bool is_run(const Region *region) {
    if (region->channels == 1)
        return region->pixel_stride == 1;
    return region->channel_stride == 1 && (region->pixel_stride == 3 || region->pixel_stride == 4);
}

static void resize_rows(const Region *region, const Axis *across, ptrdiff_t width, uint8_t *planes, ptrdiff_t stride,
                        unsigned char *block, bool wide) {
#if WITH_AVX2
    if (wide && region->channels == 3 && is_run(region)) {
        resize_rows_avx2(region, across, width, planes, stride, block);
        return;
    }
#endif
    (void)block, (void)wide;
    resize_rows_portable(region, across, width, planes, stride);
}

/* `width` bytes of each of `height` rows. */
static void resize_columns(const uint8_t *rows, ptrdiff_t stride, const Axis *down, ptrdiff_t height, ptrdiff_t width,
                           uint8_t *out, bool wide) {
    for (ptrdiff_t y = 0; y < height; y++)
        CHOOSE(wide, mix_rows)(rows + down->start[y] * stride, stride, down->num_weights[y],
                               down->weights + y * down->max_weights, down->precision[y], width, out + y * width);
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

/* One channel, or RGB, of the box into `out`; `first` and `second` are where a pass leaves its result. */
static void resample_region(Region region, const Axis *across, const Axis *down, bool columns_first, const Job *job,
                            uint8_t *out, uint8_t *first, uint8_t *second, unsigned char *block, bool wide) {
    const ptrdiff_t stride = (job->width + CHUNK - 1) / CHUNK * CHUNK;
    if (!columns_first) {
        resize_rows(&region, across, job->width, first, stride, block, wide);
        for (ptrdiff_t plane = 0; plane < region.channels; plane++)
            resize_columns(first + plane * down->count * stride, stride, down, job->height, job->width,
                           out + plane * job->height * job->width, wide);
        return;
    }
    if (!is_run(&region))
        region = pack(&region, second);
    const ptrdiff_t row_bytes = (region.width - 1) * region.pixel_stride + region.channels;
    resize_columns(region.pixels, region.row_stride, down, job->height, row_bytes, first, wide);
    region.pixels = first;
    region.row_stride = row_bytes;
    region.height = job->height;
    resize_rows(&region, across, job->width, second, stride, block, wide);
    for (ptrdiff_t row = 0; row < region.channels * job->height; row++)
        memcpy(out + row * job->width, second + row * stride, (size_t)job->width);
}

bool resample(const Image *image, const Job *job, Scratch *scratch, bool wide) {
    Axis across = plan_axis(job->filter, job->left, job->right, image->width, job->width);
    Axis down = plan_axis(job->filter, job->top, job->bottom, image->height, job->height);
    const double narrower = job->right - job->left - (double)job->width;
    const bool columns_first = job->bottom - job->top - (double)job->height > 2.0 * fmax(narrower, 0.0);
    const ptrdiff_t together = image->channels == 3 ? 3 : 1; /* the channels of other images one by one */
    Region region = {
        .pixels = image->pixels + down.first * image->row_stride + across.first * image->pixel_stride,
        .height = down.count,
        .width = across.count,
        .channels = together,
        .row_stride = image->row_stride,
        .pixel_stride = image->pixel_stride,
        .channel_stride = image->channel_stride,
    };

    const size_t stride = (size_t)(job->width + CHUNK - 1) / CHUNK * CHUNK, channels = (size_t)together;
    const size_t width = (size_t)across.count, height = (size_t)down.count, out_height = (size_t)job->height;
    size_t first_bytes = align(channels * stride * height), second_bytes = 0, rows_bytes = 0;
    if (columns_first) {
        first_bytes = align(width * 4 * out_height);
        second_bytes = align(channels * stride * out_height);
        if (!is_run(&region) && align(channels * width * height) > second_bytes)
            second_bytes = align(channels * width * height);
    }
#if WITH_AVX2
    rows_bytes = block_bytes(across.count, (ptrdiff_t)stride);
#endif
    unsigned char *memory = reserve(scratch, axis_bytes(&across, job->width) + axis_bytes(&down, job->height) +
                                                 first_bytes + second_bytes + rows_bytes);
    if (memory == NULL)
        return false;
    memory = place_axis(&across, memory, job->filter, job->left, job->right, job->width, 2, job->flip);
    memory = place_axis(&down, memory, job->filter, job->top, job->bottom, job->height, 1, false);
    uint8_t *first = memory, *second = first + first_bytes;
    for (ptrdiff_t channel = 0; channel < image->channels; channel += together) {
        resample_region(region, &across, &down, columns_first, job, job->out + channel * job->height * job->width, first,
                        second, second + second_bytes, wide);
        region.pixels += together * image->channel_stride;
    }
    return true;
}
