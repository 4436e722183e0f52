// Batch normalisation of groups, with gradients: `../model/kernels/norm.h` by the CPU, or by the GPU's
// kernels once they are registered.
#include "shim.h"

#include "../model/kernels/norm.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <vector>

using at::Tensor;
using namespace detco_norm;

namespace {

// The driver's cuLaunchKernel.
using Launch = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                       void** extra);

// In the order in which they are registered: those for float, the same for bfloat16, then the last.
enum Kernel {
  ADD_MOMENTS,
  FINISH_MOMENTS,
  NORMALISE,
  NORMALISE_POOLED,
  ADD_GRADIENTS,
  SPREAD_GRADIENTS,
  ADD_GRADIENTS_OF_TWO,
  SPREAD_GRADIENTS_OF_TWO,
  ADD_POOLED_GRADIENTS,
  SPREAD_POOLED_GRADIENTS,
  KINDS
};
constexpr int64_t FINISH_GRADIENTS = 2 * KINDS;
constexpr int64_t KERNELS = FINISH_GRADIENTS + 1;

// The kernels of a GPU, written once, before its first forward pass.
struct Loaded {
  Launch launch = nullptr;
  std::array<void*, KERNELS> kernels{};
};
std::array<Loaded, 64> gpus;
// For maps on the CPU, where a test has a stand-in for the driver in this thread.
thread_local Loaded stand_in;

// Whether a map is taken by the calling thread alone, block after block.
bool by_one_thread(const Tensor& x) { return x.is_cpu() && stand_in.launch == nullptr; }

constexpr int INVALID_CONTEXT = 201; // CUDA_ERROR_INVALID_CONTEXT
constexpr int INVALID_HANDLE = 400;  // CUDA_ERROR_INVALID_HANDLE
constexpr unsigned THREADS = 256; // as norm.cu has it
constexpr int64_t BLOCKS = 2048;  // enough for any GPU, few enough to add up
constexpr int64_t CHANNELS = 8;   // as norm.cu has it
constexpr int64_t LANES_MAX = 32;

// One thread, which does it all.
struct OneThread {
  u32 block_x, block_y, block_z;
  u32 x() const { return block_x; }
  u32 y() const { return block_y; }
  u32 z() const { return block_z; }
  u32 lanes() const { return 1; }
  u32 lane() const { return 0; }
  u32 depth() const { return 1; }
  u32 down() const { return 0; }
  void add_up(float (&)[VECTOR]) const {}
};

struct TeamOfOne {
  u32 size() const { return 1; }
  u32 member() const { return 0; }
  double sum(double value) const { return value; }
};

// How a map is cut into blocks.
struct Plan {
  Map map;
  u32 lanes;
  u32 across;

  Plan(const Tensor& x, int64_t groups, bool relu, double eps) {
    const int64_t n = x.size(0), c = x.size(1);
    TORCH_CHECK(x.dim() == 4 && groups > 0 && n % groups == 0, "a map of ", n, " samples has no ", groups,
                " groups");
    TORCH_CHECK(c % VECTOR == 0, c, " channels are not a multiple of ", VECTOR);
    TORCH_CHECK(n * x.size(2) * x.size(3) <= std::numeric_limits<int32_t>::max(), n, " samples of ", x.size(2), "x",
                x.size(3), " pixels are too many for one map");
    map.rows = n / groups * x.size(2) * x.size(3);
    map.c = static_cast<u32>(c);
    map.groups = static_cast<u32>(groups);
    map.relu = relu ? 1 : 0;
    map.eps = static_cast<float>(eps);
    lanes = 1;
    if (!by_one_thread(x)) {
      while (lanes < LANES_MAX && lanes * VECTOR < c) lanes *= 2;
    }
    across = static_cast<u32>((c + lanes * VECTOR - 1) / (lanes * VECTOR));
    const int64_t depth = by_one_thread(x) ? 1 : THREADS / lanes;
    const int64_t wanted = BLOCKS / (int64_t{across} * groups);
    const int64_t most = map.rows / (8 * depth); // a thread adds up eight rows at least
    map.shares = static_cast<u32>(std::clamp<int64_t>(std::min(wanted, most), 1, 65535));
  }
};

