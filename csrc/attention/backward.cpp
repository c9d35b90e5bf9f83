// Attention, backward: the gradients of q, k, v and the biases.
//
//   P = exp(S - shift) / sum    dP = Z∘(dO·vᵀ)    δ = rowsum(P∘dP)    dS = P∘(dP - δ + λ)
//   g = 1 - tanh²(X/softcap), or 1        λ: the cotangent of lse
//   dq = scale·(g∘dS)·k     dk = scale·(g∘dS)ᵀ·q     dv = (Z∘P)ᵀ·dO     dbias = dS, summed
//
// Vocabulary: operands.h, softmax.h, logits.h, sweep.h. Of a block of queries first P, dP and δ for
// all keys, then the products with them: five in all. dQ is finished with its block; dK, dV and the
// key bias's gradient grow in sums of the task's own.
#include "engine.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_backward_sweep.h"
#endif
#include "bias_gradient.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

template <class T, class Chosen>
class BackwardPass {
 public:
  using Storage = T;
  using E = Chosen;
  using A = Acc<T>;

  BackwardPass(const AttentionBackward& args, Carver& carve)
      : args(args),
        problem(args.problem),
        k(carve, problem.M, problem.d, in_score | in_to_queries),
        v(carve, problem.M, problem.dv, in_score),
        q(carve, problem.d, in_score | in_to_keys),
        grad_out(carve, problem.dv, in_score | in_to_keys),
        p_tiles(carve, problem.M),
        dp_tiles(carve, problem.M),
        tanh_tiles(problem.softcap > 0 ? Tiles<E>(carve, problem.M) : Tiles<E>()),
        z_tiles(problem.dropout > 0 ? Tiles<E>(carve, problem.M) : Tiles<E>()),
        operand(carve),
        dq(E::query_sums(carve, problem.d)),
        softmax(carve),
        level(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
  }

  void run(const Block& block, const KeySums<T, E>& sums) {
    const int64_t vectors = vectors_for<A>(block.queries);
    take_rows(block, vectors);
    E::clear_query_sums(dq, problem.d);
    const bool writes_bias = is_of_one_source(problem, args.grads.bias);
    const BiasGradient<A> bias(args.grads.bias, block.sequence.batch, block.head);
    if (writes_bias) bias.clear(block.i0, block.queries, problem.M);
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), ds = dp_tiles.at(block, j0);
      if (writes_bias || args.grads.key_bias.data || problem.softcap > 0) {
        make_logit_gradients(block, j0, keys, vectors);
        if (writes_bias) bias.add(ds, block, j0, keys, vectors);
        if (args.grads.key_bias.data) add_key_totals(sums.key_bias + j0, ds, keys, vectors);
        if (problem.softcap > 0) through_softcap(block, j0, keys, vectors);
        operand.take(ds, keys, block.queries, in_to_queries | in_to_keys);
      } else {
        for (int64_t w = 0; w < vectors; ++w) {
          const Vec<A> row_level = load(level + w * lanes<A>());
          operand.fill(ds, keys, block.queries, w * lanes<A>(), in_to_queries | in_to_keys,
                       [&](int64_t at, int) {
                         return load(p.data + at) * (load(ds.data + at) - row_level);
                       });
        }
      }
      if (args.grads.q.data) E::to_queries(dq, k, j0, keys, operand, vectors);
      if (args.grads.k.data) E::to_keys(sums.k, j0, keys, operand, q, block.queries);
      if (args.grads.v.data) {
        if (problem.dropout > 0) multiply(p, z_tiles.at(block, j0), keys, vectors);
        operand.take(p, keys, block.queries, in_to_keys);
        E::to_keys(sums.v, j0, keys, operand, grad_out, block.queries);
      }
    });
    if (args.grads.q.data) {
      const Rows<T> to = query_rows<T>(args.grads.q, block.sequence, block.head);
      for (int64_t i = 0; i < block.queries; ++i) level[i] = A(problem.scale);
      unpack_transposed<T, A>(to.from(block.i0), constant(dq), block.queries, problem.d, level);
    }
  }

  void run_for_bias(const Block& block, const BiasGradient<A>& gradient) {
    const int64_t vectors = vectors_for<A>(block.queries);
    take_rows(block, vectors);
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      make_logit_gradients(block, j0, keys, vectors);
      gradient.add(dp_tiles.at(block, j0), block, j0, keys, vectors);
    });
  }

 private:
  // P and dP of all keys, and level = δ - λ.
  void take_rows(const Block& block, int64_t vectors) {
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    const Rows<T> grad_rows = query_rows<T>(args.grad_out, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    grad_out.take(constant(grad_rows.from(block.i0)), block.queries, A(1));
    softmax.take(args.rows, block, vectors);
    take_numbers(level, args.grad_lse, block, vectors);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i) level[i] = -level[i];
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), dp = dp_tiles.at(block, j0);
      E::template score<Into::fresh>(p, k, j0, keys, q, vectors);
      E::template score<Into::fresh>(dp, v, j0, keys, grad_out, vectors);
      finish_logits<T>(problem, p, problem.softcap > 0 ? tanh_tiles.at(block, j0).data : nullptr,
                       block, j0, keys, vectors);
      softmax.apply(p, exponent_factor<A>(problem), keys, vectors);
      if (problem.dropout > 0) {
        dropout_tile(problem, z_tiles.at(block, j0), block, j0, keys, vectors);
        multiply(dp, z_tiles.at(block, j0), keys, vectors);
      }
      add_query_totals(level, E::width, keys, vectors,
                       [&](int64_t at) { return load(p.data + at) * load(dp.data + at); });
    });
  }

  // dP becomes dS.
  void make_logit_gradients(const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
    const A* p = p_tiles.at(block, j0).data;
    A* dp = dp_tiles.at(block, j0).data;
    for (int64_t w = 0; w < vectors; ++w) {
      const Vec<A> row_level = load(level + w * lanes<A>());
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * E::width + w * lanes<A>();
        store(dp + at, load(p + at) * (load(dp + at) - row_level));
      }
    }
  }

  // dS becomes g∘dS.
  void through_softcap(const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
    A* ds = dp_tiles.at(block, j0).data;
    const A* tanh_tile = tanh_tiles.at(block, j0).data;
    each_vector<A>(E::width, keys, vectors, [&](int64_t at) {
      const Vec<A> x = load(tanh_tile + at);
      store(ds + at, load(ds + at) * (A(1) - x * x));
    });
  }

  const AttentionBackward& args;
  const AttentionProblem& problem;
  typename E::Keys k, v;
  typename E::Queries q, grad_out;
  Tiles<E> p_tiles, dp_tiles, tanh_tiles, z_tiles;
  typename E::Operand operand;
  Rows<A> dq;
  Softmax<E> softmax;
  A* level;
};

}  // namespace

Status attention_backward(const AttentionBackward& args) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  if (AmxBackwardPass::takes(args)) return amx_backward(args);
#endif
  return for_engine(args.problem, [&](auto t, auto engine) {
    using Pass = BackwardPass<decltype(t), decltype(engine)>;
    const InputGradients& grads = args.grads;
    const bool only_bias = !(grads.q.data || grads.k.data || grads.v.data || grads.key_bias.data);
    return sweep_gradients<Pass>(args, only_bias);
  });
}

}  // namespace GK_LEVEL
}  // namespace genkern
