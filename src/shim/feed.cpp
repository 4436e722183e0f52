// What feeding a model from foreign memory needs of libtorch: tensors over that memory and a count
// of those that still live, the stream on which libtorch works, time as the device sees it.
#include "event.h"
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <string>

using at::Tensor;

namespace {

c10::Device device_of(int64_t cuda_index) {
  if (cuda_index < 0) return c10::Device(c10::kCPU);
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(cuda_index));
}

c10::Stream current(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// Memory that is lent: how many storages over it live. The storages share the count, so that one
// that outlives the loan still has where to count down.
struct Loan {
  std::shared_ptr<std::atomic<int64_t>> out = std::make_shared<std::atomic<int64_t>>(0);
};

}  // namespace

extern "C" int32_t detco_feed_loan_new(void** out, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { *out = new Loan(); });
}

// A tensor over foreign memory, of floats or (`bf16`) bfloat16s: a new tensor. It and all that
// shares its storage count as one until the last of them is gone.
extern "C" int32_t detco_feed_loan_lend(void* handle, void* address, const int64_t* sizes,
                                        const int64_t* strides, int64_t dims, int32_t bf16,
                                        int64_t cuda_index, Tensor** out, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    const auto count = static_cast<Loan*>(handle)->out;
    const auto device = device_of(cuda_index);
    const auto options = at::TensorOptions(bf16 ? at::kBFloat16 : at::kFloat).device(device);
    // Should the tensor not come about, the memory counts as lent for ever: lost, not misused.
    count->fetch_add(1, std::memory_order_relaxed);
    const auto given_back = [count](void*) { count->fetch_sub(1, std::memory_order_release); };
    const at::IntArrayRef shape(sizes, dims), steps(strides, dims);
    *out = new Tensor(at::from_blob(address, shape, steps, given_back, options, device));
  });
}

// How many of the tensors lent still live.
extern "C" int32_t detco_feed_loan_out(void* handle, int64_t* count, char* message,
                                       int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    *count = static_cast<Loan*>(handle)->out->load(std::memory_order_acquire);
  });
}

extern "C" int32_t detco_feed_loan_free(void* handle, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { delete static_cast<Loan*>(handle); });
}

// The driver's handle of the stream on which libtorch works now on this GPU; null is the default
// stream.
extern "C" int32_t detco_feed_stream(int64_t cuda_index, void** out, char* message,
                                     int64_t message_len) noexcept {
  return detco::guarded(message, message_len,
                        [&] { *out = current(device_of(cuda_index)).native_handle(); });
}

// The folder of the libtorch that is loaded: that which has `lib` in it.
extern "C" int32_t detco_feed_libtorch(char* text, int64_t text_len, char* message,
                                       int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    Dl_info info;
    std::string path;
    if (dladdr(reinterpret_cast<void*>(&at::globalContext), &info) != 0) path = info.dli_fname;
    for (int up = 0; up < 2; ++up) {
      const auto end = path.find_last_of('/');
      path = path.substr(0, end == std::string::npos ? 0 : end);
    }
    detco::copied(path.c_str(), text, text_len);
  });
}

namespace {

// Two marks in the current stream, the time between which the device takes.
struct Span {
  c10::Device device;
  c10::Event begin;
  c10::Event end;
  bool is_ended = false;

  explicit Span(c10::Device on)
      : device(on),
        begin(on.type(), c10::EventFlag::BACKEND_DEFAULT),
        end(on.type(), c10::EventFlag::BACKEND_DEFAULT) {}
};

}  // namespace

// Marks the beginning, on a GPU.
extern "C" int32_t detco_feed_span_begin(int64_t cuda_index, void** out, char* message,
                                         int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto span = std::make_unique<Span>(device_of(cuda_index));
    span->begin.record(current(span->device));
    *out = span.release();
  });
}

extern "C" int32_t detco_feed_span_end(void* handle, char* message, int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto* span = static_cast<Span*>(handle);
    span->end.record(current(span->device));
    span->is_ended = true;
  });
}

// Waits for the end, and tells the milliseconds between; 0 for a span that was not ended.
extern "C" int32_t detco_feed_span_read(void* handle, double* ms, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    const auto* span = static_cast<Span*>(handle);
    *ms = 0.0;
    if (!span->is_ended) return;
    detco::wait_for(span->end);
    *ms = span->begin.elapsedTime(span->end);
  });
}

extern "C" int32_t detco_feed_span_free(void* handle, char* message,
                                        int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] { delete static_cast<Span*>(handle); });
}
