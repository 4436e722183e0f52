// Batch normalisation of groups of a batch, with the ReLU and the residual that follow it, for maps whose
// channels are innermost: `[groups, rows, c]`, where a row is a pixel of a sample and a group a block of
// whole samples.
//
// libtorch's own would be called group by group, its results copied together, the ReLU and the addition
// be passes of their own. Here a map of m bytes is moved
//
//   forward:   read for the moments; read (and the residual), written: 3 m (4 m)
//   backward:  gradient, result and map read; the same again, written: 7 m (8 m: the residual's gradient)
//
// where the calls move 5 m and 2 m for the ReLU (7 m) forward, and 12 m (15 m) backward.
//
// The same source is the GPU's kernels (norm.cu, through NVRTC) and plain C++ (the shim), where tests hold
// it against libtorch's. What differs is the `Block`: which of how many threads this is, and how they add
// up. A block's threads stand in a rectangle, `lanes()` x `depth()`: a lane has VECTOR channels, and goes
// down every depth()-th row of the block's share of rows.
//
// Moments are sums over x - k and its square, where k is the group's first value of the channel: near the
// mean wherever the spread is not much smaller than it, so that float32 suffices without a second pass.

#pragma once

#ifdef __CUDACC__
#define DETCO_DEVICE __device__ __forceinline__
#define DETCO_UNROLL _Pragma("unroll 4") // several rows' loads in flight
#else
#define DETCO_DEVICE inline
#define DETCO_UNROLL
#include <math.h>
#endif

