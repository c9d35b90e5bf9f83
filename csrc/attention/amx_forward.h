// Attention, forward, on AMX: forward.cpp's pass for all calls without dropout.
//
// Numbers of a pair of query and key cost far more than its share of the products here, so this
// pass saves on them and on memory. Logits of a tile of keys become weights P = exp(S - shift) at
// once, in bf16 and in pairs of keys; `span` keys of them wait for one product Oᵀ += Vᵀ·Pᵀ, so that
// Oᵀ is loaded, stored and scaled seldom. The shift is the first tile's maximum, and is raised only
// where a weight comes out above `limit`: that is seen from the weights, which are cheaper to look
// through than the logits.
//
// Where v is wider or narrower than k (SAGAN's blocks) a weight is the sum of two numbers of bf16,
// and Oᵀ two products: SDPA computes these calls in fp32, and its error is the output's rounding.
#pragma once

#include "forward_results.h"

namespace genkern {
namespace GK_LEVEL {

class AmxForwardPass {
 public:
  using E = AmxEngine;
  using T = BFloat16;
  using A = float;
  static constexpr int64_t span = 4 * E::tile;

  AmxForwardPass(const AttentionForward& args, Carver& carve)
      : args(args),
        problem(args.problem),
        factor(exponent_factor<A>(problem)),
        k(carve, problem.M, problem.d, in_score),
        v(carve, problem.M, problem.dv, in_to_queries),
        q(carve, problem.d, in_score),
        s(carve.rows<A>(E::tile, E::width)),
        weights(carve.rows<Pair>(span / 2, E::width)),
        two_halves(problem.d != problem.dv),
        residues(carve.rows<Pair>(two_halves ? span / 2 : 0, E::width)),
        out_sum(E::query_sums(carve, problem.dv)),
        top(carve.array<A>(E::width)),
        sum(carve.array<A>(E::width)),
        tile_sum(carve.array<A>(E::width)),
        shrink(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
  }

  void run(const Block& block) {
    const int64_t vectors = round_up(vectors_for<A>(block.queries), 2);
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i) {
      top[i] = minus_infinity<A>;
      sum[i] = 0;
    }
    waiting = 0;
    waiting_from = block.first;
    added = false;
    bool all_have_seen = false;
    for (int64_t j0 = block.first; j0 < block.last; j0 += E::tile) {
      const int64_t keys = smaller(E::tile, block.last - j0);
      E::template score<Into::fresh>(s, k, j0, keys, q, vectors);
      finish_logits<T>(problem, s, nullptr, block, j0, keys, vectors);
      if (!all_have_seen) all_have_seen = raise(keys, vectors, block.queries);
      if (weigh(keys, vectors) == Weights::too_large) {
        raise(keys, vectors, block.queries);
        weigh(keys, vectors);
      }
      for (int64_t i = 0; i < vectors * lanes<A>(); ++i) sum[i] += tile_sum[i];
      waiting += keys;
      if (waiting == span) add_waiting(vectors);
    }
    add_waiting(vectors);
    if (!added) E::clear_query_sums(out_sum, problem.dv);
    write_forward<T>(args, block, out_sum, top, sum);
  }

 private:
  enum class Weights { fine, too_large };

  // 2^8 in bf16: above it the weights' sums would soon lose the room that fp32 leaves them.
  static constexpr short limit = 0x4380;

  // Oᵀ += Vᵀ·Pᵀ for the weights that wait.
  void add_waiting(int64_t vectors) {
    if (waiting == 0) return;
    const auto product = added ? tile_product<Into::sum> : tile_product<Into::fresh>;
    product(out_sum, constant(v.panel(waiting_from)), constant(weights), problem.dv, vectors * 16,
            waiting, E::tile, E::tile * out_rows());
    if (two_halves)
      tile_product<Into::sum>(out_sum, constant(v.panel(waiting_from)), constant(residues),
                              problem.dv, vectors * 16, waiting, E::tile, E::tile * out_rows());
    added = true;
    waiting_from += waiting;
    waiting = 0;
  }
  int64_t out_rows() const { return round_up(problem.dv, tile_rows); }

