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

// Teams for each channel of each group.
std::array<unsigned, 3> teams_of(const Plan& plan) {
  const int64_t count = int64_t{plan.map.groups} * plan.map.c;
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

class Normalised : public torch::autograd::Function<Normalised> {
 public:
  // Returns mean and unbiased variance of each group, `[groups, c]`, the result, and where there is a
  // residual the result once more, for another reader: the gradients of both come here and are added up on
  // the way. With `pooled` there is a ReLU and no residual, and the result is what a max pool makes of it.
  // `backward` says whether there will be gradients.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& map,
                                                const Tensor& weight, const Tensor& bias,
                                                const std::optional<Tensor>& other, int64_t groups, bool relu,
                                                bool pooled, double eps, bool backward) {
    const Tensor x = channels_last(map);
    const Plan plan(x, groups, relu, eps);
    TORCH_CHECK(!pooled || (relu && !other.has_value()), "a max pool follows a ReLU and no residual");
    TORCH_CHECK(weight.scalar_type() == at::kFloat && bias.scalar_type() == at::kFloat,
                "weights and biases are float");
    Tensor residual;
    if (other.has_value()) {
      TORCH_CHECK(other->sizes() == x.sizes() && other->scalar_type() == x.scalar_type(),
                  "the residual is not like the map");
      residual = channels_last(*other);
    }
    const Moments m = moments_of(plan, x);
    if (pooled) return forward_pooled(context, plan, x, weight, bias, m, backward);
    const Tensor y = at::empty_like(x);
    Tensor open; // a bit a value: whether the ReLU lets it through
    if (relu && backward) open = at::empty({x.numel() / VECTOR}, x.options().dtype(at::kByte));
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      auto *in = data<T>(x), *more = data<T>(residual), *out = data<T>(y);
      auto *w = data<float>(weight), *b = data<float>(bias);
      auto *mean = data<float>(m.mean), *rstd = data<float>(m.rstd);
      auto* bits = data<u8>(open);
      if (by_one_thread(x)) {
        each_block(plan, [&](auto& block) { normalise(block, plan.map, in, more, w, b, mean, rstd, out, bits); });
      } else {
        queue(first + NORMALISE, x, grid_of(plan), plan.map, plan.lanes, in, more, w, b, mean, rstd, out, bits);
      }
    });
    save(context, plan, x, open, weight, m, other.has_value(), false);
    if (!other.has_value()) return {m.mean, m.variance, y};
    // The same memory, and for autograd a result of its own.
    return {m.mean, m.variance, y, y.variable_data()};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "there is no gradient of this gradient");
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &open = saved[1], &weight = saved[2], &mean = saved[3], &rstd = saved[4];
    const bool residual = context->saved_data["residual"].toBool();
    const bool pooled = context->saved_data["pooled"].toBool();
    const Plan plan(x, context->saved_data["groups"].toInt(), context->saved_data["relu"].toBool(),
                    context->saved_data["eps"].toDouble());
    // Of the result's readers, those that sent one.
    std::vector<Tensor> sent;
    for (size_t i = 2; i < gradients.size(); ++i)
      if (gradients[i].defined()) sent.push_back(channels_last(gradients[i]));
    torch::autograd::variable_list out(9);
    if (sent.empty()) return out;
    Tensor dy = sent[0], more = sent.size() > 1 ? sent[1] : Tensor(), bits = open;
    const int64_t groups = plan.map.groups, c = plan.map.c;
    const auto floats = x.options().dtype(at::kFloat);
    const Tensor partial = at::empty({2, plan.map.shares, groups, c}, floats);
    const Tensor sums = at::empty({2, groups, c}, floats);
    const Tensor d_weight = at::empty({c}, floats), d_bias = at::empty({c}, floats);
    const Tensor dx = at::empty_like(x);
    const Tensor d_residual = residual ? at::empty_like(x) : Tensor();
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      const Map& map = plan.map;
      auto *in = data<T>(x), *out = data<T>(dx), *g_out = data<T>(d_residual);
      auto *w = data<float>(weight), *m = data<float>(mean), *r = data<float>(rstd);
      auto *parts = data<float>(partial), *totals = data<float>(sums);
      auto *dw = data<float>(d_weight), *db = data<float>(d_bias);
      if (pooled) {
        const Pool pool = pool_of(x, plan);
        auto* g = data<T>(dy);
        auto* places = data<u32>(bits);
        if (by_one_thread(x)) {
          const auto source = [&](auto& block) { return Pooled<T>{pool, g, places, block.z()}; };
          each_block(plan, [&](auto& block) {
            add_gradients(block, map, source(block), in, m, r, static_cast<T*>(nullptr), parts);
          });
          TeamOfOne team;
          for (int64_t i = 0; i < groups * c; ++i) finish_gradients(team, i, map, parts, totals);
          each_block(plan, [&](auto& block) {
            spread_gradients(block, map, source(block), in, w, m, r, totals, out, dw, db);
          });
        } else {
          queue(first + ADD_POOLED_GRADIENTS, x, grid_of(plan), map, pool, plan.lanes, g, places, in, m, r, parts);
          queue(FINISH_GRADIENTS, x, teams_of(plan), map, parts, totals);
          queue(first + SPREAD_POOLED_GRADIENTS, x, grid_of(plan), map, pool, plan.lanes, g, places, in, w, m, r,
                totals, out, dw, db);
        }
        return;
      }
      const auto add = [&](T* g, T* g_more, u8* through) {
        if (by_one_thread(x)) {
          each_block(plan, [&](auto& block) {
            add_gradients(block, map, Direct<T>{g, g_more, through}, in, m, r, g_out, parts);
          });
          TeamOfOne team;
          for (int64_t i = 0; i < groups * c; ++i) finish_gradients(team, i, map, parts, totals);
        } else {
          queue(first + ADD_GRADIENTS, x, grid_of(plan), map, plan.lanes, g, g_more, through, in, m, r, g_out, parts);
          queue(FINISH_GRADIENTS, x, teams_of(plan), map, parts, totals);
        }
      };
      const auto spread = [&](T* g, T* g_more, u8* through) {
        if (by_one_thread(x)) {
          each_block(plan, [&](auto& block) {
            spread_gradients(block, map, Direct<T>{g, g_more, through}, in, w, m, r, totals, out, dw, db);
          });
        } else {
          queue(first + SPREAD_GRADIENTS, x, grid_of(plan), map, plan.lanes, g, g_more, through, in, w, m, r, totals,
                out, dw, db);
        }
      };
      add(data<T>(dy), data<T>(more), data<u8>(bits));
      // The residual's gradient is the sum, behind the ReLU already.
      if (residual) dy = d_residual, more = bits = Tensor();
      spread(data<T>(dy), data<T>(more), data<u8>(bits));
    });
    out[0] = dx, out[1] = d_weight, out[2] = d_bias, out[3] = d_residual;
    return out;
  }

 private:
  static void save(torch::autograd::AutogradContext* context, const Plan& plan, const Tensor& x, const Tensor& bits,
                   const Tensor& weight, const Moments& m, bool residual, bool pooled) {
    context->save_for_backward({x, bits, weight, m.mean, m.rstd});
    context->saved_data["groups"] = static_cast<int64_t>(plan.map.groups);
    context->saved_data["relu"] = plan.map.relu != 0;
    context->saved_data["eps"] = static_cast<double>(plan.map.eps);
    context->saved_data["residual"] = residual;
    context->saved_data["pooled"] = pooled;
    context->mark_non_differentiable({m.mean, m.variance});
    context->set_materialize_grads(false);
  }

  static torch::autograd::variable_list forward_pooled(torch::autograd::AutogradContext* context, const Plan& of_x,
                                                       const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                       const Moments& m, bool backward) {
    const Pool pool = pool_of(x, of_x);
    TORCH_CHECK(of_x.map.rows <= std::numeric_limits<int32_t>::max() / of_x.map.groups, of_x.map.groups,
                " groups of ", of_x.map.rows, " pixels are too many to be pooled");
    const Tensor y = at::empty({x.size(0), x.size(1), pool.pooled_h, pool.pooled_w},
                               x.options().memory_format(at::MemoryFormat::ChannelsLast));
    const Plan plan(y, of_x.map.groups, true, of_x.map.eps);
    Tensor places; // four bits a value
    if (backward) places = at::empty({y.numel() / VECTOR}, x.options().dtype(at::kInt));
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      auto *in = data<T>(x), *out = data<T>(y);
      auto *w = data<float>(weight), *b = data<float>(bias);
      auto *mean = data<float>(m.mean), *rstd = data<float>(m.rstd);
      auto* to = data<u32>(places);
      if (by_one_thread(x)) {
        each_block(plan, [&](auto& block) {
          normalise_pooled(block, plan.map, pool, in, w, b, mean, rstd, out, to);
        });
      } else {
        queue(first + NORMALISE_POOLED, x, grid_of(plan), plan.map, pool, plan.lanes, in, w, b, mean, rstd, out, to);
      }
    });
    save(context, of_x, x, places, weight, m, false, true);
    return {m.mean, m.variance, y};
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

// Each group's mean and unbiased variance, relu(normalised map + residual), and that once more where there is
// a residual, else null: new tensors, the caller's. Group g is the g-th block of n / groups samples.
// `residual` may be null. With `pool` a max pool, as the stem has it, follows the ReLU.
extern "C" int32_t detco_norm_forward(const Tensor* map, const Tensor* weight, const Tensor* bias,
                                      const Tensor* residual, int64_t groups, int32_t relu, int32_t pool,
                                      double eps, Tensor** out, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    std::optional<Tensor> other;
    if (residual != nullptr) other = *residual;
    bool backward = map->requires_grad() || weight->requires_grad() || bias->requires_grad();
    backward = at::GradMode::is_enabled() && (backward || (residual != nullptr && residual->requires_grad()));
    const auto results = Normalised::apply(*map, *weight, *bias, other, groups, relu != 0, pool != 0, eps, backward);
    out[3] = nullptr;
    for (size_t i = 0; i < results.size(); ++i) out[i] = new Tensor(results[i]);
  });
}
