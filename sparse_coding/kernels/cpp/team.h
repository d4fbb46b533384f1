// The threads of one step, and a place where they wait for each other.
//
// They are those of torch's own OpenMP pool where it was handed over. Others would have to share the processors with
// it: after each of torch's operators its threads look out for the next for milliseconds.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel
typedef int (*TeamSize)();                                                // omp_get_num_threads
static Parallel pool_parallel = nullptr;
static TeamSize pool_size = nullptr;

extern "C" void use_pool(Parallel parallel, TeamSize size) { pool_parallel = parallel, pool_size = size; }

class Team {
  public:
    explicit Team(int size) : size_(size) {}

    // Run `work` on every thread of the team, this one among them.
    void run(const std::function<void(int)> &work) {
        if (size_ > 1 && pool_parallel) {
            Call call{work, size_};
            pool_parallel(&Call::join, &call, unsigned(size_), 0);
            if (!call.refused.load()) return;
        }
        std::vector<std::thread> others;
        for (int t = 1; t < size_; t++) others.emplace_back(work, t);
        work(0);
        for (auto &one : others) one.join();
    }

    // Wait until all have come; the last to come does `alone` first.
    template <class F> void meet(F alone) {
        int round = round_.load();
        if (arrived_.fetch_add(1) + 1 == size_) {
            alone();
            taken_.store(0);
            arrived_.store(0);
            round_.store(round + 1);
            round_.notify_all();
            return;
        }
        // mostly the others come at once; else the processor is for other programs
        for (int spins = 0; spins < 2000 && round_.load() == round; spins++) {
        }
        while (round_.load() == round) round_.wait(round);
    }

    void meet() {
        meet([] {});
    }

    // The next piece of `count` pieces that nobody has; -1 when all are taken.
    int next(int count) {
        int piece = taken_.fetch_add(1);
        return piece < count ? piece : -1;
    }

    int size() const { return size_; }

  private:
    struct Call {
        const std::function<void(int)> &work;
        int size;
        std::atomic<int> joined{0};
        std::atomic<bool> refused{false};  // the pool gave fewer threads than were asked for

        static void join(void *data) {
            Call &call = *static_cast<Call *>(data);
            if (pool_size() != call.size) call.refused.store(true);
            else call.work(call.joined.fetch_add(1));
        }
    };

    int size_;
    std::atomic<int> arrived_{0}, round_{0}, taken_{0};
};
