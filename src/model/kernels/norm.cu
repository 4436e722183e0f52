// The kernels: what norm.h says, with the threads of a GPU. Compiled by NVRTC when a GPU is used.

#include "norm.h"

using namespace detco_norm;

namespace {

const u32 THREADS = 256;

// `lanes` channels' vectors across, the others down the rows.
struct Threads {
    float* room;  // THREADS * VECTOR floats
    u32 across;

    __device__ __forceinline__ u32 x() const { return blockIdx.x; }
    __device__ __forceinline__ u32 y() const { return blockIdx.y; }
    __device__ __forceinline__ u32 z() const { return blockIdx.z; }
    __device__ __forceinline__ u32 lanes() const { return across; }
    __device__ __forceinline__ u32 lane() const { return threadIdx.x % across; }
    __device__ __forceinline__ u32 depth() const { return THREADS / across; }
    __device__ __forceinline__ u32 down() const { return threadIdx.x / across; }

    // Sums over the threads of a lane, in the first of them.
    __device__ __forceinline__ void add_up(float (&values)[VECTOR]) {
        float* mine = room + threadIdx.x * VECTOR;
        for (u32 half = depth() / 2; half > 0; half /= 2) {
            if (down() >= half && down() < 2 * half) {
                for (int i = 0; i < VECTOR; i++) mine[i] = values[i];
            }
            __syncthreads();
            if (down() < half) {
                const float* other = mine + half * across * VECTOR;
                for (int i = 0; i < VECTOR; i++) values[i] += other[i];
            }
            __syncthreads();
        }
    }
};

}  // namespace

#define KERNELS(SUFFIX, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) add_moments_##SUFFIX(                                 \
        Map map, u32 lanes, const T* x, float* partial) {                                                   \
        __shared__ float room[THREADS * VECTOR];                                                            \
        Threads block = {room, lanes};                                                                      \
        add_moments(block, map, x, partial);                                                                \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) finish_moments_##SUFFIX(                              \
        Map map, const T* x, const float* partial, float* mean, float* rstd, float* variance) {             \
        i64 index = i64(blockIdx.x) * THREADS + threadIdx.x;                                                \
        if (index < i64(map.groups) * map.c) finish_moments(index, map, x, partial, mean, rstd, variance);  \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) normalise_##SUFFIX(                                   \
        Map map, u32 lanes, const T* x, const T* residual, const float* weight, const float* bias,          \
        const float* mean, const float* rstd, T* y) {                                                       \
        Threads block = {nullptr, lanes};                                                                   \
        normalise(block, map, x, residual, weight, bias, mean, rstd, y);                                    \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) add_gradients_##SUFFIX(                               \
        Map map, u32 lanes, const T* dy, const T* y, const T* x, const float* mean, const float* rstd,      \
        float* partial) {                                                                                   \
        __shared__ float room[THREADS * VECTOR];                                                            \
        Threads block = {room, lanes};                                                                      \
        add_gradients(block, map, dy, y, x, mean, rstd, partial);                                           \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) spread_gradients_##SUFFIX(                            \
        Map map, u32 lanes, const T* dy, const T* y, const T* x, const float* weight, const float* mean,    \
        const float* rstd, const float* sums, T* dx, T* d_residual, float* d_weight, float* d_bias) {       \
        Threads block = {nullptr, lanes};                                                                   \
        spread_gradients(block, map, dy, y, x, weight, mean, rstd, sums, dx, d_residual, d_weight, d_bias); \
    }

KERNELS(float, float)
KERNELS(bf16, bf16)

extern "C" __global__ void __launch_bounds__(256)
    finish_gradients_all(Map map, const float* partial, float* sums) {
    i64 index = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (index < i64(map.groups) * map.c) finish_gradients(index, map, partial, sums);
}
