// What CUDA kernels share that read lists of flat arrays in one launch and add them up.
//
// Layout: lists.h. Plan of a sum: a thread adds up its elements in the arithmetic type, not more
// than longest_run steps of them; a warp's threads are added up in a tree of that type, warps and
// blocks in doubles (few enough of them for GPUs that are slow at fp64). Every block leaves its
// sums in a row of doubles and counts itself; the last to arrive adds the rows up in their order,
// so the same bits come on every run. The count is zero again at the end.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda_types.cuh"
#include "lists.h"

namespace genkern {
namespace cuda {

constexpr int warp_threads = 32;
constexpr int list_warps = list_threads / warp_threads;
constexpr unsigned all_lanes = 0xffffffffu;

// ---- Elements -----------------------------------------------------------------------------------

// Elements that a thread takes in one step.
template <class T>
constexpr int width = 16 / int(sizeof(T));

// The n elements from here on, as many as are `left`, then zeros: 16 bytes at a time where the
// address allows it.
template <class T, int n>
__device__ void load(const T* from, int64_t left, Acc<T> (&to)[n]) {
  static_assert(n % width<T> == 0, "whole loads of 16 bytes");
  __builtin_assume(__isGlobal(from));
  if (left >= n && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += width<T>) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      T some[width<T>];
      memcpy(some, &bits, sizeof bits);
#pragma unroll
      for (int j = 0; j < width<T>; ++j) to[i + j] = Acc<T>(some[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = i < left ? Acc<T>(from[i]) : Acc<T>(0);
  }
}

template <class T, int n>
__device__ void store(T* to, int64_t left, const Acc<T> (&from)[n]) {
  __builtin_assume(__isGlobal(to));
  if (left >= n && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += width<T>) {
      T some[width<T>];
#pragma unroll
      for (int j = 0; j < width<T>; ++j) some[j] = T(from[i + j]);
      uint4 bits;
      memcpy(&bits, some, sizeof bits);
      *reinterpret_cast<uint4*>(to + i) = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < left) to[i] = T(from[i]);
  }
}

// ---- Blocks -------------------------------------------------------------------------------------

template <class Entry>
__device__ Entry entry_of(const List<Entry>& list, int64_t array) {
  if (list.arrays <= nearby_arrays) return list.nearby[array];
  return static_cast<const Entry*>(list.memory.table)[array];
}

// The array that a block works on: the last whose first block is not after it.
template <class Entry>
__device__ int array_of(const List<Entry>& list) {
  int array = -1;
  for (int64_t at = 0; at < list.arrays; at += warp_threads) {
    const int64_t one = at + threadIdx.x % warp_threads;
    const bool begun = one < list.arrays && entry_of(list, one).first <= int64_t(blockIdx.x);
    const unsigned votes = __ballot_sync(all_lanes, begun);
    array += __popc(votes);
    if (votes != all_lanes) break;
  }
  return array;
}

// body(offset, elements left) for every step of a thread in the block's run over `count` elements.
// `place`: of the block among those of the same elements.
template <class T, class Body>
__device__ void along(int64_t place, int64_t run, int64_t count, const Body& body) {
  constexpr int64_t step = int64_t(list_threads) * width<T>;
  int64_t at = place * run * step + int64_t(threadIdx.x) * width<T>;
  for (int64_t i = 0; i < run && at < count; ++i, at += step) body(at, count - at);
}

// ---- Sums ---------------------------------------------------------------------------------------

template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int lanes = warp_threads / 2; lanes > 0; lanes /= 2)
    x += __shfl_xor_sync(all_lanes, x, lanes);
  return x;
}

// The sums over a block; the k-th is valid in thread k. All threads must have passed a barrier
// before the next call.
template <int sums, class A>
__device__ double block_sums(const A (&mine)[sums]) {
  __shared__ double of_warps[sums][list_warps];
#pragma unroll
  for (int k = 0; k < sums; ++k) {
    const A total = warp_sum(mine[k]);
    if (threadIdx.x % warp_threads == 0) of_warps[k][threadIdx.x / warp_threads] = double(total);
  }
  __syncthreads();
  double total = 0;
  if (threadIdx.x < sums)
    for (int warp = 0; warp < list_warps; ++warp) total += of_warps[threadIdx.x][warp];
  return total;
}

// Stores a block's sums, times a factor, as its entries of the rows of partials.
template <int sums, class A>
__device__ void leave(double* partials, const A (&mine)[sums], double factor = 1) {
  const double total = factor * block_sums(mine);
  if (threadIdx.x < sums) partials[threadIdx.x * int64_t(gridDim.x) + blockIdx.x] = total;
}

// Whether all other blocks have been here: then all that they stored before can be seen.
__device__ inline bool arrives_last(unsigned long long* counter) {
  __shared__ bool is_last;
  __syncthreads();  // what the block's other threads stored comes before the fence
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(counter, 1ull) == gridDim.x - 1;
    if (is_last) *counter = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// One row of the partials added up over all blocks; valid in thread 0.
__device__ inline double all_added_up(const double* row) {
  double mine[1] = {0};
  for (int64_t block = threadIdx.x; block < gridDim.x; block += list_threads) mine[0] += row[block];
  return block_sums(mine);
}

}  // namespace cuda
}  // namespace genkern
