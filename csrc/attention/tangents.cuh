// The directions of forward mode and second order, and the sweeps of both. For attention's .cu
// files.
//
//   T_X = scale·(A·kᵀ + q·Bᵀ)        T = g∘T_X + β + κ
//
// A, B, C: tangents of q, k, v; β, κ: of the bias and the key bias; data null: zero, and nothing of
// it is read or multiplied. g = 1 - tanh²(X/softcap), or 1.
//
// Layout: a block takes 16 rows for every warp, queries or keys of one head, with their tangents;
// they stay in shared memory, and tiles of the other kind come through two stages of it.
#pragma once

#include "logits.cuh"
#include "sizes.cuh"

namespace genkern {
namespace cuda {
namespace attention {

struct Directions {
  Tensor q, k, v;
  Bias bias;
  RowNumbers key_bias;
};

inline Directions directions_of(const Tangents& of, int element_bytes) {
  return {tensor_of(of.q, element_bytes), tensor_of(of.k, element_bytes),
          tensor_of(of.v, element_bytes), of.bias, of.key_bias};
}

template <class T, int D, int DV>
struct SweepSizes {
  static constexpr bool is_fp32 = !on_tensor_cores<T>;
  static constexpr int warps = is_fp32 && DV > 64 ? 2 : 4, threads = warps * lanes;
  static constexpr int block = warps * 16;  // rows that stay
  static constexpr int tile = is_fp32 && D > 64 ? 8 : 16;
};

// run(Storage<T>(), Features<D, DV>()) for the call's dtype and at most 128 features.
template <class Run>
inline Status with_storage_and_features(const Problem& problem, DType dtype, const Run& run) {
  return with_storage(dtype, [&](auto storage) {
    if (problem.d <= 64 && problem.dv <= 64) return run(storage, Features<64, 64>());
    if (problem.d <= 32) return run(storage, Features<32, 128>());
    return run(storage, Features<128, 128>());
  });
}

// ---- Rows in shared memory ----------------------------------------------------------------------

// Of q, its tangent and dO.
template <class T, int rows, int D, int DV>
struct QueryTiles {
  SharedRows<T, rows, D> q, q_tangent;
  SharedRows<T, rows, DV> grad;
  static constexpr int bytes = 2 * SharedRows<T, rows, D>::bytes + SharedRows<T, rows, DV>::bytes;

  __device__ explicit QueryTiles(SharedMemory& memory)
      : q(memory.rows_of<T, rows, D>()),
        q_tangent(memory.rows_of<T, rows, D>()),
        grad(memory.rows_of<T, rows, DV>()) {}

  template <int all>
  __device__ QueryTiles(const QueryTiles<T, all, D, DV>& of, int part)
      : q(of.q.template part<rows>(part)),
        q_tangent(of.q_tangent.template part<rows>(part)),
        grad(of.grad.template part<rows>(part)) {}

  template <int threads>
  __device__ void copy(const Problem& problem, const Directions& along, const Tensor& grad_out,
                       const Place& place, int i0) const {
    const auto rows_from = [&](const Tensor& x, int features) {
      return rows_of_queries<T>(x, place, features).from(i0);
    };
    copy_rows<threads>(q, rows_from(problem.q, problem.d));
    if (along.q.data) copy_rows<threads>(q_tangent, rows_from(along.q, problem.d));
    copy_rows<threads>(grad, rows_from(grad_out, problem.dv));
  }
};

// Of k, v and their tangents.
template <class T, int rows, int D, int DV>
struct KeyTiles {
  SharedRows<T, rows, D> k, k_tangent;
  SharedRows<T, rows, DV> v, v_tangent;
  static constexpr int bytes = 2 * (SharedRows<T, rows, D>::bytes + SharedRows<T, rows, DV>::bytes);

  __device__ explicit KeyTiles(SharedMemory& memory)
      : k(memory.rows_of<T, rows, D>()),
        k_tangent(memory.rows_of<T, rows, D>()),
        v(memory.rows_of<T, rows, DV>()),
        v_tangent(memory.rows_of<T, rows, DV>()) {}

  template <int all>
  __device__ KeyTiles(const KeyTiles<T, all, D, DV>& of, int part)
      : k(of.k.template part<rows>(part)),
        k_tangent(of.k_tangent.template part<rows>(part)),
        v(of.v.template part<rows>(part)),
        v_tangent(of.v_tangent.template part<rows>(part)) {}

  template <int threads>
  __device__ void copy(const Problem& problem, const Directions& along, const Place& place,
                       int j0) const {
    const auto rows_from = [&](const Tensor& x, int features) {
      return rows_of_keys<T>(x, place, features).from(j0);
    };
    copy_rows<threads>(k, rows_from(problem.k, problem.d));
    if (along.k.data) copy_rows<threads>(k_tangent, rows_from(along.k, problem.d));
    copy_rows<threads>(v, rows_from(problem.v, problem.dv));
    if (along.v.data) copy_rows<threads>(v_tangent, rows_from(along.v, problem.dv));
  }
};

// work(first row, stage, whether anything may be hidden) for every tile of a span. fetch(first row,
// stage) begins to copy one, while the tile before is worked on.
template <class Fetch, class Work>
__device__ inline void each_staged_tile(const Span& span, int rows, const Fetch& fetch,
                                        const Work& work) {
  __syncthreads();  // until what an earlier sweep left in the stages is read
  if (span.first < span.end) fetch(span.first, 0);
  commit_copies();
  int stage = 0;
  for (int at = span.first; at < span.end; at += rows) {
    wait_for_copies<0>();
    __syncthreads();
    if (at + rows < span.end) fetch(at + rows, stage ^ 1);
    commit_copies();
    work(at, stage, at < span.full_first || at >= span.full_end);
    stage ^= 1;
  }
  wait_for_copies<0>();
}

// ---- Tiles in registers -------------------------------------------------------------------------

// sums += of_queries·of_keysᵀ, or its transpose; of what the rows are, those from first_row on.
template <Rows rows, class T, int columns_over_8, int queries, int keys, int features>
__device__ inline void add_pairs(Sums<1, columns_over_8>& sums,
                                 SharedRows<T, queries, features> of_queries,
                                 SharedRows<T, keys, features> of_keys, int first_row) {
  using Left = LeftInShared<T, 1, features>;
  if constexpr (rows == Rows::queries)
    add_pairing(sums, Left(of_queries, first_row), of_keys);
  else
    add_pairing(sums, Left(of_keys, first_row), of_queries);
}

// The products A·kᵀ + q·Bᵀ become T. slope: tanh(X/softcap), of any value without softcap, becomes
// g; bend gets -2·tanh(X/softcap)/softcap∘T_X, or 0.
template <class T, Rows rows, int columns_over_8>
__device__ inline void finish_tangents(const Problem& problem, const Directions& along,
                                       const Place& place, const Corner<rows>& corner,
                                       Sums<1, columns_over_8>& t, Sums<1, columns_over_8>& slope,
                                       Sums<1, columns_over_8>& bend) {
  const float twice = problem.softcap != 0 ? -2 / problem.softcap : 0;
  each(t, [&](float& x, int m, int n, int e) {
    x *= problem.scale;
    const float tanh = problem.softcap != 0 ? slope.x[m][n][e] : 0;
    bend.x[m][n][e] = twice * tanh * x;
    slope.x[m][n][e] = 1 - tanh * tanh;
    x *= slope.x[m][n][e];
  });
  add_biases<T>(along.bias, along.key_bias, place, corner, t);
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
