// What the sweeps of second order know of a tile of queries and keys. For attention's .cu files.
//
//   P, dP, level, dS, g as in backward_rows.cu    T, T_X as in tangents.cuh    U = Z∘(dO·Cᵀ)
//   τ = rowsum(P∘T)     E = (T - τ)∘(dP - level) + U      ρ = rowsum(P∘E)      W = P∘(E - ρ)
//   h = -2·g·tanh(X/softcap)/softcap, or 0        W_X = g∘W + h∘dS∘T_X         dS_X = g∘dS
//
// A, B, C are cotangents of the gradients of q, k, v; β and κ of the biases'.
#pragma once

#include "tangents.cuh"

namespace genkern {
namespace cuda {
namespace attention {

// A lane's elements of the tiles that pair queries with keys; bend = h∘T_X / g. What `p` is at
// first are the logits that exp2 wants.
template <int columns_over_8>
struct Pairs {
  Sums<1, columns_over_8> p, kept, dp, u, t, slope, bend;
};

// Products become pairs.
template <class T, Rows rows, int columns_over_8>
__device__ inline void finish_pairs(const Problem& problem, const Directions& along,
                                    const Place& place, const Corner<rows>& corner, bool at_edge,
                                    Pairs<columns_over_8>& x) {
  finish_logits<T>(problem, place, corner, at_edge, x.p, &x.slope);
  finish_tangents<T>(problem, along, place, corner, x.t, x.slope, x.bend);
  if (problem.seed)
    each_dropout<1, columns_over_8>(problem, place, corner, [&](int m, int n, int e, float z) {
      x.kept.x[m][n][e] = z;
      x.dp.x[m][n][e] *= z;
      x.u.x[m][n][e] *= z;
    });
  else
    each(x.kept, [](float& z, int, int, int) { z = 1; });
}

// with_dp: whether dP and U are wanted; else they are 0.
template <Rows rows, int columns_over_8, class T, int queries, int keys, int D, int DV>
__device__ inline Pairs<columns_over_8> pairs_of(const Problem& problem, const Directions& along,
                                                 const Place& place, const Corner<rows>& corner,
                                                 bool at_edge, bool with_dp, int first_row,
                                                 const QueryTiles<T, queries, D, DV>& of_queries,
                                                 const KeyTiles<T, keys, D, DV>& of_keys) {
  Pairs<columns_over_8> x;
  x.p.clear();
  x.t.clear();
  x.dp.clear();
  x.u.clear();
  add_pairs<rows>(x.p, of_queries.q, of_keys.k, first_row);
  if (along.q.data) add_pairs<rows>(x.t, of_queries.q_tangent, of_keys.k, first_row);
  if (along.k.data) add_pairs<rows>(x.t, of_queries.q, of_keys.k_tangent, first_row);
  if (with_dp) add_pairs<rows>(x.dp, of_queries.grad, of_keys.v, first_row);
  if (with_dp && along.v.data) add_pairs<rows>(x.u, of_queries.grad, of_keys.v_tangent, first_row);
  finish_pairs<T>(problem, along, place, corner, at_edge, x);
  return x;
}

// What is known of a query.
struct QueryFacts {
  float shift, inverse, level, tau, rho;
};

// What the products with rows weigh them by; kept_pt = Z∘P∘(T - τ).
template <int columns_over_8>
struct Weights {
  Sums<1, columns_over_8> ds_x, w, w_x, kept_p, kept_pt;
};

// facts_of(m, n, e): of an element's query.
template <int columns_over_8, class Of>
__device__ inline Weights<columns_over_8> weights_of(const Problem& problem,
                                                     const Pairs<columns_over_8>& x,
                                                     const Of& facts_of) {
  Weights<columns_over_8> weights;
  each(weights.w, [&](float& w, int m, int n, int e) {
    const QueryFacts facts = facts_of(m, n, e);
    const float p = probability(problem, x.p.x[m][n][e], facts.shift, facts.inverse);
    const float dp = x.dp.x[m][n][e] - facts.level, t = x.t.x[m][n][e] - facts.tau;
    const float ds_x = p * dp * x.slope.x[m][n][e], kept_p = p * x.kept.x[m][n][e];
    w = p * (t * dp + x.u.x[m][n][e] - facts.rho);
    weights.ds_x.x[m][n][e] = ds_x;
    weights.w_x.x[m][n][e] = w * x.slope.x[m][n][e] + ds_x * x.bend.x[m][n][e];
    weights.kept_p.x[m][n][e] = kept_p;
    weights.kept_pt.x[m][n][e] = kept_p * t;
  });
  return weights;
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
