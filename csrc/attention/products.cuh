// Products of tiles (tiles.cuh). For attention's .cu files.
//
//   add_pairing   sums [rows][columns] += left [rows][D] · right [columns][D]ᵀ
//   add_product   sums [rows][features] += tile [rows][columns] · right [columns][features]
//
// bf16 and fp16 are multiplied by tensor cores, the tile of the second product rounded to their
// type; fp32 by FMA.
#pragma once

#include "tiles.cuh"

namespace genkern {
namespace cuda {
namespace attention {

// ---- Left operands of pairings ------------------------------------------------------------------

// A warp's 16·row_blocks rows, read from shared memory whenever they are multiplied.
template <class T, int row_blocks, int features>
struct LeftInShared {
  const T* data;  // the warp's first row

  template <int rows>
  __device__ explicit LeftInShared(SharedRows<T, rows, features> of, int first_row)
      : data(of.row(first_row)) {}

  static constexpr int stride = SharedRows<T, 1, features>::stride;

  __device__ void load(uint32_t (&to)[4], int m, int k) const {
    const T* row = data + lane() % 16 * stride + lane() / 16 * 8;
    load_matrices(to, shared_address(row) + (m * 16 * stride + k * 16) * int(sizeof(T)));
  }
};

// The same, kept in registers.
template <class T, int row_blocks, int features>
struct LeftInRegisters {
  uint32_t x[features / 16][row_blocks][4];

  template <int rows>
  __device__ explicit LeftInRegisters(SharedRows<T, rows, features> of, int first_row) {
    const LeftInShared<T, row_blocks, features> from(of, first_row);
#pragma unroll
    for (int k = 0; k < features / 16; ++k)
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) from.load(x[k][m], m, k);
  }
  __device__ void load(uint32_t (&to)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = x[k][m][i];
  }
};

// ---- sums += left · rightᵀ ----------------------------------------------------------------------

template <class Left, class T, int row_blocks, int column_blocks, int rows, int features>
__device__ inline void pair_on_tensor_cores(Sums<row_blocks, column_blocks>& sums, const Left& left,
                                            SharedRows<T, rows, features> right) {
  const uint32_t first =
      shared_address(right.row(lane() / 16 * 8 + lane() % 8) + lane() / 8 % 2 * 8);
#pragma unroll
  for (int k = 0; k < features / 16; ++k) {
    uint32_t a[row_blocks][4];
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) left.load(a[m], m, k);
#pragma unroll
    for (int n = 0; n < column_blocks; n += 2) {
      uint32_t b[4];
      load_matrices(b, first + (n * 8 * right.stride + k * 16) * int(sizeof(T)));
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) {
        multiply_matrices<T>(sums.x[m][n], a[m], b[0], b[1]);
        multiply_matrices<T>(sums.x[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Four features at a time: a lane reads its rows of the left once for all of its columns.
template <int row_blocks, int column_blocks, int rows, int features>
__device__ inline void pair_by_fma(Sums<row_blocks, column_blocks>& sums,
                                   const LeftInShared<float, row_blocks, features>& left,
                                   SharedRows<float, rows, features> right) {
  const float* of_rows = left.data + lane() / 4 * left.stride;
  const float* of_columns = right.row(lane() % 4 * 2);
#pragma unroll 1
  for (int k = 0; k < features; k += 4) {
    float4 a[row_blocks][2];
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][half] =
            *reinterpret_cast<const float4*>(of_rows + (16 * m + 8 * half) * left.stride + k);
#pragma unroll
    for (int n = 0; n < column_blocks; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 b =
            *reinterpret_cast<const float4*>(of_columns + (8 * n + e) * right.stride + k);
#pragma unroll
        for (int m = 0; m < row_blocks; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& sum = sums.x[m][n][2 * half + e];
            sum = fmaf(a[m][half].x, b.x, sum);
            sum = fmaf(a[m][half].y, b.y, sum);
            sum = fmaf(a[m][half].z, b.z, sum);
            sum = fmaf(a[m][half].w, b.w, sum);
          }
      }
  }
}

template <class Left, class T, int row_blocks, int column_blocks, int rows, int features>
__device__ inline void add_pairing(Sums<row_blocks, column_blocks>& sums, const Left& left,
                                   SharedRows<T, rows, features> right) {
  static_assert(8 * column_blocks == rows, "every row of the right is a column of the sums");
  if constexpr (on_tensor_cores<T>)
    pair_on_tensor_cores(sums, left, right);
  else
    pair_by_fma(sums, left, right);
}

// ---- sums += tile · right -----------------------------------------------------------------------

// A lane's sums are as they are a lane's part of a left operand.
template <class T, int row_blocks, int columns_over_8, int features_over_8, int rows, int features>
__device__ inline void multiply_on_tensor_cores(Sums<row_blocks, features_over_8>& sums,
                                                const Sums<row_blocks, columns_over_8>& tile,
                                                SharedRows<T, rows, features> right) {
  const uint32_t first = shared_address(right.row(lane() % 16) + lane() / 16 * 8);
#pragma unroll
  for (int k = 0; k < columns_over_8 / 2; ++k) {
    uint32_t a[row_blocks][4];
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = tile.x[m][2 * k + i / 2] + i % 2 * 2;
        a[m][i] = rounded_pair<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int n = 0; n < features_over_8; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, first + (k * 16 * right.stride + n * 8) * int(sizeof(T)));
#pragma unroll
      for (int m = 0; m < row_blocks; ++m) {
        multiply_matrices<T>(sums.x[m][n], a[m], b[0], b[1]);
        multiply_matrices<T>(sums.x[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// A lane gets the tile's numbers of its rows from the lanes that have them, and reads four features
// at once.
template <int row_blocks, int columns_over_8, int features_over_8, int rows, int features>
__device__ inline void multiply_by_fma(Sums<row_blocks, features_over_8>& sums,
                                       const Sums<row_blocks, columns_over_8>& tile,
                                       SharedRows<float, rows, features> right) {
  const float* first = right.row(0) + lane() % 4 * 4;
#pragma unroll
  for (int n = 0; n < columns_over_8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll 1
      for (int owner = 0; owner < 4; ++owner) {
        float a[row_blocks][2];
#pragma unroll
        for (int m = 0; m < row_blocks; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            a[m][half] = __shfl_sync(0xffffffffu, tile.x[m][n][2 * half + e], owner, 4);
        const float* row = first + (8 * n + 2 * owner + e) * right.stride;
#pragma unroll
        for (int column = 0; column < features_over_8; column += 2) {
          const float4 b = *reinterpret_cast<const float4*>(row + 8 * column);
#pragma unroll
          for (int m = 0; m < row_blocks; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float* low = sums.x[m][column] + 2 * half;
              float* high = sums.x[m][column + 1] + 2 * half;
              low[0] = fmaf(a[m][half], b.x, low[0]);
              low[1] = fmaf(a[m][half], b.y, low[1]);
              high[0] = fmaf(a[m][half], b.z, high[0]);
              high[1] = fmaf(a[m][half], b.w, high[1]);
            }
        }
      }
}

template <class T, int row_blocks, int columns_over_8, int features_over_8, int rows, int features>
__device__ inline void add_product(Sums<row_blocks, features_over_8>& sums,
                                   const Sums<row_blocks, columns_over_8>& tile,
                                   SharedRows<T, rows, features> right) {
  static_assert(8 * columns_over_8 == rows && 8 * features_over_8 == features,
                "the shapes of a product");
  if constexpr (on_tensor_cores<T>)
    multiply_on_tensor_cores(sums, tile, right);
  else
    multiply_by_fma(sums, tile, right);
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
