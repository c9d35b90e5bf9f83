// Attention, forward mode, on AMX: jvp.cpp's pass for calls without softcap, dropout and tangents
// of biases.
//
// As there of a block of queries first P, T and τ for all keys, then two products. Between them P
// waits in bf16, in the pairs that the product with C takes, and T in fp32 as its product left it.
//
// With out and lse P waits as exp(S - shift), as in amx_forward.h, and all is divided by its sum at
// the end. The shift is the maximum over the first keys; where a query sees none of them, or a
// weight comes out above `limit`, the maximum over all is looked for and all is made again.
#pragma once

#include "amx_rows.h"
#include "forward_results.h"
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
        p_pairs(carve.rows<Pair>(p_pairs_rows(problem), E::width)),
        weights(carve.rows<Pair>(span / 2, E::width)),
        two_halves(args.out.data && problem.d != problem.dv),
        residues(carve.rows<Pair>(two_halves ? p_pairs_rows(problem) : 0, E::width)),
        tangent_sum(E::query_sums(carve, problem.dv)),
        out_sum(args.out.data ? E::query_sums(carve, problem.dv) : Rows<A>{}),
        softmax(carve, problem),
        top(carve.array<A>(E::width)),
        sum(carve.array<A>(E::width)),
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
    const A magnitude = Scale<A>(problem.scale).magnitude;
    if (args.out.data) {
      if (!find_top(block, smaller(block.first + amx_part, block.last), queries) ||
          !make_weights(block, queries)) {
        find_top(block, block.last, queries);
        make_weights(block, queries);
      }
      for (int64_t i = 0; i < queries; ++i) tau[i] = sum[i] == 0 ? A(0) : tau[i] / sum[i];
    } else {
      softmax.take(args.rows, block);
      make_all(block, queries);
    }
    for (int64_t i = 0; i < queries; ++i) tau[i] *= magnitude;
    put_numbers(args.lse_tangent, tau, block);
    multiply_values(block, queries, magnitude);
  }

 private:
  static constexpr int64_t span = 4 * E::tile;
  // 2^8 in bf16, as in amx_forward.h.
  static constexpr short limit = 0x4380;

  static int64_t p_pairs_rows(const AttentionProblem& problem) {
    return round_up(problem.M, E::tile) / 2;
  }

  void make_logits(const Block& block, int64_t j0, int64_t keys, int64_t queries) {
    E::score<Into::fresh>(logits, k, j0, keys, q, queries / lanes<A>());
  }

  // The logits' maximum over the keys up to `last`; whether every query sees one of them.
  bool find_top(const Block& block, int64_t last, int64_t queries) {
    for (int64_t i = 0; i < queries; ++i) top[i] = minus_infinity<A>;
    for (int64_t j0 = block.first; j0 < last; j0 += amx_part) {
      const int64_t keys = smaller(amx_part, last - j0);
      make_logits(block, j0, keys, queries);
      finish_logits<T>(problem, logits, nullptr, block, j0, keys, queries / lanes<A>());
      for (int64_t lane = 0; lane < queries; lane += lanes<A>()) {
        Vec<A> most = load(top + lane);
        for (int64_t j = 0; j < keys; ++j) most = max(most, load(logits.row(j) + lane));
        store(top + lane, most);
      }
    }
    bool all = true;
    for (int64_t i = 0; i < block.queries; ++i) all = all && top[i] != minus_infinity<A>;
    return all;
  }

  // exp(S - top) of all keys, their sum, T and its part of τ; whether all are below the limit.
  bool make_weights(const Block& block, int64_t queries) {
    softmax.take_shift(top, queries);
    for (int64_t i = 0; i < queries; ++i) sum[i] = 0;
    return make_all(block, queries);
  }

  bool make_all(const Block& block, int64_t queries) {
    for (int64_t i = 0; i < queries; ++i) tau[i] = 0;
    Bits512 largest{};
    for (int64_t j0 = block.first; j0 < block.last; j0 += amx_part) {
      const int64_t keys = smaller(amx_part, block.last - j0);
      const Bits512 of_part = two_halves ? make_part<true>(block, j0, keys, queries)
                                         : make_part<false>(block, j0, keys, queries);
      largest = _mm512_max_epu16(largest, of_part);
    }
    return !_mm512_cmpgt_epu16_mask(largest, _mm512_set1_epi16(limit));
  }

  // P in pairs, T without the magnitude of the scale, and their part of τ. The largest of P.
  template <bool two>
  Bits512 make_part(const Block& block, int64_t j0, int64_t keys, int64_t queries) {
    constexpr int L = lanes<A>();
    const int64_t at = j0 - block.first, vectors = queries / L;
    const Rows<A> here = t.from(at);
    make_logits(block, j0, keys, queries);
    if (tangents.has_q()) E::score<Into::fresh>(here, k, j0, keys, tangents.q, vectors);
    if (tangents.has_k() && tangents.has_q())
      E::score<Into::sum>(here, tangents.k, j0, keys, q, vectors);
    if (tangents.has_k() && !tangents.has_q())
      E::score<Into::fresh>(here, tangents.k, j0, keys, q, vectors);
    finish_part(problem, logits, here, block, j0, keys, vectors);
    Bits512 largest{};
    for (int64_t lane = 0; lane < queries; lane += L) {
      const RowsOfSoftmax row = softmax.row(lane);
      Vec<A> sums[2] = {}, tau_sums[2] = {};
      for (int64_t j = 0; j < amx_part; j += 2) {
        const Vec<A> even = row.weight(load(logits.row(j) + lane));
        const Vec<A> odd = row.weight(load(logits.row(j + 1) + lane));
        sums[0] += even;
        sums[1] += odd;
        tau_sums[0] += even * load(here.row(j) + lane);
        tau_sums[1] += odd * load(here.row(j + 1) + lane);
        const Bits512 pairs = round_pair(even, odd);
        largest = _mm512_max_epu16(largest, pairs);
        store_bits(p_pairs.row((at + j) / 2) + lane, pairs);
        if (two)
          store_bits(residues.row((at + j) / 2) + lane,
                     round_pair(even - even_of(pairs), odd - odd_of(pairs)));
      }
      store(sum + lane, load(sum + lane) + (sums[0] + sums[1]));
      store(tau + lane, load(tau + lane) + (tau_sums[0] + tau_sums[1]));
    }
    return largest;
  }

  static Vec<A> even_of(Bits512 pairs) { return bit_cast<Vec<A>>(_mm512_slli_epi32(pairs, 16)); }
  static Vec<A> odd_of(Bits512 pairs) {
    return bit_cast<Vec<A>>(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  }

  void multiply_values(const Block& block, int64_t queries, A magnitude) {
    E::clear_query_sums(tangent_sum, problem.dv);
    if (args.out.data) E::clear_query_sums(out_sum, problem.dv);
    const int64_t panel = E::tile * round_up(problem.dv, tile_rows);
    for (int64_t j0 = block.first; j0 < block.last; j0 += span) {
      const int64_t keys = smaller(span, block.last - j0), at = j0 - block.first;
      const auto add = [&](Rows<A> to, const E::Keys& values, Rows<Pair> pairs) {
        tile_product<Into::sum>(to, constant(values.panel(j0)), constant(pairs), problem.dv,
                                queries, keys, E::tile, panel);
      };
      weigh(at, keys, queries, magnitude);
      add(tangent_sum, v, weights);
      if (tangents.has_v()) add(tangent_sum, tangents.v, p_pairs.from(at / 2));
      if (args.out.data) add(out_sum, v, p_pairs.from(at / 2));
      if (two_halves) add(out_sum, v, residues.from(at / 2));
    }
    if (args.out.data)
      write_forward<T>({problem, args.out, {}, args.lse}, block, out_sum, top, sum);
    else
      for (int64_t i = 0; i < block.queries; ++i) sum[i] = 1;
    const Rows<T> to = query_rows<T>(args.out_tangent, block.sequence, block.head);
    unpack_transposed<T, A>(to.from(block.i0), constant(tangent_sum), block.queries, problem.dv,
                            sum);
  }

  // P∘(T - τ) in pairs.
  void weigh(int64_t at, int64_t keys, int64_t queries, A magnitude) {
    for (int64_t lane = 0; lane < queries; lane += lanes<A>()) {
      const Vec<A> mean = load(tau + lane);
      for (int64_t j = 0; j < round_up(keys, amx_part); j += 2) {
        const Bits512 p = load_bits(p_pairs.row((at + j) / 2) + lane);
        const Vec<A> even_t = load(t.row(at + j) + lane) * magnitude - mean;
        const Vec<A> odd_t = load(t.row(at + j + 1) + lane) * magnitude - mean;
        store_bits(weights.row(j / 2) + lane, round_pair(even_of(p) * even_t, odd_of(p) * odd_t));
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
  const bool two_halves;  // whether a weight of out is two numbers of bf16
  Rows<Pair> residues;
  Rows<A> tangent_sum, out_sum;
  AmxSoftmax softmax;
  A *top, *sum, *tau;
};

}  // namespace GK_LEVEL
}  // namespace genkern
