// What ProcessGroupGloo.hpp names of Gloo's contexts; libtorch's wheel ships no header of Gloo.
#pragma once

#include <chrono>

namespace gloo {

// Made and held inside libtorch alone.
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

}  // namespace gloo
