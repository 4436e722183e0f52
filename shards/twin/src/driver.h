// What nvJPEG's twin asks of the driver's twin.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace twin {

// Counts a call; false where this one is to fail.
bool call();

// Whether a context is current in this thread.
bool current();

// Notes that something was done that a GPU would not forgive.
void fault(const char* what);

// Queues work on a stream; false where there is no such stream.
bool queue(void* stream, std::function<void()> work);

// Writes to device memory; what does not lie in one allocation that lives is a fault.
void write(uint64_t to, const void* from, size_t count);

// The next of the random numbers.
uint32_t random();

}  // namespace twin
