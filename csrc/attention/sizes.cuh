// From a call's dtype and features to the template instance of a kernel. For attention's .cu files.
#pragma once

#include "../common/launch.cuh"
#include "products.cuh"

namespace genkern {
namespace cuda {
namespace attention {

// The padded sizes that kernels are made for; the second is for few features of queries and keys
// beside many of values (SAGAN).
template <int of_queries, int of_values>
struct Features {
  static constexpr int D = of_queries, DV = of_values;
};

// run(Features<D, DV>()) for the smallest that hold d and dv.
template <class Run>
inline Status with_features(const Problem& problem, const Run& run) {
  const int d = problem.d, dv = problem.dv;
  if (d <= 64 && dv <= 64) return run(Features<64, 64>());
  if (d <= 32 && dv <= 128) return run(Features<32, 128>());
  if (d <= 128 && dv <= 128) return run(Features<128, 128>());
  return run(Features<256, 256>());
}

template <class T>
struct Storage {
  using type = T;
};

// run(Storage<T>()) for the type of a dtype.
template <class Run>
inline Status with_storage(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(Storage<float>());
    case DType::bf16:
      return run(Storage<__nv_bfloat16>());
    case DType::f16:
      return run(Storage<__half>());
    default:
      return Status::unknown_dtype;
  }
}

// Blocks for so many rows.
inline int64_t blocks_of(int64_t rows, int rows_of_block) {
  return (rows + rows_of_block - 1) / rows_of_block;
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
