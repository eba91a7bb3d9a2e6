/* Random images and jobs for the crop kernel, to be built with sanitizers; test_native.py runs it.
 *
 * Images lie in memory of exactly the bytes from their first to their last, so that a read beyond is caught. Of every
 * job the portable and the AVX2 form must give the same bytes, and leave what surrounds the output alone. Prints the
 * number of jobs; aborts at the first that goes wrong. Usage: fuzz_crops SEED SECONDS */
#include "kernel.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define GUARD 64

static uint64_t state;

static uint64_t bits(void) {
    uint64_t word = state += 0x9E3779B97F4A7C15u;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

static double uniform(double low, double high) { return low + (high - low) * (double)(bits() >> 11) * 0x1p-53; }
static ptrdiff_t integer(ptrdiff_t low, ptrdiff_t high) { return low + (ptrdiff_t)(bits() % (uint64_t)(high - low + 1)); }
static bool chance(double share) { return uniform(0, 1) < share; }

static void fail(const char *what) {
    fprintf(stderr, "fuzz_crops: %s\n", what);
    abort();
}

/* A side in px: mostly small, often 1, now and then long. */
static ptrdiff_t side(void) {
    if (chance(0.15))
        return 1;
    return chance(0.03) ? integer(1000, 12000) : chance(0.3) ? integer(2, 9) : integer(2, 150);
}

static ptrdiff_t magnitude(ptrdiff_t stride) { return stride < 0 ? -stride : stride; }

/* Strides that keep pixels apart, of any order and sign; the memory that holds them, to be freed. */
static uint8_t *random_image(Image *image) {
    do {
        image->height = side();
        image->width = side();
    } while (image->height * image->width > 1 << 18);
    image->channels = chance(0.7) ? 3 : chance(0.7) ? 1 : integer(2, 6);
    image->channel_stride = 1;
    image->pixel_stride = image->channels + (chance(0.5) ? 0 : integer(0, 2));
    image->row_stride = image->width * image->pixel_stride + (chance(0.5) ? 0 : integer(0, 20));
    if (chance(0.2)) { /* planes */
        image->pixel_stride = 1;
        image->row_stride = image->width;
        image->channel_stride = image->height * image->width;
    } else if (chance(0.2)) { /* transposed */
        image->row_stride = image->pixel_stride;
        image->pixel_stride *= image->height;
    }
    ptrdiff_t *strides[3] = {&image->row_stride, &image->pixel_stride, &image->channel_stride};
    const ptrdiff_t sizes[3] = {image->height, image->width, image->channels};
    ptrdiff_t before = 0, extent = 1;
    for (int axis = 0; axis < 3; axis++) {
        extent += magnitude(*strides[axis]) * (sizes[axis] - 1);
        if (chance(0.15))
            *strides[axis] = -*strides[axis];
        before += *strides[axis] < 0 ? -*strides[axis] * (sizes[axis] - 1) : 0;
    }
    uint8_t *memory = malloc((size_t)extent);
    if (memory == NULL)
        fail("out of memory");
    const int kind = (int)integer(0, 2);
    for (ptrdiff_t i = 0; i < extent; i++)
        memory[i] = kind == 0 ? (uint8_t)bits() : kind == 1 ? (uint8_t)(chance(0.5) ? 255 : 0) : (uint8_t)(i / 7);
    image->pixels = memory + before;
    return memory;
}

static void random_span(ptrdiff_t size, double *low, double *high) {
    if (chance(0.3)) {
        *low = 0;
        *high = (double)size;
    } else if (chance(0.5)) { /* whole pixels */
        const ptrdiff_t first = integer(0, size - 1);
        *low = (double)first;
        *high = (double)integer(first + 1, size);
    } else {
        *low = uniform(0, (double)size - 0.01);
        *high = uniform(*low + 0.005, (double)size);
    }
}

static void random_job(const Image *image, Job *job) {
    memset(job, 0, sizeof *job);
    random_span(image->width, &job->left, &job->right);
    random_span(image->height, &job->top, &job->bottom);
    do {
        job->height = side();
        job->width = side();
    } while (job->height * job->width > 1 << 17);
    job->filter = (Filter)integer(0, NUM_FILTERS - 1);
    job->flip = chance(0.5);
    job->solarise = chance(0.2);
    job->blur_radius = chance(0.5) ? 0 : chance(0.8) ? uniform(0.01, 4) : chance(0.5) ? uniform(4, 40) : MAX_BLUR;
    const bool coloured = image->channels == 1 || image->channels == 3;
    job->grey = coloured && chance(0.2);
    job->num_jitter = (int)integer(0, chance(0.1) ? MAX_JITTER : 4);
    for (int i = 0; i < job->num_jitter; i++) {
        job->jitter[i].operation = coloured ? (Operation)integer(0, NUM_OPERATIONS - 1) : BRIGHTNESS;
        job->jitter[i].factor = chance(0.9) ? uniform(-0.5, 2) : chance(0.5) ? -1e6 : 1e6;
    }
}

/* An image of any number of channels, of bytes or words, into each kind of output that there is for it. */
static void fuzz_channels(Scratch *scratch) {
    const Kind kind = chance(0.5) ? BYTES : WORDS;
    const ptrdiff_t item = kind == BYTES ? 1 : 2;
    Image image;
    do {
        image.height = side();
        image.width = side();
    } while (image.height * image.width > 1 << 14);
    image.channels = integer(1, 19);
    image.channel_stride = item;
    image.pixel_stride = image.channels * item;
    image.row_stride = image.width * image.pixel_stride;
    const size_t extent = (size_t)(image.height * image.row_stride);
    uint8_t *memory = malloc(extent);
    Job job;
    do
        random_job(&image, &job);
    while (job.height * job.width > 1 << 13);
    job.num_jitter = 0;
    const Kind out_kind = chance(0.3) ? FLOATS : kind;
    const size_t out_item = out_kind == BYTES ? 1 : out_kind == WORDS ? 2 : 4;
    const size_t size = (size_t)(image.channels * job.height * job.width) * out_item;
    uint8_t *outs[2] = {malloc(size + 2 * GUARD), malloc(size + 2 * GUARD)};
    if (memory == NULL || outs[0] == NULL || outs[1] == NULL)
        fail("out of memory");
    for (size_t i = 0; i < extent; i++)
        memory[i] = (uint8_t)bits();
    image.pixels = memory;
    for (int wide = 0; wide < 2; wide++) {
        memset(outs[wide], 0xA5, size + 2 * GUARD);
        job.out = outs[wide] + GUARD;
        if (!resample_channels(&image, kind, &job, out_kind, scratch, wide && has_avx2()))
            fail("out of memory");
    }
    for (size_t i = 0; i < GUARD; i++)
        if (outs[0][i] != 0xA5 || outs[0][GUARD + size + i] != 0xA5)
            fail("wrote around the output of any channels");
    if (memcmp(outs[0], outs[1], size + 2 * GUARD) != 0)
        fail("the portable and the AVX2 form of any channels differ");
    free(outs[0]);
    free(outs[1]);
    free(memory);
}

int main(int argc, char **argv) {
    if (argc != 3)
        fail("usage: fuzz_crops SEED SECONDS");
    state = strtoull(argv[1], NULL, 10);
    const double limit = strtod(argv[2], NULL);
    const clock_t start = clock();
    Scratch scratch = {0};
    long num_jobs = 0;
    while ((double)(clock() - start) / CLOCKS_PER_SEC < limit) {
        Image image;
        uint8_t *memory = random_image(&image);
        for (int repeat = 0; repeat < 4; repeat++, num_jobs++) {
            Job job;
            random_job(&image, &job);
            const char *wrong = check_job(&image, &job);
            if (wrong != NULL)
                fail(wrong);
            const size_t size = (size_t)(image.channels * job.height * job.width);
            uint8_t *outs[2];
            for (int wide = 0; wide < 2; wide++) {
                outs[wide] = malloc(size + 2 * GUARD);
                if (outs[wide] == NULL)
                    fail("out of memory");
                memset(outs[wide], 0xA5, size + 2 * GUARD);
                job.out = outs[wide] + GUARD;
                if (!make_crop(&image, &job, &scratch, wide && has_avx2()))
                    fail("out of memory");
            }
            for (size_t i = 0; i < GUARD; i++)
                if (outs[0][i] != 0xA5 || outs[1][i] != 0xA5 || outs[0][GUARD + size + i] != 0xA5 ||
                    outs[1][GUARD + size + i] != 0xA5)
                    fail("wrote around the output");
            if (memcmp(outs[0], outs[1], size + 2 * GUARD) != 0)
                fail("the portable and the AVX2 form differ");
            free(outs[0]);
            free(outs[1]);
            if (chance(0.3))
                free_scratch(&scratch); /* so that a job's memory is not that of a larger one before it */
        }
        free(memory);
        fuzz_channels(&scratch);
        if (chance(0.3))
            free_scratch(&scratch);
    }
    free_scratch(&scratch);
    printf("%ld\n", num_jobs);
    return 0;
}
