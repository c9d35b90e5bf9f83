// Launches of CUDA kernels, as the host sees them. No CUDA header takes part.
//
// A hook may take the launches' place: it is handed everything that the driver would have been
// (genkern/ptx executes it on the CPU, or counts it).
#pragma once

#include <stddef.h>

#include <functional>
#include <string>

namespace genkern {
namespace cuda {

struct LaunchRequest {
  const char* kernel;  // mangled, as PTX has it
  unsigned grid[3], block[3];
  size_t shared_bytes;  // dynamic
  const void* const* arguments;
  const size_t* sizes;  // in bytes, of the arguments
  int count;
};

using LaunchHook = std::function<void(const LaunchRequest&)>;

// An empty hook: launches are the driver's again. May be called at any time by one thread.
void set_launch_hook(LaunchHook hook);
const LaunchHook& launch_hook();

// The mangled name of the kernel with this stub on the host.
const char* kernel_name(const void* stub);

// What the last failed launch of this thread said, with the kernel's name.
const std::string& last_launch_error();
void set_last_launch_error(const char* kernel, const char* what);

}  // namespace cuda
}  // namespace genkern
