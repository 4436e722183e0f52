// The kernels on the host, for the tests: the source of view.h with threads of the host's.

#include "block.h"

#include <thread>
#include <vector>

using namespace detco;

// All views of a batch, one after the other, each by a block of `threads`. 0, or 1 where memory ran
// out. The addresses in the batch are the host's; `shared_bytes` is what a launch would ask for.
extern "C" int detco_views_twin(const Batch* batch, u32 shared_bytes, u32 threads) noexcept try {
    Barrier barrier(threads);
    std::vector<u32> partial(threads);
    std::vector<u64> shared(shared_bytes / 8 + 1);
    std::vector<u64> scratch(batch->scratch_bytes / 8 + 1);
    auto work = [&](u32 number) {
        HostBlock block = {number, barrier, partial};
        u8* own = reinterpret_cast<u8*>(shared.data());
        fill_table(block, *batch, own);
        for (u32 i = 0; i < batch->count; i++) {
            block.wait();
            const View& view = reinterpret_cast<const View*>(batch->views)[i];
            render(block, *batch, view, own, reinterpret_cast<u8*>(scratch.data()));
        }
    };
    std::vector<std::thread> others;
    for (u32 number = 1; number < threads; number++) others.emplace_back(work, number);
    work(0);
    for (std::thread& other : others) other.join();
    return 0;
} catch (...) {
    return 1;
}