// What a map of `x`'s pixels is pooled to.
Pool pool_of(const Tensor& x, const Plan& plan) {
  const auto h = static_cast<u32>(x.size(2)), w = static_cast<u32>(x.size(3));
  return {h, w, (h - 1) / 2 + 1, (w - 1) / 2 + 1, static_cast<u32>(x.size(0)) / plan.map.groups};
}

// Runs `body` for each block, on the CPU.
template <class Body>
void each_block(const Plan& plan, Body&& body) {
  for (u32 z = 0; z < plan.map.groups; ++z)
    for (u32 y = 0; y < plan.map.shares; ++y)
      for (u32 x = 0; x < plan.across; ++x) {
        OneThread block{x, y, z};
        body(block);
      }
}

template <class T>
T* data(const Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, "a tensor that begins between vectors");
  return static_cast<T*>(tensor.data_ptr());
}

// Queues a kernel on the stream on which libtorch works now.
template <class... Arguments>
void queue(int64_t kernel, const Tensor& like, std::array<unsigned, 3> grid, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  const auto launch = [&](const Loaded& loaded, void* stream) {
    return loaded.launch(loaded.kernels[kernel], grid[0], grid[1], grid[2], THREADS, 1, 1, 0, stream, pointers,
                         nullptr);
  };
  if (like.is_cpu()) {
    TORCH_CHECK(launch(stand_in, nullptr) == 0, "the stand-in for cuLaunchKernel failed");
    return;
  }
  const auto index = static_cast<size_t>(like.device().index());
  TORCH_CHECK(like.is_cuda() && index < gpus.size() && gpus[index].launch != nullptr,
              "the kernels of group normalisation are not loaded on ", like.device());
  const c10::DeviceGuard device(like.device());
  const c10::impl::VirtualGuardImpl guard(like.device().type());
  void* stream = guard.getStream(like.device()).native_handle();
  int status = launch(gpus[index], stream);
  if (status == INVALID_CONTEXT || status == INVALID_HANDLE) {
    // A thread of autograd's in which CUDA's runtime has not worked yet, or with another GPU: work of any
    // kind makes the GPU's context its own.
    at::zeros({1}, like.options());
    status = launch(gpus[index], stream);
  }
  TORCH_CHECK(status == 0, "cuLaunchKernel: status ", status);
}

std::array<unsigned, 3> grid_of(const Plan& plan) { return {plan.across, plan.map.shares, plan.map.groups}; }

// Teams for each channel of each group, `times` over.
std::array<unsigned, 3> teams_of(const Plan& plan, int64_t times = 1) {
  const int64_t count = times * plan.map.groups * plan.map.c;
  return {static_cast<unsigned>((count + CHANNELS - 1) / CHANNELS), 1, 1};
}

// Calls `body` with the map's type and the offset of that type's kernels.
template <class Body>
void by_type(const Tensor& x, Body&& body) {
  if (x.scalar_type() == at::kFloat) return body(float{}, int64_t{0});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "a map of ", x.scalar_type(), ": float or bfloat16 is needed");
  body(bf16{}, int64_t{KINDS});
}

struct Moments {
  Tensor mean, rstd, variance;
};

