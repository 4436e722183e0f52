// One view from frame to tensor, by one block of threads.
//
// The same source is the GPU's kernel (views.cu, through NVRTC) and plain C++ for the host
// (twin.cpp), where the tests hold it against the renderer in Rust, byte for byte. It has no
// include and no intrinsic. What differs between the two is the `Block`: which of how many threads
// this is, how they wait for each other, and how they add up a number.
//
// Arithmetic is that of the renderer in Rust, which is Pillow's: weights of 22 bits from doubles, 8
// bits after each of the two filters and after each operation. That holds only without fused
// multiply-adds (--fmad=false, -ffp-contract=off).
//
// Passes over a view of s x s pixels, with the crop's c bytes and o bytes of output:
//
//   pass      when                         reads                 writes
//   resize    always                       c of the frame        3 s^2 of the block's own memory
//   colour    a contrast or a blur and     3 s^2, own            3 s^2, own
//             something between follow
//   rows      a blur                       9 s^2, own            9 s^2, own
//   columns   a blur                       9 s^2, own            9 s^2, own
//   count     a stretch or an evening out  3 s^2, own            a table
//   copy      a sharpening or a turn       3 s^2, own            3 s^2, scratch
//   move      a sharpening or a turn       3 s^2 and more, copy  3 s^2, own
//   output    always                       3 s^2 or less, own    o of the tensor
//
// A contrast needs the mean of all pixels before it, a blur the neighbours, and RandAugment has
// four operations more that need other pixels: nothing else ends a pass. Operations of single
// pixels ride on the pass before them, or on the output. The block's own memory is shared memory
// where a view fits (on the H100 and B200 up to s = 268, on the A100 up to 226: DetCo's 224 and
// 255, and 224), else scratch memory, which stays in the second-level cache.
//
// So the device's memory sees c + o for a view, and a crop that another view of the same frame has
// just read comes from the cache. For DetCo's four views of an ImageNet picture of 500 x 375 in
// bfloat16:
//
//   frame, at most                          500 * 375 * 3         562,500 bytes read
//   two global views                        2 * 224^2 * 3 * 2     602,112 bytes written
//   two sets of nine patches                2 * 9 * 64^2 * 3 * 2  442,368 bytes written
//
// 1.61 MB a sample: at the 3.35 TB/s of an H100 SXM's data sheet 0.48 us, the floor. No GPU has
// shown yet what the kernel reaches of it. In 0.48 us that chip issues about 60 instructions for
// each of the 230,402 pixels; the loads and products of resizing alone, from 9 inputs of 3 bytes on
// average, are as many. So arithmetic, not memory, is likely to be the limit.

#pragma once

#ifdef __CUDACC__
#define DETCO_DEVICE __device__ __forceinline__
// For what few views need: apart, so that it takes no registers from what all need.
#define DETCO_RARE __device__ __noinline__
#else
#define DETCO_DEVICE inline
#define DETCO_RARE inline
#endif