namespace detco_norm {

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// bfloat16: the upper half of a float.
struct bf16 {
    u16 bits;
};

DETCO_DEVICE float wide(float x) { return x; }

DETCO_DEVICE float wide(bf16 x) {
    union {
        u32 bits;
        float value;
    } both;
    both.bits = u32(x.bits) << 16;
    return both.value;
}

DETCO_DEVICE void narrow(float x, float& out) { out = x; }

// To the nearest, ties to even; what is not a number stays none.
DETCO_DEVICE void narrow(float x, bf16& out) {
    union {
        float value;
        u32 bits;
    } both;
    both.value = x;
    u32 bits = both.bits;
    out.bits = (bits & 0x7FFFFFFFu) > 0x7F800000u ? u16((bits >> 16) | 0x40u)
                                                  : u16((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Channels of a thread: 16 bytes of bfloat16, 32 of float.
const int VECTOR = 8;

template <class T>
struct alignas(16) Eight {
    T at[VECTOR];
};

template <class T>
DETCO_DEVICE void read(const T* from, float (&values)[VECTOR]) {
    const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(from);
    for (int i = 0; i < VECTOR; i++) values[i] = wide(eight.at[i]);
}

template <class T>
DETCO_DEVICE void write(T* to, const float (&values)[VECTOR]) {
    Eight<T> eight;
    for (int i = 0; i < VECTOR; i++) narrow(values[i], eight.at[i]);
    *reinterpret_cast<Eight<T>*>(to) = eight;
}

// A map and how blocks share it: block (x, y, z) has channels from `x * lanes * VECTOR`, share y of the
// rows, group z.
struct Map {
    i64 rows;    // of a group
    u32 c;       // channels, a multiple of VECTOR
    u32 groups;
    u32 shares;  // of a group's rows
    u32 relu;
    float eps;
};

// What a thread works on.
struct Part {
    bool used;       // whether its channels exist
    i64 channel;     // its first
    i64 group_at;    // offset of the group's first row at that channel
    i64 first, end;  // its rows
};

template <class Block>
DETCO_DEVICE Part part_of(const Block& block, const Map& map) {
    Part part;
    part.channel = (i64(block.x()) * block.lanes() + block.lane()) * VECTOR;
    part.used = part.channel < map.c;
    part.group_at = i64(block.z()) * map.rows * map.c + part.channel;
    i64 share = (map.rows + map.shares - 1) / map.shares;
    part.first = i64(block.y()) * share;
    part.end = part.first + share < map.rows ? part.first + share : map.rows;
    return part;
}

// ---- Forward.

// Adds up x - k and its square. Writes partial sums `[2, shares, groups, c]`.
template <class T, class Block>
DETCO_DEVICE void add_moments(Block& block, const Map& map, const T* x, float* partial) {
    const Part part = part_of(block, map);
    float k[VECTOR] = {}, sum[VECTOR] = {}, square[VECTOR] = {};
    if (part.used) {
        read(x + part.group_at, k);
        DETCO_UNROLL
        for (i64 row = part.first + block.down(); row < part.end; row += block.depth()) {
            float values[VECTOR];
            read(x + part.group_at + row * map.c, values);
            for (int i = 0; i < VECTOR; i++) {
                float d = values[i] - k[i];
                sum[i] += d;
                square[i] += d * d;
            }
        }
    }
    block.add_up(sum);
    block.add_up(square);
    if (part.used && block.down() == 0) {
        i64 width = i64(map.groups) * map.c;
        i64 to = block.y() * width + i64(block.z()) * map.c + part.channel;
        for (int i = 0; i < VECTOR; i++) {
            partial[to + i] = sum[i];
            partial[map.shares * width + to + i] = square[i];
        }
    }
}

// Moments of one channel of one group, of which there are groups * c. Writes `[groups, c]` each.
template <class T>
DETCO_DEVICE void finish_moments(i64 index, const Map& map, const T* x, const float* partial, float* mean,
                                 float* rstd, float* variance) {
    i64 width = i64(map.groups) * map.c;
    double sum = 0, square = 0;
    for (u32 share = 0; share < map.shares; share++) {
        sum += partial[share * width + index];
        square += partial[(map.shares + share) * width + index];
    }
    i64 group = index / map.c;
    float k = wide(x[group * map.rows * map.c + index % map.c]);
    double n = double(map.rows), offset = sum / n;
    double spread = square - sum * offset;
    if (spread < 0) spread = 0;
    mean[index] = float(k + offset);
    rstd[index] = float(1.0 / sqrt(spread / n + double(map.eps)));
    variance[index] = float(spread / (n > 1 ? n - 1 : 1)); // unbiased, as running statistics have it
}

// y = relu(weight * (x - mean) * rstd + bias + residual); residual may be null.
template <class T, class Block>
DETCO_DEVICE void normalise(Block& block, const Map& map, const T* x, const T* residual, const float* weight,
                            const float* bias, const float* mean, const float* rstd, T* y) {
    const Part part = part_of(block, map);
    if (!part.used) return;
    float scale[VECTOR], shift[VECTOR];
    i64 at = i64(block.z()) * map.c + part.channel;
    for (int i = 0; i < VECTOR; i++) {
        scale[i] = weight[part.channel + i] * rstd[at + i];
        shift[i] = bias[part.channel + i] - mean[at + i] * scale[i];
    }
    DETCO_UNROLL
    for (i64 row = part.first + block.down(); row < part.end; row += block.depth()) {
        i64 place = part.group_at + row * map.c;
        float values[VECTOR];
        read(x + place, values);
        for (int i = 0; i < VECTOR; i++) values[i] = values[i] * scale[i] + shift[i];
        if (residual) {
            float more[VECTOR];
            read(residual + place, more);
            for (int i = 0; i < VECTOR; i++) values[i] += more[i];
        }
        if (map.relu) {
            // Not `max`: what is not a number must come through, as it does in libtorch.
            for (int i = 0; i < VECTOR; i++) values[i] = values[i] < 0 ? 0 : values[i];
        }
        write(y + place, values);
    }
}

// ---- Backward. The gradient before the ReLU is the one behind it where the result is above 0.

template <class T>
DETCO_DEVICE void read_gradient(const Map& map, const T* dy, const T* y, i64 place, float (&g)[VECTOR]) {
    read(dy + place, g);
    if (map.relu) {
        float result[VECTOR];
        read(y + place, result);
        for (int i = 0; i < VECTOR; i++) g[i] = result[i] <= 0 ? 0 : g[i];
    }
}

// Adds up g and g * xhat. Writes partial sums `[2, shares, groups, c]`.
template <class T, class Block>
DETCO_DEVICE void add_gradients(Block& block, const Map& map, const T* dy, const T* y, const T* x,
                                const float* mean, const float* rstd, float* partial) {
    const Part part = part_of(block, map);
    float sum[VECTOR] = {}, dot[VECTOR] = {};
    i64 width = i64(map.groups) * map.c;
    if (part.used) {
        float m[VECTOR], r[VECTOR];
        i64 at = i64(block.z()) * map.c + part.channel;
        for (int i = 0; i < VECTOR; i++) {
            m[i] = mean[at + i];
            r[i] = rstd[at + i];
        }
        DETCO_UNROLL
        for (i64 row = part.first + block.down(); row < part.end; row += block.depth()) {
            i64 place = part.group_at + row * map.c;
            float g[VECTOR], values[VECTOR];
            read_gradient(map, dy, y, place, g);
            read(x + place, values);
            for (int i = 0; i < VECTOR; i++) {
                sum[i] += g[i];
                dot[i] += g[i] * ((values[i] - m[i]) * r[i]);
            }
        }
    }
    block.add_up(sum);
    block.add_up(dot);
    if (part.used && block.down() == 0) {
        i64 to = block.y() * width + i64(block.z()) * map.c + part.channel;
        for (int i = 0; i < VECTOR; i++) {
            partial[to + i] = sum[i];
            partial[map.shares * width + to + i] = dot[i];
        }
    }
}

// Sums of one channel of one group, into `sums` `[2, groups, c]`. `index` counts in `[groups, c]`.
DETCO_DEVICE void finish_gradients(i64 index, const Map& map, const float* partial, float* sums) {
    i64 width = i64(map.groups) * map.c;
    double sum = 0, dot = 0;
    for (u32 share = 0; share < map.shares; share++) {
        sum += partial[share * width + index];
        dot += partial[(map.shares + share) * width + index];
    }
    sums[index] = float(sum);
    sums[width + index] = float(dot);
}

// Gradients of weight and bias, `[c]`: the sums over all groups. For the blocks of the first share of the
// first group, one thread a vector of channels.
template <class Block>
DETCO_DEVICE void add_groups(Block& block, const Map& map, const Part& part, const float* sums,
                             float* d_weight, float* d_bias) {
    if (block.y() > 0 || block.z() > 0 || block.down() > 0) return;
    i64 width = i64(map.groups) * map.c;
    for (int i = 0; i < VECTOR; i++) {
        double sum = 0, dot = 0;
        for (u32 group = 0; group < map.groups; group++) {
            i64 index = i64(group) * map.c + part.channel + i;
            sum += sums[index];
            dot += sums[width + index];
        }
        d_bias[part.channel + i] = float(sum);
        d_weight[part.channel + i] = float(dot);
    }
}

// dx = weight * rstd * (g - mean of g - xhat * mean of g * xhat); the residual's gradient is g itself,
// written where `d_residual` is not null. Adds up the gradients of weight and bias on the way.
template <class T, class Block>
DETCO_DEVICE void spread_gradients(Block& block, const Map& map, const T* dy, const T* y, const T* x,
                                   const float* weight, const float* mean, const float* rstd,
                                   const float* sums, T* dx, T* d_residual, float* d_weight,
                                   float* d_bias) {
    const Part part = part_of(block, map);
    if (!part.used) return;
    add_groups(block, map, part, sums, d_weight, d_bias);
    float m[VECTOR], r[VECTOR], scale[VECTOR], g_mean[VECTOR], dot_mean[VECTOR];
    i64 at = i64(block.z()) * map.c + part.channel;
    i64 width = i64(map.groups) * map.c;
    float share = float(1.0 / double(map.rows));
    for (int i = 0; i < VECTOR; i++) {
        m[i] = mean[at + i];
        r[i] = rstd[at + i];
        scale[i] = weight[part.channel + i] * r[i];
        g_mean[i] = sums[at + i] * share;
        dot_mean[i] = sums[width + at + i] * share;
    }
    DETCO_UNROLL
    for (i64 row = part.first + block.down(); row < part.end; row += block.depth()) {
        i64 place = part.group_at + row * map.c;
        float g[VECTOR], values[VECTOR];
        read_gradient(map, dy, y, place, g);
        if (d_residual) write(d_residual + place, g);
        read(x + place, values);
        for (int i = 0; i < VECTOR; i++) {
            float xhat = (values[i] - m[i]) * r[i];
            values[i] = scale[i] * (g[i] - g_mean[i] - xhat * dot_mean[i]);
        }
        write(dx + place, values);
    }
}

}  // namespace detco_norm
