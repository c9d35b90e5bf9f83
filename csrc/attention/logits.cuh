// From products to logits and from logits to probabilities: scale, softcap, biases, masks, dropout,
// on tiles in registers. For attention's .cu files.
//
// A tile has queries as rows and keys as columns, or the other way round: `Corner` says which, and
// where it lies.
#pragma once

#include "tiles.cuh"

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

// The bias of a query and a key that lie in the tensor; -inf where a boolean one hides.
template <class T>
__device__ inline float bias_at(const Bias& bias, const Place& place, int query, int key) {
  const int64_t at =
      place.batch * bias.batch + place.head * bias.head + query * bias.row + key * bias.key;
  if (bias.type == BiasType::boolean)
    return static_cast<const uint8_t*>(bias.data)[at] ? 0 : -infinity();
  if (bias.type == BiasType::arithmetic) return static_cast<const float*>(bias.data)[at];
  return float(static_cast<const T*>(bias.data)[at]);
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
  if (problem.bias.data)
    each(s, [&](float& x, int m, int n, int e) {
      const int query = corner.query(m, n, e), key = corner.key(m, n, e);
      if (query < place.queries && key < place.keys)
        x += bias_at<T>(problem.bias, place, query, key);
    });
  if (problem.key_bias.data) {
    const float* numbers = key_numbers(problem.key_bias, place);
    each(s, [&](float& x, int m, int n, int e) {
      const int key = corner.key(m, n, e);
      if (key < place.keys) x += numbers[key];
    });
  }
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

  // Logits become P.
  template <int column_blocks>
  __device__ void apply(const Problem& problem, Sums<row_blocks, column_blocks>& s) const {
    each(s, [&](float& x, int m, int, int e) {
      const int r = row_number(m, e);
      x = probability(problem, x, shift[r], inverse[r]);
    });
  }
};

// ---- Tile after tile ----------------------------------------------------------------------------

// step(is_quick, first row of the tile) for every tile of a span. In those that are quick (only for
// tensor cores, where it counts) nothing is hidden, products are the logits, and tiles are copied
// in vectors.
template <class T, class Step>
__device__ inline void each_tile(const Problem& problem, const Span& span, int rows,
                                 bool in_vectors, const Step& step) {
  int quick_first = span.end, quick_end = span.end;
  if (on_tensor_cores<T> && problem.is_simple && in_vectors) {
    quick_first = span.full_first;
    quick_end = span.full_end;
  }
  for (int at = span.first; at < span.end;) {
    if constexpr (on_tensor_cores<T>)
      for (; at >= quick_first && at < quick_end; at += rows) step(std::true_type(), at);
    if (at < span.end) step(std::false_type(), at);
    at += rows;
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
// and 1/(1 - p) where it is kept.
template <int row_blocks, int column_blocks, Rows rows, class Apply>
__device__ inline void each_dropout(const Problem& problem, const Place& place,
                                    const Corner<rows>& corner, const Apply& apply) {
  const uint64_t seed = uint64_t(*problem.seed);
  const uint32_t head = uint32_t(place.batch * problem.H + place.head);
  const auto factor = [&](const PhiloxWords& words, int key) {
    return words.word(key % 4) >= problem.dropped_below ? problem.kept : 0.f;
  };
#pragma unroll
  for (int m = 0; m < row_blocks; ++m)
#pragma unroll
    for (int n = 0; n < column_blocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int key = corner.key(m, n, e);
        const PhiloxWords words(seed, corner.query(m, n, e), key / 4, head);
        apply(m, n, e, factor(words, key));
        if (rows == Rows::queries)  // the next key is of the same four
          apply(m, n, e + 1, factor(words, key + 1));
        else
          apply(m, n, e + 1,
                factor(PhiloxWords(seed, corner.query(m, n, e + 1), key / 4, head), key));
      }
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
