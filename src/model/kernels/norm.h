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
//     and a third gradient, the same for all pixels of a sample, is read with them: no more
//
// and a bit a value, written forward and read backward: whether the ReLU let it through. The calls move 5 m
// and 2 m for the ReLU (7 m) forward, and 12 m (15 m, and 3 m for the sum) backward.
//
// A residual that is a normalised map itself, the way around where a stage begins, is normalised in the same
// passes:
//
//   forward:   both read for the moments; both read, written: 5 m
//   backward:  two gradients and both maps read; the same again, both written: 10 m
//
// where 7 m and 12 m would be moved one after the other.
//
// The stem's max pool follows its ReLU at once: the map between is never written. With a pooled map of m / 4
// and the places of maxima, four bits each,
//
//   forward:   read for the moments; read, pooled map and places written: 2.3 m
//   backward:  pooled gradient, places and map read; the same again, written: 3.6 m
//
// where 3 m and 5 m, and 2.2 m for the pool each way with its places of 64 bits, would be moved.
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
#define DETCO_UNROLL_FOUR _Pragma("unroll 4") // several loads in flight
#define DETCO_UNROLL_TWO _Pragma("unroll 2")  // as many as the registers hold
#else
#define DETCO_DEVICE inline
#define DETCO_UNROLL
#define DETCO_UNROLL_FOUR
#define DETCO_UNROLL_TWO
#include <math.h>
#include <string.h>
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

DETCO_DEVICE float of_bits(u32 bits) {
    union {
        u32 bits;
        float value;
    } both;
    both.bits = bits;
    return both.value;
}

DETCO_DEVICE u32 bits_of(float x) {
    union {
        float value;
        u32 bits;
    } both;
    both.value = x;
    return both.bits;
}

DETCO_DEVICE float wide(float x) { return x; }
DETCO_DEVICE float wide(bf16 x) { return of_bits(u32(x.bits) << 16); }

// Two neighbours as they lie in memory.
DETCO_DEVICE float lower(u32 both) { return of_bits(both << 16); }
DETCO_DEVICE float upper(u32 both) { return of_bits(both & 0xFFFF0000u); }

