/* The order of operations, the checks before them, and the memory they share. */
#include "kernel.h"

#include <math.h>
#include <stdlib.h>

void *reserve(Scratch *scratch, size_t size) {
    if (size > scratch->size) {
        free_scratch(scratch);
        size = (size + 63) & ~(size_t)63;
        scratch->memory = aligned_alloc(64, size);
        scratch->size = scratch->memory == NULL ? 0 : size;
    }
    return scratch->memory;
}

void free_scratch(Scratch *scratch) {
    free(scratch->memory);
    scratch->memory = NULL;
    scratch->size = 0;
}

const char *check_job(const Image *image, const Job *job) {
    if (image->height < 1 || image->width < 1 || image->channels < 1)
        return "an image has one pixel and one channel at least";
    if (image->height > MAX_SIDE || image->width > MAX_SIDE || image->channels > MAX_SIDE)
        return "a side of the image is longer than 1048576";
    if (job->height < 1 || job->width < 1 || job->height > MAX_SIDE || job->width > MAX_SIDE)
        return "a side of the crop is not within 1 .. 1048576";
    /* written so that a NaN fails */
    if (!(job->left >= 0 && job->left < job->right && job->right <= (double)image->width))
        return "the box does not lie within the image's width";
    if (!(job->top >= 0 && job->top < job->bottom && job->bottom <= (double)image->height))
        return "the box does not lie within the image's height";
    if (!(job->right - job->left >= 1e-3 && job->bottom - job->top >= 1e-3))
        return "the box is narrower than a thousandth of a pixel";
    if ((int)job->filter < 0 || job->filter >= NUM_FILTERS)
        return "unknown interpolation";
    if (!(job->blur_radius >= 0 && job->blur_radius <= MAX_BLUR))
        return "the radius of the blur is not within 0 .. 1000";
    if (job->num_jitter < 0 || job->num_jitter > MAX_JITTER)
        return "too many operations of jitter";
    for (int i = 0; i < job->num_jitter; i++) {
        if ((int)job->jitter[i].operation < 0 || job->jitter[i].operation >= NUM_OPERATIONS)
            return "unknown operation of jitter";
        if (!(fabs(job->jitter[i].factor) <= 1e6))
            return "a factor of jitter is not finite, or beyond a million";
        if (image->channels != 1 && image->channels != 3 && job->jitter[i].operation != BRIGHTNESS)
            return "only brightness can be changed of images that have neither 1 nor 3 channels";
    }
    if (job->grey && image->channels != 1 && image->channels != 3)
        return "only images of 1 or 3 channels can be made grey";
    return NULL;
}

bool has_avx2(void) {
#if WITH_AVX2
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

bool make_crop(const Image *image, const Job *job, Scratch *scratch, bool wide) {
    const size_t num_pixels = (size_t)job->height * (size_t)job->width;
    if (!resample(image, job, scratch, wide))
        return false;
    for (int i = 0; i < job->num_jitter; i++)
        adjust(job->out, image->channels, num_pixels, job->jitter[i].operation, job->jitter[i].factor, wide);
    if (job->grey)
        make_grey(job->out, image->channels, num_pixels, wide);
    if (job->blur_radius > 0 &&
        !blur(job->out, image->channels, job->height, job->width, job->blur_radius, scratch, wide))
        return false;
    if (job->solarise)
        solarise(job->out, num_pixels * (size_t)image->channels, wide);
    return true;
}