  // The shift rises to the maximum of the tile, all sums shrink to it. Whether every query has seen
  // a key by now.
  bool raise(int64_t keys, int64_t vectors, int64_t queries) {
    add_waiting(vectors);
    bool all = true;
    for (int64_t w = 0; w < vectors; ++w) {
      const A* at = s.data + w * lanes<A>();
      const Vec<A> old_top = load(top + w * lanes<A>());
      Vec<A> new_top = old_top;
      for (int64_t j = 0; j < keys; ++j) new_top = max(new_top, load(at + j * E::width));
      const auto nothing = new_top == minus_infinity<A>;
      const Vec<A> shift = select(nothing, Vec<A>{}, new_top);
      const Vec<A> less = E::exponential(old_top - shift, factor);
      store(top + w * lanes<A>(), new_top);
      store(shrink + w * lanes<A>(), less);
      store(sum + w * lanes<A>(), load(sum + w * lanes<A>()) * less);
      for (int64_t l = 0; l < smaller(lanes<A>(), queries - w * lanes<A>()); ++l)
        all = all && !nothing[l];
    }
    if (added)
      for (int64_t e = 0; e < problem.dv; ++e)
        for (int64_t w = 0; w < vectors; ++w) {
          A* o = out_sum.row(e) + w * lanes<A>();
          store(o, load(o) * load(shrink + w * lanes<A>()));
        }
    return all;
  }

  Weights weigh(int64_t keys, int64_t vectors) {
    return two_halves ? weigh_as<true>(keys, vectors) : weigh_as<false>(keys, vectors);
  }

  // A pair of weights in bf16, and what the rounding left of them.
  template <bool two>
  Bits512 put(int64_t row, int64_t lane, Vec<A> even, Vec<A> odd) {
    const Bits512 pairs = round_pair(even, odd);
    store_bits(weights.row(row) + lane, pairs);
    if (two) {
      const Bits512 upper = _mm512_set1_epi32(int(0xffff0000));
      const Vec<A> even_half = bit_cast<Vec<A>>(_mm512_slli_epi32(pairs, 16));
      const Vec<A> odd_half = bit_cast<Vec<A>>(_mm512_and_si512(pairs, upper));
      store_bits(residues.row(row) + lane, round_pair(even - even_half, odd - odd_half));
    }
    return pairs;
  }

  // The tile's weights join those that wait, their sums are tile_sum.
  template <bool two>
  Weights weigh_as(int64_t keys, int64_t vectors) {
    Bits512 largest{};
    const A exponent = factor * 1.44269504f;
    for (int64_t w = 0; w < vectors; ++w) {
      const int64_t lane = w * lanes<A>();
      const Vec<A> raw = load(top + lane);
      const Vec<A> shift = select(raw == minus_infinity<A>, Vec<A>{}, raw);
      const A* at = s.data + lane;
      Vec<A> even_sum{}, odd_sum{};
      int64_t j = 0;
      for (; j + 2 <= keys; j += 2, at += 2 * E::width) {
        const Vec<A> even = power((load(at) - shift) * exponent);
        const Vec<A> odd = power((load(at + E::width) - shift) * exponent);
        even_sum += even;
        odd_sum += odd;
        largest = _mm512_max_epu16(largest, put<two>(waiting / 2 + j / 2, lane, even, odd));
      }
      if (j < keys) {
        const Vec<A> even = power((load(at) - shift) * exponent);
        even_sum += even;
        largest = _mm512_max_epu16(largest, put<two>(waiting / 2 + j / 2, lane, even, Vec<A>{}));
        j += 2;
      }
      for (const int64_t whole = round_up(keys, tile_depth); j < whole; j += 2)
        put<two>(waiting / 2 + j / 2, lane, Vec<A>{}, Vec<A>{});
      store(tile_sum + lane, even_sum + odd_sum);
    }
    return _mm512_cmpgt_epu16_mask(largest, _mm512_set1_epi16(limit)) ? Weights::too_large
                                                                      : Weights::fine;
  }

  const AttentionForward& args;
  const AttentionProblem& problem;
  const A factor;
  E::Keys k, v;
  E::Queries q;
  Rows<A> s;
  Rows<Pair> weights;
  const bool two_halves;  // whether a weight is two numbers of bf16
  Rows<Pair> residues;
  Rows<A> out_sum;
  A *top, *sum, *tile_sum, *shrink;
  int64_t waiting, waiting_from;  // keys whose weights wait, and the first of them
  bool added;                     // whether out_sum holds anything
};

}  // namespace GK_LEVEL
}  // namespace genkern
