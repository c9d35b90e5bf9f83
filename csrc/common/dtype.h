// Element types of the tensors that a launcher may be given. The numbers are part of the Python
// interface (genkern/ops/_tensors.py).
#pragma once

namespace genkern {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// What a launcher answers. The binding turns anything but `ok` into a Python exception.
// `refused` stays inside of attention: an engine leaves the call to another one.
enum class Status : int {
  ok = 0,
  unknown_dtype = 1,
  out_of_memory = 2,
  cuda_error = 3,
  refused = 4
};

}  // namespace genkern
