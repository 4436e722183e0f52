// ProcessGroupNCCL, in a library of its own: it needs libtorch_cuda, which the program must not
// need to start. `build.rs` compiles and embeds it, `c10d.cpp` loads it.
#define USE_C10D_NCCL
#include "c10d.h"

#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

extern "C" int32_t detco_nccl_open(const detco::StorePtr* store, int32_t rank, int32_t size,
                                   int64_t timeout_ms, detco::BackendPtr* backend, char* message,
                                   int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = detco::Millis(timeout_ms);
    *backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(*store, rank, size, options);
  });
}
