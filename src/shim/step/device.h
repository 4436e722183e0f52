// Devices as the shim's callers name them. Nothing in this folder names CUDA's headers: devices are reached through
// c10's generic interfaces, so that the shim links against libtorch_cpu and libc10 alone and a GPU's library can come
// at run time.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace detco {

// A GPU by its index; below 0 the CPU.
inline c10::Device device_of(int64_t cuda_index) {
  if (cuda_index < 0) return c10::Device(c10::kCPU);
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(cuda_index));
}

}  // namespace detco
