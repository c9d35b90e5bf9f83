// Tiles in shared memory and in registers, and their products. For attention's .cu files.
//
// A matrix from global memory lies in shared memory as `SharedRows`: its rows, zeros beyond the
// last row and the last feature, and 16 bytes of nothing after every row, by which eight rows'
// pieces of 16 bytes fall into different banks, and every address is a constant away from a
// thread's first.
//
// A tile of sums is spread over a warp's registers (`Sums`) as mma.sync has it, for fp32 too: of a
// block of 16 rows × 8 columns lane l has columns 2(l % 4) and the next, of row l / 4 and of row
// l / 4 + 8. So four neighbouring lanes share a row, and what is done to single elements
// (logits.cuh) is written once for all types. Of a wide fp32 tile (`features`) a lane's columns lie
// otherwise, four in a row.
//
//   add_pairing   sums [rows][columns] += left [rows][D] · right [columns][D]ᵀ
//   add_product   sums [rows][features] += tile [rows][columns] · right [columns][features]
//
// bf16 and fp16 are multiplied by tensor cores, the tile of the second product rounded to their
// type; fp32 by FMA.
#pragma once

#include <type_traits>

#include "../common/instructions.cuh"
#include "problem.cuh"

namespace genkern {
namespace cuda {
namespace attention {

constexpr int lanes = 32;

__device__ inline int lane() { return threadIdx.x % lanes; }
__device__ inline int warp() { return threadIdx.x / lanes; }

template <class T>
constexpr bool on_tensor_cores = !std::is_same<T, float>::value;

// ---- In shared memory ---------------------------------------------------------------------------

template <class T, int rows, int features>
struct SharedRows {
  static constexpr int stride = features + 16 / int(sizeof(T));
  static constexpr int bytes = rows * stride * int(sizeof(T));
  T* data;
  __device__ T* row(int i) const { return data + i * stride; }
  // The i-th `part_rows` of them.
  template <int part_rows>
  __device__ SharedRows<T, part_rows, features> part(int i) const {
    return {row(i * part_rows)};
  }
};

// Carves a block's dynamic shared memory.
class SharedMemory {
 public:
  __device__ SharedMemory() {
    extern __shared__ __align__(16) char all[];
    next_ = all;
  }
  template <class T, int rows, int features>
  __device__ SharedRows<T, rows, features> rows_of() {
    return {static_cast<T*>(take(SharedRows<T, rows, features>::bytes))};
  }
  __device__ float* numbers(int count) { return static_cast<float*>(take(count * 4)); }

 private:
  __device__ void* take(int bytes) {
    char* taken = next_;
    next_ += bytes;
    return taken;
  }
  char* next_;
};

// ---- From global to shared memory ---------------------------------------------------------------

// Rows of a head: `count` of them can be read (none where it is not positive), `features` of each.
template <class T>
struct GlobalRows {
  const T* data;
  int64_t stride;
  int count, features;
  bool in_vectors;

