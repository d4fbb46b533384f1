// Exact selection in a row of scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product.h"

// Positions of all values that are not below `floor` (not `<=` where `strict`), in order; returns how many. `out` has
// room for n + 16. NaN is never below.
static int positions(const float *v, int n, float floor, bool strict, int32_t *out) {
    int count = 0, i = 0;
#if defined(__AVX512F__)
    __m512 bound = _mm512_set1_ps(floor);
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= n; i += 16) {
        __m512 x = _mm512_loadu_ps(v + i);
        __mmask16 kept = strict ? _mm512_cmp_ps_mask(x, bound, _CMP_NLE_UQ) : _mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ);
        if (!kept) continue;
        // through a register: a compressing store to memory is slow on some CPUs
        __m512i at = _mm512_maskz_compress_epi32(kept, _mm512_add_epi32(place, _mm512_set1_epi32(i)));
        _mm512_storeu_si512(out + count, at);
        count += __builtin_popcount(kept);
    }
#endif
    for (; i < n; i++) {
        out[count] = i;
        count += strict ? !(v[i] <= floor) : !(v[i] < floor);
    }
    return count;
}

// How many of n keys, a multiple of LANES, are at least `bound`.
static inline int64_t at_least(const uint32_t *keys, int64_t n, uint32_t bound) {
    int64_t count = 0;
#if defined(__AVX512F__)
    __m512i least = _mm512_set1_epi32(int(bound));
    for (int64_t i = 0; i < n; i += 16)
        count += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), least));
#else
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += keys[i] >= bound;
    count = sum;
#endif
    return count;
}

// The k-th largest of n numbers, which are overwritten, as are LANES places behind them: bit by bit, counting how many
// are at least as large, until those are k. Faster than std::nth_element, whose branches cannot be foreseen.
static float kth_of(float *numbers, int64_t n, int64_t k) {
    typedef uint32_t Bits __attribute__((may_alias));
    Bits *keys = (Bits *)numbers;  // in the order of the numbers
    for (int64_t i = 0; i < n; i++) keys[i] ^= uint32_t(int32_t(keys[i]) >> 31) | 0x80000000u;
    for (int i = 0; i < LANES; i++) keys[n + i] = 0;
    int64_t padded = (n + LANES - 1) / LANES * LANES;
    uint32_t found = 0, least = 0xffffffffu;
    for (int bit = 31; bit >= 0; bit--) {
        uint32_t tried = found | 1u << bit;
        int64_t count = at_least((const uint32_t *)keys, padded, tried);
        if (count >= k) found = tried;
        if (count == k) break;
    }
    for (int64_t i = 0; i < n; i++) least = keys[i] >= found && keys[i] < least ? keys[i] : least;
    least ^= least >> 31 ? 0x80000000u : 0xffffffffu;
    float out;
    memcpy(&out, &least, 4);
    return out;
}

// Positions, in order, of all of n numbers that are not below a bound, which at least k of them reach and few others
// do; returns how many. The bound is the k-th largest of the maxima of small groups. NaN is always among them. k <= n;
// `room` holds n + 16 floats, `out` n + 16 positions.
static int candidates(const float *v, int n, int k, float *room, int32_t *out) {
    int group = 16;  // 1: the bound is the k-th largest itself
    while (group > 1 && n / group < 2 * k + LANES) group /= 2;
    int blocks = n / (group * LANES), rest = blocks * group * LANES;
    for (int b = 0; b < blocks; b++) {
        const Vector *in = (const Vector *)(v + b * group * LANES);
        Vector most = in[0], other = in[group / 2];
        for (int g = 1; g < group / 2; g++) {
            most = in[g] > most ? in[g] : most;
            other = in[group / 2 + g] > other ? in[group / 2 + g] : other;
        }
        ((Vector *)room)[b] = most > other ? most : other;
    }
    std::copy(v + rest, v + n, room + blocks * LANES);
    return positions(v, n, kth_of(room, blocks * LANES + n - rest, k), false, out);
}

// The k-th largest of n numbers.
static float kth_largest(const float *v, int n, int k, float *room, int32_t *places) {
    int count = candidates(v, n, k, room, places);
    for (int i = 0; i < count; i++) room[i] = v[places[i]];
    return kth_of(room, count, k);
}

// Positions of the k largest of n scores, in order; of equal ones the first. Returns how many: k, or n where that is
// less. A NaN counts as the largest, and as the only one, since nothing computed with it is a number either.
static int largest(const float *v, int n, int k, float *room, int32_t *out) {
    k = std::min(k, n);
    int count = candidates(v, n, k, room, out);
    for (int i = 0; i < count; i++) {
        room[i] = v[out[i]];
        if (room[i] != room[i]) return out[0] = out[i], 1;
    }
    if (count == k) return k;
    float last = kth_of(room, count, k);
    int ties = k, kept = 0;
    for (int i = 0; i < count; i++) ties -= v[out[i]] > last;
    for (int i = 0; i < count; i++) {  // no branches: they could not be foreseen
        float score = v[out[i]];
        bool tie = score == last;
        out[kept] = out[i];
        kept += (score > last) | (tie & (ties > 0));
        ties -= tie;
    }
    return kept;
}
