// Packs: as many elements as one load or store of 16 bytes takes.
#pragma once

#include <stdint.h>

#include "cuda_types.cuh"

namespace genkern {
namespace cuda {

constexpr int pack_bytes = 16;
template <class T>
constexpr int pack_size = pack_bytes / int(sizeof(T));

inline bool is_pack_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % pack_bytes == 0;
}

template <class T>
union Pack {
  uint4 bytes;
  T elements[pack_size<T>];
  __device__ Pack() {}
};

// `at` is a multiple of 16 bytes.
template <class T>
__device__ Pack<T> load_pack(const T* at) {
  Pack<T> pack;
  pack.bytes = *reinterpret_cast<const uint4*>(at);
  return pack;
}

template <class T>
__device__ void store_pack(T* at, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(at) = pack.bytes;
}

}  // namespace cuda
}  // namespace genkern
