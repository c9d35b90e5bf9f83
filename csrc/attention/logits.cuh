// From products to logits and from logits to probabilities: scale, softcap, biases, masks, dropout,
// on tiles in registers. For attention's .cu files.
//
// A tile has queries as rows and keys as columns, or the other way round: `Corner` says which, and
// where it lies.
#pragma once

#include "products.cuh"

namespace genkern {
namespace cuda {
namespace attention {

constexpr float log2_e = 1.44269504088896f, ln_2 = 0.693147180559945f;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

enum class Rows { queries, keys };  // what a tile's rows are

// The first row and column of a warp's tile.
template <Rows rows>
class Corner {
 public:
  __device__ Corner(int row, int column) : row_(row), column_(column) {}

  // Of element x[m][n][e] of the lane.
  __device__ int query(int m, int n, int e) const {
    return rows == Rows::queries ? in_row(m, e) : in_column(n, e);
  }
  __device__ int key(int m, int n, int e) const {
    return rows == Rows::queries ? in_column(n, e) : in_row(m, e);
  }

 private:
  __device__ int in_row(int m, int e) const { return row_ + row_of_lane(row_number(m, e)); }
  __device__ int in_column(int n, int e) const { return column_ + column_of_lane(n, e); }

  int row_, column_;
};

// ---- Logits -------------------------------------------------------------------------------------

// By exp; near 0, where that cancels, by the series.
__device__ inline float tanh_of(float x) {
  const float e = exp2f(fabsf(x) * (-2 * log2_e));
  const float far = copysignf(__fdividef(1 - e, 1 + e), x);
  const float y = x * x;
  float near = fmaf(-1382.f / 155925, y, 62.f / 2835);
  near = fmaf(near, y, -17.f / 315);
  near = fmaf(near, y, 2.f / 15);
  near = fmaf(near, y, -1.f / 3);
  near = fmaf(near, y, 1.f);
  return y < 0.1f ? x * near : far;
}

__device__ inline float as_bias(uint8_t seen) { return seen ? 0 : -infinity(); }
template <class T>
__device__ inline float as_bias(T x) {
  return float(x);
}

// S: how the bias is stored.
template <class S, Rows rows, int row_blocks, int column_blocks>
__device__ inline void add_stored_bias(const Bias& bias, const Place& place,
                                       const Corner<rows>& corner,
                                       Sums<row_blocks, column_blocks>& s) {
  const S* all =
      static_cast<const S*>(bias.data) + place.batch * bias.batch + place.head * bias.head;
  each(s, [&](float& x, int m, int n, int e) {
    const int query = corner.query(m, n, e), key = corner.key(m, n, e);
    const bool is_inside = query < place.queries && key < place.keys;
    x += is_inside ? as_bias(all[query * bias.row + key * bias.key]) : 0;
  });
}

// What there is of the two biases; a boolean one hides by -inf.
template <class T, Rows rows, int row_blocks, int column_blocks>
__device__ inline void add_biases(const Bias& bias, const RowNumbers& key_bias, const Place& place,
                                  const Corner<rows>& corner, Sums<row_blocks, column_blocks>& s) {
  if (bias.data) {
    if (bias.type == BiasType::boolean)
      add_stored_bias<uint8_t>(bias, place, corner, s);
    else if (std::is_same<T, float>::value || bias.type == BiasType::arithmetic)
      add_stored_bias<float>(bias, place, corner, s);
    else
      add_stored_bias<T>(bias, place, corner, s);
  }
  if (key_bias.data) {
    const float* numbers = key_numbers(key_bias, place);
    each(s, [&](float& x, int m, int n, int e) {
      const int key = corner.key(m, n, e);
      if (key < place.keys) x += numbers[key];
    });
  }
}

// Products q·k become the logits that exp2 wants, hidden ones -inf. at_edge: whether any may be
// hidden. `of_tanh` gets tanh(X / softcap) where there is a softcap and it is not null.
template <class T, Rows rows, int row_blocks, int column_blocks>
__device__ inline void finish_logits(const Problem& problem, const Place& place,
                                     const Corner<rows>& corner, bool at_edge,
                                     Sums<row_blocks, column_blocks>& s,
                                     Sums<row_blocks, column_blocks>* of_tanh = nullptr) {
  if (problem.sign != 1) each(s, [&](float& x, int, int, int) { x *= problem.sign; });
  if (problem.softcap != 0) {
    each(s, [&](float& x, int m, int n, int e) {
      const float t = tanh_of(x * problem.magnitude_by_softcap);
      if (of_tanh) of_tanh->x[m][n][e] = t;
      x = t * problem.softcap;
    });
  } else if (!problem.is_plain) {
    each(s, [&](float& x, int, int, int) { x *= problem.magnitude; });
  }
  add_biases<T>(problem.bias, problem.key_bias, place, corner, s);
  if (at_edge)
    each(s, [&](float& x, int m, int n, int e) {
      const Interval seen = keys_of(problem, place, corner.query(m, n, e));
      const int key = corner.key(m, n, e);
      if (key < seen.first || key >= seen.end) x = -infinity();
    });
}

// ---- Probabilities ------------------------------------------------------------------------------

// shift: as it is taken off exp2's argument.
__device__ inline float probability(const Problem& problem, float logit, float shift,
                                    float inverse) {
  return exp2_approximate(fmaf(logit, problem.exponent, -shift)) * inverse;
}

// What the forward kept of a lane's rows of queries.
template <int row_blocks>
struct Softmax {
  float shift[2 * row_blocks], inverse[2 * row_blocks];

