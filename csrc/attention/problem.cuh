// What attention's CUDA kernels are given, and where in it a block stands. For .cu files.
//
// The kernels know d and dv only as padded sizes, template parameters; everything else is known
// when they run. S = scale·q·kᵀ arrives in the kernels' arithmetic as sign·q·k, and what turns a
// difference of such logits into an argument of exp2 is `exponent`: without softcap and bias
// ("plain") it holds |scale|, so the shift is in units of |scale|, as attention.h has it.
#pragma once

#include "../common/cuda_types.cuh"
#include "attention.h"

namespace genkern {
namespace cuda {
namespace attention {

// [B, heads, rows, features] as the contract has it; in_vectors: 16 bytes can be read at once.
struct Tensor {
  const void* data;
  int64_t batch, head, row;
  bool in_vectors;
};

struct Problem {
  Tensor q, k, v;
  Bias bias;
  RowNumbers key_bias;
  const int64_t *q_starts, *k_starts, *key_lengths;
  const int64_t* seed;  // of dropout, on the device; null: none
  int H, Hk, N, M, d, dv;
  int left, right;  // not above N + M, where they hide nothing
  bool lower_right;
  bool is_simple;  // sign·q·k are the logits already, and nothing is dropped
  bool is_plain;
  float scale, sign, magnitude, softcap, magnitude_by_softcap, exponent, kept;
  uint32_t dropped_below;
};

inline Tensor tensor_of(const Heads& x, int element_bytes) {
  const auto is_multiple = [&](int64_t elements) { return elements * element_bytes % 16 == 0; };
  const bool in_vectors = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && is_multiple(x.batch) &&
                          is_multiple(x.head) && is_multiple(x.row);
  return {x.data, x.batch, x.head, x.row, in_vectors};
}

inline Problem problem_of(const AttentionProblem& of, const int64_t* seed) {
  const int bytes = of.dtype == DType::f32 ? 4 : 2;
  Problem problem{};
  problem.q = tensor_of(of.q, bytes);
  problem.k = tensor_of(of.k, bytes);
  problem.v = tensor_of(of.v, bytes);
  problem.bias = of.bias;
  problem.key_bias = of.key_bias;
  problem.q_starts = of.q_starts;
  problem.k_starts = of.k_starts;
  problem.key_lengths = of.key_lengths;
  problem.seed = seed;
  problem.H = int(of.H);
  problem.Hk = int(of.Hk);
  problem.N = int(of.N);
  problem.M = int(of.M);
  problem.d = int(of.d);
  problem.dv = int(of.dv);
  // No key is further away than there are rows: a clamped bound means the same.
  const int64_t farthest = of.N + of.M;
  problem.left = int(of.left < farthest ? of.left : farthest);
  problem.right = int(of.right < farthest ? of.right : farthest);
  problem.lower_right = of.lower_right;
  problem.is_plain = of.softcap == 0 && !of.bias.data && !of.key_bias.data;
  problem.scale = float(of.scale);
  problem.sign = problem.scale > 0 ? 1 : problem.scale < 0 ? -1 : 0;
  problem.is_simple = problem.is_plain && problem.sign == 1 && !seed;
  const double magnitude = problem.scale == 0 ? 1 : fabs(double(problem.scale));
  const double log2_e = 1.4426950408889634;
  problem.magnitude = float(magnitude);
  problem.softcap = float(of.softcap);
  problem.magnitude_by_softcap = of.softcap == 0 ? 0 : float(magnitude / of.softcap);
  problem.exponent = float((problem.is_plain ? magnitude : 1) * log2_e);
  problem.kept = of.dropout < 1 ? float(1 / (1 - of.dropout)) : 0;
  // Where all is dropped the largest word stays, times 0.
  const double words = of.dropout * 4294967296.;
  problem.dropped_below = words < 4294967295. ? uint32_t(words) : 4294967295u;
  return problem;
}

// ---- Where a block stands -----------------------------------------------------------------------

// One head of one sequence: `queries` rows from first_query on; of key_rows keys from first_key on
// `keys` may be seen. offset: where among the keys query 0 stands.
struct Place {
  int64_t batch, first_query, first_key;
  int head, kv_head, queries, keys, key_rows, offset;
};

__device__ inline int64_t clamped(int64_t x, int64_t upper) {
  return x < 0 ? 0 : x < upper ? x : upper;
}

__device__ inline Place place_of(const Problem& problem, int batch, int head) {
  Place place{batch,     0,         0,         head, head / (problem.H / problem.Hk),
              problem.N, problem.M, problem.M, 0};
  if (problem.q_starts) {
    // Kept inside of the tensors: on a GPU nobody has looked at the values. N and M are all rows.
    place.first_query = clamped(problem.q_starts[batch], problem.N);
    place.first_key = clamped(problem.k_starts[batch], problem.M);
    const int64_t end_query = clamped(problem.q_starts[batch + 1], problem.N);
    const int64_t end_key = clamped(problem.k_starts[batch + 1], problem.M);
    place.queries = int(max(end_query - place.first_query, int64_t(0)));
    place.key_rows = int(max(end_key - place.first_key, int64_t(0)));
  }
  place.keys = place.key_rows;
  if (problem.key_lengths) place.keys = int(clamped(problem.key_lengths[batch], place.key_rows));
  if (problem.lower_right) place.offset = place.key_rows - place.queries;
  return place;
}

struct BlockOfQueries {
  int first;
  Place place;
};

// Of a block of the grid that works on `rows` queries; the last queries, which see the most under a
// causal mask, begin.
__device__ inline BlockOfQueries block_of_queries(const Problem& problem, int blocks, int rows) {
  const int sequence_head = blockIdx.x / blocks;
  const int block = blocks - 1 - int(blockIdx.x) % blocks;
  return {block * rows, place_of(problem, sequence_head / problem.H, sequence_head % problem.H)};
}

struct BlockOfKeys {
  int first, batch, kv_head;
};

// Of a block that works on `rows` keys; the first keys, which most queries see under a causal mask,
// begin.
__device__ inline BlockOfKeys block_of_keys(const Problem& problem, int blocks, int rows) {
  const int sequence_head = blockIdx.x / blocks;
  return {int(blockIdx.x) % blocks * rows, sequence_head / problem.Hk, sequence_head % problem.Hk};
}

// ---- Who sees whom ------------------------------------------------------------------------------

// The keys from `first` on and before `end` that a query sees: none for one beyond the last.
struct Interval {
  int first, end;
};

__device__ inline Interval keys_of(const Problem& problem, const Place& place, int query) {
  const int64_t at = int64_t(query) + place.offset;
  return {int(max(at - problem.left, int64_t(0))),
          query < place.queries ? int(min(int64_t(place.keys), at + problem.right + 1)) : 0};
}

// The tiles that a block must visit: they begin at `first` and before `end`; between full_first and
// full_end nobody's keys are hidden.
struct Span {
  int first, full_first, full_end, end;
};

__device__ inline int round_down(int64_t x, int to) { return int(x / to * to); }
__device__ inline int round_up(int64_t x, int to) { return int((x + to - 1) / to * to); }

// With everything at hand: of [first, end) tiles, those whose rows lie in [full_first, full_end).
__device__ inline Span aligned_span(int64_t first, int64_t full_first, int64_t full_end,
                                    int64_t end, int rows) {
  first = round_down(max(first, int64_t(0)), rows);
  end = max(end, first);
  const int past = round_up(end, rows);
  const int from = min(round_up(max(full_first, int64_t(0)), rows), past);
  const int to = max(round_down(max(full_end, int64_t(0)), rows), from);
  return {int(first), max(from, int(first)), max(to, int(first)), int(end)};
}

// Tiles of `keys` keys, for the `queries` queries from i0 on.
__device__ inline Span key_span(const Problem& problem, const Place& place, int i0, int queries,
                                int keys) {
  const int64_t first = int64_t(i0) + place.offset;
  const int64_t last = int64_t(min(i0 + queries, place.queries)) - 1 + place.offset;
  if (i0 >= place.queries) return {0, 0, 0, 0};
  return aligned_span(first - problem.left, last - problem.left,
                      min(int64_t(place.keys), first + problem.right + 1),
                      min(int64_t(place.keys), last + problem.right + 1), keys);
}

// Tiles of `queries` queries, for the `keys` keys from j0 on.
__device__ inline Span query_span(const Problem& problem, const Place& place, int j0, int queries,
                                  int keys) {
  const int64_t first = int64_t(j0) - place.offset;
  const int64_t last = int64_t(min(j0 + keys, place.keys)) - 1 - place.offset;
  if (j0 >= place.keys) return {0, 0, 0, 0};
  const int64_t full_end = j0 + keys <= place.keys ? first + problem.left + 1 : 0;
  return aligned_span(first - problem.right, last - problem.right,
                      min(int64_t(place.queries), full_end),
                      min(int64_t(place.queries), last + problem.left + 1), queries);
}

// ---- Addresses ----------------------------------------------------------------------------------

template <class T>
__device__ inline const T* query_rows(const Tensor& x, const Place& place) {
  return static_cast<const T*>(x.data) + place.batch * x.batch + place.head * x.head +
         place.first_query * x.row;
}
template <class T>
__device__ inline const T* key_rows(const Tensor& x, const Place& place) {
  return static_cast<const T*>(x.data) + place.batch * x.batch + place.kv_head * x.head +
         place.first_key * x.row;
}
template <class T>
__device__ inline T* query_rows(const Heads& x, const Place& place) {
  return static_cast<T*>(x.data) + place.batch * x.batch + place.head * x.head +
         place.first_query * x.row;
}
template <class T>
__device__ inline T* key_rows(const Heads& x, const Place& place) {
  return static_cast<T*>(x.data) + place.batch * x.batch + place.kv_head * x.head +
         place.first_key * x.row;
}
__device__ inline float* query_numbers(const RowNumbers& x, const Place& place) {
  return static_cast<float*>(x.data) + place.batch * x.batch + place.head * x.head +
         place.first_query;
}
__device__ inline float* key_numbers(const RowNumbers& x, const Place& place) {
  return static_cast<float*>(x.data) + place.batch * x.batch + place.kv_head * x.head +
         place.first_key;
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
