// Batch normalisation of groups of a batch, with the ReLU and the residual that follow it, for maps whose
// channels are innermost: `[groups, rows, c]`, where a row is a pixel of a sample and a group a block of
// whole samples.
//
// libtorch's own would be called group by group, its results copied together, the ReLU, the addition and
// the sum of two readers' gradients be passes of their own. Here a map of m bytes is moved
//
//   forward:   read for the moments; read, written: 3 m
//     and a residual: read in the second pass: 4 m
//   backward:  gradient and map read; the same again, written: 5 m
//     and a residual: two gradients and the map read, their masked sum written, which is the residual's
//     gradient; that sum and the map read, written: 7 m
//
// and a bit a value, written forward and read backward: whether the ReLU let it through. The calls move 5 m
// and 2 m for the ReLU (7 m) forward, and 12 m (15 m, and 3 m for the sum) backward.
//
// The first of two passes over a map goes from its end to its beginning: what the convolution before it
// wrote last, and what the second pass reads first, may then still lie in the GPU's cache.
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
#define DETCO_UNROLL _Pragma("unroll")
#define DETCO_UNROLL_ROWS _Pragma("unroll 4") // several rows' loads in flight
#else
#define DETCO_DEVICE inline
#define DETCO_UNROLL
#define DETCO_UNROLL_ROWS
#include <math.h>
#endif

namespace detco_norm {

typedef unsigned char u8;
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

// As it lies in memory: what uses a value waits for it, so that loads come first and together.
template <class T>
DETCO_DEVICE Eight<T> load(const T* from) {
    return *reinterpret_cast<const Eight<T>*>(from);
}

template <class T>
DETCO_DEVICE void widen(const Eight<T>& eight, float (&values)[VECTOR]) {
    for (int i = 0; i < VECTOR; i++) values[i] = wide(eight.at[i]);
}

template <class T>
DETCO_DEVICE void read(const T* from, float (&values)[VECTOR]) {
    widen(load(from), values);
}

DETCO_DEVICE void write(float* to, const float (&values)[VECTOR]) {
    Eight<float> eight;
    for (int i = 0; i < VECTOR; i++) eight.at[i] = values[i];
    *reinterpret_cast<Eight<float>*>(to) = eight;
}

// Two neighbours.
DETCO_DEVICE u32 pair(float low, float high) {
    bf16 a, b;
    narrow(low, a);
    narrow(high, b);
    return u32(a.bits) | u32(b.bits) << 16;
}

struct alignas(16) Words {
    u32 at[VECTOR / 2];
};

// One store of 16 bytes, which NVRTC does not make of four words by itself. No kernel reads what it writes,
// so the compiler need not be told that this touches memory, and loads of later rows may come before it.
DETCO_DEVICE void store(void* to, const Words& words) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3]));
#else
    *static_cast<Words*>(to) = words;
#endif
}

DETCO_DEVICE void write(bf16* to, const float (&values)[VECTOR]) {
    Words words;
    for (int i = 0; i < VECTOR / 2; i++) words.at[i] = pair(values[2 * i], values[2 * i + 1]);
    store(to, words);
}

