// The vectors u and v of the forward, on the device: what the matrix is multiplied by, and where
// they go in the end. Plan of the forward: forward.cu.
#pragma once

#include "layers.cuh"

namespace genkern {
namespace cuda {
namespace spectral {

// u or v. Offsets are bytes of the scratch memory.
struct Vector {
  const void* before;  // in the vector's own order, as `state` and `store` (or null)
  void* state;
  void* store;
  int leading, length;
  int panels, splits, steps;  // how its product is cut: tiles of a panel that one block takes
  int first_counter;          // of one for each panel
  int64_t sums;               // [splits, length], in memory's order
  int64_t product;            // [length] x̃, in memory's order
  int64_t parts;              // [panels] doubles
};

struct ForwardLayer {
  const void* weight;
  void* normalized;
  void* sigma;
  int64_t elements;
  Matrix matrix;
  Vector a, b;
  int iterations;
  int write_blocks, write_loops;
  bool b_is_far;
  bool wide_state;  // before and store have the sum type
  bool aligned;     // weight and normalized
};

// ---- Vectors ------------------------------------------------------------------------------------

template <class A>
__device__ A* at_offset(unsigned char* scratch, int64_t offset) {
  return reinterpret_cast<A*>(scratch + offset);
}

// max(‖x̃‖, eps); NaN stays.
template <class A>
__device__ A divisor_of(A norm, double eps) {
  return norm < A(eps) ? A(eps) : norm;
}

template <class A>
__device__ A norm_of(const Vector& vector, unsigned char* scratch) {
  return A(sqrt(added_up(at_offset<double>(scratch, vector.parts), vector.panels)));
}

template <class T>
__device__ Acc<T> before(const Vector& vector, bool wide, int at) {
  const int index = own_index(at, vector.leading, vector.length);
  if (wide) return static_cast<const Acc<T>*>(vector.before)[index];
  return Acc<T>(static_cast<const T*>(vector.before)[index]);
}

// What the matrix is multiplied by: the vector as it was before the call, or the last product.
template <class T>
struct Factors {
  using A = Acc<T>;
  const Vector& vector;
  bool wide;
  const A* flat;  // in memory's order, or null
  bool aligned;
  Reciprocal<A> inverse;

  // As before the call.
  __device__ Factors(const Vector& vector, bool wide)
      : vector(vector),
        wide(wide),
        flat(wide && vector.leading <= 1 ? static_cast<const A*>(vector.before) : nullptr),
        aligned(reinterpret_cast<uintptr_t>(flat) % pack_bytes == 0),
        inverse(A(1)) {}
  __device__ Factors(const Vector& vector, const A* product, A divisor)
      : vector(vector), wide(true), flat(product), aligned(true), inverse(divisor) {}

  __device__ A operator()(int at) const {
    if (at >= vector.length) return A(0);
    return flat ? inverse * flat[at] : before<T>(vector, wide, at);
  }

  // Those of a lane's columns.
  template <bool packed>
  __device__ void load(const Columns<T, packed>& columns, A (&x)[lane_columns<T, packed>]) const {
    if (packed && flat && aligned && columns.is_inside(0)) {
#pragma unroll
      for (int i = 0; i < lane_columns<T, packed>; i += pack_size<A>) {
        const Pack<A> pack = load_pack(flat + columns.at(i));
#pragma unroll
        for (int j = 0; j < pack_size<A>; ++j) x[i + j] = inverse * pack.elements[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < lane_columns<T, packed>; ++i) x[i] = (*this)(columns.at(i));
    }
  }
};

// This block's share of the new vector, to where it is wanted.
template <class T>
__device__ void keep(const Vector& vector, const ForwardLayer& layer, int block, Acc<T> divisor,
                     unsigned char* scratch) {
  using A = Acc<T>;
  const A* product = at_offset<A>(scratch, vector.product);
  const bool is_new = layer.iterations > 0;
  for (int64_t i = block * int64_t(threads) + threadIdx.x; i < vector.length;
       i += layer.write_blocks * int64_t(threads)) {
    const int at = int(i), index = own_index(at, vector.leading, vector.length);
    const A x = is_new ? product[at] / divisor : before<T>(vector, layer.wide_state, at);
    static_cast<A*>(vector.state)[index] = x;
    if (!is_new || !vector.store) continue;
    if (layer.wide_state) {
      static_cast<A*>(vector.store)[index] = x;
    } else {
      static_cast<T*>(vector.store)[index] = T(x);
    }
  }
}

}  // namespace spectral
}  // namespace cuda
}  // namespace genkern
