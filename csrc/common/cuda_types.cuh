// What CUDA kernels share: storage types and their arithmetic types, dispatch by dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"

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

// body(T{}) for the type that a dtype's elements are stored in.
template <class Body>
Status for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::bf16:
      return body(__nv_bfloat16{});
    case DType::f16:
      return body(__half{});
  }
  return Status::unknown_dtype;
}

}  // namespace cuda
}  // namespace genkern
