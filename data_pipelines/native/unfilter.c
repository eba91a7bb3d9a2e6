/* The filters of PNG undone: every byte is told as its difference from what its neighbours to the left and above say. */
#include "kernel.h"

#include <stdlib.h>
#include <string.h>

static uint8_t paeth(int left, int above, int corner) {
    const int by_left = abs(above - corner), by_above = abs(left - corner), by_corner = abs(left + above - 2 * corner);
    if (by_left <= by_above && by_left <= by_corner)
        return (uint8_t)left;
    return (uint8_t)(by_above <= by_corner ? above : corner);
}

INLINE bool unfilter_row(int filter, const uint8_t *raw, const uint8_t *above, ptrdiff_t count, const ptrdiff_t step,
                         uint8_t *row) {
    for (ptrdiff_t i = 0; i < step; i++) { /* nothing is to the left */
        const int up = above == NULL ? 0 : above[i];
        row[i] = (uint8_t)(raw[i] + (filter == 2 || filter == 4 ? up : filter == 3 ? up / 2 : 0));
    }
    if (filter == 0 || (filter == 2 && above == NULL))
        memcpy(row, raw, (size_t)count);
    else if (filter == 1 || (filter == 4 && above == NULL)) /* of nothing above, Paeth's is the left one */
        for (ptrdiff_t i = step; i < count; i++)
            row[i] = (uint8_t)(raw[i] + row[i - step]);
    else if (filter == 2)
        for (ptrdiff_t i = step; i < count; i++)
            row[i] = (uint8_t)(raw[i] + above[i]);
    else if (filter == 3)
        for (ptrdiff_t i = step; i < count; i++)
            row[i] = (uint8_t)(raw[i] + (row[i - step] + (above == NULL ? 0 : above[i])) / 2);
    else if (filter == 4)
        for (ptrdiff_t i = step; i < count; i++)
            row[i] = (uint8_t)(raw[i] + paeth(row[i - step], above[i], above[i - step]));
    else
        return false;
    return true;
}

bool unfilter(const uint8_t *raw, ptrdiff_t height, ptrdiff_t row_bytes, ptrdiff_t pixel_bytes, uint8_t *out) {
    const uint8_t *above = NULL;
    for (ptrdiff_t y = 0; y < height; y++, raw += row_bytes + 1, above = out, out += row_bytes) {
        const bool known = pixel_bytes == 3 ? unfilter_row(*raw, raw + 1, above, row_bytes, 3, out)
                                            : unfilter_row(*raw, raw + 1, above, row_bytes, pixel_bytes, out);
        if (!known)
            return false;
    }
    return true;
}
