// Waiting for a GPU without a core of one's own.
#pragma once

#include <c10/core/Event.h>

#include <chrono>
#include <thread>

namespace detco {

// libtorch's own wait spins: for most of a step, on a core that the loader's workers are in want of. What is
// waited for here is asked for again a tenth of a millisecond later. Throws as `query` does.
inline void wait_for(const c10::Event& event) {
  while (!event.query()) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

}  // namespace detco