Moments moments_of(const Plan& plan, const Tensor& x) {
  const auto floats = x.options().dtype(at::kFloat);
  const int64_t groups = plan.map.groups, c = plan.map.c;
  const Tensor partial = at::empty({2, plan.map.shares, groups, c}, floats);
  Moments m{at::empty({groups, c}, floats), at::empty({groups, c}, floats), at::empty({groups, c}, floats)};
  by_type(x, [&](auto type, int64_t first) {
    using T = decltype(type);
    auto *in = data<T>(x);
    auto *sums = data<float>(partial), *mean = data<float>(m.mean), *rstd = data<float>(m.rstd);
    auto* variance = data<float>(m.variance);
    if (by_one_thread(x)) {
      each_block(plan, [&](auto& block) { add_moments(block, plan.map, in, sums); });
      TeamOfOne team;
      for (int64_t i = 0; i < groups * c; ++i) finish_moments(team, i, plan.map, in, sums, mean, rstd, variance);
    } else {
      queue(first + ADD_MOMENTS, x, grid_of(plan), plan.map, plan.lanes, in, sums);
      queue(first + FINISH_MOMENTS, x, teams_of(plan), plan.map, in, sums, mean, rstd, variance);
    }
  });
  return m;
}

// Maps and gradients of this thread that came in another layout and were copied.
thread_local int64_t copies = 0;

