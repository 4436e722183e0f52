// What a training step needs of libtorch: operations on lists of tensors, gradients given by hand,
// autocast, memory formats, copies beside the computation, and what memory is in use.
//
// Nothing here names CUDA's headers: devices are reached through c10's generic interfaces, so that
// the shim links against libtorch_cpu and libc10 alone and a GPU's library can come at run time.
#include "event.h"
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

using at::Tensor;

namespace {

std::vector<Tensor> listed(const Tensor* const* tensors, int64_t count) {
  std::vector<Tensor> list;
  list.reserve(count);
  for (int64_t i = 0; i < count; ++i) list.push_back(*tensors[i]);
  return list;
}

c10::Device device_of(int64_t cuda_index) {
  if (cuda_index < 0) return c10::Device(c10::kCPU);
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(cuda_index));
}

c10::Stream current(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
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

// Loads CUDA's part of libtorch, from beside the part that is loaded. `state`: 0 loaded, 1 no NVIDIA
// driver, 2 no such library, 3 it cannot be loaded. `text` says which file, or the loader's words.
extern "C" int32_t detco_step_load_cuda(int32_t* state, char* text, int64_t text_len,
                                        char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    if (dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL) == nullptr) {
      *state = 1;
      return detco::copied("libcuda.so.1", text, text_len);
    }
    Dl_info info;
    std::string folder;
    if (dladdr(reinterpret_cast<void*>(&at::globalContext), &info) != 0) {
      const std::string path(info.dli_fname);
      folder = path.substr(0, path.find_last_of('/') + 1);
    }
    const auto path = folder + "libtorch_cuda.so";
    detco::copied(path.c_str(), text, text_len);
    if (access(path.c_str(), R_OK) != 0) {
      *state = 2;
    } else if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      *state = 3;
      const char* reason = dlerror();
      detco::copied(reason == nullptr ? "unknown reason" : reason, text, text_len);
    } else {
      *state = 0;
    }
  });
}

// Free and total bytes of a GPU, and the most that tensors have held since the last reset.
extern "C" int32_t detco_step_cuda_memory(int64_t cuda_index, int64_t* free_bytes,
                                          int64_t* total_bytes, int64_t* peak_bytes, char* message,
                                          int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    // Where no tensor has been on a GPU yet, the allocator knows of none.
    at::globalContext().lazyInitDevice(c10::kCUDA);
    auto* allocator = c10::getDeviceAllocator(c10::kCUDA);
    const auto index = static_cast<c10::DeviceIndex>(cuda_index);
    const auto [free, total] = allocator->getMemoryInfo(index);
    const auto stats = allocator->getDeviceStats(index);
    *free_bytes = static_cast<int64_t>(free);
    *total_bytes = static_cast<int64_t>(total);
    *peak_bytes = stats.allocated_bytes[0].peak;
  });
}

// A small tensor to the device without waiting for the device: a new tensor.
extern "C" int32_t detco_step_upload(const Tensor* tensor, int64_t cuda_index, Tensor** out,
                                     char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    if (cuda_index < 0) {
      *out = new Tensor(*tensor);
      return;
    }
    // Pinned, the copy runs by itself; libtorch's allocator keeps the memory until it is done.
    *out = new Tensor(tensor->pin_memory().to(device_of(cuda_index), /*non_blocking=*/true));
  });
}

namespace {

// Numbers on their way to the host.
struct Download {
  Tensor host;
  std::optional<c10::Event> arrived;
};

}  // namespace

// Begins to copy a tensor to the host, behind what its device has been given so far.
extern "C" int32_t detco_step_download_begin(const Tensor* tensor, void** out, char* message,
                                             int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    at::NoGradGuard no_grad;
    auto download = std::make_unique<Download>();
    if (tensor->device().is_cpu()) {
      download->host = *tensor;
    } else {
      const auto options = tensor->options().device(at::kCPU).pinned_memory(true);
      download->host = at::empty(tensor->sizes(), options);
      download->host.copy_(*tensor, /*non_blocking=*/true);
      download->arrived.emplace(tensor->device().type());
      download->arrived->record(current(tensor->device()));
    }
    *out = download.release();
  });
}

// Waits for the copy: a new tensor on the host.
extern "C" int32_t detco_step_download_wait(void* handle, Tensor** out, char* message,
                                            int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto* download = static_cast<Download*>(handle);
    if (download->arrived) detco::wait_for(*download->arrived);
    *out = new Tensor(download->host);
  });
}

