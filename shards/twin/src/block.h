// A block of threads on the host.

#pragma once

#include "view.h"

#include <condition_variable>
#include <mutex>
#include <vector>

namespace detco {

// Lets all threads of a block wait for each other, again and again.
class Barrier {
public:
    explicit Barrier(u32 threads) : threads_(threads) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        u64 round = round_;
        if (++arrived_ == threads_) {
            arrived_ = 0;
            round_++;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return round_ != round; });
        }
    }

private:
    std::mutex mutex_;
    std::condition_variable all_;
    u64 round_ = 0;
    u32 arrived_ = 0;
    const u32 threads_;
};

struct HostBlock {
    u32 number;
    Barrier& barrier;
    std::vector<u32>& partial;

    u32 thread() const { return number; }
    u32 threads() const { return u32(partial.size()); }
    void wait() const { barrier.wait(); }
    void increment(u32* count) const { __atomic_fetch_add(count, 1u, __ATOMIC_RELAXED); }

    u32 sum(u32 value) const {
        partial[number] = value;
        wait();
        u32 total = 0;
        for (u32 part : partial) total += part;
        wait();
        return total;
    }
};

}  // namespace detco