Tensor channels_last(const Tensor& x) {
  copies += x.is_contiguous(at::MemoryFormat::ChannelsLast) ? 0 : 1;
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

// Runs a kernel's `body` for each block on the CPU, or queues it.
template <class Body, class... Arguments>
void each(const Plan& plan, int64_t kernel, const Tensor& like, Body&& body, Arguments... arguments) {
  if (by_one_thread(like)) {
    each_block(plan, body);
  } else {
    queue(kernel, like, grid_of(plan), arguments...);
  }
}

// A layer of batch normalisation: what it is given, and the moments of that.
struct Layer {
  Tensor x, weight;
  Tensor bias; // forward only
  Moments moments;

  By by() const {
    if (!x.defined()) return {};
    return {data<float>(weight), bias.defined() ? data<float>(bias) : nullptr, data<float>(moments.mean),
            data<float>(moments.rstd)};
  }

  template <class T>
  Branch<T> branch() const {
    return {data<T>(x), data<float>(weight), data<float>(moments.mean), data<float>(moments.rstd)};
  }
};

// A gradient of maps that is the same for all pixels of a sample, as `Average` makes it: `[n, c]` of it.
Tensor of_each_sample(const Tensor& gradient) {
  if (gradient.dim() != 4) return {};
  for (const int64_t edge : {2, 3})
    if (gradient.stride(edge) != 0 && gradient.size(edge) != 1) return {};
  const Tensor each = gradient.select(3, 0).select(2, 0);
  return each.is_contiguous() ? each : Tensor();
}

class Normalised : public torch::autograd::Function<Normalised> {
 public:
  // Results, in their order. `AGAIN` and `WHOLE` are the map once more, for other readers: the gradients of
  // all come here and are added up on the way.
  enum Result { MEAN, VARIANCE, MAP, AGAIN, WHOLE, OTHER_MEAN, OTHER_VARIANCE, RESULTS };

  struct Options {
    int64_t groups;
    bool relu;
    bool pooled;   // there is a ReLU and no residual, and the map is what a max pool makes of it
    double eps;
    bool backward; // whether there will be gradients
  };

  // Mean and unbiased variance are each group's, `[groups, c]`. Without a residual the list ends at `MAP`, and
  // without `other_weight`, by which a residual is normalised, at `WHOLE`.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& map,
                                                const Tensor& weight, const Tensor& bias,
                                                const std::optional<Tensor>& residual,
                                                const std::optional<Tensor>& other_weight,
                                                const std::optional<Tensor>& other_bias, const Options& options) {
    const Tensor x = channels_last(map);
    const Plan plan(x, options.groups, options.relu, options.eps);
    TORCH_CHECK(!options.pooled || (options.relu && !residual.has_value()),
                "a max pool follows a ReLU and no residual");
    TORCH_CHECK(weight.scalar_type() == at::kFloat && bias.scalar_type() == at::kFloat,
                "weights and biases are float");
    Layer layer{x, weight, bias, moments_of(plan, x)}, other;
    Tensor added;
    if (residual.has_value()) {
      TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(),
                  "the residual is not like the map");
      added = channels_last(*residual);
    }
    if (other_weight.has_value()) {
      TORCH_CHECK(added.defined() && other_bias.has_value(), "another layer's weight, but no map or no bias");
      TORCH_CHECK(other_weight->scalar_type() == at::kFloat && other_bias->scalar_type() == at::kFloat,
                  "weights and biases are float");
      other = {added, *other_weight, *other_bias, moments_of(plan, added)};
    }
    torch::autograd::variable_list out(RESULTS);
    Tensor bits;
    if (options.pooled) {
      std::tie(out[MAP], bits) = pool(plan, layer, options.backward);
    } else {
      const Tensor y = at::empty_like(x);
      // A bit a value: whether the ReLU lets it through.
      if (options.relu && options.backward) bits = at::empty({x.numel() / VECTOR}, x.options().dtype(at::kByte));
      by_type(x, [&](auto type, int64_t first) {
        using T = decltype(type);
        auto *in = data<T>(x), *more = data<T>(added), *to = data<T>(y);
        const By by = layer.by(), by_other = other.by();
        auto* open = data<u8>(bits);
        each(plan, first + NORMALISE, x,
             [&](auto& block) { normalise(block, plan.map, in, by, more, by_other, to, open); }, plan.map, plan.lanes,
             in, by, more, by_other, to, open);
      });
      out[MAP] = y;
    }
    context->saved_data["groups"] = options.groups;
    context->saved_data["relu"] = options.relu;
    context->saved_data["eps"] = options.eps;
    context->saved_data["pooled"] = options.pooled;
    context->saved_data["added"] = added.defined();
    context->save_for_backward({x, weight, layer.moments.mean, layer.moments.rstd, bits, other.x, other.weight,
                                other.moments.mean, other.moments.rstd});
    context->set_materialize_grads(false);
    torch::autograd::variable_list constant{layer.moments.mean, layer.moments.variance};
    out[MEAN] = constant[0], out[VARIANCE] = constant[1];
    if (other.x.defined()) {
      constant.insert(constant.end(), {other.moments.mean, other.moments.variance});
      out[OTHER_MEAN] = other.moments.mean, out[OTHER_VARIANCE] = other.moments.variance;
    }
    context->mark_non_differentiable(constant);
    // The same memory, and for autograd results of their own.
    if (added.defined()) out[AGAIN] = out[MAP].variable_data(), out[WHOLE] = out[MAP].variable_data();
    out.resize(other.x.defined() ? RESULTS : added.defined() ? WHOLE + 1 : MAP + 1);
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "there is no gradient of this gradient");
    const auto saved = context->get_saved_variables();
    const Layer layer{saved[0], saved[1], {}, {saved[2], saved[3], {}}};
    const Layer other{saved[5], saved[6], {}, {saved[7], saved[8], {}}};
    const Tensor &x = layer.x, &bits = saved[4];
    const bool added = context->saved_data["added"].toBool();
    const Plan plan(x, context->saved_data["groups"].toInt(), context->saved_data["relu"].toBool(),
                    context->saved_data["eps"].toDouble());
    // Of the map's readers, those that sent one.
    std::vector<Tensor> sent;
    Tensor each_sample;
    const bool takes_each = added && !other.x.defined();
    for (const Result reader : {MAP, AGAIN, WHOLE}) {
      if (reader >= gradients.size() || !gradients[reader].defined()) continue;
      const Tensor& gradient = gradients[reader];
      const Tensor each = takes_each && !each_sample.defined() ? of_each_sample(gradient) : Tensor();
      if (each.defined()) {
        each_sample = each;
      } else {
        sent.push_back(channels_last(gradient));
      }
    }
    torch::autograd::variable_list out(7);
    if (sent.empty() && !each_sample.defined()) return out;
    if (sent.size() > 2) sent[0] = sent[0] + sent[2];
    sent.resize(2);
    const Tensor dx = at::empty_like(x), d_added = added ? at::empty_like(x) : Tensor();
    if (context->saved_data["pooled"].toBool()) {
      out = gradients_of_pool(plan, layer, sent[0], bits, dx);
    } else if (other.x.defined()) {
      out = gradients_of_two(plan, layer, other, sent, bits, dx, d_added);
    } else {
      out = gradients_of_one(plan, layer, sent, each_sample, bits, dx, d_added);
    }
    out[0] = dx, out[3] = d_added;
    return out;
  }

 private:
  // What both passes write of a layer, or of two with the same gradient.
  struct Sums {
    Tensor partial, sums;

    Sums(const Plan& plan, int64_t layers, const Tensor& like)
        : partial(at::empty({1 + layers, plan.map.shares, plan.map.groups, plan.map.c}, floats(like))),
          sums(at::empty({1 + layers, plan.map.groups, plan.map.c}, floats(like))) {}

    void finish(const Plan& plan) const {
      const auto layers = static_cast<u32>(sums.size(0) - 1);
      auto *from = data<float>(partial), *to = data<float>(sums);
      if (by_one_thread(sums)) {
        TeamOfOne team;
        for (int64_t i = 0; i < sums.numel(); ++i) finish_gradients(team, i, layers, plan.map, from, to);
      } else {
        queue(FINISH_GRADIENTS, sums, teams_of(plan, 1 + layers), plan.map, layers, from, to);
      }
    }
  };

  // The gradients of a layer's weight and bias.
  struct OfWeights {
    Tensor weight, bias;

    OfWeights(const Plan& plan, const Tensor& like)
        : weight(at::empty({plan.map.c}, floats(like))), bias(at::empty({plan.map.c}, floats(like))) {}

    template <class T>
    Gradients<T> with(const Tensor& dx) const {
      return {data<T>(dx), data<float>(weight), data<float>(bias)};
    }
  };

  static at::TensorOptions floats(const Tensor& like) { return like.options().dtype(at::kFloat); }

  // The pooled map and, if they are needed, the places of maxima, four bits a value.
  static std::tuple<Tensor, Tensor> pool(const Plan& of_x, const Layer& layer, bool backward) {
    const Tensor& x = layer.x;
    const Pool pool = pool_of(x, of_x);
    const Tensor y = at::empty({x.size(0), x.size(1), pool.pooled_h, pool.pooled_w},
                               x.options().memory_format(at::MemoryFormat::ChannelsLast));
    const Plan plan(y, of_x.map.groups, true, of_x.map.eps);
    Tensor places;
    if (backward) places = at::empty({y.numel() / VECTOR}, x.options().dtype(at::kInt));
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      auto *in = data<T>(x), *to = data<T>(y);
      const By by = layer.by();
      auto* where = data<u32>(places);
      each(plan, first + NORMALISE_POOLED, x,
           [&](auto& block) { normalise_pooled(block, plan.map, pool, in, by, to, where); }, plan.map, pool,
           plan.lanes, in, by, to, where);
    });
    return {y, places};
  }

  static torch::autograd::variable_list gradients_of_pool(const Plan& plan, const Layer& layer, const Tensor& dy,
                                                          const Tensor& places, const Tensor& dx) {
    const Tensor& x = layer.x;
    const Map& map = plan.map;
    const Sums sums(plan, 1, x);
    const OfWeights of_weights(plan, x);
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      const Pooled<T> source{pool_of(x, plan), data<T>(dy), data<u32>(places)};
      const Branch<T> of[] = {layer.branch<T>()};
      const Gradients<T> to[] = {of_weights.with<T>(dx)};
      auto *parts = data<float>(sums.partial), *totals = data<float>(sums.sums);
      const By by = layer.by();
      each(plan, first + ADD_POOLED_GRADIENTS, x,
           [&](auto& block) { add_gradients(block, map, source, of, static_cast<T*>(nullptr), parts); }, map,
           source.pool, plan.lanes, source.dy, source.places, of->x, by, parts);
      sums.finish(plan);
      each(plan, first + SPREAD_POOLED_GRADIENTS, x,
           [&](auto& block) { spread_gradients(block, map, source, of, totals, to); }, map, source.pool, plan.lanes,
           source.dy, source.places, of->x, by, totals, to[0]);
    });
    return {{}, of_weights.weight, of_weights.bias, {}, {}, {}, {}};
  }

  static torch::autograd::variable_list gradients_of_one(const Plan& plan, const Layer& layer,
                                                         const std::vector<Tensor>& sent, const Tensor& each_sample,
                                                         const Tensor& bits, const Tensor& dx,
                                                         const Tensor& d_added) {
    const Tensor& x = layer.x;
    const Map& map = plan.map;
    const Sums sums(plan, 1, x);
    const OfWeights of_weights(plan, x);
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      const auto pixels = static_cast<u32>(x.size(2) * x.size(3));
      Direct<T> source{data<T>(sent[0]), data<T>(sent[1]), data<u8>(bits), data<T>(each_sample), pixels};
      const Branch<T> of[] = {layer.branch<T>()};
      const Gradients<T> to[] = {of_weights.with<T>(dx)};
      auto* d = data<T>(d_added);
      auto *parts = data<float>(sums.partial), *totals = data<float>(sums.sums);
      const By by = layer.by();
      each(plan, first + ADD_GRADIENTS, x, [&](auto& block) { add_gradients(block, map, source, of, d, parts); }, map,
           plan.lanes, source.one, source.more, source.each, pixels, source.open, of->x, by, d, parts);
      sums.finish(plan);
      // The residual's gradient is the sum, behind the ReLU already.
      if (d != nullptr) source = {d, nullptr, nullptr, nullptr, pixels};
      each(plan, first + SPREAD_GRADIENTS, x,
           [&](auto& block) { spread_gradients(block, map, source, of, totals, to); }, map, plan.lanes, source.one,
           source.more, source.open, of->x, by, totals, to->dx, to->d_weight, to->d_bias);
    });
    return {{}, of_weights.weight, of_weights.bias, {}, {}, {}, {}};
  }

  static torch::autograd::variable_list gradients_of_two(const Plan& plan, const Layer& layer, const Layer& other,
                                                         const std::vector<Tensor>& sent, const Tensor& bits,
                                                         const Tensor& dx, const Tensor& d_added) {
    const Tensor& x = layer.x;
    const Map& map = plan.map;
    const Sums sums(plan, 2, x);
    const OfWeights of_weights(plan, x), of_others(plan, x);
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      const Direct<T> source{data<T>(sent[0]), data<T>(sent[1]), data<u8>(bits), nullptr, 0};
      const Branch<T> of[] = {layer.branch<T>(), other.branch<T>()};
      const Gradients<T> to[] = {of_weights.with<T>(dx), of_others.with<T>(d_added)};
      auto *parts = data<float>(sums.partial), *totals = data<float>(sums.sums);
      const By by = layer.by(), by_other = other.by();
      each(plan, first + ADD_GRADIENTS_OF_TWO, x,
           [&](auto& block) { add_gradients(block, map, source, of, static_cast<T*>(nullptr), parts); }, map,
           plan.lanes, source.one, source.more, source.open, of[0].x, by, of[1].x, by_other, parts);
      sums.finish(plan);
      each(plan, first + SPREAD_GRADIENTS_OF_TWO, x,
           [&](auto& block) { spread_gradients(block, map, source, of, totals, to); }, map, plan.lanes, source.one,
           source.more, source.open, of[0].x, by, of[1].x, by_other, totals, to[0], to[1]);
    });
    return {{}, of_weights.weight, of_weights.bias, {}, of_others.weight, of_others.bias, {}};
  }
};