  // i0: the warp's first row. Beyond the last row P is 0, and where nothing is seen: with any other
  // shift than this a large bias would make it inf·0.
  __device__ Softmax(const Problem& problem, const SoftmaxRows& rows, const Place& place, int i0) {
#pragma unroll
    for (int r = 0; r < 2 * row_blocks; ++r) {
      const int i = i0 + row_of_lane(r);
      const float sum = i < place.queries ? query_numbers(rows.sum, place)[i] : 0;
      shift[r] = sum > 0 ? query_numbers(rows.shift, place)[i] * problem.exponent : infinity();
      inverse[r] = sum > 0 ? 1 / sum : 0;
    }
  }

  // Logits become P, or where not `divided` P times the row's sum.
  template <bool divided = true, int column_blocks>
  __device__ void apply(const Problem& problem, Sums<row_blocks, column_blocks>& s) const {
    each(s, [&](float& x, int m, int, int e) {
      const int r = row_number(m, e);
      x = probability(problem, x, shift[r], divided ? inverse[r] : 1);
    });
  }
};

// ---- Tile after tile ----------------------------------------------------------------------------

// quick(first row) or general(first row) for every tile of a span. A tile is quick (only on tensor
// cores, where it counts) where nothing is hidden, products are the logits, and the tensors can be
// copied in vectors.
template <class T, class Quick, class General>
__device__ inline void each_tile(const Problem& problem, const Span& span, int rows,
                                 bool in_vectors, const Quick& quick, const General& general) {
  const bool has_quick = on_tensor_cores<T> && problem.is_simple && in_vectors;
  const int quick_first = has_quick ? span.full_first : span.end;
  const int quick_end = has_quick ? span.full_end : span.end;
  for (int at = span.first; at < span.end; at += rows) {
    if constexpr (on_tensor_cores<T>) {
      if (at == quick_first)
        for (; at < quick_end; at += rows) quick(at);
      if (at >= span.end) break;
    }
    general(at);
  }
}

// ---- Dropout ------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011) on the counters (query, key / 4, batch·H + head, 0): word
// key % 4 of the answer is the key's. The same in every pass, and in reference.py.
struct PhiloxWords {
  uint32_t x[4];

  __device__ PhiloxWords(uint64_t seed, uint32_t query, uint32_t key_quad, uint32_t head)
      : x{query, key_quad, head, 0} {
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32_t even_high = __umulhi(0xD2511F53u, x[0]), even_low = 0xD2511F53u * x[0];
      const uint32_t odd_high = __umulhi(0xCD9E8D57u, x[2]), odd_low = 0xCD9E8D57u * x[2];
      x[0] = odd_high ^ x[1] ^ key[0];
      x[1] = odd_low;
      x[2] = even_high ^ x[3] ^ key[1];
      x[3] = even_low;
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
  }
  __device__ uint32_t word(int i) const {
    const uint32_t low = i & 1 ? x[1] : x[0], high = i & 1 ? x[3] : x[2];
    return i & 2 ? high : low;
  }
};

// apply(m, n, e, Z) for a lane's elements x[m][n][e] of a tile, Z being 0 where a key is dropped
// and 1/(1 - p) where it is kept. First all bits, in a loop that is not unrolled, because ten
// rounds are long.
template <int row_blocks, int column_blocks, Rows rows, class Apply>
__device__ inline void each_dropout(const Problem& problem, const Place& place,
                                    const Corner<rows>& corner, const Apply& apply) {
  constexpr int elements = 4 * row_blocks * column_blocks;
  static_assert(elements <= 64, "a bit for every element");
  // Keys in neighbouring columns are two of the same four.
  constexpr int drawn = rows == Rows::queries ? 2 : 1;
  const uint64_t seed = uint64_t(*problem.seed);
  const uint32_t head = uint32_t(place.batch * problem.H + place.head);
  uint64_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < elements; i += drawn) {
    const int m = i / (4 * column_blocks), n = i / 4 % column_blocks, e = i % 4;
    const int key = corner.key(m, n, e);
    const PhiloxWords words(seed, corner.query(m, n, e), key / 4, head);
#pragma unroll
    for (int word = 0; word < drawn; ++word)
      kept |= uint64_t(words.word((key + word) % 4) >= problem.dropped_below) << (i + word);
  }
#pragma unroll
  for (int m = 0; m < row_blocks; ++m)
#pragma unroll
    for (int n = 0; n < column_blocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        apply(m, n, e, kept >> (4 * (m * column_blocks + n) + e) & 1 ? problem.kept : 0.f);
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
