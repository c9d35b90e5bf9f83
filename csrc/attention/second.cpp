// Attention, second order: the gradients of ⟨backward(x, dO, λ), (A, B, C, β, κ)⟩.
//
//   P, dP, δ, dS, g as in backward.cpp      T, T_X as in tangents.h      U = Z∘(dO·Cᵀ)
//   τ = rowsum(P∘T)     E = (T - τ)∘(dP - δ + λ) + U      W = P∘(E - rowsum(P∘E))
//   h = -2·g·tanh(X/softcap)/softcap, or 0        W_X = g∘W + h∘dS∘T_X       dS_X = g∘dS
//
//   q' = scale·(dS_X·B + W_X·k)     k' = scale·(dS_Xᵀ·A + W_Xᵀ·q)     v' = (Z∘P∘(T - τ))ᵀ·dO
//   dO' = (Z∘P)·C + (Z∘P∘(T - τ))·v       λ' = τ       bias' = W, summed
//
// Vocabulary: operands.h, softmax.h, tangents.h, sweep.h. Of a block of queries first the tiles P,
// dP, T, U and their sums for all keys (five products), then the seven products with them. Centred
// by τ and δ, no digits go where keys have a mean.
#include "bias_gradient.h"
#include "tangents.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

template <class T, class Chosen>
class SecondPass {
 public:
  using Storage = T;
  using E = Chosen;
  using A = Acc<T>;

  SecondPass(const AttentionSecond& args, Carver& carve)
      : args(args),
        problem(args.problem),
        k(carve, problem.M, problem.d, in_score | in_to_queries),
        v(carve, problem.M, problem.dv, in_score | in_to_queries),
        q(carve, problem.d, in_score | in_to_keys),
        grad_out(carve, problem.dv, in_score | in_to_keys),
        tangents(problem, args.tangents, carve, in_score | in_to_queries, in_score | in_to_queries,
                 in_score | in_to_keys),
        p_tiles(carve, problem.M),
        dp_tiles(carve, problem.M),
        t_tiles(carve, problem.M),
        e_tiles(carve, problem.M),
        tanh_tiles(problem.softcap > 0 ? Tiles<E>(carve, problem.M) : Tiles<E>()),
        tx_tiles(problem.softcap > 0 ? Tiles<E>(carve, problem.M) : Tiles<E>()),
        z_tiles(problem.dropout > 0 ? Tiles<E>(carve, problem.M) : Tiles<E>()),
        operand(carve),
        q_sum(E::query_sums(carve, problem.d)),
        out_sum(E::query_sums(carve, problem.dv)),
        softmax(carve),
        level(carve.array<A>(E::width)),
        tau(carve.array<A>(E::width)),
        rho(carve.array<A>(E::width)),
        factor(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
    tangents.enter(sequence, kv_head);
  }

