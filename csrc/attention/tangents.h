// The directions of a second-order or forward-mode pass, as operands. For kernel files.
//
//   T_X = scale·(A·kᵀ + q·Bᵀ)        T = g∘T_X + β + κ
//
// A, B, C: tangents of q, k, v; β, κ: of the bias and the key bias; any of them may be missing,
// which means zero. g = 1 - tanh²(X/softcap), or 1.
#pragma once

#include "softmax.h"

namespace genkern {
namespace GK_LEVEL {

template <class T, class Chosen = Engine<T>>
class TangentOperands {
 public:
  using E = Chosen;
  using A = Acc<T>;

  typename E::Keys k, v;
  typename E::Queries q;

  TangentOperands(const AttentionProblem& problem, const Tangents& tangents, Carver& carve,
                  int uses_of_k, int uses_of_v, int uses_of_q)
      : k(carve, tangents.k.data ? problem.M : 0, problem.d, uses_of_k),
        v(carve, tangents.v.data ? problem.M : 0, problem.dv, uses_of_v),
        q(carve, problem.d, uses_of_q),
        problem(problem),
        tangents(tangents) {}

  bool has_q() const { return tangents.q.data; }
  bool has_k() const { return tangents.k.data; }
  bool has_v() const { return tangents.v.data; }

  void enter(const Sequence& sequence, int64_t kv_head) {
    if (has_k()) k.take(constant(key_rows<T>(tangents.k, sequence, kv_head)), sequence.keys);
    if (has_v()) v.take(constant(key_rows<T>(tangents.v, sequence, kv_head)), sequence.keys);
  }
  void take(const Block& block) {
    if (!has_q()) return;
    const Rows<T> rows = query_rows<T>(tangents.q, block.sequence, block.head);
    q.take(constant(rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
  }

  // The tangents of logits. `tanh_tile`: tanh(X/softcap), or null without softcap; `tx_tile` then
  // keeps T_X, or is null.
  void logits(Rows<A> to, const A* tanh_tile, A* tx_tile, const typename E::Keys& primal_k,
              const typename E::Queries& primal_q, const Block& block, int64_t j0, int64_t keys,
              int64_t vectors) const {
    if (has_q()) E::template score<Into::fresh>(to, primal_k, j0, keys, q, vectors);
    if (has_k() && has_q()) E::template score<Into::sum>(to, k, j0, keys, primal_q, vectors);
    if (has_k() && !has_q()) E::template score<Into::fresh>(to, k, j0, keys, primal_q, vectors);
    const bool products = has_q() || has_k();
    const A magnitude = Scale<A>(problem.scale).magnitude;
    each_vector<A>(to.stride, keys, vectors, [&](int64_t at) {
      Vec<A> x = products ? load(to.data + at) * magnitude : Vec<A>{};
      if (tx_tile) store(tx_tile + at, x);
      if (tanh_tile) x *= A(1) - load(tanh_tile + at) * load(tanh_tile + at);
      store(to.data + at, x);
    });
    add_bias<T>(to, tangents.bias, block, j0, keys);
    add_key_bias(to, tangents.key_bias, block, j0, keys, vectors);
  }

 private:
  const AttentionProblem& problem;
  const Tangents& tangents;
};

}  // namespace GK_LEVEL
}  // namespace genkern
