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
#include <optional>
#include <string>

using at::Tensor;
using namespace detco_norm;

namespace {

// The driver's cuLaunchKernel.
using Launch = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                       void** extra);

// In the order in which they are registered: five for float, the same for bfloat16, then the last.
enum Kernel { ADD_MOMENTS, FINISH_MOMENTS, NORMALISE, ADD_GRADIENTS, SPREAD_GRADIENTS, KINDS };
constexpr int64_t FINISH_GRADIENTS = 2 * KINDS;
constexpr int64_t KERNELS = FINISH_GRADIENTS + 1;

// The kernels of a GPU, written once, before its first forward pass.
struct Loaded {
  Launch launch = nullptr;
  std::array<void*, KERNELS> kernels{};
};
std::array<Loaded, 64> gpus;

constexpr int INVALID_CONTEXT = 201; // CUDA_ERROR_INVALID_CONTEXT
constexpr int INVALID_HANDLE = 400;  // CUDA_ERROR_INVALID_HANDLE
constexpr unsigned THREADS = 256; // as norm.cu has it
constexpr int64_t BLOCKS = 2048;  // enough for any GPU, few enough to add up
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
    if (!x.is_cpu()) {
      while (lanes < LANES_MAX && lanes * VECTOR < c) lanes *= 2;
    }
    across = static_cast<u32>((c + lanes * VECTOR - 1) / (lanes * VECTOR));
    const int64_t depth = x.is_cpu() ? 1 : THREADS / lanes;
    const int64_t wanted = BLOCKS / (int64_t{across} * groups);
    const int64_t most = map.rows / (8 * depth); // a thread adds up eight rows at least
    map.shares = static_cast<u32>(std::clamp<int64_t>(std::min(wanted, most), 1, 65535));
  }
};

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
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

// Queues a kernel on the stream on which libtorch works now.
template <class... Arguments>
void queue(int64_t kernel, const Tensor& like, std::array<unsigned, 3> grid, Arguments... arguments) {
  const auto index = static_cast<size_t>(like.device().index());
  TORCH_CHECK(like.is_cuda() && index < gpus.size() && gpus[index].launch != nullptr,
              "the kernels of group normalisation are not loaded on ", like.device());
  const Loaded& gpu = gpus[index];
  const c10::DeviceGuard device(like.device());
  const c10::impl::VirtualGuardImpl guard(like.device().type());
  void* stream = guard.getStream(like.device()).native_handle();
  void* pointers[] = {&arguments...};
  const auto launch = [&] {
    return gpu.launch(gpu.kernels[kernel], grid[0], grid[1], grid[2], THREADS, 1, 1, 0, stream, pointers, nullptr);
  };
  int status = launch();
  if (status == INVALID_CONTEXT || status == INVALID_HANDLE) {
    // A thread of autograd's in which CUDA's runtime has not worked yet, or with another GPU: work of any
    // kind makes the GPU's context its own.
    at::zeros({1}, like.options());
    status = launch();
  }
  TORCH_CHECK(status == 0, "cuLaunchKernel: status ", status);
}

std::array<unsigned, 3> grid_of(const Plan& plan) { return {plan.across, plan.map.shares, plan.map.groups}; }

std::array<unsigned, 3> threads_for(int64_t count) {
  return {static_cast<unsigned>((count + THREADS - 1) / THREADS), 1, 1};
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
    if (x.is_cpu()) {
      each_block(plan, [&](auto& block) { add_moments(block, plan.map, in, sums); });
      for (int64_t i = 0; i < groups * c; ++i) finish_moments(i, plan.map, in, sums, mean, rstd, variance);
    } else {
      queue(first + ADD_MOMENTS, x, grid_of(plan), plan.map, plan.lanes, in, sums);
      queue(first + FINISH_MOMENTS, x, threads_for(groups * c), plan.map, in, sums, mean, rstd, variance);
    }
  });
  return m;
}

Tensor channels_last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

