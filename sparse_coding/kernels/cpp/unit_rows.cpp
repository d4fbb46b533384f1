// Rows that are kept at unit norm, in one pass over memory each: see unit_rows.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "team.h"

static constexpr int64_t PIECE = 16384;  // numbers that a thread takes at once

template <class F> static void each_row(int64_t rows, int64_t width, int64_t threads, F f) {
    int64_t step = std::max<int64_t>(1, PIECE / width);
    std::atomic<int64_t> next{0};
    Team team(int(std::clamp<int64_t>((rows + step - 1) / step, 1, threads)));
    team.run([&](int) {
        for (int64_t first; (first = next.fetch_add(step)) < rows;)
            for (int64_t i = first; i < std::min(first + step, rows); i++) f(i * width);
    });
}

// gradient -= (gradient . atom) atom
extern "C" void project_rows(const float *atoms, float *gradients, int64_t rows, int64_t width, int64_t threads) {
    each_row(rows, width, threads, [=](int64_t at) {
        const float *atom = atoms + at;
        float *gradient = gradients + at, along = 0;
        for (int64_t j = 0; j < width; j++) along += atom[j] * gradient[j];
        for (int64_t j = 0; j < width; j++) gradient[j] -= along * atom[j];
    });
}

// row /= |row|; a zero row stays zero
extern "C" void normalise_rows(float *values, int64_t rows, int64_t width, int64_t threads) {
    each_row(rows, width, threads, [=](int64_t at) {
        float *row = values + at, squared = 0;
        for (int64_t j = 0; j < width; j++) squared += row[j] * row[j];
        float norm = std::max(std::sqrt(squared), std::numeric_limits<float>::min());
        for (int64_t j = 0; j < width; j++) row[j] /= norm;
    });
}
