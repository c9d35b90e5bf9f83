// Attention, forward: out = (Z∘softmax(S))·v by online softmax over tiles of keys.
//
// Vocabulary: operands.h, logits.h, sweep.h. Of a block of queries Qᵀ is packed once, then for
// every tile of keys: Sᵀ; the running maximum m, lane by lane; P = exp(S - m); the sums l and Oᵀ
// shrink by exp(m_old - m); Oᵀ += Vᵀ·Pᵀ. At the end out = Oᵀ / l; m and l are kept, and lse = m +
// log l.
#include <type_traits>

#include "engine.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_forward.h"
#include "split_forward.h"
#else
#include "forward_results.h"
#endif
#include "logits.h"
#include "sweep.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

template <class T, class Chosen>
class ForwardPass {
 public:
  using E = Chosen;
  using A = Acc<T>;

  ForwardPass(const AttentionForward& args, Carver& carve)
      : args(args),
        problem(args.problem),
        k(carve, problem.M, problem.d, in_score),
        v(carve, problem.M, problem.dv, in_to_queries),
        q(carve, problem.d, in_score),
        s(carve.rows<A>(E::tile, E::width)),
        z(problem.dropout > 0 ? carve.rows<A>(E::tile, E::width) : Rows<A>{}),
        operand(carve),
        out_sum(E::query_sums(carve, problem.dv)),
        top(carve.array<A>(E::width)),
        sum(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
  }

  void run(const Block& block) {
    const int64_t vectors = vectors_for<A>(block.queries);
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i) {
      top[i] = minus_infinity<A>;
      sum[i] = 0;
    }
    E::clear_query_sums(out_sum, problem.dv);
    for (int64_t j0 = block.first; j0 < block.last; j0 += E::tile) {
      const int64_t keys = smaller(E::tile, block.last - j0);
      E::template score<Into::fresh>(s, k, j0, keys, q, vectors);
      finish_logits<T>(problem, s, nullptr, block, j0, keys, vectors);
      if (problem.dropout > 0) dropout_tile(problem, z, block, j0, keys, vectors);
      softmax_step(keys, vectors, block.queries);
      E::to_queries(out_sum, v, j0, keys, operand, vectors);
    }
    write_forward<T>(args, block, out_sum, top, sum);
  }

 private:
  // The operand becomes Z∘exp(S - m) with the new running maximum m; out_sum and sum shrink to it.
  void softmax_step(int64_t keys, int64_t vectors, int64_t queries) {
    constexpr int L = lanes<A>();
    const A factor = exponent_factor<A>(problem);
    for (int64_t w = 0; w < vectors; ++w) {
      A* at = s.data + w * L;
      const Vec<A> old_top = load(top + w * L);
      // Two at a time, because each waits for the one before.
      Vec<A> new_top = old_top, odd_top = old_top;
      for (int64_t j = 0; j + 1 < keys; j += 2) {
        new_top = max(new_top, load(at + j * E::width));
        odd_top = max(odd_top, load(at + (j + 1) * E::width));
      }
      if (keys % 2 != 0) new_top = max(new_top, load(at + (keys - 1) * E::width));
      new_top = max(new_top, odd_top);
      // All keys so far at -inf: any finite shift gives the zeros that are due.
      const Vec<A> shift = select(new_top == minus_infinity<A>, Vec<A>{}, new_top);
      Vec<A> more[4] = {};
      operand.fill(s, keys, queries, w * L, in_to_queries, [&](int64_t i, int part) {
        const Vec<A> p = E::exponential(load(s.data + i) - shift, factor);
        more[part] += p;
        return z.data ? p * load(z.data + i) : p;
      });
      const Vec<A> shrink = E::exponential(old_top - shift, factor);
      store(top + w * L, new_top);
      store(sum + w * L, load(sum + w * L) * shrink + ((more[0] + more[1]) + (more[2] + more[3])));
      if (all_equal(old_top, new_top)) continue;  // nothing shrinks
      for (int64_t e = 0; e < problem.dv; ++e) {
        A* o = out_sum.row(e) + w * L;
        store(o, load(o) * shrink);
      }
    }
  }

  static bool all_equal(Vec<A> x, Vec<A> y) { return memcmp(&x, &y, sizeof x) == 0; }

  const AttentionForward& args;
  const AttentionProblem& problem;
  typename E::Keys k, v;
  typename E::Queries q;
  Rows<A> s, z;
  typename E::Operand operand;
  Rows<A> out_sum;
  A *top, *sum;
};

}  // namespace

Status attention_forward(const AttentionForward& args) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  if (args.problem.dtype == DType::bf16 && args.problem.dropout == 0)
    return sweep_queries<AmxForwardPass>(args);
#endif
  return for_engine(args.problem, [&](auto t, auto engine) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
    if constexpr (std::is_same_v<decltype(engine), SplitEngine>)
      if (args.problem.dropout == 0) return sweep_queries<SplitForwardPass>(args);
#endif
    return sweep_queries<ForwardPass<decltype(t), decltype(engine)>>(args);
  });
}

}  // namespace GK_LEVEL
}  // namespace genkern
