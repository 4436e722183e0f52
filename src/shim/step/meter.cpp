// A count of the memory that tensors on the CPU take.
#include "../shim.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <memory>

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
