// Attention, forward mode: the derivatives of out and lse along tangents of the inputs.
//
//   T: the tangent of S (tangents.h)     τ = rowsum(P∘T)
//   tangent of out = (Z∘P)·C + (Z∘P∘(T - τ))·v        tangent of lse = τ
//
// Vocabulary: operands.h, softmax.h, tangents.h. Of a block of queries first P, T and τ for all
// keys, then two products: five in all. With out and lse it is six, where forward and derivative
// one after the other are seven: then P waits as exp(S - m), m the maximum as the tile knew it, and
// all is divided by the sum at the end.
#include "engine.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_jvp.h"
#endif
#include "forward_results.h"
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
        tangent_sum(E::query_sums(carve, problem.dv)),
        out_sum(args.out.data ? E::query_sums(carve, problem.dv) : Rows<A>{}),
        softmax(carve),
        tops(args.out.data ? carve.rows<A>(ceil_div(problem.M, E::tile), E::width) : Rows<A>{}),
        top(carve.array<A>(E::width)),
        sum(carve.array<A>(E::width)),
        tau(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
    tangents.enter(sequence, kv_head);
  }

  void run(const Block& block) {
    const int64_t vectors = vectors_for<A>(block.queries);
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    tangents.take(block);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i) {
      tau[i] = sum[i] = 0;
      top[i] = minus_infinity<A>;
    }
    if (args.out.data) {
      make_weights(block, vectors);
    } else {
      softmax.take(args.rows, block, vectors);
      make_softmax(block, vectors);
    }
    put_numbers(args.lse_tangent, tau, block);
    if (args.out_tangent.data || args.out.data) multiply_values(block, vectors);
  }

 private:
  // T of a tile, and its part of τ.
  void make_tangents(const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
    const Rows<A> p = p_tiles.at(block, j0), t = t_tiles.at(block, j0);
    tangents.logits(t, tanh_tile(), nullptr, k, q, block, j0, keys, vectors);
    add_query_totals(tau, E::width, keys, vectors,
                     [&](int64_t at) { return load(p.data + at) * load(t.data + at); });
  }

  // P, T and τ.
  void make_softmax(const Block& block, int64_t vectors) {
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0);
      E::template score<Into::fresh>(p, k, j0, keys, q, vectors);
      finish_logits<T>(problem, p, tanh_tile(), block, j0, keys, vectors);
      softmax.apply(p, exponent_factor<A>(problem), keys, vectors);
      make_tangents(block, j0, keys, vectors);
    });
  }

  // exp(S - tops), of which the last is `top`; the sum of exp(S - top); T and τ.
  void make_weights(const Block& block, int64_t vectors) {
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0);
      E::template score<Into::fresh>(p, k, j0, keys, q, vectors);
      finish_logits<T>(problem, p, tanh_tile(), block, j0, keys, vectors);
      for (int64_t lane = 0; lane < vectors * lanes<A>(); lane += lanes<A>())
        weigh(p.data + lane, keys, lane, tops_of(block, j0));
      make_tangents(block, j0, keys, vectors);
    });
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i)
      tau[i] = sum[i] == 0 ? A(0) : tau[i] / sum[i];
  }

  void weigh(A* at, int64_t keys, int64_t lane, A* tile_top) {
    const A factor = exponent_factor<A>(problem);
    const Vec<A> old_top = load(top + lane);
    // Two at a time, because each waits for the one before.
    Vec<A> new_top = old_top, odd_top = old_top;
    for (int64_t j = 0; j + 1 < keys; j += 2) {
      new_top = max(new_top, load(at + j * E::width));
      odd_top = max(odd_top, load(at + (j + 1) * E::width));
    }
    if (keys % 2 != 0) new_top = max(new_top, load(at + (keys - 1) * E::width));
    new_top = max(new_top, odd_top);
    const Vec<A> shift = finite(new_top), shrink = E::exponential(old_top - shift, factor);
    const Vec<A> more = sum_over_keys<A>(keys, [&](int64_t j) {
      const Vec<A> p = E::exponential(load(at + j * E::width) - shift, factor);
      store(at + j * E::width, p);
      return p;
    });
    store(top + lane, new_top);
    store(tile_top + lane, new_top);
    store(sum + lane, load(sum + lane) * shrink + more);
    store(tau + lane, load(tau + lane) * shrink);
  }

  // All keys so far at -inf: any finite shift gives the zeros that are due.
  static Vec<A> finite(Vec<A> top) { return select(top == minus_infinity<A>, Vec<A>{}, top); }

  // A tile's weights as all tiles have them: exp(S - top).
  void settle(Rows<A> p, const A* tile_top, int64_t keys, int64_t vectors) {
    for (int64_t lane = 0; lane < vectors * lanes<A>(); lane += lanes<A>()) {
      if (memcmp(tile_top + lane, top + lane, sizeof(Vec<A>)) == 0) continue;
      const Vec<A> shrink = E::exponential(load(tile_top + lane) - finite(load(top + lane)),
                                           exponent_factor<A>(problem));
      for (int64_t j = 0; j < keys; ++j) {
        A* at = p.row(j) + lane;
        store(at, load(at) * shrink);
      }
    }
  }

  void multiply_values(const Block& block, int64_t vectors) {
    E::clear_query_sums(tangent_sum, problem.dv);
    if (args.out.data) E::clear_query_sums(out_sum, problem.dv);
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), t = t_tiles.at(block, j0);
      if (args.out.data) settle(p, tops_of(block, j0), keys, vectors);
      if (problem.dropout > 0) {
        dropout_tile(problem, work, block, j0, keys, vectors);
        multiply(p, work, keys, vectors);
      }
      if (args.out.data || tangents.has_v()) operand.take(p, keys, block.queries, in_to_queries);
      if (args.out.data) E::to_queries(out_sum, v, j0, keys, operand, vectors);
      if (tangents.has_v()) E::to_queries(tangent_sum, tangents.v, j0, keys, operand, vectors);
      for (int64_t w = 0; w < vectors; ++w) {
        const Vec<A> mean = load(tau + w * lanes<A>());
        operand.fill(t, keys, block.queries, w * lanes<A>(), in_to_queries, [&](int64_t at, int) {
          return (load(t.data + at) - mean) * load(p.data + at);
        });
      }
      E::to_queries(tangent_sum, v, j0, keys, operand, vectors);
    });
    if (args.out.data)
      write_forward<T>({problem, args.out, {}, args.lse}, block, out_sum, top, sum);
    else
      for (int64_t i = 0; i < block.queries; ++i) sum[i] = 1;
    if (!args.out_tangent.data) return;
    const Rows<T> to = query_rows<T>(args.out_tangent, block.sequence, block.head);
    unpack_transposed<T, A>(to.from(block.i0), constant(tangent_sum), block.queries, problem.dv,
                            sum);
  }

  A* tops_of(const Block& block, int64_t j0) const {
    return tops.row((j0 - block.first) / E::tile);
  }
  A* tanh_tile() const { return problem.softcap > 0 ? work.data : nullptr; }

  const AttentionJvp& args;
  const AttentionProblem& problem;
  typename E::Keys k, v;
  typename E::Queries q;
  TangentOperands<T, E> tangents;
  Tiles<E> p_tiles, t_tiles;
  Rows<A> work;
  typename E::Operand operand;
  Rows<A> tangent_sum, out_sum;
  Softmax<E> softmax;
  Rows<A> tops;  // the maxima of the logits as every tile knew them
  A *top, *sum;  // the maximum and Σ exp(S - top); at the end what is divided by the sum is written
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