class Normalised : public torch::autograd::Function<Normalised> {
 public:
  // Returns the result, and mean and unbiased variance of each group, `[groups, c]`.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& map,
                                                const Tensor& weight, const Tensor& bias,
                                                const std::optional<Tensor>& other, int64_t groups, bool relu,
                                                double eps) {
    const Tensor x = channels_last(map);
    const Plan plan(x, groups, relu, eps);
    TORCH_CHECK(weight.scalar_type() == at::kFloat && bias.scalar_type() == at::kFloat,
                "weights and biases are float");
    Tensor residual;
    if (other.has_value()) {
      TORCH_CHECK(other->sizes() == x.sizes() && other->scalar_type() == x.scalar_type(),
                  "the residual is not like the map");
      residual = channels_last(*other);
    }
    const Moments m = moments_of(plan, x);
    const Tensor y = at::empty_like(x);
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      auto *in = data<T>(x), *more = data<T>(residual), *out = data<T>(y);
      auto *w = data<float>(weight), *b = data<float>(bias);
      auto *mean = data<float>(m.mean), *rstd = data<float>(m.rstd);
      if (x.is_cpu()) {
        each_block(plan, [&](auto& block) { normalise(block, plan.map, in, more, w, b, mean, rstd, out); });
      } else {
        queue(first + NORMALISE, x, grid_of(plan), plan.map, plan.lanes, in, more, w, b, mean, rstd, out);
      }
    });
    context->save_for_backward({x, relu ? y : Tensor(), weight, m.mean, m.rstd});
    context->saved_data["groups"] = groups;
    context->saved_data["eps"] = eps;
    context->saved_data["residual"] = other.has_value();
    context->mark_non_differentiable({m.mean, m.variance});
    return {y, m.mean, m.variance};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &y = saved[1], &weight = saved[2], &mean = saved[3], &rstd = saved[4];
    const Plan plan(x, context->saved_data["groups"].toInt(), y.defined(), context->saved_data["eps"].toDouble());
    const Tensor dy = channels_last(gradients[0]);
    const int64_t groups = plan.map.groups, c = plan.map.c;
    const auto floats = x.options().dtype(at::kFloat);
    const Tensor partial = at::empty({2, plan.map.shares, groups, c}, floats);
    const Tensor sums = at::empty({2, groups, c}, floats);
    const Tensor d_weight = at::empty({c}, floats), d_bias = at::empty({c}, floats);
    const Tensor dx = at::empty_like(x);
    const Tensor d_residual = context->saved_data["residual"].toBool() ? at::empty_like(x) : Tensor();
    by_type(x, [&](auto type, int64_t first) {
      using T = decltype(type);
      auto *g = data<T>(dy), *result = data<T>(y), *in = data<T>(x), *out = data<T>(dx), *more = data<T>(d_residual);
      auto *w = data<float>(weight), *m = data<float>(mean), *r = data<float>(rstd);
      auto *parts = data<float>(partial), *totals = data<float>(sums);
      auto *dw = data<float>(d_weight), *db = data<float>(d_bias);
      const Map& map = plan.map;
      if (x.is_cpu()) {
        each_block(plan, [&](auto& block) { add_gradients(block, map, g, result, in, m, r, parts); });
        for (int64_t i = 0; i < groups * c; ++i) finish_gradients(i, map, parts, totals);
        each_block(plan, [&](auto& block) {
          spread_gradients(block, map, g, result, in, w, m, r, totals, out, more, dw, db);
        });
      } else {
        queue(first + ADD_GRADIENTS, x, grid_of(plan), map, plan.lanes, g, result, in, m, r, parts);
        queue(FINISH_GRADIENTS, x, threads_for(groups * c), map, parts, totals);
        queue(first + SPREAD_GRADIENTS, x, grid_of(plan), map, plan.lanes, g, result, in, w, m, r, totals, out, more,
              dw, db);
      }
    });
    return {dx, d_weight, d_bias, d_residual, Tensor(), Tensor(), Tensor()};
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

// Registers the driver's cuLaunchKernel and the kernels of norm.cu, `count` of them, for a GPU. Once,
// before any of its maps is normalised.
extern "C" int32_t detco_norm_register(int64_t cuda_index, void* launch, void* const* functions, int64_t count,
                                       char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    TORCH_CHECK(count == KERNELS, count, " kernels, expected ", KERNELS);
    Loaded& gpu = gpus.at(static_cast<size_t>(cuda_index));
    std::copy(functions, functions + count, gpu.kernels.begin());
    gpu.launch = reinterpret_cast<Launch>(launch);
  });
}

// relu(normalised map + residual), and each group's mean and unbiased variance: three new tensors, the
// caller's. Group g is the g-th block of n / groups samples. `residual` may be null.
extern "C" int32_t detco_norm_forward(const Tensor* map, const Tensor* weight, const Tensor* bias,
                                      const Tensor* residual, int64_t groups, int32_t relu, double eps,
                                      Tensor** out, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    std::optional<Tensor> other;
    if (residual != nullptr) other = *residual;
    const auto results = Normalised::apply(*map, *weight, *bias, other, groups, relu != 0, eps);
    for (size_t i = 0; i < 3; ++i) out[i] = new Tensor(results[i]);
  });
}
