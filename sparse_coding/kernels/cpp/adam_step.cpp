// Adam on the parameters of a stack in one pass, a piece of a member's parameter at a time: see adam_native.py.
//
// The operations are those of torch's fused kernel in their order, each rounded as there; the adds that it contracts are
// written as fma, so that no compiler chooses others.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "team.h"

struct AdamProblem {
    int64_t members, parameters, threads;
    double beta1, beta2, eps;
    const double *lrs;                         // [M]
    const int64_t *sizes;                      // of each parameter of one member
    float *const *values, *const *steps;       // [M size] and [M], of each parameter
    float *const *moment1, *const *moment2, *const *gradients;
};

static constexpr int64_t PIECE = 16384;

static void update(const AdamProblem &p, float *value, float *m, float *v, const float *g, int64_t count, double lr,
                   double step) {
    float weight = float(1 - p.beta1), beta2 = float(p.beta2), square = float(1 - p.beta2), eps = float(p.eps);
    float size = float(lr / (1 - std::pow(p.beta1, step))), root = float(std::sqrt(1 - std::pow(p.beta2, step)));
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) {
        m[i] = std::fma(weight, g[i] - m[i], m[i]);
        v[i] = std::fma(square * g[i], g[i], v[i] * beta2);
        value[i] -= size * m[i] / (std::sqrt(v[i]) / root + eps);
    }
}

// 0: done. 1: this CPU has no fma, or the mean gradient would be rounded otherwise; nothing was computed.
extern "C" int adam_step(const AdamProblem *given) {
    const AdamProblem &p = *given;
#if !defined(__FP_FAST_FMAF)
    return 1;
#endif
    if (1 - p.beta1 >= 0.5) return 1;
    int64_t total = 0;
    for (int64_t k = 0; k < p.parameters; k++) total += (p.sizes[k] + PIECE - 1) / PIECE * p.members;
    std::atomic<int64_t> next{0};
    Team team(int(std::min(p.threads, total)));
    team.run([&](int) {
        for (int64_t i; (i = next.fetch_add(1)) < total;) {
            int64_t k = 0, at = i, pieces;
            while (at >= (pieces = (p.sizes[k] + PIECE - 1) / PIECE) * p.members) at -= pieces * p.members, k++;
            int64_t member = at / pieces, first = at % pieces * PIECE, start = member * p.sizes[k] + first;
            update(p, p.values[k] + start, p.moment1[k] + start, p.moment2[k] + start, p.gradients[k] + start,
                   std::min(PIECE, p.sizes[k] - first), p.lrs[member], double(p.steps[k][member]) + 1);
        }
    });
    for (int64_t k = 0; k < p.parameters; k++)
        for (int64_t member = 0; member < p.members; member++) p.steps[k][member] += 1;
    return 0;
}