// The bits of a float's nearest bfloat16, ties to even; what is not a number stays none.
DETCO_DEVICE u32 nearest(float x) {
    u32 bits = bits_of(x);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

// Two neighbours.
DETCO_DEVICE u32 pair(float low, float high) {
#ifdef __CUDACC__
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return nearest(low) | nearest(high) << 16;
#endif
}

// Channels of a thread: 16 bytes of bfloat16, 32 of float.
const int VECTOR = 8;

template <class T>
struct alignas(16) Eight {
    T at[VECTOR];
};

// Words: of halves the compiler takes each as soon as it is there, and waits for it.
template <>
struct alignas(16) Eight<bf16> {
    u32 at[VECTOR / 2];
};

// As it lies in memory: what uses a value waits for it, so that loads come first and together.
template <class T>
DETCO_DEVICE Eight<T> load(const T* from) {
#ifdef __CUDACC__
    return *reinterpret_cast<const Eight<T>*>(from);
#else
    // What one function writes as words another reads as numbers.
    Eight<T> eight;
    memcpy(&eight, from, sizeof eight);
    return eight;
#endif
}

DETCO_DEVICE void widen(const Eight<float>& eight, float (&values)[VECTOR]) {
    for (int i = 0; i < VECTOR; i++) values[i] = eight.at[i];
}

DETCO_DEVICE void widen(const Eight<bf16>& eight, float (&values)[VECTOR]) {
    for (int i = 0; i < VECTOR; i += 2) {
        values[i] = lower(eight.at[i / 2]);
        values[i + 1] = upper(eight.at[i / 2]);
    }
}

template <class T>
DETCO_DEVICE void read(const T* from, float (&values)[VECTOR]) {
    widen(load(from), values);
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
    memcpy(to, &words, sizeof words);
#endif
}

DETCO_DEVICE void write(float* to, const float (&values)[VECTOR]) {
    for (int half = 0; half < 2; half++) {
        Words words;
        for (int i = 0; i < 4; i++) words.at[i] = bits_of(values[4 * half + i]);
        store(to + 4 * half, words);
    }
}

DETCO_DEVICE void write(bf16* to, const float (&values)[VECTOR]) {
    Words words;
    for (int i = 0; i < VECTOR / 2; i++) words.at[i] = pair(values[2 * i], values[2 * i + 1]);
    store(to, words);
}

// Numbers as they would be written and read again.
DETCO_DEVICE void round_as(const float*, float (&)[VECTOR]) {}

DETCO_DEVICE void round_as(const bf16*, float (&values)[VECTOR]) {
    for (int i = 0; i < VECTOR; i += 2) {
        const u32 both = pair(values[i], values[i + 1]);
        values[i] = lower(both);
        values[i + 1] = upper(both);
    }
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

// Rows that a thread takes together, as its registers allow.
const int ROWS = 2;
const int ROWS_OF_TWO = 1; // where the gradients of two maps are made

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
    const int ROWS = sizeof(T) == 2 ? 4 : 2;
    float k[VECTOR] = {}, sum[VECTOR] = {}, square[VECTOR] = {};
    if (part.used) {
        read(x + part.group_at, k);
        for (i64 row = part.first + block.down(); row < part.end; row += ROWS * block.depth()) {
            Eight<T> in[ROWS];
            DETCO_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const Place place = place_of(block, map, part, row, r);
                if (place.used) in[r] = load(x + place.at);
            }
            DETCO_UNROLL
            for (int r = 0; r < ROWS; r++) {
                if (!place_of(block, map, part, row, r).used) continue;
                float values[VECTOR];
                widen(in[r], values);
                for (int i = 0; i < VECTOR; i++) {
                    float d = values[i] - k[i];
                    sum[i] += d;
                    square[i] += d * d;
                }
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

// Adds up SUMS partial sums of one channel of one group over all shares, of `[sums, shares, groups, c]`; `index`
// counts in `[groups, c]`. A team divides the shares; `used` is false for one that has no channel.
template <int SUMS, class Team>
DETCO_DEVICE void add_shares(Team& team, i64 index, bool used, const Map& map, const float* partial,
                             double (&sums)[SUMS]) {
    const i64 width = i64(map.groups) * map.c;
    for (int k = 0; k < SUMS; k++) sums[k] = 0;
    if (used && team.member() < map.shares) {
        // A counted loop, whose loads the compiler takes together.
        const u32 count = (map.shares - team.member() + team.size() - 1) / team.size();
        DETCO_UNROLL_FOUR
        for (u32 i = 0; i < count; i++) {
            const u32 share = team.member() + i * team.size();
            for (int k = 0; k < SUMS; k++) sums[k] += partial[(k * map.shares + share) * width + index];
        }
    }
    for (int k = 0; k < SUMS; k++) sums[k] = team.sum(sums[k]);
}

// Moments of one channel of one group. Writes `[groups, c]` each.
template <class T, class Team>
DETCO_DEVICE void finish_moments(Team& team, i64 index, const Map& map, const T* x, const float* partial,
                                 float* mean, float* rstd, float* variance) {
    const bool used = index < i64(map.groups) * map.c;
    double sums[2]; // of x - k, and of its square
    add_shares(team, index, used, map, partial, sums);
    if (!used || team.member() > 0) return;
    i64 group = index / map.c;
    float k = wide(x[group * map.rows * map.c + index % map.c]);
    double n = double(map.rows), offset = sums[0] / n;
    double spread = sums[1] - sums[0] * offset;
    if (spread < 0) spread = 0;
    mean[index] = float(k + offset);
    rstd[index] = float(1.0 / sqrt(spread / n + double(map.eps)));
    variance[index] = float(spread / (n > 1 ? n - 1 : 1)); // unbiased, as running statistics have it
}

// What a map is normalised by: weight and bias `[c]`, mean and 1 / deviation `[groups, c]`.
struct By {
    const float* weight;
    const float* bias;
    const float* mean;
    const float* rstd;
};

// weight * (x - mean) * rstd + bias = scale * x + shift, for a thread's channels.
template <class Block>
DETCO_DEVICE void fold(const Block& block, const Map& map, const Part& part, const By& by,
                       float (&scale)[VECTOR], float (&shift)[VECTOR]) {
    float m[VECTOR];
    const i64 at = i64(block.z()) * map.c + part.channel;
    read(by.mean + at, m);
    read(by.rstd + at, scale);
    for (int i = 0; i < VECTOR; i++) {
        scale[i] *= by.weight[part.channel + i];
        shift[i] = by.bias[part.channel + i] - m[i] * scale[i];
    }
}

// y = relu(weight * (x - mean) * rstd + bias + residual); residual may be null. `other` normalises it, unless
// it has no weight. Writes `open` `[groups, rows, c / VECTOR]`, where it is not null: the values of a vector
// that the ReLU lets through.
template <class T, class Block>
DETCO_DEVICE void normalise(Block& block, const Map& map, const T* x, const By& by, const T* residual,
                            const By& other, T* y, u8* open) {
    const Part part = part_of(block, map);
    if (!part.used) return;
    float scale[VECTOR], shift[VECTOR], scale_other[VECTOR];
    fold(block, map, part, by, scale, shift);
    for (int i = 0; i < VECTOR; i++) scale_other[i] = 1;
    if (residual && other.weight) {
        float shift_other[VECTOR];
        fold(block, map, part, other, scale_other, shift_other);
        for (int i = 0; i < VECTOR; i++) shift[i] += shift_other[i];
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
                float added[VECTOR];
                widen(more[r], added);
                for (int i = 0; i < VECTOR; i++) values[i] += added[i] * scale_other[i];
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

// A max pool of 3x3 pixels at every second one, with a frame of one pixel that is never the largest, over
// maps of h x w pixels.
struct Pool {
    u32 h, w;
    u32 pooled_h, pooled_w;
    u32 images;  // of a group
};

const int WINDOW = 3;
const int PIXELS = WINDOW * WINDOW;

// Four bits a value: where in its window the largest lies, row by row.
const u32 NOWHERE = 15; // the ReLU let none through

// The largest values so far, none below 0, and where they were met first. What is not a number is larger
// than all.
template <class T>
struct Largest {
    float values[VECTOR];
    u32 places[VECTOR];

    DETCO_DEVICE void clear() {
        for (int i = 0; i < VECTOR; i++) values[i] = -1, places[i] = 0;
    }

    DETCO_DEVICE void meet(const float (&met)[VECTOR], u32 place) {
        for (int i = 0; i < VECTOR; i++) {
            bool larger = met[i] > values[i] || met[i] != met[i];
            values[i] = larger ? met[i] : values[i];
            places[i] = larger ? place : places[i];
        }
    }

    DETCO_DEVICE float value(int i) const { return values[i]; }
    DETCO_DEVICE u32 place(int i) const { return places[i]; }
};

// Of bfloat16 the bits count as the numbers do, not a number beyond all; behind them is room for the place,
// of which the first counts most: a comparison a value.
template <>
struct Largest<bf16> {
    u32 keys[VECTOR];

    DETCO_DEVICE void clear() {
        for (int i = 0; i < VECTOR; i++) keys[i] = 0;
    }

    DETCO_DEVICE void meet(const float (&met)[VECTOR], u32 place) {
        for (int i = 0; i < VECTOR; i += 2) {
            const u32 both = pair(met[i], met[i + 1]), rest = PIXELS - place;
            const u32 low = both << 16 | rest, high = (both & 0xFFFF0000u) | rest;
            keys[i] = low > keys[i] ? low : keys[i];
            keys[i + 1] = high > keys[i + 1] ? high : keys[i + 1];
        }
    }

    DETCO_DEVICE float value(int i) const { return upper(keys[i]); }
    DETCO_DEVICE u32 place(int i) const { return PIXELS - (keys[i] & 0xFFFFu); }
};

// relu(weight * (x - mean) * rstd + bias), of which the largest of each window is written, and where it lies
// `[groups, pooled rows, c / VECTOR]`, if `places` is not null. `map` is the pooled one. Of equal ones the
// first is taken, as libtorch does, once they are rounded as libtorch rounds them.
template <class T, class Block>
DETCO_DEVICE void normalise_pooled(Block& block, const Map& map, const Pool& pool, const T* x, const By& by,
                                   T* y, u32* places) {
    const Part part = part_of(block, map);
    if (!part.used) return;
    float scale[VECTOR], shift[VECTOR];
    fold(block, map, part, by, scale, shift);
    for (i64 row = part.first + block.down(); row < part.end; row += block.depth()) {
        const u32 column = u32(row) % pool.pooled_w, line = u32(row) / pool.pooled_w;
        const u32 image = block.z() * pool.images + line / pool.pooled_h;
        const int top = 2 * int(line % pool.pooled_h) - 1, left = 2 * int(column) - 1;
        Eight<T> in[PIXELS];
        bool used[PIXELS];
        DETCO_UNROLL
        for (int k = 0; k < PIXELS; k++) {
            const u32 h = u32(top + k / WINDOW), w = u32(left + k % WINDOW); // -1 is beyond, too
            used[k] = h < pool.h && w < pool.w;
            if (used[k]) in[k] = load(x + ((i64(image) * pool.h + h) * pool.w + w) * map.c + part.channel);
        }
        Largest<T> largest;
        largest.clear();
        DETCO_UNROLL
        for (int k = 0; k < PIXELS; k++) {
            if (!used[k]) continue;
            float values[VECTOR];
            widen(in[k], values);
            for (int i = 0; i < VECTOR; i++) {
                values[i] = values[i] * scale[i] + shift[i];
                values[i] = values[i] <= 0 ? 0 : values[i];
            }
            largest.meet(values, k);
        }
        u32 packed = 0;
        float values[VECTOR];
        for (int i = 0; i < VECTOR; i++) {
            values[i] = largest.value(i);
            packed |= (values[i] == 0 ? NOWHERE : largest.place(i)) << (4 * i);
        }
        const i64 to = part.group_at + row * map.c;
        if (places) places[to / VECTOR] = packed;
        write(y + to, values);
    }
}

// ---- Backward.

// The gradient behind a normalisation, of its results' readers, and what the ReLU lets through. A reader may be
// missing: its pointer is null then, as `open` is without a ReLU.
template <class T>
struct Direct {
    static const int ROWS = detco_norm::ROWS;

    const T* one;
    const T* more;
    const u8* open;
    const T* each; // `[samples, c]`: of every pixel of a sample
    u32 pixels;    // of a sample

    // As it lies in memory.
    struct Loaded {
        Eight<T> one, more, each;
        u32 open;
    };

    template <class Block>
    DETCO_DEVICE void load(const Block& block, const Map& map, const Part& part, i64 row, i64 place,
                           Loaded& to) const {
        if (one) to.one = detco_norm::load(one + place);
        if (more) to.more = detco_norm::load(more + place);
        if (each) {
            const u32 sample = (u32(block.z()) * u32(map.rows) + u32(row)) / pixels;
            to.each = detco_norm::load(each + i64(sample) * map.c + part.channel);
        }
        to.open = open ? open[place / VECTOR] : 0xFF;
    }

    // What is behind the ReLU, where the value came through.
    DETCO_DEVICE void widen(const Loaded& from, float (&g)[VECTOR]) const {
        for (int i = 0; i < VECTOR; i++) g[i] = 0;
        if (one) detco_norm::widen(from.one, g);
        if (more) add(from.more, g);
        if (each) add(from.each, g);
        if (more || each) round_as(one, g); // as the sum would be written
        for (int i = 0; i < VECTOR; i++) g[i] = from.open >> i & 1 ? g[i] : 0;
    }

    static DETCO_DEVICE void add(const Eight<T>& from, float (&g)[VECTOR]) {
        float other[VECTOR];
        detco_norm::widen(from, other);
        for (int i = 0; i < VECTOR; i++) g[i] += other[i];
    }
};

// The gradient behind a normalisation with ReLU and max pool: `dy` and `places` of the pooled map.
template <class T>
struct Pooled {
    static const int ROWS = sizeof(T) == 2 ? detco_norm::ROWS : 1;

    Pool pool;
    const T* dy;
    const u32* places;

    // Of the windows that a pixel lies in: one, two or four.
    struct Loaded {
        Eight<T> dy[4];
        u32 places[4];
        u32 where[4];  // which of the window's pixels it is; NOWHERE - 1 where there is no window
    };

    template <class Block>
    DETCO_DEVICE void load(const Block& block, const Map& map, const Part& part, i64 row, i64, Loaded& to) const {
        const u32 w = u32(row) % pool.w, line = u32(row) / pool.w;
        const u32 h = line % pool.h, image = block.z() * pool.images + line / pool.h;
        // In vectors: of the window in whose middle or at whose ends it lies.
        const u32 across = map.c / VECTOR;
        const i64 base = (i64(image * pool.pooled_h + h / 2) * pool.pooled_w + w / 2) * across + part.channel / VECTOR;
        DETCO_UNROLL
        for (int i = 0; i < 4; i++) {
            // That, and those at whose beginning it lies.
            const u32 down = i / 2, right = i % 2;
            const bool in = (!down || (h % 2 && h / 2 + 1 < pool.pooled_h)) &&
                            (!right || (w % 2 && w / 2 + 1 < pool.pooled_w));
            to.where[i] = in ? (down ? 0 : 1 + h % 2) * WINDOW + (right ? 0 : 1 + w % 2) : NOWHERE - 1;
            if (!in) continue;
            const i64 at = base + (down * pool.pooled_w + right) * across;
            to.dy[i] = detco_norm::load(dy + at * VECTOR);
            to.places[i] = places[at];
        }
    }

    DETCO_DEVICE void widen(const Loaded& from, float (&g)[VECTOR]) const {
        for (int k = 0; k < VECTOR; k++) g[k] = 0;
        DETCO_UNROLL
        for (int i = 0; i < 4; i++) {
            if (from.where[i] == NOWHERE - 1) continue;
            float values[VECTOR];
            detco_norm::widen(from.dy[i], values);
            const u32 other = from.places[i] ^ from.where[i] * 0x11111111u; // four zeros where they are equal
            for (int k = 0; k < VECTOR; k++) g[k] += other & 15u << (4 * k) ? 0 : values[k];
        }
        round_as(dy, g); // as the map's gradient would be written
    }
};

// A map that was normalised, and what by.
template <class T>
struct Branch {
    const T* x;
    const float* weight;
    const float* mean;
    const float* rstd;
};

// Of maps that are normalised and added, each gets the same gradient g. Adds up g, and g * xhat of each map.
// Writes partial sums `[1 + MAPS, shares, groups, c]`, and g where `d_residual` is not null.
template <int MAPS, class T, class Source, class Block>
DETCO_DEVICE void add_gradients(Block& block, const Map& map, const Source& source, const Branch<T> (&of)[MAPS],
                                T* d_residual, float* partial) {
    const int ROWS = MAPS == 1 ? Source::ROWS : ROWS_OF_TWO;
    const Part part = part_of(block, map);
    float sum[VECTOR] = {}, dot[MAPS][VECTOR] = {};
    const i64 at = i64(block.z()) * map.c + part.channel;
    if (part.used) {
        float m[MAPS][VECTOR];
        for (int k = 0; k < MAPS; k++) read(of[k].mean + at, m[k]);
        for (i64 row = part.first + block.down(); row < part.end; row += ROWS * block.depth()) {
            typename Source::Loaded gradients[ROWS];
            Eight<T> in[ROWS][MAPS];
            DETCO_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const Place place = place_of(block, map, part, row, r);
                if (!place.used) continue;
                source.load(block, map, part, row + i64(r) * block.depth(), place.at, gradients[r]);
                for (int k = 0; k < MAPS; k++) in[r][k] = load(of[k].x + place.at);
            }
            DETCO_UNROLL
            for (int r = 0; r < ROWS; r++) {
                const Place place = place_of(block, map, part, row, r);
                if (!place.used) continue;
                float g[VECTOR];
                source.widen(gradients[r], g);
                if (d_residual) write(d_residual + place.at, g);
                for (int i = 0; i < VECTOR; i++) sum[i] += g[i];
                for (int k = 0; k < MAPS; k++) {
                    float values[VECTOR];
                    widen(in[r][k], values);
                    for (int i = 0; i < VECTOR; i++) dot[k][i] += g[i] * (values[i] - m[k][i]);
                }
            }
        }
    }
    block.add_up(sum);
    for (int k = 0; k < MAPS; k++) block.add_up(dot[k]);
    if (part.used && block.down() == 0) {
        i64 width = i64(map.groups) * map.c, to = block.y() * width + at;
        write(partial + to, sum);
        for (int k = 0; k < MAPS; k++) {
            float r[VECTOR];
            read(of[k].rstd + at, r);
            for (int i = 0; i < VECTOR; i++) dot[k][i] *= r[i];
            write(partial + (1 + k) * map.shares * width + to, dot[k]);
        }
    }
}

// One sum of one channel of one group, into `sums` `[1 + maps, groups, c]`, in which `index` counts.
template <class Team>
DETCO_DEVICE void finish_gradients(Team& team, i64 index, u32 maps, const Map& map, const float* partial,
                                   float* sums) {
    const i64 width = i64(map.groups) * map.c;
    const bool used = index < (1 + maps) * width;
    double sum[1];
    add_shares(team, index % width, used, map, partial + index / width * map.shares * width, sum);
    if (used && team.member() == 0) sums[index] = float(sum[0]);
}

// One map's gradient, and where those of its weight and bias go, `[c]`.
template <class T>
struct Gradients {
    T* dx;
    float* d_weight;
    float* d_bias;
};

// Gradients of weight and bias, `[c]`: the sums over all groups. For the blocks of the first share of the
// first group, one thread a vector of channels.
template <int MAPS, class T, class Block>
DETCO_DEVICE void add_groups(Block& block, const Map& map, const Part& part, const float* sums,
                             const Gradients<T> (&to)[MAPS]) {
    if (block.y() > 0 || block.z() > 0 || block.down() > 0) return;
    const i64 width = i64(map.groups) * map.c;
    for (int k = 0; k < MAPS; k++) {
        double sum[VECTOR] = {}, dot[VECTOR] = {};
        DETCO_UNROLL_TWO
        for (u32 group = 0; group < map.groups; group++) {
            const float* at = sums + i64(group) * map.c + part.channel;
            float of_sum[VECTOR], of_dot[VECTOR];
            read(at, of_sum);
            read(at + (1 + k) * width, of_dot);
            for (int i = 0; i < VECTOR; i++) sum[i] += of_sum[i], dot[i] += of_dot[i];
        }
        for (int i = 0; i < VECTOR; i++) {
            to[k].d_bias[part.channel + i] = float(sum[i]);
            to[k].d_weight[part.channel + i] = float(dot[i]);
        }
    }
}

// dx = weight * rstd * (g - mean of g - xhat * mean of g * xhat), of each map. Adds up the gradients of weight
// and bias on the way.
template <int MAPS, class T, class Source, class Block>
DETCO_DEVICE void spread_gradients(Block& block, const Map& map, const Source& source, const Branch<T> (&of)[MAPS],
                                   const float* sums, const Gradients<T> (&to)[MAPS]) {
    const int ROWS = MAPS == 1 ? Source::ROWS : ROWS_OF_TWO;
    const Part part = part_of(block, map);
    if (!part.used) return;
    add_groups(block, map, part, sums, to);
    // dx = scale * g + slope * (x - m) + shift.
    float m[MAPS][VECTOR], scale[MAPS][VECTOR], slope[MAPS][VECTOR], shift[MAPS][VECTOR];
    const i64 at = i64(block.z()) * map.c + part.channel, width = i64(map.groups) * map.c;
    const float share = float(1.0 / double(map.rows));
    for (int k = 0; k < MAPS; k++) {
        float r[VECTOR];
        read(of[k].mean + at, m[k]);
        read(of[k].rstd + at, r);
        read(sums + at, shift[k]);
        read(sums + (1 + k) * width + at, slope[k]);
        for (int i = 0; i < VECTOR; i++) {
            scale[k][i] = of[k].weight[part.channel + i] * r[i];
            slope[k][i] *= -share * scale[k][i] * r[i];
            shift[k][i] *= -share * scale[k][i];
        }
    }
    for (i64 row = part.first + block.down(); row < part.end; row += ROWS * block.depth()) {
        typename Source::Loaded gradients[ROWS];
        Eight<T> in[ROWS][MAPS];
        DETCO_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const Place place = place_of(block, map, part, row, r);
            if (!place.used) continue;
            source.load(block, map, part, row + i64(r) * block.depth(), place.at, gradients[r]);
            for (int k = 0; k < MAPS; k++) in[r][k] = load(of[k].x + place.at);
        }
        DETCO_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const Place place = place_of(block, map, part, row, r);
            if (!place.used) continue;
            float g[VECTOR];
            source.widen(gradients[r], g);
            for (int k = 0; k < MAPS; k++) {
                float values[VECTOR];
                widen(in[r][k], values);
                for (int i = 0; i < VECTOR; i++) {
                    values[i] = scale[k][i] * g[i] + (slope[k][i] * (values[i] - m[k][i]) + shift[k][i]);
                }
                write(to[k].dx + place.at, values);
            }
        }
    }
}

}  // namespace detco_norm
