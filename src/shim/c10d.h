// What the shim's two halves around c10d share: `c10d.cpp` is part of the program, `nccl.cpp` is a
// library of its own that is loaded where there is a GPU.
#pragma once

#include "shim.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

namespace detco {

using Millis = std::chrono::milliseconds;

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

// `nccl.cpp`'s one function: puts a new ProcessGroupNCCL behind `*backend`.
using OpenNccl = int32_t (*)(const StorePtr* store, int32_t rank, int32_t size,
                             int64_t timeout_ms, BackendPtr* backend, char* message,
                             int64_t message_len);
constexpr const char* OPEN_NCCL = "detco_nccl_open";

}  // namespace detco