  void run(const Block& block, const KeySums<T, E>& sums) {
    const int64_t vectors = vectors_for<A>(block.queries);
    take_rows(block, vectors);
    put_numbers(args.out_grad_lse, tau, block);
    E::clear_query_sums(q_sum, problem.d);
    E::clear_query_sums(out_sum, problem.dv);
    const bool writes_bias = is_of_one_source(problem, args.grads.bias);
    const BiasGradient<A> bias(args.grads.bias, block.sequence.batch, block.head);
    if (writes_bias) bias.clear(block.i0, block.queries, problem.M);
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), pt = t_tiles.at(block, j0);
      const Rows<A> w = e_tiles.at(block, j0);
      const bool ready =
          writes_bias || args.grads.key_bias.data || problem.softcap > 0 || problem.dropout > 0;
      if (ready) make_weights(block, j0, keys, vectors);
      if (writes_bias) bias.add(w, block, j0, keys, vectors);
      if (args.grads.key_bias.data) add_key_totals(sums.key_bias + j0, w, keys, vectors);
      if (problem.softcap > 0) through_softcap(block, j0, keys, vectors);
      if (problem.dropout > 0) {
        multiply(p, z_tiles.at(block, j0), keys, vectors);
        multiply(pt, z_tiles.at(block, j0), keys, vectors);
      }
      multiply_out(block, sums, j0, keys, vectors, ready);
    });
    write(args.grads.q, q_sum, problem.d, A(problem.scale), block);
    write(args.out_grad_out, out_sum, problem.dv, A(1), block);
  }

  void run_for_bias(const Block& block, const BiasGradient<A>& gradient) {
    const int64_t vectors = vectors_for<A>(block.queries);
    take_rows(block, vectors);
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      make_weights(block, j0, keys, vectors);
      gradient.add(e_tiles.at(block, j0), block, j0, keys, vectors);
    });
  }

 private:
  // P, dP, T and E of all keys; level = δ - λ; τ; ρ = rowsum(P∘E).
  void take_rows(const Block& block, int64_t vectors) {
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    const Rows<T> grad_rows = query_rows<T>(args.grad_out, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    grad_out.take(constant(grad_rows.from(block.i0)), block.queries, A(1));
    tangents.take(block);
    softmax.take(args.rows, block, vectors);
    take_numbers(level, args.grad_lse, block, vectors);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i) {
      level[i] = -level[i];
      tau[i] = rho[i] = 0;
    }
    each_tile<E>(block, [&](int64_t j0, int64_t keys) {
      const Rows<A> p = p_tiles.at(block, j0), dp = dp_tiles.at(block, j0);
      const Rows<A> t = t_tiles.at(block, j0), u = e_tiles.at(block, j0);
      A* tanh_tile = problem.softcap > 0 ? tanh_tiles.at(block, j0).data : nullptr;
      A* tx_tile = problem.softcap > 0 ? tx_tiles.at(block, j0).data : nullptr;
      E::template score<Into::fresh>(p, k, j0, keys, q, vectors);
      E::template score<Into::fresh>(dp, v, j0, keys, grad_out, vectors);
      if (tangents.has_v())
        E::template score<Into::fresh>(u, tangents.v, j0, keys, grad_out, vectors);
      else
        clear(u, keys);
      finish_logits<T>(problem, p, tanh_tile, block, j0, keys, vectors);
      softmax.apply(p, exponent_factor<A>(problem), keys, vectors);
      tangents.logits(t, tanh_tile, tx_tile, k, q, block, j0, keys, vectors);
      if (problem.dropout > 0) {
        const Rows<A> z = z_tiles.at(block, j0);
        dropout_tile(problem, z, block, j0, keys, vectors);
        multiply(dp, z, keys, vectors);
        multiply(u, z, keys, vectors);
      }
      add_query_totals(level, E::width, keys, vectors,
                       [&](int64_t at) { return load(p.data + at) * load(dp.data + at); });
      add_query_totals(tau, E::width, keys, vectors,
                       [&](int64_t at) { return load(p.data + at) * load(t.data + at); });
    });
    each_tile<E>(block, [&](int64_t j0, int64_t keys) { center(block, j0, keys, vectors); });
  }

  // dP becomes dP - level, T becomes T - τ, U becomes E; ρ grows.
  void center(const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
    const Rows<A> p = p_tiles.at(block, j0), dp = dp_tiles.at(block, j0);
    const Rows<A> t = t_tiles.at(block, j0), u = e_tiles.at(block, j0);
    for (int64_t w = 0; w < vectors; ++w) {
      const int64_t lane = w * lanes<A>();
      const Vec<A> row_level = load(level + lane), row_tau = load(tau + lane);
      const Vec<A> total = sum_over_keys<A>(keys, [&](int64_t j) {
        const int64_t at = j * E::width + lane;
        const Vec<A> centred_dp = load(dp.data + at) - row_level;
        const Vec<A> centred_t = load(t.data + at) - row_tau;
        const Vec<A> e = centred_t * centred_dp + load(u.data + at);
        store(dp.data + at, centred_dp);
        store(t.data + at, centred_t);
        store(u.data + at, e);
        return load(p.data + at) * e;
      });
      store(rho + lane, load(rho + lane) + total);
    }
  }

  // dP - level becomes dS, T - τ becomes P∘(T - τ), E becomes W.
  void make_weights(const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
    const A* p = p_tiles.at(block, j0).data;
    A *dp = dp_tiles.at(block, j0).data, *t = t_tiles.at(block, j0).data;
    A* e = e_tiles.at(block, j0).data;
    for (int64_t w = 0; w < vectors; ++w) {
      const Vec<A> row_rho = load(rho + w * lanes<A>());
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = j * E::width + w * lanes<A>();
        const Vec<A> weight = load(p + at);
        store(dp + at, weight * load(dp + at));
        store(t + at, weight * load(t + at));
        store(e + at, weight * (load(e + at) - row_rho));
      }
    }
  }

  // dS becomes dS_X, W becomes W_X.
  void through_softcap(const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
    A *ds = dp_tiles.at(block, j0).data, *w = e_tiles.at(block, j0).data;
    const A* tanh_tile = tanh_tiles.at(block, j0).data;
    const A* tx = tx_tiles.at(block, j0).data;
    const A twice = A(-2 / problem.softcap);
    each_vector<A>(E::width, keys, vectors, [&](int64_t at) {
      const Vec<A> x = load(tanh_tile + at), slope = A(1) - x * x;
      const Vec<A> through = load(ds + at) * slope;
      store(ds + at, through);
      store(w + at, load(w + at) * slope + through * x * twice * load(tx + at));
    });
  }

  // The operand becomes P∘(factor - level), or the tile of factors as it is.
  void take_weighted(Rows<A> factors, const A* row_level, const Block& block, int64_t j0,
                     int64_t keys, bool as_it_is) {
    constexpr int uses = in_to_queries | in_to_keys;
    if (as_it_is) {
      operand.take(factors, keys, block.queries, uses);
      return;
    }
    const A* p = p_tiles.at(block, j0).data;
    for (int64_t lane = 0; lane < block.queries; lane += lanes<A>()) {
      const Vec<A> here = row_level ? load(row_level + lane) : Vec<A>{};
      operand.fill(factors, keys, block.queries, lane, uses, [&](int64_t at, int) {
        return load(p + at) * (load(factors.data + at) - here);
      });
    }
  }

  // `ready`: make_weights has been here.
  void multiply_out(const Block& block, const KeySums<T, E>& sums, int64_t j0, int64_t keys,
                    int64_t vectors, bool ready) {
    const InputGradients& grads = args.grads;
    const Rows<A> p = p_tiles.at(block, j0), ds = dp_tiles.at(block, j0);
    const Rows<A> pt = t_tiles.at(block, j0), w = e_tiles.at(block, j0);
    if (grads.q.data || grads.k.data) {
      take_weighted(w, rho, block, j0, keys, ready);
      if (grads.q.data) E::to_queries(q_sum, k, j0, keys, operand, vectors);
      if (grads.k.data) E::to_keys(sums.k, j0, keys, operand, q, block.queries);
    }
    if ((grads.q.data && tangents.has_k()) || (grads.k.data && tangents.has_q())) {
      take_weighted(ds, nullptr, block, j0, keys, ready);
      if (grads.q.data && tangents.has_k())
        E::to_queries(q_sum, tangents.k, j0, keys, operand, vectors);
      if (grads.k.data && tangents.has_q())
        E::to_keys(sums.k, j0, keys, operand, tangents.q, block.queries);
    }
    if (grads.v.data || args.out_grad_out.data) {
      take_weighted(pt, nullptr, block, j0, keys, ready);
      if (args.out_grad_out.data) E::to_queries(out_sum, v, j0, keys, operand, vectors);
      if (grads.v.data) E::to_keys(sums.v, j0, keys, operand, grad_out, block.queries);
    }
    if (args.out_grad_out.data && tangents.has_v()) {
      operand.take(p, keys, block.queries, in_to_queries);
      E::to_queries(out_sum, tangents.v, j0, keys, operand, vectors);
    }
  }

  void write(const Heads& tensor, Rows<A> sums, int64_t columns, A times, const Block& block) {
    if (!tensor.data) return;
    const Rows<T> to = query_rows<T>(tensor, block.sequence, block.head);
    for (int64_t i = 0; i < block.queries; ++i) factor[i] = times;
    unpack_transposed<T, A>(to.from(block.i0), constant(sums), block.queries, columns, factor);
  }

  const AttentionSecond& args;
  const AttentionProblem& problem;
  typename E::Keys k, v;
  typename E::Queries q, grad_out;
  TangentOperands<T, E> tangents;
  Tiles<E> p_tiles, dp_tiles, t_tiles, e_tiles, tanh_tiles, tx_tiles, z_tiles;
  typename E::Operand operand;
  Rows<A> q_sum, out_sum;
  Softmax<E> softmax;
  A *level, *tau, *rho, *factor;
};

}  // namespace

Status attention_second(const AttentionSecond& args) {
  return for_engine(args.problem, [&](auto t, auto engine) {
    return sweep_gradients<SecondPass<decltype(t), decltype(engine)>>(args, false);
  });
}

}  // namespace GK_LEVEL
}  // namespace genkern
