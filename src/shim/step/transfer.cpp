// Copies beside the computation.
#include "../event.h"
#include "../shim.h"
#include "device.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <optional>

using at::Tensor;
using detco::device_of;

namespace {

c10::Stream current(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace

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
