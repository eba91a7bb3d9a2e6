/* One crop of an image: an antialiased resize of a box straight to the final size, then the colour operations.
 *
 * Every function has a portable form and, on x86-64, one for AVX2 that is chosen at run time; both give the same
 * bytes, because sums are of integers, and floating-point operations are neither contracted nor reordered
 * (-ffp-contract=off). Nothing here knows of Python: the caller has checked sizes with check_job().
 */
#ifndef SELFSIGHT_KERNEL_H
#define SELFSIGHT_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define WITH_AVX2 1
#define AVX2 __attribute__((target("avx2")))
#else
#define WITH_AVX2 0
#define AVX2
#endif
#define INLINE static inline __attribute__((always_inline))

/* Defines `name` as the choice between two compilations of the same `name_body`, for loops that the compiler
 * vectorises by itself. */
#if WITH_AVX2
#define TWO_FORMS(name, parameters, ...)                                       \
    AVX2 static void name##_avx2 parameters { name##_body(__VA_ARGS__); }      \
    static void name##_portable parameters { name##_body(__VA_ARGS__); }
#define CHOOSE(wide, name) ((wide) ? name##_avx2 : name##_portable)
#else
#define TWO_FORMS(name, parameters, ...)                                       \
    static void name##_portable parameters { name##_body(__VA_ARGS__); }
#define CHOOSE(wide, name) ((void)(wide), name##_portable)
#endif

#define MAX_SIDE (1 << 20) /* px of an image or a crop, so that no product of sizes below overflows 64 bits */
#define MAX_JITTER 8
#define MAX_BLUR 1000.0 /* px */

typedef struct {
    const uint8_t *pixels; /* of row 0, column 0, channel 0 */
    ptrdiff_t height, width, channels;
    ptrdiff_t row_stride, pixel_stride, channel_stride; /* in bytes, of any sign */
} Image;

typedef enum { BILINEAR, BICUBIC, LANCZOS, NUM_FILTERS } Filter;
typedef enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, NUM_OPERATIONS } Operation;

typedef struct {
    double left, top, right, bottom; /* px of the image */
    Filter filter;
    bool flip, grey, solarise;
    double blur_radius; /* standard deviation in px of the crop; 0: none */
    int num_jitter;
    struct {
        Operation operation;
        double factor; /* hue: turns */
    } jitter[MAX_JITTER];
    uint8_t *out; /* (channels, height, width), contiguous */
    ptrdiff_t height, width;
} Job;

/* Memory for one job at a time, kept for the next. Start with zeros, end with free_scratch(). */
typedef struct {
    unsigned char *memory;
    size_t size;
} Scratch;

/* At least `size` bytes, aligned to 64; what was there is lost. NULL: out of memory. */
void *reserve(Scratch *scratch, size_t size);
void free_scratch(Scratch *scratch);

/* What is wrong with a job on this image, or NULL. */
const char *check_job(const Image *image, const Job *job);

/* Whether this processor runs the AVX2 forms. */
bool has_avx2(void);

/* Pixels of any number of channels, which lie one behind the other: 8 or 16 bits, and single-precision numbers. */
typedef enum { BYTES, WORDS, FLOATS } Kind;

/* The box of an image of bytes or words at `out`, which is (channels, height, width) of the same kind, rounded and cut
 * to its range, or of floats, cut; of the job, the colours are left. Returns false when out of memory. */
bool resample_channels(const Image *image, Kind kind, const Job *job, Kind out_kind, Scratch *scratch, bool wide);

/* The rows of a PNG, each behind the number of its filter, to pixels; false: there is no such filter. */
bool unfilter(const uint8_t *raw, ptrdiff_t height, ptrdiff_t row_bytes, ptrdiff_t pixel_bytes, uint8_t *out);

/* Each returns false when out of memory. */
bool make_crop(const Image *image, const Job *job, Scratch *scratch, bool wide);
bool resample(const Image *image, const Job *job, Scratch *scratch, bool wide);
bool blur(uint8_t *planes, ptrdiff_t channels, ptrdiff_t height, ptrdiff_t width, double radius, Scratch *scratch,
          bool wide);

void adjust(uint8_t *planes, ptrdiff_t channels, size_t num_pixels, Operation operation, double factor, bool wide);
void make_grey(uint8_t *planes, ptrdiff_t channels, size_t num_pixels, bool wide);
void solarise(uint8_t *values, size_t count, bool wide);

#endif