// The mean of each map's pixels, `[n, c, h, w]` to `[n, c]`. libtorch's own writes its gradient channels first,
// whatever the map was; the map's other gradient is added into that, and all of it turned around again. This
// one writes nothing: each pixel has the same gradient.
class Average : public torch::autograd::Function<Average> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& map) {
    context->saved_data["sizes"] = map.sizes().vec();
    return map.mean({2, 3});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const Tensor each = gradients[0] / static_cast<double>(sizes[2] * sizes[3]);
    return {each.unsqueeze(-1).unsqueeze(-1).expand(sizes)};
  }
};

}  // namespace

// The folder of the libtorch that is loaded, without a slash at its end.
extern "C" int32_t detco_norm_libtorch(char* text, int64_t text_len, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    Dl_info info;
    std::string path;
    if (dladdr(reinterpret_cast<void*>(&at::globalContext), &info) != 0) path = info.dli_fname;
    detco::copied(path.substr(0, path.find_last_of('/')).c_str(), text, text_len);
  });
}

// How many maps and gradients the calling thread's normalisations had to lay channels last so far.
extern "C" int64_t detco_norm_copies() noexcept { return copies; }

// The mean of each map's pixels, `[n, c]`: a new tensor, the caller's.
extern "C" int32_t detco_norm_average(const Tensor* map, Tensor** out, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    TORCH_CHECK(map->dim() == 4, "a map has four dimensions, this has ", map->dim());
    *out = new Tensor(Average::apply(*map));
  });
}

