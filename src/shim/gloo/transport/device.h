// What ProcessGroupGloo.hpp names of Gloo's transports; libtorch's wheel ships no header of Gloo.
#pragma once

namespace gloo {
namespace transport {

// Made inside libtorch; only shared pointers to it pass through us.
class Device;

// Held by pointer inside libtorch alone; its destructor is virtual there too.
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

}  // namespace transport
}  // namespace gloo
