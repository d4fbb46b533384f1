// Sums of rows, each times a weight.
#pragma once

#include "product.h"

// sum += weight(e) * row(e) over `count` entries, where row(e) counts rows of d numbers at a distance of `stride`.
template <class T, class E, class Row, class Weight>
static void add_rows(float *sum, int64_t d, const T *rows, int64_t stride, const E *e, int count, Row row,
                     Weight weight) {
    int i = 0;
    for (; i + 4 <= count; i += 4) {  // four at once: the sum is read and written less often
        const T *r0 = rows + row(e[i]) * stride, *r1 = rows + row(e[i + 1]) * stride;
        const T *r2 = rows + row(e[i + 2]) * stride, *r3 = rows + row(e[i + 3]) * stride;
        float w0 = weight(e[i]), w1 = weight(e[i + 1]), w2 = weight(e[i + 2]), w3 = weight(e[i + 3]);
#pragma GCC ivdep
        for (int64_t j = 0; j < d; j++)
            sum[j] += w0 * widen(r0[j]) + w1 * widen(r1[j]) + (w2 * widen(r2[j]) + w3 * widen(r3[j]));
    }
    for (; i < count; i++) {
        const T *r = rows + row(e[i]) * stride;
        float w = weight(e[i]);
#pragma GCC ivdep
        for (int64_t j = 0; j < d; j++) sum[j] += w * widen(r[j]);
    }
}

static inline float squared_length(const float *v, int64_t d) {
    float sum = 0;
    for (int64_t j = 0; j < d; j++) sum += v[j] * v[j];
    return sum;
}
