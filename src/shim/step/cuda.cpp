// CUDA's part of libtorch, and what memory a GPU has.
#include "../shim.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <string>

#include <dlfcn.h>
#include <unistd.h>

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
