// What CUDA kernels share: storage types and their arithmetic types, block sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace genkern {
namespace cuda {

// Elements of bf16 and fp16 are computed in float.
template <class T>
struct Arithmetic {
  using type = T;
};
template <>
struct Arithmetic<__nv_bfloat16> {
  using type = float;
};
template <>
struct Arithmetic<__half> {
  using type = float;
};
template <class T>
using Acc = typename Arithmetic<T>::type;

// The sum over a block, the same bits on every run; valid in thread 0. `threads` is a power of two,
// `shared` has room for as many values.
template <int threads>
__device__ double block_sum(double x, double* shared) {
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int step = threads / 2; step > 0; step /= 2) {
    if (int(threadIdx.x) < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  const double total = shared[0];
  __syncthreads();  // before the next sum overwrites it
  return total;
}

}  // namespace cuda
}  // namespace genkern
