// The kernels of src/model/kernels/norm.cu on the host, behind the signature of the driver's cuLaunchKernel:
// a fiber for each thread of a block, block after block. Between two barriers the threads run one after
// the other, in an order drawn anew each time: what a missing barrier would let slip is read too early or
// too late by some.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace {

struct Index {
    unsigned x, y, z;
};

Index threadIdx, blockIdx, gridDim;

// The threads of a block.
class Fibers {
public:
    // Runs `body` in each of `count` threads. Whether all met at the same barriers.
    template <class Body>
    bool run(unsigned count, Body& body) {
        threads_.resize(count);
        for (Thread& thread : threads_) {
            if (thread.stack.empty()) thread.stack.resize(64 << 10);
            thread.ended = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = &back_;
            body_ = [](void* body) { (*static_cast<Body*>(body))(); };
            argument_ = &body;
            makecontext(&thread.context, &Fibers::enter, 0);
        }
        std::vector<unsigned> order(count);
        std::iota(order.begin(), order.end(), 0u);
        while (true) {
            std::shuffle(order.begin(), order.end(), random_);
            for (unsigned number : order) {
                current_ = number;
                threadIdx = {number, 0, 0};
                swapcontext(&back_, &threads_[number].context);
            }
            auto ended = std::count_if(threads_.begin(), threads_.end(), [](auto& thread) { return thread.ended; });
            if (ended == long(count)) return true;
            if (ended != 0) return false;
        }
    }

    void wait() { swapcontext(&threads_[current_].context, &back_); }

private:
    struct Thread {
        ucontext_t context;
        std::vector<char> stack;
        bool ended;
    };

    static void enter();

    std::vector<Thread> threads_;
    ucontext_t back_;
    unsigned current_ = 0;
    void (*body_)(void*) = nullptr;
    void* argument_ = nullptr;
    std::minstd_rand random_;
};

Fibers fibers;

void Fibers::enter() {
    fibers.body_(fibers.argument_);
    fibers.threads_[fibers.current_].ended = true;
}

void __syncthreads() { fibers.wait(); }

}  // namespace

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static // one block at a time
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#include "norm.cu"

namespace {

template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<Arguments*>(arguments[I])...);
}

struct Kernel {
    const char* name;
    void (*run)(void** arguments);
};

template <auto KERNEL>
void run(void** arguments) {
    []<class... A>(void (*kernel)(A...), void** arguments) {
        call(kernel, arguments, std::index_sequence_for<A...>());
    }(KERNEL, arguments);
}

#define NAMED(NAME) Kernel{#NAME, run<NAME>}
const std::array KERNELS_BY_NAME = {
    NAMED(add_moments_float), NAMED(add_moments_bf16),
    NAMED(finish_moments_float), NAMED(finish_moments_bf16),
    NAMED(normalise_float), NAMED(normalise_bf16),
    NAMED(normalise_pooled_float), NAMED(normalise_pooled_bf16),
    NAMED(add_gradients_float), NAMED(add_gradients_bf16),
    NAMED(spread_gradients_float), NAMED(spread_gradients_bf16),
    NAMED(add_gradients_of_two_float), NAMED(add_gradients_of_two_bf16),
    NAMED(spread_gradients_of_two_float), NAMED(spread_gradients_of_two_bf16),
    NAMED(add_pooled_gradients_float), NAMED(add_pooled_gradients_bf16),
    NAMED(spread_pooled_gradients_float), NAMED(spread_pooled_gradients_bf16),
    NAMED(finish_gradients_all),
};

}  // namespace

// A kernel by its name; null if there is none.
extern "C" const void* kernel_of(const char* name) {
    for (const Kernel& kernel : KERNELS_BY_NAME)
        if (std::strcmp(kernel.name, name) == 0) return &kernel;
    return nullptr;
}

// As cuLaunchKernel, but done when it returns. 1 where the threads of a block missed each other.
extern "C" int launch(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
                      unsigned, unsigned, unsigned, void*, void** arguments, void**) {
    static std::mutex one;
    std::lock_guard<std::mutex> lock(one);
    auto body = [&] { static_cast<const Kernel*>(function)->run(arguments); };
    gridDim = {grid_x, grid_y, grid_z};
    for (unsigned z = 0; z < grid_z; z++)
        for (unsigned y = 0; y < grid_y; y++)
            for (unsigned x = 0; x < grid_x; x++) {
                blockIdx = {x, y, z};
                if (!fibers.run(threads, body)) return 1;
            }
    return 0;
}
