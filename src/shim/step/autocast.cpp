// Autocast, and the numerics of the whole process.
#include "../shim.h"
#include "device.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>

using at::Tensor;
using detco::device_of;

// Enters autocast to bfloat16 on this thread. `was` takes what `detco_step_autocast_leave` needs.
extern "C" int32_t detco_step_autocast_enter(int64_t cuda_index, int32_t* was, char* message,
                                             int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    const auto type = device_of(cuda_index).type();
    *was = at::autocast::is_autocast_enabled(type) ? 1 : 0;
    at::autocast::set_autocast_dtype(type, at::kBFloat16);
    at::autocast::set_autocast_enabled(type, true);
    at::autocast::increment_nesting();
  });
}

// Leaves autocast; the outermost forgets the weights it has cast.
extern "C" int32_t detco_step_autocast_leave(int64_t cuda_index, int32_t was, char* message,
                                             int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_of(cuda_index).type(), was != 0);
  });
}

// Numerics of the whole process: TensorFloat-32 on a GPU for what stays float32, and deterministic
// algorithms, or else whatever cuDNN finds fastest by trying.
extern "C" int32_t detco_step_numerics(int32_t tf32, int32_t deterministic, char* message,
                                       int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto& context = at::globalContext();
    context.setFloat32MatmulPrecision(tf32 ? "high" : "highest");
    context.setAllowTF32CuDNN(tf32 != 0);
    context.setBenchmarkCuDNN(deterministic == 0);
    context.setDeterministicCuDNN(deterministic != 0);
    // What has no deterministic form warns: an error would end a run for a pooling layer.
    context.setDeterministicAlgorithms(deterministic != 0, /*warn_only=*/true);
    // Filling new memory serves debugging, and costs a pass over every tensor.
    context.setDeterministicFillUninitializedMemory(false);
  });
}
