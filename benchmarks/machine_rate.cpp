// The rate of matrix products on data that is in cache already: what benchmarks/scaling.py draws its limit from.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "../sparse_coding/kernels/cpp/dense_tile.h"

static volatile float kept;

template <class T> static double rate(int threads, double seconds) {
    constexpr int TILE = 96, DEPTH = 512;
    std::atomic<int64_t> products{0};
    auto work = [&] {
        std::vector<T> a(TILE * DEPTH), panel(DEPTH * WIDTH);
        std::vector<float> out(TILE * WIDTH);
        auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
        while (std::chrono::steady_clock::now() < until) {
            for (int i = 0; i < 20; i++)
                add_product(a.data(), DEPTH, STEP<T>, TILE, panel.data(), DEPTH / STEP<T>, out.data(), WIDTH);
            products += 20;
        }
        kept = out[0];
    };
    auto began = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(work);
    work();
    for (auto &one : others) one.join();
    std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
    return 2.0 * TILE * DEPTH * WIDTH * double(products.load()) / taken.count();
}

// FLOP per second on `threads` threads; 0 for bf16 where the CPU does not multiply it.
extern "C" double product_rate(int half, int threads, double seconds) {
    if (!half) return rate<float>(threads, seconds);
#if defined(__AVX512BF16__)
    return rate<bf16>(threads, seconds);
#else
    return 0;
#endif
}
