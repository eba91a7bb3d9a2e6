/* The colour operations of Pillow and of torchvision's transforms on Pillow images, on planes of 8 bits.
 *
 * Loops are written for the compiler to vectorise: no branches, one kind of arithmetic, planes that do not overlap. */
#include "colour.h"

#define SOLARISE_THRESHOLD 128

/* Luma in ITU-R 601 weights, 16 binary places. */
#define LUMA(r, g, b) ((19595u * (r) + 38470u * (g) + 7471u * (b) + 32768u) >> 16)

/* From `base` (factor 0) to `value` (factor 1) or beyond, cut to 0 .. 255, the fraction dropped. */
INLINE uint8_t blend(float base, float value, float factor) {
    float mixed = base + factor * (value - base);
    mixed = mixed > 0.0f ? mixed : 0.0f;
    mixed = mixed < 255.0f ? mixed : 255.0f;
    return (uint8_t)(int32_t)mixed;
}

void towards_portable(uint8_t *values, size_t count, float base, float factor) {
    for (size_t i = 0; i < count; i++)
        values[i] = blend(base, (float)values[i], factor);
}

void saturate_portable(PLANES, size_t count, float factor) {
    for (size_t i = 0; i < count; i++) {
        const float luma = (float)(int32_t)LUMA(red[i], green[i], blue[i]);
        red[i] = blend(luma, (float)red[i], factor);
        green[i] = blend(luma, (float)green[i], factor);
        blue[i] = blend(luma, (float)blue[i], factor);
    }
}

INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t within(int32_t value, int32_t low, int32_t high) { return smaller(larger(value, low), high); }
INLINE int32_t distance(int32_t a, int32_t b) { return larger(a, b) - smaller(a, b); }

/* To hue, saturation and value of 8 bits each, the hue turned by `shift` of 256, and back. */
void turn_hue_portable(PLANES, size_t count, int32_t shift) {
    for (size_t i = 0; i < count; i++) {
        const int32_t r = red[i], g = green[i], b = blue[i];
        const int32_t high = larger(larger(r, g), b), spread = high - smaller(smaller(r, g), b);
        const int32_t is_red = -(r == high), is_green = -(g == high) & ~is_red, is_blue = ~(is_red | is_green);

        /* hue: sixths of a turn, each of 42.5 of the 255 steps */
        const int32_t difference = (is_red & (g - b)) | (is_green & (b - r)) | (is_blue & (r - g));
        const int32_t sixths = (is_green & 2) | (is_blue & 4);
        float turned = ((float)sixths + (float)difference / (float)larger(spread, 1)) * 42.5f;
        turned += turned < 0.0f ? 255.0f : 0.0f;
        const int32_t hue = ((int32_t)turned + shift) & 255;
        const int32_t saturation = (int32_t)((float)(255 * spread) / (float)larger(high, 1));

        /* how much each channel lacks at full saturation, of 255: none over a third of the circle, all over another */
        const int32_t place = hue * 6;
        const int32_t no_red = within(510 - distance(place, 765), 0, 255);
        const int32_t no_green = within(distance(place, 510) - 255, 0, 255);
        const int32_t no_blue = within(distance(place, 1020) - 255, 0, 255);
        red[i] = (uint8_t)(int32_t)((float)(high * (65025 - saturation * no_red)) * (1.0f / 65025.0f) + 0.5f);
        green[i] = (uint8_t)(int32_t)((float)(high * (65025 - saturation * no_green)) * (1.0f / 65025.0f) + 0.5f);
        blue[i] = (uint8_t)(int32_t)((float)(high * (65025 - saturation * no_blue)) * (1.0f / 65025.0f) + 0.5f);
    }
}

uint32_t sum_luma_portable(const uint8_t *red, const uint8_t *green, const uint8_t *blue, size_t count) {
    uint32_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += LUMA(red[i], green[i], blue[i]);
    return sum;
}

static float mean_luma(const uint8_t *planes, ptrdiff_t channels, size_t num_pixels, bool wide) {
    uint64_t sum = 0;
    const uint8_t *green = planes + (channels == 3 ? num_pixels : 0);
    const uint8_t *blue = planes + (channels == 3 ? 2 * num_pixels : 0);
    for (size_t i = 0; i < num_pixels; i += 1 << 16) {
        const size_t count = num_pixels - i < 1 << 16 ? num_pixels - i : 1 << 16;
        sum += CHOOSE(wide, sum_luma)(planes + i, green + i, blue + i, count); /* of one channel: itself */
    }
    return (float)(int32_t)((double)sum / (double)num_pixels + 0.5);
}

void adjust(uint8_t *planes, ptrdiff_t channels, size_t num_pixels, Operation operation, double factor, bool wide) {
    uint8_t *green = planes + num_pixels, *blue = planes + 2 * num_pixels;
    if (operation == BRIGHTNESS)
        CHOOSE(wide, towards)(planes, num_pixels * (size_t)channels, 0.0f, (float)factor);
    else if (operation == CONTRAST)
        CHOOSE(wide, towards)
        (planes, num_pixels * (size_t)channels, mean_luma(planes, channels, num_pixels, wide), (float)factor);
    else if (channels == 3 && operation == SATURATION)
        CHOOSE(wide, saturate)(planes, green, blue, num_pixels, (float)factor);
    else if (channels == 3 && operation == HUE)
        CHOOSE(wide, turn_hue)(planes, green, blue, num_pixels, (int32_t)(factor * 255.0));
}

INLINE void grey_body(PLANES, size_t count) {
    for (size_t i = 0; i < count; i++)
        red[i] = green[i] = blue[i] = (uint8_t)LUMA(red[i], green[i], blue[i]);
}
TWO_FORMS(grey, (PLANES, size_t count), red, green, blue, count)

void make_grey(uint8_t *planes, ptrdiff_t channels, size_t num_pixels, bool wide) {
    if (channels == 3)
        CHOOSE(wide, grey)(planes, planes + num_pixels, planes + 2 * num_pixels, num_pixels);
}

INLINE void solarise_body(uint8_t *restrict values, size_t count) {
    for (size_t i = 0; i < count; i++)
        values[i] = values[i] < SOLARISE_THRESHOLD ? values[i] : (uint8_t)(255 - values[i]);
}
TWO_FORMS(solarise, (uint8_t *restrict values, size_t count), values, count)

void solarise(uint8_t *values, size_t count, bool wide) { CHOOSE(wide, solarise)(values, count); }
