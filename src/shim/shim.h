// The wall between Rust and libtorch, for what the crate `tch` does not reach.
//
// Contract of every function here:
//  - `extern "C"`, `noexcept`, returns 0, or 1 with a message in `message` (NUL-terminated, cut to
//    `message_len` bytes; the caller owns it);
//  - every exception becomes a status, of whatever type;
//  - fixed-width integers and (pointer, length) pairs only; no STL crosses, nothing calls back;
//  - a tensor crosses as the `at::Tensor*` that `tch` holds; it is borrowed for the call;
//  - a handle is opaque and made and destroyed in pairs.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>

namespace detco {

// Copies a text into the caller's buffer, cut to fit.
inline void copied(const char* text, char* buffer, int64_t buffer_len) noexcept {
  if (buffer == nullptr || buffer_len <= 0) return;
  const auto length = strnlen(text, static_cast<size_t>(buffer_len) - 1);
  memcpy(buffer, text, length);
  buffer[length] = '\0';
}

// Runs `body`; what it throws becomes a status.
template <class Body>
int32_t guarded(char* message, int64_t message_len, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    copied(error.what(), message, message_len);
  } catch (...) {
    copied("an exception of an unknown type", message, message_len);
  }
  return 1;
}

}  // namespace detco
