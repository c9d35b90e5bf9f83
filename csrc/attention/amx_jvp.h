// Attention, forward mode, on AMX: jvp.cpp's pass for calls without softcap, dropout and tangents
// of biases.
//
// As there of a block of queries first P, T and τ for all keys, then two products. Between them P
// waits in bf16, in the pairs that the product with C takes, and T in fp32 as its product left it.
#pragma once

#include "amx_rows.h"
#include "tangents.h"

namespace genkern {
namespace GK_LEVEL {

class AmxJvpPass {
 public:
  using E = AmxEngine;
  using T = BFloat16;
  using A = float;

  static bool takes(const AttentionJvp& args) {
    const AttentionProblem& problem = args.problem;
    const Tangents& tangents = args.tangents;
    return problem.dtype == DType::bf16 && problem.softcap == 0 && problem.dropout == 0 &&
           !tangents.bias.data && !tangents.key_bias.data && args.out_tangent.data &&
           (tangents.q.data || tangents.k.data);
  }

  AmxJvpPass(const AttentionJvp& args, Carver& carve)
      : args(args),
        problem(args.problem),
        k(carve, problem.M, problem.d, in_score),
        v(carve, problem.M, problem.dv, in_to_queries),
        q(carve, problem.d, in_score),
        tangents(problem, args.tangents, carve, in_score, in_to_queries, in_score),
        logits(carve.rows<A>(amx_part, E::width)),
        t(carve.rows<A>(round_up(problem.M, E::tile), E::width)),
        p_pairs(carve.rows<Pair>(round_up(problem.M, E::tile) / 2, E::width)),
        weights(carve.rows<Pair>(span / 2, E::width)),
        out_sum(E::query_sums(carve, problem.dv)),
        softmax(carve, problem),
        tau(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
    tangents.enter(sequence, kv_head);
  }

  void run(const Block& block) {
    const int64_t queries = round_up(block.queries, amx_pack);
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    tangents.take(block);
    softmax.take(args.rows, block);
    for (int64_t i = 0; i < queries; ++i) tau[i] = 0;
    for (int64_t j0 = block.first; j0 < block.last; j0 += amx_part)
      make_part(block, j0, smaller(amx_part, block.last - j0), queries);
    const A magnitude = Scale<A>(problem.scale).magnitude;
    for (int64_t i = 0; i < queries; ++i) tau[i] *= magnitude;
    put_numbers(args.lse_tangent, tau, block);

    E::clear_query_sums(out_sum, problem.dv);
    const int64_t panel = E::tile * round_up(problem.dv, tile_rows);
    for (int64_t j0 = block.first; j0 < block.last; j0 += span) {
      const int64_t keys = smaller(span, block.last - j0), at = j0 - block.first;
      weigh(at, keys, queries, magnitude);
      tile_product<Into::sum>(out_sum, constant(v.panel(j0)), constant(weights), problem.dv,
                              queries, keys, E::tile, panel);
      if (tangents.has_v())
        tile_product<Into::sum>(out_sum, constant(tangents.v.panel(j0)),
                                constant(p_pairs.from(at / 2)), problem.dv, queries, keys, E::tile,
                                panel);
    }
    const Rows<T> to = query_rows<T>(args.out_tangent, block.sequence, block.head);
    for (int64_t i = 0; i < block.queries; ++i) tau[i] = 1;
    unpack_transposed<T, A>(to.from(block.i0), constant(out_sum), block.queries, problem.dv, tau);
  }

 private:
  static constexpr int64_t span = 4 * E::tile;

  // P in pairs, T without the magnitude of the scale, and their part of τ.
  void make_part(const Block& block, int64_t j0, int64_t keys, int64_t queries) {
    constexpr int L = lanes<A>();
    const int64_t at = j0 - block.first, vectors = queries / L;
    const Rows<A> here = t.from(at);
    E::score<Into::fresh>(logits, k, j0, keys, q, vectors);
    if (tangents.has_q()) E::score<Into::fresh>(here, k, j0, keys, tangents.q, vectors);
    if (tangents.has_k() && tangents.has_q())
      E::score<Into::sum>(here, tangents.k, j0, keys, q, vectors);
    if (tangents.has_k() && !tangents.has_q())
      E::score<Into::fresh>(here, tangents.k, j0, keys, q, vectors);
    finish_part(problem, logits, here, block, j0, keys, vectors);
    for (int64_t lane = 0; lane < queries; lane += L) {
      const RowsOfSoftmax row = softmax.row(lane);
      Vec<A> even_sum{}, odd_sum{};
      for (int64_t j = 0; j < amx_part; j += 2) {
        const Vec<A> even = row.weight(load(logits.row(j) + lane));
        const Vec<A> odd = row.weight(load(logits.row(j + 1) + lane));
        even_sum += even * load(here.row(j) + lane);
        odd_sum += odd * load(here.row(j + 1) + lane);
        store_bits(p_pairs.row((at + j) / 2) + lane, round_pair(even, odd));
      }
      store(tau + lane, load(tau + lane) + (even_sum + odd_sum));
    }
  }

  // P∘(T - τ) in pairs.
  void weigh(int64_t at, int64_t keys, int64_t queries, A magnitude) {
    const Bits512 upper = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t lane = 0; lane < queries; lane += lanes<A>()) {
      const Vec<A> mean = load(tau + lane);
      for (int64_t j = 0; j < round_up(keys, amx_part); j += 2) {
        const Bits512 p = load_bits(p_pairs.row((at + j) / 2) + lane);
        const Vec<A> even = bit_cast<Vec<A>>(_mm512_slli_epi32(p, 16));
        const Vec<A> odd = bit_cast<Vec<A>>(_mm512_and_si512(p, upper));
        const Vec<A> even_t = load(t.row(at + j) + lane) * magnitude - mean;
        const Vec<A> odd_t = load(t.row(at + j + 1) + lane) * magnitude - mean;
        store_bits(weights.row(j / 2) + lane, round_pair(even * even_t, odd * odd_t));
      }
    }
  }

  const AttentionJvp& args;
  const AttentionProblem& problem;
  E::Keys k, v;
  E::Queries q;
  TangentOperands<T, E> tangents;
  Rows<A> logits, t;
  Rows<Pair> p_pairs, weights;
  Rows<A> out_sum;
  AmxSoftmax softmax;
  A* tau;
};

}  // namespace GK_LEVEL
}  // namespace genkern