// Registers the driver's cuLaunchKernel and the kernels of norm.cu, `count` of them, for a GPU. Once,
// before any of its maps is normalised. For the GPU -1 a stand-in for them, which takes the calling thread's
// maps on the CPU; none where `launch` is null.
extern "C" int32_t detco_norm_register(int64_t cuda_index, void* launch, void* const* functions, int64_t count,
                                       char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    TORCH_CHECK(count == KERNELS, count, " kernels, expected ", KERNELS);
    Loaded& gpu = cuda_index == -1 ? stand_in : gpus.at(static_cast<size_t>(cuda_index));
    std::copy(functions, functions + count, gpu.kernels.begin());
    gpu.launch = reinterpret_cast<Launch>(launch);
  });
}

// A batch normalisation of groups, of which group g is the g-th block of n / groups samples, and what follows.
// `residual` may be null, and so may `other_weight` and `other_bias`, by which it is normalised before it is
// added. With `pool` a max pool, as the stem has it, follows the ReLU. Results are new tensors, the caller's, in
// the order of `Normalised::Result`; null where there is none.
extern "C" int32_t detco_norm_forward(const Tensor* map, const Tensor* weight, const Tensor* bias,
                                      const Tensor* residual, const Tensor* other_weight, const Tensor* other_bias,
                                      int64_t groups, int32_t relu, int32_t pool, double eps, Tensor** out,
                                      char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    const auto optional = [](const Tensor* tensor) {
      return tensor == nullptr ? std::optional<Tensor>() : std::optional<Tensor>(*tensor);
    };
    bool backward = false;
    for (const Tensor* tensor : {map, weight, bias, residual, other_weight, other_bias})
      backward = backward || (tensor != nullptr && tensor->requires_grad());
    const Normalised::Options options{groups, relu != 0, pool != 0, eps, backward && at::GradMode::is_enabled()};
    const auto results = Normalised::apply(*map, *weight, *bias, optional(residual), optional(other_weight),
                                           optional(other_bias), options);
    for (size_t i = 0; i < Normalised::RESULTS; ++i) out[i] = i < results.size() ? new Tensor(results[i]) : nullptr;
  });
}
