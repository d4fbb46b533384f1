// The dense product of the step, pre = x W_enc + b_enc, a tile of rows at a time: packed weights and a register kernel.
//
// Weights are packed into panels of WIDTH columns. With bf16 instructions a panel holds pairs of neighbours along the
// summed axis, as the dot-product instruction reads them; without, bf16 products are fp32 products of rounded factors,
// which is the same sum.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
constexpr int WIDTH = LANES * VECTORS;
constexpr int ROWS = 6;  // with VECTORS, as many sums as registers hold

struct bf16 {
    uint16_t bits;
};

static inline float widen(float value) { return value; }

static inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline void narrow(float value, float &out) { out = value; }

static inline void narrow(float value, bf16 &out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

// What a panel is made of, for factors kept as T.
template <class T> struct Panel {
    using Element = float;
    static constexpr int STEP = 1;
};
#if defined(__AVX512BF16__)
template <> struct Panel<bf16> {
    using Element = bf16;
    static constexpr int STEP = 2;
};
#endif

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// out = a . panel + bias for N rows. Inlined into the loops around it, GCC would not keep the sums in registers.
template <class T, int N>
static __attribute__((noinline)) void sums(const T *a, size_t a_stride, const float *panel, int depth, float *out,
                        size_t out_stride, const float *bias) {
    Vector sum[N][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sum[r][v] = ((const Vector *)bias)[v];
    for (int i = 0; i < depth; i++, panel += WIDTH) {
        Vector b[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) b[v] = ((const Vector *)panel)[v];
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) {
            float factor = widen(a[r * a_stride + i]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[r][v] += factor * b[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) ((Vector *)(out + r * out_stride))[v] = sum[r][v];
}

#if defined(__AVX512BF16__)
template <class T, int N>
static __attribute__((noinline)) void sums(const bf16 *a, size_t a_stride, const bf16 *panel, int depth, float *out,
                        size_t out_stride, const float *bias) {
    __m512 sum[N][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_loadu_ps(bias + v * LANES);
    for (int i = 0; i < depth; i += 2, panel += 2 * WIDTH) {
        __m512bh b[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + 2 * v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) {
            int pair;
            memcpy(&pair, a + r * a_stride + i, 4);
            __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], factor, b[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(out + r * out_stride + v * LANES, sum[r][v]);
}
#endif

// out[r] = a[r] . panel + bias for `rows` rows.
template <class T, class P>
static void product(const T *a, size_t a_stride, int rows, const P *panel, int depth, float *out, size_t out_stride,
                    const float *bias) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_stride, out += ROWS * out_stride)
        sums<T, ROWS>(a, a_stride, panel, depth, out, out_stride, bias);
    if (rows >= 4) {
        sums<T, 4>(a, a_stride, panel, depth, out, out_stride, bias);
        rows -= 4, a += 4 * a_stride, out += 4 * out_stride;
    }
    if (rows >= 2) {
        sums<T, 2>(a, a_stride, panel, depth, out, out_stride, bias);
        rows -= 2, a += 2 * a_stride, out += 2 * out_stride;
    }
    if (rows) sums<T, 1>(a, a_stride, panel, depth, out, out_stride, bias);
}

// Rows `first <= i < last` (even `first`) of W [depth columns] into their places in all panels of padded depth
// `padded`; `transposed`: W is given as [columns depth]. Columns past the end become 0.
template <class T>
static void pack(const float *W, bool transposed, int depth, int columns, int padded, int first, int last,
                 typename Panel<T>::Element *panels) {
    constexpr int STEP = Panel<T>::STEP;
    for (int c0 = 0; c0 < columns; c0 += WIDTH) {
        auto *panel = panels + size_t(c0 / WIDTH) * padded * WIDTH;
        int width = columns - c0 < WIDTH ? columns - c0 : WIDTH;
        for (int i = first; i < last; i++) {
            auto *out = panel + size_t(i / STEP) * STEP * WIDTH + i % STEP;
            if (STEP == 2 && !transposed && width == WIDTH && i % 2 == 0 && i + 1 < depth) {  // two rows at once
                const float *a = W + size_t(i) * columns + c0, *b = a + columns;
                for (int c = 0; c < WIDTH; c++) {
                    bf16 low, high;
                    narrow(a[c], low), narrow(b[c], high);
                    uint32_t pair = low.bits | uint32_t(high.bits) << 16;
                    memcpy((void *)(out + 2 * c), &pair, 4);
                }
                i++;
                continue;
            }
            for (int c = 0; c < WIDTH; c++) {
                float value = 0;
                if (i < depth && c < width)
                    value = transposed ? W[size_t(c0 + c) * depth + i] : W[size_t(i) * columns + c0 + c];
                T rounded;
                narrow(value, rounded);
                if constexpr (sizeof(typename Panel<T>::Element) == sizeof(T))
                    memcpy(&out[c * STEP], &rounded, sizeof(T));
                else
                    out[c * STEP] = widen(rounded);
            }
        }
    }
}
