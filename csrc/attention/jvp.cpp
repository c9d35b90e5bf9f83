// Attention, forward mode: the derivatives of out and lse along tangents of the inputs.
//
//   T: the tangent of S (tangents.h)     τ = rowsum(P∘T)
//   tangent of out = (Z∘P)·C + (Z∘P∘(T - τ))·v        tangent of lse = τ
//
// Vocabulary: operands.h, softmax.h, tangents.h. Of a block of queries first P, T and τ for all
// keys, then two products: five in all.
#include "engine.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_jvp.h"
#endif
#include "sweep.h"
#include "tangents.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

template <class T, class Chosen>
class JvpPass {
 public:
  using E = Chosen;
  using A = Acc<T>;

  JvpPass(const AttentionJvp& args, Carver& carve)
      : args(args),
        problem(args.problem),
        k(carve, problem.M, problem.d, in_score),
        v(carve, problem.M, problem.dv, in_to_queries),
        q(carve, problem.d, in_score),
        tangents(problem, args.tangents, carve, in_score, in_to_queries, in_score),
        p_tiles(carve, problem.M),
        t_tiles(carve, problem.M),
        work(carve.rows<A>(E::tile, E::width)),
        operand(carve),
        out_sum(E::query_sums(carve, problem.dv)),
        softmax(carve),
        tau(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
    tangents.enter(sequence, kv_head);
  }

  void run(const Block& block) {
    const int64_t vectors = vectors_for<A>(block.queries);
    take_rows(block, vectors);
    put_numbers(args.lse_tangent, tau, block);
    if (!args.out_tangent.data) return;
    E::clear_query_sums(out_sum, problem.dv);
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), t = t_tiles.at(block, j0);
      if (problem.dropout > 0) {
        dropout_tile(problem, work, block, j0, keys, vectors);
        multiply(p, work, keys, vectors);
      }
      for (int64_t w = 0; w < vectors; ++w) {
        const Vec<A> mean = load(tau + w * lanes<A>());
        operand.fill(t, keys, block.queries, w * lanes<A>(), in_to_queries, [&](int64_t at, int) {
          return (load(t.data + at) - mean) * load(p.data + at);
        });
      }
      E::to_queries(out_sum, v, j0, keys, operand, vectors);
      if (tangents.has_v()) {
        operand.take(p, keys, block.queries, in_to_queries);
        E::to_queries(out_sum, tangents.v, j0, keys, operand, vectors);
      }
    });
    const Rows<T> to = query_rows<T>(args.out_tangent, block.sequence, block.head);
    for (int64_t i = 0; i < block.queries; ++i) tau[i] = 1;
    unpack_transposed<T, A>(to.from(block.i0), constant(out_sum), block.queries, problem.dv, tau);
  }

 private:
  // P, T and τ.
  void take_rows(const Block& block, int64_t vectors) {
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    tangents.take(block);
    softmax.take(args.rows, block, vectors);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i) tau[i] = 0;
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), t = t_tiles.at(block, j0);
      A* tanh_tile = problem.softcap > 0 ? work.data : nullptr;
      E::template score<Into::fresh>(p, k, j0, keys, q, vectors);
      finish_logits<T>(problem, p, tanh_tile, block, j0, keys, vectors);
      softmax.apply(p, exponent_factor<A>(problem), keys, vectors);
      tangents.logits(t, tanh_tile, nullptr, k, q, block, j0, keys, vectors);
      add_query_totals(tau, E::width, keys, vectors,
                       [&](int64_t at) { return load(p.data + at) * load(t.data + at); });
    });
  }

  const AttentionJvp& args;
  const AttentionProblem& problem;
  typename E::Keys k, v;
  typename E::Queries q;
  TangentOperands<T, E> tangents;
  Tiles<E> p_tiles, t_tiles;
  Rows<A> work;
  typename E::Operand operand;
  Rows<A> out_sum;
  Softmax<E> softmax;
  A* tau;
};

}  // namespace

Status attention_jvp(const AttentionJvp& args) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  if (AmxJvpPass::takes(args)) return sweep_queries<AmxJvpPass>(args);
#endif
  return for_engine(args.problem, [&](auto t, auto engine) {
    return sweep_queries<JvpPass<decltype(t), decltype(engine)>>(args);
  });
}

}  // namespace GK_LEVEL
}  // namespace genkern
