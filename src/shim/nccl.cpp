// ProcessGroupNCCL, in a library of its own: it needs libtorch_cuda, which the program must not
// need to start. `build.rs` compiles and embeds it, `c10d.cpp` loads it.
#define USE_C10D_NCCL
#include "c10d.h"

#include <torch/csrc/cuda/nccl.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <cstdint>
#include <stdexcept>
#include <string>

// `Options` holds NCCL's own configuration by value: another version's may have another size.
static void same_nccl() {
  // Major, minor and patch, of 32, 16 and 16 bits.
  const uint64_t found = torch::cuda::nccl::version();
  const uint64_t built = uint64_t{NCCL_MAJOR} << 32 | uint64_t{NCCL_MINOR} << 16 | NCCL_PATCH;
  if (found >> 16 == built >> 16) return;
  const auto text = [](uint64_t v) {
    return std::to_string(v >> 32) + "." + std::to_string(v >> 16 & 0xFFFF);
  };
  throw std::runtime_error("this program was built with the headers of NCCL " + text(built) +
                           ", and libtorch has " + text(found));
}

extern "C" int32_t detco_nccl_open(const detco::StorePtr* store, int32_t rank, int32_t size,
                                   int64_t timeout_ms, detco::BackendPtr* backend, char* message,
                                   int64_t message_len) noexcept {
  return detco::guarded(message, message_len, [&] {
    same_nccl();
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = detco::Millis(timeout_ms);
    *backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(*store, rank, size, options);
  });
}