// As it would be written and read again.
template <class T>
DETCO_DEVICE float rounded(float x) {
    T out;
    narrow(x, out);
    return wide(out);
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

// Rows that a thread takes together.
const int ROWS = 2;

// Whether a row is a thread's, and where its vector lies.
struct Place {
    bool used;
    i64 at;
};

// The r-th of a thread's rows that are taken together. Their loads come first, so that all are on their
// way when the first is waited for.
template <class Block>
DETCO_DEVICE Place place_of(const Block& block, const Map& map, const Part& part, i64 first, int r) {
    i64 row = first + i64(r) * block.depth();
    return {row < part.end, part.group_at + row * map.c};
}

// ---- Forward.

// Adds up x - k and its square. Writes partial sums `[2, shares, groups, c]`.
template <class T, class Block>
DETCO_DEVICE void add_moments(Block& block, const Map& map, const T* x, float* partial) {
    const Part part = part_of(block, map);
    float k[VECTOR] = {}, sum[VECTOR] = {}, square[VECTOR] = {};
    if (part.used) {
        read(x + part.group_at, k);
        DETCO_UNROLL_ROWS
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
        write(partial + to, sum);
        write(partial + map.shares * width + to, square);
    }
}

// Adds up both partial sums of one channel of one group over all shares; `index` counts in `[groups, c]`. A
// team divides the shares; `used` is false for one that has no channel.
template <class Team>
DETCO_DEVICE void add_shares(Team& team, i64 index, bool used, const Map& map, const float* partial,
                             double& first, double& second) {
    const i64 width = i64(map.groups) * map.c;
    first = second = 0;
    if (used) {
        DETCO_UNROLL_ROWS
        for (u32 share = team.member(); share < map.shares; share += team.size()) {
            first += partial[share * width + index];
            second += partial[(map.shares + share) * width + index];
        }
    }
    first = team.sum(first);
    second = team.sum(second);
}

// Moments of one channel of one group. Writes `[groups, c]` each.
template <class T, class Team>
DETCO_DEVICE void finish_moments(Team& team, i64 index, const Map& map, const T* x, const float* partial,
                                 float* mean, float* rstd, float* variance) {
    const bool used = index < i64(map.groups) * map.c;
    double sum, square;
    add_shares(team, index, used, map, partial, sum, square);
    if (!used || team.member() > 0) return;
    i64 group = index / map.c;
    float k = wide(x[group * map.rows * map.c + index % map.c]);
    double n = double(map.rows), offset = sum / n;
    double spread = square - sum * offset;
    if (spread < 0) spread = 0;
    mean[index] = float(k + offset);
    rstd[index] = float(1.0 / sqrt(spread / n + double(map.eps)));
    variance[index] = float(spread / (n > 1 ? n - 1 : 1)); // unbiased, as running statistics have it
}

// y = relu(weight * (x - mean) * rstd + bias + residual); residual may be null. Writes `open`
// `[groups, rows, c / VECTOR]`, where it is not null: the values of a vector that the ReLU lets through.
template <class T, class Block>
DETCO_DEVICE void normalise(Block& block, const Map& map, const T* x, const T* residual, const float* weight,
                            const float* bias, const float* mean, const float* rstd, T* y, u8* open) {
    const Part part = part_of(block, map);
    if (!part.used) return;
    float m[VECTOR], scale[VECTOR], shift[VECTOR];
    i64 at = i64(block.z()) * map.c + part.channel;
    read(mean + at, m);
    read(rstd + at, scale);
    for (int i = 0; i < VECTOR; i++) {
        scale[i] *= weight[part.channel + i];
        shift[i] = bias[part.channel + i] - m[i] * scale[i];
    }
    for (i64 row = part.first + block.down(); row < part.end; row += ROWS * block.depth()) {
        Eight<T> in[ROWS], more[ROWS];
        DETCO_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const Place place = place_of(block, map, part, row, r);
            if (place.used) in[r] = load(x + place.at);
            if (place.used && residual) more[r] = load(residual + place.at);
        }
        DETCO_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const Place place = place_of(block, map, part, row, r);
            if (!place.used) continue;
            float values[VECTOR];
            widen(in[r], values);
            for (int i = 0; i < VECTOR; i++) values[i] = values[i] * scale[i] + shift[i];
            if (residual) {
                float other[VECTOR];
                widen(more[r], other);
                for (int i = 0; i < VECTOR; i++) values[i] += other[i];
            }
            if (map.relu) {
                // Not `max`: what is not a number must come through, as it does in libtorch.
                u32 through = 0;
                for (int i = 0; i < VECTOR; i++) {
                    bool shut = values[i] <= 0;
                    values[i] = shut ? 0 : values[i];
                    through |= u32(!shut) << i;
                }
                if (open) open[place.at / VECTOR] = u8(through);
            }
            write(y + place.at, values);
        }
    }
}

// ---- Backward.

// Gradients of a vector as they lie in memory. Behind the ReLU there may be two, of two readers.
template <class T>
struct Gradient {
    Eight<T> one, more;
    u32 open;
};

// `more` and `open` may be null.
template <class T>
DETCO_DEVICE void load_gradient(const T* dy, const T* more, const u8* open, i64 place, Gradient<T>& to) {
    to.one = load(dy + place);
    if (more) to.more = load(more + place);
    to.open = open ? open[place / VECTOR] : 0xFF;
}

// The gradient before the ReLU: what is behind it, where the value came through.
template <class T>
DETCO_DEVICE void widen_gradient(const Gradient<T>& from, bool two, float (&g)[VECTOR]) {
    widen(from.one, g);
    if (two) {
        float other[VECTOR];
        widen(from.more, other);
        // As the sum would be written.
        for (int i = 0; i < VECTOR; i++) g[i] = rounded<T>(g[i] + other[i]);
    }
    for (int i = 0; i < VECTOR; i++) g[i] = from.open >> i & 1 ? g[i] : 0;
}

