// Operations on lists of tensors, gradients given by hand, and memory formats.
#include "../shim.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <vector>

using at::Tensor;

namespace {

std::vector<Tensor> listed(const Tensor* const* tensors, int64_t count) {
  std::vector<Tensor> list;
  list.reserve(count);
  for (int64_t i = 0; i < count; ++i) list.push_back(*tensors[i]);
  return list;
}

// `grad` as `like` lies in memory: fused operations go through both with one index.
Tensor aligned(const Tensor& grad, const Tensor& like) {
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    if (like.size(dim) == 1 || grad.stride(dim) == like.stride(dim)) continue;
    return at::empty_like(like).copy_(grad);
  }
  return grad;
}

}  // namespace

// One update of torch.optim.SGD, without dampening or Nesterov, of `count` parameters in a few
// launches. Where `skip` (one float on the device, or null) is 1, nothing changes.
extern "C" int32_t detco_step_sgd(const Tensor* const* parameters, const Tensor* const* gradients,
                                  const Tensor* const* buffers, int64_t count, double decay,
                                  double momentum, double rate, int32_t nesterov,
                                  const Tensor* skip, char* message,
                                  int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    at::NoGradGuard no_grad;
    auto into = listed(parameters, count);
    // The fused kernels want no buffers where there is no momentum.
    auto momenta = listed(buffers, momentum == 0.0 ? 0 : count);
    std::vector<Tensor> from;
    from.reserve(count);
    for (int64_t i = 0; i < count; ++i) from.push_back(aligned(*gradients[i], into[i]));
    std::optional<Tensor> found_inf;
    if (skip != nullptr) found_inf = *skip;
    at::_fused_sgd_(into, from, momenta, decay, momentum, rate, /*dampening=*/0.0,
                    /*nesterov=*/nesterov != 0, /*maximize=*/false, /*is_first_step=*/false,
                    /*grad_scale=*/std::nullopt, found_inf);
  });
}

// into[i] += weight * (towards[i] - into[i])
extern "C" int32_t detco_step_lerp(const Tensor* const* into, const Tensor* const* towards,
                                   int64_t count, double weight, char* message,
                                   int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    at::NoGradGuard no_grad;
    at::_foreach_lerp_(listed(into, count), listed(towards, count), weight);
  });
}

// Copies values, tensor by tensor.
extern "C" int32_t detco_step_copy(const Tensor* const* into, const Tensor* const* from,
                                   int64_t count, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(listed(into, count), listed(from, count), /*non_blocking=*/true);
  });
}

// Adds a scalar tensor to each.
extern "C" int32_t detco_step_add(const Tensor* const* into, int64_t count, const Tensor* summand,
                                  char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    at::NoGradGuard no_grad;
    at::_foreach_add_(listed(into, count), *summand);
  });
}

// Euclidean length of all together: a new tensor, the caller's.
extern "C" int32_t detco_step_length(const Tensor* const* tensors, int64_t count, Tensor** out,
                                     char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    at::NoGradGuard no_grad;
    const auto lengths = at::_foreach_norm(listed(tensors, count), 2);
    *out = new Tensor(at::linalg_vector_norm(at::stack(lengths)));
  });
}

// Takes the gradients away; the next backward pass makes new ones.
extern "C" int32_t detco_step_forget_gradients(const Tensor* const* tensors, int64_t count,
                                               char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    for (int64_t i = 0; i < count; ++i) tensors[i]->mutable_grad().reset();
  });
}

// The same values with channels innermost: a new tensor, or the same memory if it lies so already.
extern "C" int32_t detco_step_channels_last(const Tensor* tensor, Tensor** out, char* message,
                                            int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    *out = new Tensor(tensor->contiguous(at::MemoryFormat::ChannelsLast));
  });
}
