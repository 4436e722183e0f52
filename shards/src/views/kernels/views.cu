// The kernels: what view.h says, with the threads of a GPU. Compiled by NVRTC when a device is
// opened.

#include "view.h"

using namespace detco;

namespace {

const u32 WARP = 32;

// The threads of one block. `partial` has a place for each warp.
struct DeviceBlock {
    u32* partial;

    __device__ __forceinline__ u32 thread() const { return threadIdx.x; }
    __device__ __forceinline__ u32 threads() const { return blockDim.x; }
    __device__ __forceinline__ void wait() const { __syncthreads(); }

    __device__ __forceinline__ void increment(u32* count) const { atomicAdd(count, 1u); }

    // The sum over all threads, in each of them. Waits for all, before and after. A block has whole
    // warps.
    __device__ __forceinline__ u32 sum(u32 value) const {
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
            value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
        }
        if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
        __syncthreads();
        u32 total = 0;
        for (u32 warp = 0; warp < blockDim.x / WARP; warp++) total += partial[warp];
        // Nobody writes a next sum before everybody has read this one.
        __syncthreads();
        return total;
    }
};

}  // namespace

// Views of a batch: each block takes every gridDim.x-th. Dynamic shared memory as `lay_out` has it.
extern "C" __global__ void __launch_bounds__(768) detco_views(const __grid_constant__ Batch batch) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 partial[32];
    __shared__ View view;
    DeviceBlock block = {partial};
    u8* scratch = reinterpret_cast<u8*>(batch.scratch) + blockIdx.x * batch.scratch_bytes;
    fill_table(block, batch, shared);
    for (u32 i = blockIdx.x; i < batch.count; i += gridDim.x) {
        // The view before is done with its numbers.
        __syncthreads();
        const View* views = reinterpret_cast<const View*>(batch.views);
        const u32* from = reinterpret_cast<const u32*>(views + i);
        for (u32 word = threadIdx.x; word < sizeof(View) / 4; word += blockDim.x) {
            reinterpret_cast<u32*>(&view)[word] = from[word];
        }
        __syncthreads();
        render(block, batch, view, shared, scratch);
    }
}

// Bytes that the host rendered, `[..., 3]`, to the same numbers. Reads `count` bytes, writes 2 or 4
// times as many.
extern "C" __global__ void __launch_bounds__(1024)
    detco_normalise(const __grid_constant__ Batch batch, const u8* from, const u64 out,
                    const u64 count) {
    __shared__ __align__(16) float table[3 * 256];
    __shared__ u32 partial[32];
    DeviceBlock block = {partial};
    fill_table(block, batch, reinterpret_cast<u8*>(table));
    __syncthreads();
    u64 step = u64(gridDim.x) * blockDim.x;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        put(batch, out, i, table[(i % 3) * 256 + from[i]]);
    }
}
