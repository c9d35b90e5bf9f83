// What the forward and the backward kernels share: how a launch covers all layers of a list, and
// how the lanes of a warp hold a piece of a weight.
//
// A call has one table: a struct for each layer, then, for each launch, the number of the first
// block of each layer. A launch has for each layer as many blocks as that is worth; a block finds
// its layer, and its number there, by its own number.
//
// A weight [outer, rows, inner] (spectral_norm.h) is seen as a matrix [far, near], whose element
// (f, n) lies at
//
//     f·far_stride + (n / near_inner)·near_jump + n % near_inner
//
// so that neighbours along `near` are neighbours in memory. Rows are far and columns near, except
// where the rows are innermost (a weight normalised along its last dimension): there columns are
// far. A tile is tile_rows × tile_columns: a warp has warp_rows rows of it, a lane of that warp
// one pack of each row, or some single elements where rows do not begin at multiples of 16 bytes.
#pragma once

#include <string.h>

#include <vector>

#include "../common/packs.cuh"

namespace genkern {
namespace cuda {
namespace spectral {

constexpr int warps = 8;
constexpr int threads = 32 * warps;
constexpr int warp_rows = 4;
constexpr int tile_rows = warps * warp_rows;
// More single elements than this would not fit into registers.
template <class T, bool packed>
constexpr int lane_columns = packed || pack_size<T> < 4 ? pack_size<T> : 4;
template <class T, bool packed>
constexpr int tile_columns = 32 * lane_columns<T, packed>;
template <class T>
__host__ __device__ constexpr int tile_columns_of(bool packed) {
  return packed ? tile_columns<T, true> : tile_columns<T, false>;
}
// Elements that a block takes at once where it reads memory as a flat array.
template <class T>
constexpr int flat = 4 * threads * pack_size<T>;

struct Matrix {
  int far, near;
  int64_t far_stride;
  int near_inner;
  int64_t near_jump;
  bool packed;  // every run of near_inner elements, on both ends, is a multiple of 16 bytes

  __device__ int64_t near_offset(int n) const {
    return near_inner < near ? (n / near_inner) * near_jump + n % near_inner : n;
  }
};

// Where a vector in its own order has the element `at` of memory's order: [leading, …] in the one,
// transposed in the other.
inline __device__ int own_index(int at, int leading, int length) {
  return leading > 1 ? (at % leading) * (length / leading) + at / leading : at;
}

// 1/x as two factors, since 1/x alone may leave the range of A.
template <class A>
struct Reciprocal {
  A power, rest;

  __device__ explicit Reciprocal(A x) {
    int exponent = 0;
    if (isfinite(x)) frexp(x, &exponent);
    power = ldexp(A(1), max(min(-exponent, 126), -126));
    rest = A(1) / (x * power);
  }
  __device__ A operator*(A other) const { return other * power * rest; }
};

// ---- Blocks -------------------------------------------------------------------------------------

// The last layer whose first block is not after this one.
inline __device__ int layer_of_block(const int* firsts, int layers) {
  const int lane = threadIdx.x % 32;
  int begun = 0;
  for (int base = 0; base < layers; base += 32) {
    const bool has = base + lane < layers && firsts[base + lane] <= int(blockIdx.x);
    begun += __popc(__ballot_sync(0xffffffffu, has));
  }
  return begun - 1;
}

// The same bits in every lane.
template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The same bits in every thread.
inline __device__ double block_sum(double x, double (&of_warps)[warps]) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < warps; ++warp) sum += of_warps[warp];
  return sum;
}

// The sum of `count` doubles, the same bits in every thread.
inline __device__ double added_up(const double* parts, int count) {
  double sum = 0;
  for (int i = threadIdx.x % 32; i < count; i += 32) sum += parts[i];
  return warp_sum(sum);
}

// ---- Pieces of rows -----------------------------------------------------------------------------

// The columns that a lane has of a tile whose first column is `first`: neighbours in a packed
// matrix, else every 32nd.
template <class T, bool packed>
struct Columns {
  static constexpr int width = lane_columns<T, packed>;
  static constexpr int runs = packed ? 1 : width;
  int first;
  int64_t offsets[runs];
  bool inside[runs];

  __device__ Columns(const Matrix& matrix, int tile_first)
      : first(tile_first + int(threadIdx.x % 32) * (packed ? width : 1)) {
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      inside[i] = at(i) < matrix.near;
      offsets[i] = inside[i] ? matrix.near_offset(at(i)) : 0;
    }
  }
  __device__ int at(int i) const { return first + i * (packed ? 1 : 32); }
  __device__ bool is_inside(int i) const { return inside[packed ? 0 : i]; }

  // Zero outside, and where there is no such row.
  __device__ Pack<T> load(const T* row, bool has_row) const {
    Pack<T> pack;
    pack.bytes = {0, 0, 0, 0};
    if constexpr (packed) {
      if (has_row && inside[0]) pack = load_pack(row + offsets[0]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (has_row && inside[i]) pack.elements[i] = row[offsets[i]];
    }
    return pack;
  }

  __device__ void store(T* row, const Pack<T>& pack) const {
    if constexpr (packed) {
      if (inside[0]) store_pack(row + offsets[0], pack);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (inside[i]) row[offsets[i]] = pack.elements[i];
    }
  }
};

// ---- Plans, on the host -------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct View {
  Matrix matrix;
  bool far_is_u;
};

inline View view_of(int64_t outer, int64_t rows, int64_t inner, int pack, bool aligned) {
  View view;
  if (inner == 1 && outer > 1) {
    view = {{int(outer), int(rows), rows, int(rows), 0, false}, false};
  } else {
    view = {{int(rows), int(outer * inner), inner, int(inner), rows * inner, false}, true};
  }
  Matrix& m = view.matrix;
  m.packed = aligned && m.far_stride % pack == 0 && m.near_inner % pack == 0;
  return view;
}

// A table of `layers` and of each launch's first blocks, with `counters` zeros at its end.
template <class Layer, int launches>
std::vector<int64_t> table_of(const std::vector<Layer>& layers,
                              const std::vector<int> (&firsts)[launches], int64_t counters) {
  static_assert(sizeof(Layer) % sizeof(int64_t) == 0);
  const size_t own = layers.size() * sizeof(Layer), each = layers.size() * sizeof(int);
  const int64_t bytes = int64_t(own + launches * each) + counters * int64_t(sizeof(unsigned));
  std::vector<int64_t> table(ceil_div(bytes, sizeof(int64_t)));
  char* to = reinterpret_cast<char*>(table.data());
  memcpy(to, layers.data(), own);
  for (int i = 0; i < launches; ++i) memcpy(to + own + i * each, firsts[i].data(), each);
  return table;
}

// The parts of a table on the device.
template <class Layer>
struct Table {
  const Layer* layers;
  int count;
  const int* firsts;  // of the launch that this is for

  Table(const void* table, int layer_count, int launch)
      : layers(static_cast<const Layer*>(table)),
        count(layer_count),
        firsts(reinterpret_cast<const int*>(layers + layer_count) + int64_t(launch) * layer_count) {
  }
};

}  // namespace spectral
}  // namespace cuda
}  // namespace genkern
