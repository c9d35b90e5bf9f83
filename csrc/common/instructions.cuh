// Instructions that CUDA C++ has no name for: the one place of inline PTX. All need sm_80, but for
// exp2_approximate.
//
// None of them is ordered by the compiler with ordinary reads and writes of shared memory: between
// those stands a barrier, which is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace genkern {
namespace cuda {

__device__ inline uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

// x, which the compiler no longer knows how to compute: in a loop it keeps a register for it rather
// than compute it again and again.
__device__ inline int kept(int x) {
  asm("" : "+r"(x));
  return x;
}

// ---- Copies from global to shared memory that nobody waits for ----------------------------------

// 16 bytes, of which the first `bytes` are read and the others zero. Both addresses are multiples
// of 16.
__device__ inline void copy_16_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// 4 bytes, or zeros where not `is_read`.
__device__ inline void copy_4_async(uint32_t to, const void* from, bool is_read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(to), "l"(from), "r"(is_read ? 4 : 0)
               : "memory");
}

// Ends a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until all of this thread's groups but the `pending` latest have arrived.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

// ---- Tensor cores -------------------------------------------------------------------------------

// Four matrices of 8×8 16-bit elements; lanes 8i to 8i + 7 give the addresses of matrix i's rows.
// Lane l has elements 2(l % 4) and the next of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same, each transposed on the way.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// c [16][8] += a [16][16] · b [16][8], sums in fp32. Lane l has of c elements 2(l % 4) and the next
// of rows l / 4 and l / 4 + 8; of a the same of columns 0 to 7, then of columns 8 to 15; of b rows
// 2(l % 4) and the next of column l / 4, then the same of rows 8 to 15.
template <class T>
__device__ inline void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b_low,
                                         uint32_t b_high);

template <>
__device__ inline void multiply_matrices<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                        uint32_t b_low, uint32_t b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

template <>
__device__ inline void multiply_matrices<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                 uint32_t b_low, uint32_t b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// ---- Functions ----------------------------------------------------------------------------------

// 2ˣ, off by at most 2 ulp (2^-22 of it), below 2^-126 zero: the argument of a softmax's
// exponential, a difference of rounded logits, is not known better.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cuda
}  // namespace genkern
