// The version of libtorch's headers: a look at it shows that shim and libtorch fit each other.
#include "shim.h"

#include <torch/version.h>

// Writes the version, such as "2.11.0", into `text`, cut to `text_len` bytes.
extern "C" int32_t detco_headers_version(char* text, int64_t text_len, char* message,
                                         int64_t message_len) noexcept {
  return detco::guarded(message, message_len,
                        [&] { detco::copied(TORCH_VERSION, text, text_len); });
}
