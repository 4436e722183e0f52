// The kernels: what norm.h says, with the threads of a GPU. Compiled by NVRTC when a GPU is used. No
// kernel's output is one of its inputs.

#include "norm.h"

using namespace detco_norm;

namespace {

const u32 THREADS = 256;

// `lanes` channels' vectors across, the others down the rows. The blocks that start first have the first
// rows of the first group, or the last of the last.
template <bool BACKWARDS>
struct Threads {
    float* room;  // THREADS * VECTOR floats
    u32 across;

    __device__ __forceinline__ u32 x() const { return blockIdx.x; }
    __device__ __forceinline__ u32 y() const { return BACKWARDS ? gridDim.y - 1 - blockIdx.y : blockIdx.y; }
    __device__ __forceinline__ u32 z() const { return BACKWARDS ? gridDim.z - 1 - blockIdx.z : blockIdx.z; }
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

// CHANNELS teams a block: what each reads of a share lies side by side.
const u32 CHANNELS = 8;

struct Team {
    double* room;  // THREADS doubles

    __device__ __forceinline__ u32 size() const { return THREADS / CHANNELS; }
    __device__ __forceinline__ u32 member() const { return threadIdx.x / CHANNELS; }
    __device__ __forceinline__ i64 index() const { return i64(blockIdx.x) * CHANNELS + threadIdx.x % CHANNELS; }