namespace detco {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- What comes from the host. views/cuda/pack.rs has the same, field by field.

enum Kind : u32 {
    BRIGHTNESS = 0,    // factor
    CONTRAST = 1,      // factor
    SATURATION = 2,    // factor
    HUE = 3,           // a: shift in 1/255 turns
    GRAY = 4,
    BLUR = 5,          // a: full weight, b: far weight, in 2^-24; c: radius
    INVERT = 6,
    POSTERIZE = 7,     // a: mask
    SOLARIZE = 8,      // a: threshold
    SOLARIZE_ADD = 9,  // a: what is added
    AUTO_CONTRAST = 10,
    EQUALIZE = 11,
    SHARPNESS = 12,    // factor
    AFFINE = 13,       // a: which matrix; b: 1 for bicubic
    FLIP = 14,         // left and right exchanged, where an affine one follows
};

struct Op {
    u32 kind;
    float factor;
    u32 a, b, c;
};

// Two rows of three: the input's x, then its y.
struct Matrix {
    double at[6];
};

struct View {
    u64 frame;        // address of the frame: u8 [height, width, 3], rows `pitch` bytes apart
    u64 out;          // address of the view in its tensor: [side, side, 3] or [count, patch, patch, 3]
    u64 pitch;
    u32 left, top, width, height;  // the crop
    u32 side;         // of the view
    u32 column_taps;  // room for the weights of one column
    u32 first_op, ops;
    u32 flip;
    u32 patch;        // side of a patch; 0: the view itself is the output
    u32 slots[9];     // of the flipped view, for each slot: left | top << 16 of its patch
    u32 row_taps;
    u32 count;        // of slots, at most 9; without patches 1
    u32 cubic;        // resizes by a cubic, else by a triangle
};

struct Batch {
    u64 views;             // address of View[count]
    u64 matrices;          // address of Matrix[]
    u64 ops;               // address of Op[]
    u64 scratch;           // address of scratch_bytes for each block
    u64 scratch_bytes;
    u64 scratch_weights;   // where in it the weights stand,
    u64 scratch_copy;      // and where a copy of a view
    u32 count;
    u32 side_max;
    u32 shared_view;       // bytes of shared memory for a view,
    u32 shared_weights;    // and for weights
    u32 bf16;              // output: bfloat16, else float
    float mean[3], std[3]; // of bytes / 255
    u32 reserved;          // so that no compiler pads by itself
};

static_assert(sizeof(Op) == 20 && sizeof(View) == 112, "as in views/cuda/pack.rs");
static_assert(sizeof(Batch) == 104, "as in views/cuda/pack.rs");

// ---- A block's memory.

struct Span {
    u32 start, count;
};

// The inputs of each output along one axis, and their weights, `[tap][output]`: neighbouring
// threads have neighbouring outputs.
struct Axis {
    Span* spans;
    int* weights;
};

struct Memory {
    u8* view;     // [3, side, stride]
    float* table; // [3, 256]: the output of each byte
    u32* counts;  // [3, 256]: a histogram, then what its operation makes of each value
    Axis columns, rows;
    u8* copy;     // as the view
    u32 stride;
};

// Rows an odd number of words apart: threads in one column of 32 rows use 32 different banks.
DETCO_DEVICE u32 stride_of(u32 side) {
    u32 words = (side + 3) / 4;
    return 4 * (words | 1);
}

const u32 TABLE_BYTES = 3 * 256 * sizeof(float);

// Shared memory: the table, counts, both axes' spans, then a view and weights, where they fit.
DETCO_DEVICE Memory lay_out(const Batch& batch, const View& view, u8* shared, u8* scratch) {
    Memory memory;
    memory.stride = stride_of(view.side);
    memory.table = reinterpret_cast<float*>(shared);
    memory.counts = reinterpret_cast<u32*>(shared + TABLE_BYTES);
    Span* spans = reinterpret_cast<Span*>(shared + 2 * TABLE_BYTES);
    u8* free = reinterpret_cast<u8*>(spans + 2 * batch.side_max);
    bool view_fits = u64(3) * view.side * memory.stride <= batch.shared_view;
    memory.view = view_fits ? free : scratch;
    u32 taps = view.column_taps + view.row_taps;
    bool weights_fit = u64(4) * view.side * taps <= batch.shared_weights;
    u8* weights = weights_fit ? free + batch.shared_view : scratch + batch.scratch_weights;
    memory.columns.spans = spans;
    memory.columns.weights = reinterpret_cast<int*>(weights);
    memory.rows.spans = spans + batch.side_max;
    memory.rows.weights = memory.columns.weights + u64(view.side) * view.column_taps;
    memory.copy = scratch + batch.scratch_copy;
    return memory;
}

// ---- Crop and resize.

const u32 WEIGHT_BITS = 22;
const int HALF = 1 << (WEIGHT_BITS - 1);

// Pillow's filters by the distance from the middle. What is outside of them weighs nothing.
DETCO_DEVICE double weight_of(double distance, bool cubic) {
    double x = distance < 0.0 ? -distance : distance;
    if (!cubic) return x < 1.0 ? 1.0 - x : 0.0;
    const double a = -0.5;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

// One output of an axis: a filter as wide as the reduction, cut off at the edges.
DETCO_DEVICE void lay(u32 inputs, u32 outputs, u32 output, bool cubic, const Axis& axis) {
    double scale = double(inputs) / double(outputs);
    double stretch = scale > 1.0 ? scale : 1.0;
    double inverse = 1.0 / stretch;
    double center = (double(output) + 0.5) * scale;
    double support = cubic ? 2.0 * stretch : stretch;
    double first = center - support + 0.5;
    u32 start = first > 0.0 ? u32(first) : 0;
    u32 end = u32(center + support + 0.5);
    end = end < inputs ? end : inputs;
    double sum = 0.0;
    for (u32 input = start; input < end; input++) {
        sum += weight_of((double(input) - center + 0.5) * inverse, cubic);
    }
    for (u32 input = start; input < end; input++) {
        double real = weight_of((double(input) - center + 0.5) * inverse, cubic);
        int weight = int((real < 0.0 ? -0.5 : 0.5) + real / sum * double(1 << WEIGHT_BITS));
        axis.weights[u64(input - start) * outputs + output] = weight;
    }
    axis.spans[output].start = start;
    axis.spans[output].count = end - start;
}

struct Pixel {
    int r, g, b;
};

DETCO_DEVICE int least(int a, int b) { return a < b ? a : b; }
DETCO_DEVICE int most(int a, int b) { return a > b ? a : b; }

// A weighted sum as a byte: a cubic's may lie outside.
DETCO_DEVICE int rounded(int sum) { return most(0, least(255, sum >> WEIGHT_BITS)); }

// A pixel of the resized crop: along the row, rounded to 8 bits, then along the column.
DETCO_DEVICE Pixel resize(const View& view, const Memory& memory, u32 x, u32 y) {
    Span columns = memory.columns.spans[x];
    Span rows = memory.rows.spans[y];
    const u8* line = reinterpret_cast<const u8*>(view.frame);
    line += (view.top + rows.start) * view.pitch + u64(view.left + columns.start) * 3;
    Pixel sum = {HALF, HALF, HALF};
    for (u32 j = 0; j < rows.count; j++, line += view.pitch) {
        Pixel along = {HALF, HALF, HALF};
        const u8* from = line;
        const int* weight = memory.columns.weights + x;
        for (u32 i = 0; i < columns.count; i++, from += 3, weight += view.side) {
            along.r += *weight * from[0];
            along.g += *weight * from[1];
            along.b += *weight * from[2];
        }
        int across = memory.rows.weights[u64(j) * view.side + y];
        sum.r += across * rounded(along.r);
        sum.g += across * rounded(along.g);
        sum.b += across * rounded(along.b);
    }
    Pixel out = {rounded(sum.r), rounded(sum.g), rounded(sum.b)};
    return out;
}

// ---- Colour.

// ITU-R 601-2 luma in 16-bit fixed point, rounded.
DETCO_DEVICE int luma(Pixel p) { return (p.r * 19595 + p.g * 38470 + p.b * 7471 + 0x8000) >> 16; }

// `from` at factor 0, `to` at factor 1, clamped and truncated.
DETCO_DEVICE int blend(int from, int to, float factor) {
    float value = float(from) + factor * (float(to) - float(from));
    value = value < 0.0f ? 0.0f : value;
    return int(value > 255.0f ? 255.0f : value);
}

DETCO_DEVICE Pixel blend(Pixel from, Pixel to, float factor) {
    Pixel out = {blend(from.r, to.r, factor), blend(from.g, to.g, factor),
                 blend(from.b, to.b, factor)};
    return out;
}

DETCO_DEVICE Pixel flat(int value) {
    Pixel out = {value, value, value};
    return out;
}

// The hue turned by `shift` / 255, through Pillow's 8-bit hue, saturation and value; `turn` of
// views/color.rs.
DETCO_DEVICE Pixel turn(Pixel p, int shift) {
    int high = most(most(p.r, p.g), p.b);
    int low = least(least(p.r, p.g), p.b);
    int middle = p.r + p.g + p.b - high - low;
    int range = high - low;
    // Gray pixels have no hue; any will do, because their saturation is 0.
    float part = float(high - middle) / float(most(range, 1));
    // The hue in sixths of a turn is a base plus or minus `part`.
    float sixths;
    if (p.r == high) {
        sixths = p.b <= p.g ? 1.0f - part : -1.0f + part;
    } else if (p.g == high) {
        sixths = p.b <= p.r ? 1.0f + part : 3.0f - part;
    } else {
        sixths = p.r <= p.g ? 3.0f + part : 5.0f - part;
    }
    float turns = sixths / 6.0f + (sixths < 0.0f ? 1.0f : 0.0f);
    int hue = (int(turns * 255.0f) + shift) & 0xFF;
    int saturation = int(float(range * 255) / float(most(high, 1)));

    int sector = ((hue * 6 + 1) * 257) >> 16;
    int within = hue * 6 - sector * 255;
    int away = (sector & 1) == 1 ? within : 255 - within;
    // Rounded quotients; neither is ever halfway between two integers.
    low = high * (255 - saturation) + 128;
    low = (low + (low >> 8)) >> 8;
    float between = float(high * (255 * 255 - saturation * away));
    middle = int(between * (1.0f / (255.0f * 255.0f)) + 0.5f);
    // Hue 255 is a full turn, sector 6: the same as sector 0. Selects, not a table: registers have
    // no addresses.
    if (sector == 6) sector = 0;
    Pixel out = {
        sector == 0 || sector == 5 ? high : sector == 2 || sector == 3 ? low : middle,
        sector == 1 || sector == 2 ? high : sector == 4 || sector == 5 ? low : middle,
        sector == 3 || sector == 4 ? high : sector == 0 || sector == 1 ? low : middle,
    };
    return out;
}

DETCO_DEVICE int solarize(int value, u32 threshold) {
    return u32(value) < threshold ? value : 255 - value;
}

DETCO_DEVICE int solarize_add(int value, u32 add) {
    return value < 128 ? least(value + int(add), 255) : value;
}

// What an operation needs of the other pixels, where it needs no more than that.
struct Whole {
    int mean;            // of the luma, for a contrast
    const u32* outputs;  // [3, 256], after a histogram
};

// An operation whose result at a pixel follows from that pixel and from numbers of the whole.
DETCO_DEVICE Pixel apply(const Op& op, Pixel p, const Whole& whole) {
    switch (op.kind) {
    case BRIGHTNESS: return blend(flat(0), p, op.factor);
    case CONTRAST: return blend(flat(whole.mean), p, op.factor);
    case SATURATION: return blend(flat(luma(p)), p, op.factor);
    case HUE: return turn(p, int(op.a));
    case GRAY: return flat(luma(p));
    case INVERT: p.r = 255 - p.r; p.g = 255 - p.g; p.b = 255 - p.b; return p;
    case POSTERIZE: p.r &= op.a; p.g &= op.a; p.b &= op.a; return p;
    case SOLARIZE:
        p.r = solarize(p.r, op.a); p.g = solarize(p.g, op.a); p.b = solarize(p.b, op.a); return p;
    case SOLARIZE_ADD:
        p.r = solarize_add(p.r, op.a); p.g = solarize_add(p.g, op.a); p.b = solarize_add(p.b, op.a);
        return p;
    case AUTO_CONTRAST:
    case EQUALIZE:
        p.r = int(whole.outputs[p.r]);
        p.g = int(whole.outputs[256 + p.g]);
        p.b = int(whole.outputs[512 + p.b]);
        return p;
    default: return p;
    }
}

DETCO_DEVICE Pixel apply_all(const Op* ops, u32 from, u32 to, Pixel p,
                             const Whole& whole) {
    for (u32 i = from; i < to; i++) p = apply(ops[i], p, whole);
    return p;
}

// The first operation from `from` on that a pixel cannot do by itself.
DETCO_DEVICE u32 run_end(const Op* ops, u32 from, u32 count) {
    while (from < count && ops[from].kind != CONTRAST && ops[from].kind != BLUR &&
           ops[from].kind < AUTO_CONTRAST) {
        from++;
    }
    return from;
}

// A pixel of the view, or of a copy of it.
DETCO_DEVICE Pixel load(const u8* from, u32 stride, u32 side, u32 x, u32 y) {
    u64 plane = u64(side) * stride;
    const u8* at = from + u64(y) * stride + x;
    Pixel p = {at[0], at[plane], at[2 * plane]};
    return p;
}

DETCO_DEVICE Pixel load_view(const Memory& memory, u32 side, u32 x, u32 y) {
    return load(memory.view, memory.stride, side, x, y);
}

DETCO_DEVICE void store(const Memory& memory, u32 side, u32 x, u32 y, Pixel p) {
    u64 plane = u64(side) * memory.stride;
    u8* at = memory.view + u64(y) * memory.stride + x;
    at[0] = u8(p.r);
    at[plane] = u8(p.g);
    at[2 * plane] = u8(p.b);
}

// ---- Blur: Pillow's three boxes along rows, then three along columns, each rounded to 8 bits.

DETCO_DEVICE u8 weigh(u32 sum, u32 ends, const Op& blur) {
    return u8((sum * blur.a + ends * blur.b + (1u << 23)) >> 24);
}

// A box of R pixels on either side, and a part of the next, over a line in place. The line's bytes
// are `step` apart; beyond its ends stand its ends.
template <int R>
DETCO_DEVICE void box(u8* line, u32 count, u64 step, const Op& blur) {
    // The inputs from x - R - 1 to x + R + 1: those on the left are overwritten already.
    u32 window[2 * R + 3];
    for (int k = 0; k < 2 * R + 3; k++) {
        u32 at = k > R + 1 ? u32(k - R - 1) : 0;
        window[k] = line[(at < count ? at : count - 1) * step];
    }
    for (u32 x = 0; x < count; x++) {
        u32 sum = 0;
        for (int k = 1; k < 2 * R + 2; k++) sum += window[k];
        line[x * step] = weigh(sum, window[0] + window[2 * R + 2], blur);
        for (int k = 0; k < 2 * R + 2; k++) window[k] = window[k + 1];
        u32 ahead = x + R + 2;
        // Past the end the newest input is the last one, and stays.
        if (ahead < count) window[2 * R + 2] = line[ahead * step];
    }
}

// The same for any radius, from a copy of the line whose bytes are `lines` apart.
DETCO_RARE void wide_box(u8* line, u32 count, u64 step, u8* copy, u64 lines, const Op& blur) {
    for (u32 x = 0; x < count; x++) copy[x * lines] = line[x * step];
    int last = int(count) - 1, radius = int(blur.c);
    u32 sum = 0;
    for (int k = -radius; k <= radius; k++) sum += copy[most(0, least(k, last)) * lines];
    for (int x = 0; x <= last; x++) {
        u32 left = copy[most(x - radius - 1, 0) * lines];
        u32 right = copy[least(x + radius + 1, last) * lines];
        line[u32(x) * step] = weigh(sum, left + right, blur);
        sum += right - copy[most(x - radius, 0) * lines];
    }
}

// The three boxes over one line of many.
DETCO_DEVICE void three_boxes(u8* line, u32 count, u64 step, u8* copy, u64 lines, const Op& blur) {
    for (int pass = 0; pass < 3; pass++) {
        if (blur.c == 0) box<0>(line, count, step, blur);
        else if (blur.c == 1) box<1>(line, count, step, blur);
        else wide_box(line, count, step, copy, lines, blur);
    }
}

// ---- RandAugment's operations that need other pixels: `ImageOps`, `ImageEnhance`,
// `Image.transform`.

// A number as a byte: truncated, and cut off at both ends.
DETCO_DEVICE int to_byte(double value) {
    return value < 0.0 ? 0 : value > 255.0 ? 255 : int(value);
}

// Turns the histogram of a channel into what the operation makes of each value.
DETCO_DEVICE void stretch(u32* counts) {
    int least = 0, most = 255;
    while (least < 255 && counts[least] == 0) least++;
    while (most > 0 && counts[most] == 0) most--;
    double scale = most > least ? 255.0 / double(most - least) : 1.0;
    double offset = most > least ? -double(least) * scale : 0.0;
    for (int value = 0; value < 256; value++) {
        counts[value] = u32(to_byte(double(value) * scale + offset));
    }
}

DETCO_DEVICE void even_out(u32* counts) {
    u32 total = 0, last = 0;
    for (int value = 0; value < 256; value++) {
        total += counts[value];
        last = counts[value] > 0 ? counts[value] : last;
    }
    u32 step = (total - last) / 255, before = step / 2;
    for (u32 value = 0; value < 256; value++) {
        u32 count = counts[value];
        u32 even = step == 0 ? value : before / step;
        counts[value] = even < 255 ? even : 255;
        before += count;
    }
}

// A value of one channel of a copy; beyond the edge stands the edge.
DETCO_DEVICE double value_at(const u8* plane, u32 stride, int last, int x, int y) {
    return double(plane[u64(least(most(y, 0), last)) * stride + u32(least(most(x, 0), last))]);
}

// Pillow's cubic through four values, `t` of the way from the second to the third.
DETCO_DEVICE double cubic(double a, double b, double c, double d, double t) {
    double slope = c - a;
    double square = 2.0 * (a - b) + c - d;
    double cube = -a + b - c + d;
    return b + t * (slope + t * (square + t * cube));
}

// A value between pixels, `dx` and `dy` beyond the one at (x, y).
DETCO_DEVICE int between(const u8* plane, u32 stride, int last, int x, int y, double dx, double dy,
                         bool bicubic) {
    double rows[4];
    for (int j = 0; j < 4; j++) {
        double a = value_at(plane, stride, last, x - 1, y + j - 1);
        double b = value_at(plane, stride, last, x, y + j - 1);
        double c = value_at(plane, stride, last, x + 1, y + j - 1);
        double d = value_at(plane, stride, last, x + 2, y + j - 1);
        rows[j] = bicubic ? cubic(a, b, c, d, dx) : b + (c - b) * dx;
    }
    double linear = rows[1] + (rows[2] - rows[1]) * dy;
    return to_byte(bicubic ? cubic(rows[0], rows[1], rows[2], rows[3], dy) : linear);
}

// The largest integer that is no larger. Places are never far outside.
DETCO_DEVICE int floor_of(double value) {
    int whole = int(value);
    return double(whole) > value ? whole - 1 : whole;
}

// The pixel that a matrix fetches; ImageNet's mean outside the image.
DETCO_DEVICE Pixel fetch(const u8* copy, u32 stride, u32 side, u32 x, u32 y, const Matrix& matrix,
                         bool bicubic) {
    const double* m = matrix.at;
    double from_x = double(x) + 0.5, from_y = double(y) + 0.5;
    double at_x = m[0] * from_x + m[1] * from_y + m[2];
    double at_y = m[3] * from_x + m[4] * from_y + m[5];
    Pixel out = {124, 116, 104};
    if (!(at_x >= 0.0 && at_x < double(side) && at_y >= 0.0 && at_y < double(side))) return out;
    at_x -= 0.5;
    at_y -= 0.5;
    int left = floor_of(at_x), top = floor_of(at_y), last = int(side) - 1;
    double dx = at_x - double(left), dy = at_y - double(top);
    u64 plane = u64(side) * stride;
    out.r = between(copy, stride, last, left, top, dx, dy, bicubic);
    out.g = between(copy + plane, stride, last, left, top, dx, dy, bicubic);
    out.b = between(copy + 2 * plane, stride, last, left, top, dx, dy, bicubic);
    return out;
}

// A blend with the image smoothed by a 3x3 filter, 5 in the middle and 1 around it, of 13. At the
// border the smoothed image is the image.
DETCO_DEVICE Pixel sharpen(const u8* copy, u32 stride, u32 side, u32 x, u32 y, float factor) {
    Pixel p = load(copy, stride, side, x, y);
    if (x == 0 || y == 0 || x + 1 >= side || y + 1 >= side) return p;
    Pixel sum = {4 * p.r, 4 * p.g, 4 * p.b};
    for (u32 i = 0; i < 9; i++) {
        Pixel near = load(copy, stride, side, x + i % 3 - 1, y + i / 3 - 1);
        sum.r += near.r;
        sum.g += near.g;
        sum.b += near.b;
    }
    // Rounded: a 13th is never at a half.
    Pixel smooth = {(2 * sum.r + 13) / 26, (2 * sum.g + 13) / 26, (2 * sum.b + 13) / 26};
    return blend(smooth, p, factor);
}

// ---- The passes.

template <class Block>
DETCO_DEVICE void blur(Block& block, const Memory& memory, u32 side, const Op& op) {
    u32 lines = 3 * side;
    for (u32 i = block.thread(); i < lines; i += block.threads()) {
        three_boxes(memory.view + u64(i) * memory.stride, side, 1, memory.copy + i, lines, op);
    }
    block.wait();
    for (u32 i = block.thread(); i < lines; i += block.threads()) {
        u8* column = memory.view + u64(i / side) * side * memory.stride + i % side;
        three_boxes(column, side, memory.stride, memory.copy + i, lines, op);
    }
    block.wait();
}

// Counts the values of each channel, and turns the counts into the operation's outputs.
template <class Block>
DETCO_DEVICE void count_pass(Block& block, const Memory& memory, u32 side, const Op& op) {
    for (u32 i = block.thread(); i < 3 * 256; i += block.threads()) memory.counts[i] = 0;
    block.wait();
    for (u32 i = block.thread(); i < side * side; i += block.threads()) {
        Pixel p = load_view(memory, side, i % side, i / side);
        block.increment(memory.counts + p.r);
        block.increment(memory.counts + 256 + p.g);
        block.increment(memory.counts + 512 + p.b);
    }
    block.wait();
    for (u32 i = block.thread(); i < 3; i += block.threads()) {
        if (op.kind == EQUALIZE) even_out(memory.counts + 256 * i);
        else stretch(memory.counts + 256 * i);
    }
    block.wait();
}

// Sharpening, turning, shearing, shifting, mirroring: from a copy.
template <class Block>
DETCO_DEVICE void move_pass(Block& block, const Batch& batch, const Memory& memory, u32 side,
                            const Op& op) {
    u32 words = 3 * side * memory.stride / 4;
    const u32* from = reinterpret_cast<const u32*>(memory.view);
    u32* to = reinterpret_cast<u32*>(memory.copy);
    for (u32 i = block.thread(); i < words; i += block.threads()) to[i] = from[i];
    block.wait();
    const Matrix* matrices = reinterpret_cast<const Matrix*>(batch.matrices);
    for (u32 i = block.thread(); i < side * side; i += block.threads()) {
        u32 x = i % side, y = i / side;
        Pixel p = op.kind == SHARPNESS
            ? sharpen(memory.copy, memory.stride, side, x, y, op.factor)
            : op.kind == FLIP
            ? load(memory.copy, memory.stride, side, side - 1 - x, y)
            : fetch(memory.copy, memory.stride, side, x, y, matrices[op.a], op.b != 0);
        store(memory, side, x, y, p);
    }
    block.wait();
}

// The crop, resized, and the operations before `end`. Gives the sum of the luma.
template <class Block>
DETCO_DEVICE u32 resize_pass(Block& block, const View& view, const Memory& memory, const Op* ops,
                             u32 end) {
    u32 sum = 0;
    for (u32 i = block.thread(); i < view.side * view.side; i += block.threads()) {
        u32 x = i % view.side, y = i / view.side;
        Pixel p = apply_all(ops, 0, end, resize(view, memory, x, y), Whole());
        store(memory, view.side, x, y, p);
        sum += u32(luma(p));
    }
    return block.sum(sum);
}

// The operations from `from` to `to` in place. Gives the sum of the luma.
template <class Block>
DETCO_DEVICE u32 color_pass(Block& block, const View& view, const Memory& memory, const Op* ops,
                            u32 from, u32 to, const Whole& whole) {
    u32 sum = 0;
    for (u32 i = block.thread(); i < view.side * view.side; i += block.threads()) {
        u32 x = i % view.side, y = i / view.side;
        Pixel p = apply_all(ops, from, to, load_view(memory, view.side, x, y), whole);
        store(memory, view.side, x, y, p);
        sum += u32(luma(p));
    }
    return block.sum(sum);
}

DETCO_DEVICE u32 bits_of(float value) {
    union {
        float value;
        u32 bits;
    } both;
    both.value = value;
    return both.bits;
}

// The nearest bfloat16, to even where there are two. Not for NaN.
DETCO_DEVICE u16 to_bf16(float value) {
    u32 bits = bits_of(value);
    return u16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

DETCO_DEVICE float normalised(const Batch& batch, u32 channel, u32 byte) {
    return (float(byte) / 255.0f - batch.mean[channel]) / batch.std[channel];
}

DETCO_DEVICE void put(const Batch& batch, u64 out, u64 at, float value) {
    if (batch.bf16) reinterpret_cast<u16*>(out)[at] = to_bf16(value);
    else reinterpret_cast<float*>(out)[at] = value;
}

// The last operations, flip, cut, permutation, normalisation: into the tensor.
template <class Block>
DETCO_DEVICE void output_pass(Block& block, const Batch& batch, const View& view,
                              const Memory& memory, const Op* ops, u32 from,
                              const Whole& whole) {
    u32 side = view.patch == 0 ? view.side : view.patch;
    for (u32 i = block.thread(); i < view.count * side * side; i += block.threads()) {
        u32 slot = i / (side * side), within = i % (side * side);
        u32 x = within % side, y = within / side;
        if (view.patch != 0) {
            x += view.slots[slot] & 0xFFFF;
            y += view.slots[slot] >> 16;
        }
        x = view.flip ? view.side - 1 - x : x;
        Pixel p = apply_all(ops, from, view.ops, load_view(memory, view.side, x, y), whole);
        put(batch, view.out, u64(i) * 3, memory.table[p.r]);
        put(batch, view.out, u64(i) * 3 + 1, memory.table[256 + p.g]);
        put(batch, view.out, u64(i) * 3 + 2, memory.table[512 + p.b]);
    }
}

// Fills the table of outputs: once a block, before its first view.
template <class Block>
DETCO_DEVICE void fill_table(Block& block, const Batch& batch, u8* shared) {
    float* table = reinterpret_cast<float*>(shared);
    for (u32 i = block.thread(); i < 3 * 256; i += block.threads()) {
        table[i] = normalised(batch, i / 256, i % 256);
    }
}

// One view, from frame to tensor.
template <class Block>
DETCO_DEVICE void render(Block& block, const Batch& batch, const View& view, u8* shared,
                         u8* scratch) {
    const Op* ops = reinterpret_cast<const Op*>(batch.ops) + view.first_op;
    Memory memory = lay_out(batch, view, shared, scratch);
    for (u32 i = block.thread(); i < 2 * view.side; i += block.threads()) {
        bool cubic = view.cubic != 0;
        if (i < view.side) lay(view.width, view.side, i, cubic, memory.columns);
        else lay(view.height, view.side, i - view.side, cubic, memory.rows);
    }
    block.wait();
    u32 at = run_end(ops, 0, view.ops);
    u32 sum = resize_pass(block, view, memory, ops, at);
    Whole whole = {0, memory.counts};
    // What comes before `at` is done, and `sum` is the luma of what there is now.
    while (true) {
        u32 from = at;
        if (at < view.ops) {
            const Op& op = ops[at];
            bool by_pixel = op.kind == CONTRAST || op.kind == AUTO_CONTRAST || op.kind == EQUALIZE;
            if (op.kind == CONTRAST) {
                whole.mean = int(double(sum) / double(u64(view.side) * view.side) + 0.5);
            } else if (op.kind == BLUR) {
                blur(block, memory, view.side, op);
            } else if (by_pixel) {
                count_pass(block, memory, view.side, op);
            } else {
                move_pass(block, batch, memory, view.side, op);
            }
            // What can be done now rides on the next pass.
            from = by_pixel ? at : at + 1;
            at = run_end(ops, at + 1, view.ops);
        }
        if (at == view.ops) {
            output_pass(block, batch, view, memory, ops, from, whole);
            return;
        }
        if (from < at || ops[at].kind == CONTRAST) {
            sum = color_pass(block, view, memory, ops, from, at, whole);
        }
    }
}

}  // namespace detco
