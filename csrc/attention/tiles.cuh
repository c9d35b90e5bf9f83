// Tiles in shared memory and in registers. For attention's .cu files.
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

  __device__ bool in_whole_vectors() const { return in_vectors && features * sizeof(T) % 16 == 0; }
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
  // Conditions that nobody knows beforehand take registers, one for every unrolled row.
  constexpr int unrolled = rows % step == 0 ? rows / step : 1;
#pragma unroll unrolled
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
  constexpr int unrolled = rows * features % threads == 0 ? 4 : 1;  // as above
#pragma unroll unrolled
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

// Tiles of a tensor one after another. Where all is `in_whole_vectors`, a thread keeps its place in
// the next tile, and copies 16 bytes or none: few instructions for a tile. remembers: its place in
// shared memory too, and how many rows there are, where registers are left for them.
template <int threads, class T, int rows, int features, bool remembers = true>
class TileCopies {
 public:
  __device__ explicit TileCopies(const GlobalRows<T>& from)
      : from_(from),
        count_(remembers ? kept(count(from)) : count(from)),
        place_(remembers ? kept(place()) : place()) {}

  // The tile from row i0 on. is_quick: in whole vectors, behind the one that was copied last.
  template <class Quick>
  __device__ void copy(Quick, SharedRows<T, rows, features> to, int i0) {
    if constexpr (!Quick::value) {
      copy_rows<threads>(to, from_.from(i0));
      next_ = from_.data + (i0 + rows + first()) * from_.stride + column();
    } else {
      const uint32_t target = shared_address(to.data) + place_;
#pragma unroll
      for (int i = 0; i < rows; i += step) {
        if (rows % step == 0 || first() + i < rows)
          copy_16_async(target + i * to.stride * int(sizeof(T)), next_ + i * from_.stride,
                        i0 + i < count_ ? 16 : 0);
      }
      next_ += rows * from_.stride;
    }
  }

 private:
  static constexpr int elements = 16 / sizeof(T), pieces = features / elements;
  static constexpr int step = threads / pieces;
  static_assert(threads % pieces == 0, "a thread's pieces lie in one column");
  __device__ static int column() { return threadIdx.x % pieces * elements; }
  __device__ static int first() { return threadIdx.x / pieces; }
  __device__ static int count(const GlobalRows<T>& from) {
    return column() < from.features ? from.count - first() : 0;
  }
  __device__ static int place() {
    return (first() * SharedRows<T, 1, features>::stride + column()) * int(sizeof(T));
  }

  GlobalRows<T> from_;
  int count_;  // rows that can be read, from the thread's first on
  int place_;  // the thread's first 16 bytes, in a tile in shared memory
  const T* next_;
};

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

// ---- From registers to global memory ------------------------------------------------------------

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