// Adds up g and g * xhat. Writes partial sums `[2, shares, groups, c]`, and g where `d_residual` is not null.
template <class T, class Block>
DETCO_DEVICE void add_gradients(Block& block, const Map& map, const T* dy, const T* more, const u8* open,
                                const T* x, const float* mean, const float* rstd, T* d_residual,
                                float* partial) {
    const Part part = part_of(block, map);
    float sum[VECTOR] = {}, dot[VECTOR] = {};
    const i64 at = i64(block.z()) * map.c + part.channel;
    if (part.used) {
        float m[VECTOR];
        read(mean + at, m);
        for (i64 row = part.first + block.down(); row < part.end; row += ROWS * block.depth()) {
            Gradient<T> gradients[ROWS];
            Eight<T> in[ROWS];
            DETCO_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const Place place = place_of(block, map, part, row, r);
                if (!place.used) continue;
                load_gradient(dy, more, open, place.at, gradients[r]);
                in[r] = load(x + place.at);
            }
            DETCO_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const Place place = place_of(block, map, part, row, r);
                if (!place.used) continue;
                float g[VECTOR], values[VECTOR];
                widen_gradient(gradients[r], more, g);
                widen(in[r], values);
                if (d_residual) write(d_residual + place.at, g);
                for (int i = 0; i < VECTOR; i++) {
                    sum[i] += g[i];
                    dot[i] += g[i] * (values[i] - m[i]);
                }
            }
        }
    }
    block.add_up(sum);
    block.add_up(dot);
    if (part.used && block.down() == 0) {
        i64 width = i64(map.groups) * map.c, to = block.y() * width + at;
        float r[VECTOR];
        read(rstd + at, r);
        for (int i = 0; i < VECTOR; i++) dot[i] *= r[i];
        write(partial + to, sum);
        write(partial + map.shares * width + to, dot);
    }
}

// Sums of one channel of one group, into `sums` `[2, groups, c]`.
template <class Team>
DETCO_DEVICE void finish_gradients(Team& team, i64 index, const Map& map, const float* partial, float* sums) {
    const i64 width = i64(map.groups) * map.c;
    double sum, dot;
    add_shares(team, index, index < width, map, partial, sum, dot);
    if (index >= width || team.member() > 0) return;
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

// dx = weight * rstd * (g - mean of g - xhat * mean of g * xhat). Adds up the gradients of weight and bias
// on the way.
template <class T, class Block>
DETCO_DEVICE void spread_gradients(Block& block, const Map& map, const T* dy, const T* more, const u8* open,
                                   const T* x, const float* weight, const float* mean, const float* rstd,
                                   const float* sums, T* dx, float* d_weight, float* d_bias) {
    const Part part = part_of(block, map);
    if (!part.used) return;
    add_groups(block, map, part, sums, d_weight, d_bias);
    // dx = scale * g + slope * (x - m) + shift.
    float m[VECTOR], scale[VECTOR], slope[VECTOR], shift[VECTOR];
    i64 at = i64(block.z()) * map.c + part.channel;
    i64 width = i64(map.groups) * map.c;
    float share = float(1.0 / double(map.rows)), r[VECTOR];
    read(mean + at, m);
    read(rstd + at, r);
    read(sums + at, shift);
    read(sums + width + at, slope);
    for (int i = 0; i < VECTOR; i++) {
        scale[i] = weight[part.channel + i] * r[i];
        slope[i] *= -share * scale[i] * r[i];
        shift[i] *= -share * scale[i];
    }
    for (i64 row = part.first + block.down(); row < part.end; row += ROWS * block.depth()) {
        Gradient<T> gradients[ROWS];
        Eight<T> in[ROWS];
        DETCO_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const Place place = place_of(block, map, part, row, r);
            if (!place.used) continue;
            load_gradient(dy, more, open, place.at, gradients[r]);
            in[r] = load(x + place.at);
        }
        DETCO_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const Place place = place_of(block, map, part, row, r);
            if (!place.used) continue;
            float g[VECTOR], values[VECTOR];
            widen_gradient(gradients[r], more, g);
            widen(in[r], values);
            for (int i = 0; i < VECTOR; i++) {
                values[i] = scale[i] * g[i] + (slope[i] * (values[i] - m[i]) + shift[i]);
            }
            write(dx + place.at, values);
        }
    }
}

}  // namespace detco_norm