extern "C" int32_t detco_step_download_free(void* handle, char* message,
                                            int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { delete static_cast<Download*>(handle); });
}

namespace {

// Bytes from the host to the device beside the computation: a buffer on the device, and a stream that
// fills it. On a CPU the copy is done when it has been asked for.
struct Lane {
  Tensor device;
  std::optional<c10::Stream> side;
  std::optional<c10::Event> copied;
  std::optional<c10::Event> used;

  bool is_under_way() const { return copied && copied->was_marked_for_recording(); }
};

}  // namespace

extern "C" int32_t detco_step_lane_new(int64_t cuda_index, int64_t bytes, void** out,
                                       char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto lane = std::make_unique<Lane>();
    const auto device = device_of(cuda_index);
    lane->device = at::empty({bytes}, at::TensorOptions(at::kByte).device(device));
    if (!device.is_cpu()) {
      lane->side = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
      lane->copied.emplace(device.type());
      lane->used.emplace(device.type());
      // The new buffer may be memory that work already given to this stream still reads.
      lane->used->record(current(device));
    }
    *out = lane.release();
  });
}

// Sends sections, one behind the other; what the current stream is given next waits for them. They
// must stay as they are until the copy is done. The bytes on the device: a new tensor that shares the
// lane's memory.
extern "C" int32_t detco_step_lane_send(void* handle, const uint8_t* const* sections,
                                        const int64_t* lengths, int64_t count, Tensor** out,
                                        char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto* lane = static_cast<Lane*>(handle);
    const auto copy = [&] {
      int64_t start = 0;
      for (int64_t i = 0; i < count; ++i) {
        auto* bytes = const_cast<uint8_t*>(sections[i]);
        const auto host = at::from_blob(bytes, {lengths[i]}, at::TensorOptions(at::kByte));
        lane->device.narrow(0, start, lengths[i]).copy_(host, /*non_blocking=*/true);
        start += lengths[i];
      }
    };
    if (lane->side) {
      lane->used->block(*lane->side);
      {
        c10::StreamGuard guard(*lane->side);
        copy();
        lane->copied->record(*lane->side);
      }
      lane->copied->block(current(lane->device.device()));
    } else {
      copy();
    }
    *out = new Tensor(lane->device);
  });
}

// Whether the last copy has left the host; with `wait` it has when this returns.
extern "C" int32_t detco_step_lane_left(void* handle, int32_t wait, int32_t* left, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    const auto* lane = static_cast<Lane*>(handle);
    *left = 1;
    if (!lane->is_under_way()) return;
    if (wait) detco::wait_for(*lane->copied);
    else *left = lane->copied->query() ? 1 : 0;
  });
}

// What the current stream has been given so far is all that reads the sent bytes.
extern "C" int32_t detco_step_lane_used(void* handle, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto* lane = static_cast<Lane*>(handle);
    if (lane->used) lane->used->record(current(lane->device.device()));
  });
}

extern "C" int32_t detco_step_lane_free(void* handle, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { delete static_cast<Lane*>(handle); });
}

namespace {

// Counts what this thread's tensors on the CPU hold.
struct Meter : c10::MemoryReportingInfoBase {
  int64_t held = 0;
  int64_t peak = 0;

  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    held += bytes;
    peak = std::max(peak, held);
  }

  bool memoryProfilingEnabled() const override { return true; }
};

struct Metering {
  std::shared_ptr<Meter> meter = std::make_shared<Meter>();
  c10::DebugInfoGuard guard{c10::DebugInfoKind::PROFILER_STATE, meter};
};

}  // namespace

// Begins to count the memory of this thread's tensors on the CPU.
extern "C" int32_t detco_step_meter_begin(void** out, char* message,
                                          int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { *out = new Metering(); });
}

// Bytes taken and not given back since the beginning, and the most at once.
extern "C" int32_t detco_step_meter_read(void* handle, int64_t* held, int64_t* peak, char* message,
                                         int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    const auto* metering = static_cast<Metering*>(handle);
    *held = metering->meter->held;
    *peak = metering->meter->peak;
  });
}

// Ends the counting, on the thread that began it.
extern "C" int32_t detco_step_meter_end(void* handle, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { delete static_cast<Metering*>(handle); });
}