    // The sum over a team, in its first member.
    __device__ __forceinline__ double sum(double value) {
        room[threadIdx.x] = value;
        __syncthreads();
        for (u32 half = size() / 2; half > 0; half /= 2) {
            if (member() < half) room[threadIdx.x] += room[threadIdx.x + half * CHANNELS];
            __syncthreads();
        }
        return room[threadIdx.x];
    }
};

}  // namespace

#define KERNELS(SUFFIX, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                    \
        add_moments_##SUFFIX(Map map, u32 lanes, const T* __restrict__ x, float* __restrict__ partial) {    \
        __shared__ __align__(16) float room[THREADS * VECTOR];                                              \
        Threads<true> block = {room, lanes};                                                                \
        add_moments(block, map, x, partial);                                                                \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                       \
        finish_moments_##SUFFIX(Map map, const T* __restrict__ x, const float* __restrict__ partial,        \
                                float* __restrict__ mean, float* __restrict__ rstd,                         \
                                float* __restrict__ variance) {                                             \
        __shared__ double room[THREADS];                                                                    \
        Team team = {room};                                                                                 \
        finish_moments(team, team.index(), map, x, partial, mean, rstd, variance);                          \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, sizeof(T) == 2 ? 3 : 2)                               \
        normalise_##SUFFIX(Map map, u32 lanes, const T* __restrict__ x, By by,                              \
                           const T* __restrict__ residual, By other, T* __restrict__ y,                     \
                           u8* __restrict__ open) {                                                         \
        Threads<false> block = {nullptr, lanes};                                                            \
        normalise(block, map, x, by, residual, other, y, open);                                             \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        normalise_pooled_##SUFFIX(Map map, Pool pool, u32 lanes, const T* __restrict__ x, By by,            \
                                  T* __restrict__ y, u32* __restrict__ places) {                            \
        Threads<false> block = {nullptr, lanes};                                                            \
        normalise_pooled(block, map, pool, x, by, y, places);                                               \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        add_gradients_##SUFFIX(Map map, u32 lanes, const T* __restrict__ dy, const T* __restrict__ more,    \
                               const T* __restrict__ each, u32 pixels, const u8* __restrict__ open,         \
                               const T* __restrict__ x, By by, T* __restrict__ d_residual,                  \
                               float* __restrict__ partial) {                                               \
        __shared__ __align__(16) float room[THREADS * VECTOR];                                              \
        Threads<true> block = {room, lanes};                                                                \
        const Branch<T> of[] = {{x, by.weight, by.mean, by.rstd}};                                          \
        add_gradients(block, map, Direct<T>{dy, more, open, each, pixels}, of, d_residual, partial);        \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        spread_gradients_##SUFFIX(Map map, u32 lanes, const T* __restrict__ dy, const T* __restrict__ more, \
                                  const u8* __restrict__ open, const T* __restrict__ x, By by,              \
                                  const float* __restrict__ sums, T* __restrict__ dx,                       \
                                  float* __restrict__ d_weight, float* __restrict__ d_bias) {               \
        Threads<false> block = {nullptr, lanes};                                                            \
        const Branch<T> of[] = {{x, by.weight, by.mean, by.rstd}};                                          \
        const Gradients<T> to[] = {{dx, d_weight, d_bias}};                                                 \
        spread_gradients(block, map, Direct<T>{dy, more, open, nullptr, 0}, of, sums, to);                  \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        add_gradients_of_two_##SUFFIX(Map map, u32 lanes, const T* __restrict__ dy, const T* __restrict__ more,\
                                      const u8* __restrict__ open, const T* __restrict__ x, By by,          \
                                      const T* __restrict__ residual, By other,                             \
                                      float* __restrict__ partial) {                                        \
        __shared__ __align__(16) float room[THREADS * VECTOR];                                              \
        Threads<true> block = {room, lanes};                                                                \
        const Branch<T> of[] = {{x, by.weight, by.mean, by.rstd},                                           \
                                {residual, other.weight, other.mean, other.rstd}};                          \
        add_gradients(block, map, Direct<T>{dy, more, open, nullptr, 0}, of, static_cast<T*>(nullptr),      \
                      partial);                                                                             \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        spread_gradients_of_two_##SUFFIX(Map map, u32 lanes, const T* __restrict__ dy,                      \
                                         const T* __restrict__ more, const u8* __restrict__ open,           \
                                         const T* __restrict__ x, By by, const T* __restrict__ residual,    \
                                         By other, const float* __restrict__ sums,                          \
                                         Gradients<T> to_x, Gradients<T> to_residual) {                     \
        Threads<false> block = {nullptr, lanes};                                                            \
        const Branch<T> of[] = {{x, by.weight, by.mean, by.rstd},                                           \
                                {residual, other.weight, other.mean, other.rstd}};                          \
        const Gradients<T> to[] = {to_x, to_residual};                                                      \
        spread_gradients(block, map, Direct<T>{dy, more, open, nullptr, 0}, of, sums, to);                  \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        add_pooled_gradients_##SUFFIX(Map map, Pool pool, u32 lanes, const T* __restrict__ dy,              \
                                      const u32* __restrict__ places, const T* __restrict__ x, By by,       \
                                      float* __restrict__ partial) {                                        \
        __shared__ __align__(16) float room[THREADS * VECTOR];                                              \
        Threads<true> block = {room, lanes};                                                                \
        const Branch<T> of[] = {{x, by.weight, by.mean, by.rstd}};                                          \
        add_gradients(block, map, Pooled<T>{pool, dy, places}, of, static_cast<T*>(nullptr), partial);      \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                    \
        spread_pooled_gradients_##SUFFIX(Map map, Pool pool, u32 lanes, const T* __restrict__ dy,           \
                                         const u32* __restrict__ places, const T* __restrict__ x, By by,    \
                                         const float* __restrict__ sums, Gradients<T> to_x) {               \
        Threads<false> block = {nullptr, lanes};                                                            \
        const Branch<T> of[] = {{x, by.weight, by.mean, by.rstd}};                                          \
        const Gradients<T> to[] = {to_x};                                                                   \
        spread_gradients(block, map, Pooled<T>{pool, dy, places}, of, sums, to);                            \
    }

KERNELS(float, float)
KERNELS(bf16, bf16)

extern "C" __global__ void __launch_bounds__(256)
    finish_gradients_all(Map map, u32 maps, const float* __restrict__ partial, float* __restrict__ sums) {
    __shared__ double room[THREADS];
    Team team = {room};
    finish_gradients(team, team.index(), maps, map, partial, sums);
}
