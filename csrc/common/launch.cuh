// How every CUDA kernel is launched: stream-ordered, with nothing allocated and nothing waited for,
// so that a CUDA graph can capture it. On an error the kernel's name is kept for the exception.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dtype.h"
#include "launch.h"

namespace genkern {
namespace cuda {

// A block may have this much dynamic shared memory without asking for more.
constexpr size_t shared_bytes_for_free = 48 * 1024;

inline Status report_launch(const void* stub, cudaError_t error) {
  if (error == cudaSuccess) return Status::ok;
  set_last_launch_error(kernel_name(stub), cudaGetErrorString(error));
  return Status::cuda_error;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...). An empty grid is no launch.
template <class... Parameters>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              void* stream, std::enable_if_t<true, Parameters>... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Status::ok;
  const void* stub = reinterpret_cast<const void*>(kernel);
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  if (launch_hook()) {
    const size_t sizes[] = {sizeof(arguments)...};
    launch_hook()({kernel_name(stub),
                   {grid.x, grid.y, grid.z},
                   {block.x, block.y, block.z},
                   shared_bytes,
                   addresses,
                   sizes,
                   int(sizeof...(arguments))});
    return Status::ok;
  }
  if (shared_bytes > shared_bytes_for_free) {
    const cudaError_t error =
        cudaFuncSetAttribute(stub, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return report_launch(stub, error);
  }
  return report_launch(stub, cudaLaunchKernel(stub, grid, block, addresses, shared_bytes,
                                              static_cast<cudaStream_t>(stream)));
}

}  // namespace cuda
}  // namespace genkern
