// The names of the kernels, the hook and the last error: see launch.h.
//
// CUDA's runtime is told every kernel's name when the module is loaded, and tells nobody: the
// linker passes what registers a kernel through here (setup.py: --wrap).
#ifdef GK_HAVE_CUDA

#include "launch.h"

#include <cxxabi.h>
#include <stdlib.h>

#include <unordered_map>
#include <utility>

namespace genkern {
namespace cuda {
namespace {

// Filled before main, by static initialisers in any order: hence made at first use.
std::unordered_map<const void*, const char*>& names() {
  static std::unordered_map<const void*, const char*> map;
  return map;
}

LaunchHook hook;
thread_local std::string error;

}  // namespace

void set_launch_hook(LaunchHook wanted) { hook = std::move(wanted); }
const LaunchHook& launch_hook() { return hook; }

const char* kernel_name(const void* stub) {
  const auto found = names().find(stub);
  return found == names().end() ? "a kernel without a name" : found->second;
}

const std::string& last_launch_error() { return error; }
void set_last_launch_error(const char* kernel, const char* what) {
  char* readable = abi::__cxa_demangle(kernel, nullptr, nullptr, nullptr);
  error = std::string(readable ? readable : kernel) + ": " + what;
  free(readable);
}

}  // namespace cuda
}  // namespace genkern

extern "C" {

void __real___cudaRegisterFunction(void** module, const char* stub, char* device_function,
                                   const char* name, int thread_limit, void* thread_index,
                                   void* block_index, void* block_size, void* grid_size,
                                   int* warp_size);

void __wrap___cudaRegisterFunction(void** module, const char* stub, char* device_function,
                                   const char* name, int thread_limit, void* thread_index,
                                   void* block_index, void* block_size, void* grid_size,
                                   int* warp_size) {
  genkern::cuda::names()[stub] = name;
  __real___cudaRegisterFunction(module, stub, device_function, name, thread_limit, thread_index,
                                block_index, block_size, grid_size, warp_size);
}

}  // extern "C"

#endif  // GK_HAVE_CUDA
