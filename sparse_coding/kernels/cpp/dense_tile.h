// Products of the dense step over tiles that stay in cache, and the layouts they read.
//
// Two layouts of a matrix [depth columns] whose first axis is summed over:
//   rows     row-major, the left factor of a product along its columns
//   paired   panels of WIDTH columns, in each of them STEP neighbours along the summed axis side by side: the right
//            factor of a product, or, column by column, the left factor of one along rows
// T is what factors are kept as: float, or bf16 where the CPU multiplies it. Sums are fp32.
#pragma once

#include <algorithm>

#include "product.h"

template <class T> constexpr int STEP = Panel<T>::STEP;

static inline Vector load(const float *from) { return *(const Vector *)from; }
static inline void store(float *to, Vector value) { *(Vector *)to = value; }

// STEP vectors, neighbours along the summed axis, from and to their places in a panel.
static inline void unpair(const float *panel, Vector *out) { out[0] = load(panel); }
static inline void pair(const Vector *in, float *panel) { store(panel, in[0]); }
static inline void store_rounded(float *to, Vector value) { store(to, value); }

#if defined(__AVX512BF16__)
static inline void unpair(const bf16 *panel, Vector *out) {
    __m512i both = _mm512_loadu_si512(panel);
    out[0] = (Vector)_mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    out[1] = (Vector)_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
}

static inline __m256i rounded(Vector value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }

static inline void pair(const Vector *in, bf16 *panel) {
    __m512i low = _mm512_cvtepu16_epi32(rounded(in[0])), high = _mm512_cvtepu16_epi32(rounded(in[1]));
    _mm512_storeu_si512(panel, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

static inline void store_rounded(bf16 *to, Vector value) { _mm256_storeu_si256((__m256i *)to, rounded(value)); }
#endif

// ---- the product

template <int N>
static inline void multiply(const float *a, size_t row, size_t step, const float *panel, int steps, Vector (*sum)[VECTORS]) {
    for (int i = 0; i < steps; i++, a += step, panel += WIDTH) {
        Vector b[VECTORS];
        for (int v = 0; v < VECTORS; v++) b[v] = load(panel + v * LANES);
        for (int r = 0; r < N; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] += a[r * row] * b[v];
    }
}

#if defined(__AVX512BF16__)
template <int N>
static inline void multiply(const bf16 *a, size_t row, size_t step, const bf16 *panel, int steps, Vector (*sum)[VECTORS]) {
    for (int i = 0; i < steps; i++, a += step, panel += 2 * WIDTH) {
        __m512bh b[VECTORS];
        for (int v = 0; v < VECTORS; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + 2 * v * LANES);
        for (int r = 0; r < N; r++) {
            int both;
            memcpy(&both, a + r * row, 4);
            __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < VECTORS; v++) sum[r][v] = (Vector)_mm512_dpbf16_ps((__m512)sum[r][v], factor, b[v]);
        }
    }
}
#endif

// out[r] += a[r] . panel for N rows; `bias` given: out[r] = bias + a[r] . panel
template <class T, int N>
static void add_rows(const T *a, size_t row, size_t step, const T *panel, int steps, float *out, size_t stride,
                     const float *bias) {
    Vector sum[N][VECTORS];
    for (int r = 0; r < N; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = load((bias ? bias : out + r * stride) + v * LANES);
    multiply<N>(a, row, step, panel, steps, sum);
    for (int r = 0; r < N; r++)
        for (int v = 0; v < VECTORS; v++) store(out + r * stride + v * LANES, sum[r][v]);
}

template <class T>
static void add_product(const T *a, size_t row, size_t step, int rows, const T *panel, int steps, float *out,
                        size_t stride, const float *bias = nullptr) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS) add_rows<T, ROWS>(a + r * row, row, step, panel, steps, out + r * stride, stride, bias);
    if (r + 4 <= rows) add_rows<T, 4>(a + r * row, row, step, panel, steps, out + r * stride, stride, bias), r += 4;
    for (; r < rows; r++) add_rows<T, 1>(a + r * row, row, step, panel, steps, out + r * stride, stride, bias);
}

// ---- layouts

static inline int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// WIDTH numbers of row `i` of W [rows columns] from column `c` on; 0 past the ends.
static inline const float *part(const float *W, int64_t rows, int64_t columns, int64_t i, int64_t c, float *room) {
    if (i < rows && c + WIDTH <= columns) return W + i * columns + c;
    for (int k = 0; k < WIDTH; k++) room[k] = i < rows && c + k < columns ? W[i * columns + c + k] : 0;
    return room;
}

// Panel `c / WIDTH` of W [rows columns], summed over rows, of padded depth `depth`.
template <class T>
static void pair_panel(const float *W, int64_t rows, int64_t columns, int64_t c, int64_t depth, T *out) {
    constexpr int S = STEP<T>;
    float room[S][WIDTH];
    for (int64_t i = 0; i < depth; i += S, out += S * WIDTH) {
        const float *row[S];
        for (int s = 0; s < S; s++) row[s] = part(W, rows, columns, i + s, c, room[s]);
        for (int v = 0; v < WIDTH; v += LANES) {
            Vector in[S];
            for (int s = 0; s < S; s++) in[s] = load(row[s] + v);
            pair(in, out + v * S);
        }
    }
}

// Panel `i / WIDTH` of W^T, W [rows columns], summed over columns; `room` holds WIDTH rows of padded length `depth`.
template <class T>
static void pair_panel_transposed(const float *W, int64_t rows, int64_t columns, int64_t i, int64_t depth, T *room, T *out) {
    constexpr int S = STEP<T>;
    float piece[WIDTH];
    for (int64_t r = 0; r < WIDTH; r++)
        for (int64_t c = 0; c < depth; c += WIDTH) {
            const float *row = part(W, rows, columns, i + r, c, piece);
            for (int v = 0; v < WIDTH; v += LANES) store_rounded(room + r * depth + c + v, load(row + v));
        }
    struct Pair {
        T of[S];
    };
    const Pair *from = (const Pair *)room;
    Pair *to = (Pair *)out;
    for (int64_t c = 0; c < depth / S; c++)
        for (int64_t r = 0; r < WIDTH; r++) to[c * WIDTH + r] = from[r * (depth / S) + c];
}

// out [tile width] = sign * (x - shift) of `real` rows of x [.. columns], 0 past the ends.
static void centre(const float *x, int64_t columns, int64_t real, const float *shift, float sign, float *out, int64_t tile,
                   int64_t width) {
    for (int64_t r = 0; r < tile; r++, out += width) {
        int64_t count = r < real ? columns : 0;
        for (int64_t c = 0; c < count; c++) out[c] = sign * (shift ? x[r * columns + c] - shift[c] : x[r * columns + c]);
        std::fill(out + count, out + width, 0.f);
    }
}

// A tile of rows [tile width] into its place, row `first`, in panels that are paired along all `rows`.
template <class T>
static void pair_tile(const float *from, int64_t tile, int64_t width, T *to, int64_t rows, int64_t first) {
    constexpr int S = STEP<T>;
    for (int64_t c = 0; c < width; c += WIDTH)
        for (int64_t r = 0; r < tile; r += S)
            for (int v = 0; v < WIDTH; v += LANES) {
                Vector in[S];
                for (int k = 0; k < S; k++) in[k] = load(from + (r + k) * width + c + v);
                pair(in, to + c * rows + (first + r) * WIDTH + v * S);
            }
}