  __device__ GlobalRows from(int row) const {
    return {data + row * stride, stride, count - row, features, in_vectors};
  }
  __device__ GlobalRows columns_from(int column) const {
    return {data + column, stride, count, features - column, in_vectors};
  }
};

template <class T>
__device__ inline GlobalRows<T> rows_of_queries(const Tensor& x, const Place& place, int features) {
  return {query_rows<T>(x, place), x.row, place.queries, features, x.in_vectors};
}
// Only keys that may be seen: what lies beyond is never read.
template <class T>
__device__ inline GlobalRows<T> rows_of_keys(const Tensor& x, const Place& place, int features) {
  return {key_rows<T>(x, place), x.row, place.keys, features, x.in_vectors};
}

// A block's threads copy a tile, 16 bytes at a time, without waiting for it.
template <int threads, class T, int rows, int features>
__device__ inline void copy_vectors(SharedRows<T, rows, features> to, const GlobalRows<T>& from) {
  constexpr int elements = 16 / sizeof(T), pieces = features / elements;
  static_assert(threads % pieces == 0, "a thread's pieces lie in one column");
  constexpr int step = threads / pieces;
  const int column = threadIdx.x % pieces * elements, first = threadIdx.x / pieces;
  const int bytes = min(max((from.features - column) * int(sizeof(T)), 0), 16);
  const uint32_t target = shared_address(to.row(first) + column);
  const T* source = from.data + first * from.stride + column;
#pragma unroll
  for (int i = 0; i < rows; i += step) {
    if (rows % step == 0 || first + i < rows)
      copy_16_async(target + i * to.stride * int(sizeof(T)), source,
                    first + i < from.count ? bytes : 0);
    source += step * from.stride;
  }
}

// The same of rows that do not begin at multiples of 16 bytes, element by element.
template <int threads, class T, int rows, int features>
__device__ inline void copy_elements(SharedRows<T, rows, features> to, const GlobalRows<T>& from) {
#pragma unroll 4
  for (int at = threadIdx.x; at < rows * features; at += threads) {
    const int i = at / features, column = at % features;
    T x = T(0.f);
    if (i < from.count && column < from.features) x = from.data[i * from.stride + column];
    to.row(i)[column] = x;
  }
}

template <int threads, bool always_in_vectors = false, class T, int rows, int features>
__device__ inline void copy_rows(SharedRows<T, rows, features> to, const GlobalRows<T>& from) {
  if (always_in_vectors || from.in_vectors)
    copy_vectors<threads>(to, from);
  else
    copy_elements<threads>(to, from);
}

// ---- In registers -------------------------------------------------------------------------------

// Blocks of 16 rows × 8 columns of a warp: x[block of rows][block of columns][element].
template <int row_blocks, int column_blocks>
struct Sums {
  float x[row_blocks][column_blocks][4];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < row_blocks; ++m)
#pragma unroll
      for (int n = 0; n < column_blocks; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
  }
};

// body(x[m][n][e], m, n, e) for all of a lane's elements.
template <int row_blocks, int column_blocks, class Body>
__device__ inline void each(Sums<row_blocks, column_blocks>& sums, const Body& body) {
#pragma unroll
  for (int m = 0; m < row_blocks; ++m)
#pragma unroll
    for (int n = 0; n < column_blocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) body(sums.x[m][n][e], m, n, e);
}

// A lane has 2·row_blocks rows; an element's is number row_number(m, e) of them.
__device__ constexpr int row_number(int m, int e) { return 2 * m + e / 2; }

// Where among a warp's rows row number r is, and among a tile's columns an element.
__device__ inline int row_of_lane(int r) { return r / 2 * 16 + r % 2 * 8 + lane() / 4; }
__device__ inline int column_of_lane(int n, int e) { return 8 * n + lane() % 4 * 2 + e % 2; }

// The sum, or the largest, of what the four lanes of a row have.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

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

template <class T>
__device__ inline uint32_t rounded_pair(float low, float high);
template <>
__device__ inline uint32_t rounded_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ inline uint32_t rounded_pair<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

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

// ---- From registers to global memory ------------------------------------------------------------

// Which feature the first of a lane's pair in block n of 8 is, in the sums of `add_product`.
template <class T>
__device__ inline int feature_of_lane(int n) {
  return on_tensor_cores<T> ? 8 * n + lane() % 4 * 2 : n / 2 * 16 + lane() % 4 * 4 + n % 2 * 2;
}

template <class T>
__device__ inline void store_pair(T* to, float first, float second) {
  reinterpret_cast<uint32_t&>(*to) = rounded_pair<T>(first, second);
}
template <>
__device__ inline void store_pair<float>(float* to, float first, float second) {
  reinterpret_cast<float2&>(*to) = make_float2(first, second);
}

// A warp's rows, rounded, to `to` + row·stride, of rows below `count` and features below
// `features`.
template <class T, int row_blocks, int features_over_8>
__device__ inline void store_rows(T* to, int64_t stride, int count, int features,
                                  const Sums<row_blocks, features_over_8>& sums) {
  const bool in_pairs =
      (reinterpret_cast<uintptr_t>(to) | uintptr_t(stride) * sizeof(T)) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int r = 0; r < 2 * row_blocks; ++r) {
    const int i = row_of_lane(r);
    if (i >= count) continue;
    T* row = to + i * stride;
#pragma unroll
    for (int n = 0; n < features_over_8; ++n) {
      const float* pair = sums.x[r / 2][n] + r % 2 * 2;
      const int column = feature_of_lane<T>(n);
      if (in_pairs && column + 1 < features) {
        store_pair(row + column, pair[0], pair[1]);
      } else {
        if (column < features) row[column] = T(pair[0]);
        if (column + 1 < features) row[column + 1] = T(pair[1]);
      }
    }
  }
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
