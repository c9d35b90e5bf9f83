// Attention, backward, on AMX: backward.cpp's pass for calls without softcap, dropout and gradients
// of biases.
//
// δ of a query is a sum over all keys and must be known before the products with dS begin. Instead
// of keeping P and dP of all keys in between, this pass makes them twice: what is kept would leave
// the second cache where rows are long, and making it costs two products. Seven products, then:
//
//   for every block of queries    δ = Σ P∘dP over its keys
//   for every span of keys        for every block of queries, tile by tile of the span: P and
//                                 dS = P∘(dP - δ), rounded; dV += Pᵀ·dO, dK += dSᵀ·Q, dQᵀ += Kᵀ·dSᵀ
//
// so that a span's K, V, dK and dV stay in the second cache for all queries of a task; dQ of the
// task's blocks waits in scratch.
#pragma once

#include "amx_rows.h"
#include "sweep.h"

namespace genkern {
namespace GK_LEVEL {

class AmxBackwardPass {
 public:
  using Storage = BFloat16;
  using E = AmxEngine;
  using T = BFloat16;
  using A = float;

  static bool takes(const AttentionBackward& args) {
    const AttentionProblem& problem = args.problem;
    return problem.dtype == DType::bf16 && problem.softcap == 0 && problem.dropout == 0 &&
           !args.grads.bias.data && !args.grads.key_bias.data;
  }

  AmxBackwardPass(const AttentionBackward& args, Carver& carve)
      : args(args),
        problem(args.problem),
        most_blocks(blocks_of_task<E>(args.problem)),
        k(carve, problem.M, problem.d, in_score | in_to_queries),
        v(carve, problem.M, problem.dv, in_score),
        q(carve, problem.d, in_score | in_to_keys),
        grad_out(carve, problem.dv, in_score | in_to_keys),
        logits(carve.rows<A>(amx_part, E::width)),
        dp(carve.rows<A>(amx_part, E::width)),
        p_rows(carve.rows<T>(E::tile, E::width)),
        ds_rows(carve.rows<T>(E::tile, E::width)),
        ds_pairs(carve.rows<Pair>(waiting_keys / 2, E::width)),
        softmax(carve, problem),
        level(carve.array<A>(E::width)),
        ones(carve.array<A>(E::width)),
        levels(carve.rows<A>(most_blocks, E::width)),
        dq_rows(round_up(problem.d, tile_rows)),
        all_dq(carve.rows<A>(most_blocks * dq_rows, E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    keys_of_sequence = sequence.keys;
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
  }

  // `each` runs its argument for all blocks of a task, always in one order.
  template <class Each>
  void run_task(const Each& each, const KeySums<T>& sums) {
    int64_t nth = 0;
    if (keys_of_sequence <= span) {
      each([&](const Block& block) {
        take(block);
        take_level(block);
        clear(dq_of(0), dq_rows);
        multiply(block, block.first, block.last, dq_of(0), sums);
        write(block, dq_of(0));
      });
      return;
    }
    each([&](const Block& block) {
      take(block);
      take_level(block);
      memcpy(levels.row(nth), level, E::width * sizeof(A));
      clear(dq_of(nth++), dq_rows);
    });
    for (int64_t j0 = 0; j0 < keys_of_sequence; j0 += span) {
      nth = 0;
      each([&](const Block& block) {
        const int64_t first = larger(block.first, j0), last = smaller(block.last, j0 + span);
        if (first < last) {
          take(block);
          memcpy(level, levels.row(nth), E::width * sizeof(A));
          multiply(block, first, last, dq_of(nth), sums);
        }
        ++nth;
      });
    }
    nth = 0;
    each([&](const Block& block) { write(block, dq_of(nth++)); });
  }

 private:
  static constexpr int64_t span = 1024;
  static constexpr int64_t waiting_keys = 256;

  Rows<A> dq_of(int64_t nth) const { return all_dq.from(nth * dq_rows); }

  static int64_t packs(const Block& block) { return ceil_div(block.queries, amx_pack); }

  void take(const Block& block) {
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    const Rows<T> grad_rows = query_rows<T>(args.grad_out, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    grad_out.take(constant(grad_rows.from(block.i0)), block.queries, A(1));
    softmax.take(args.rows, block);
  }

  // Logits and dP of keys j0 …; those of keys up to `amx_part` that there are not are hidden.
  void make_part(const Block& block, int64_t j0, int64_t keys) {
    const int64_t vectors = 2 * packs(block);
    E::score<Into::fresh>(logits, k, j0, keys, q, vectors);
    E::score<Into::fresh>(dp, v, j0, keys, grad_out, vectors);
    finish_part(problem, logits, dp, block, j0, keys, vectors);
  }

  // level = δ - λ.
  void take_level(const Block& block) {
    take_numbers(level, args.grad_lse, block, 2 * packs(block));
    for (int64_t i = 0; i < packs(block) * amx_pack; ++i) level[i] = -level[i];
    for (int64_t j0 = block.first; j0 < block.last; j0 += amx_part) {
      make_part(block, j0, smaller(amx_part, block.last - j0));
      for (int64_t lane = 0; lane < packs(block) * amx_pack; lane += lanes<A>()) {
        const RowsOfSoftmax row = softmax.row(lane);
        const A *s = logits.data + lane, *d = dp.data + lane;
        Vec<A> even{}, odd{};
        for (int64_t j = 0; j < amx_part; j += 2, s += 2 * E::width, d += 2 * E::width) {
          even += row.weight(load(s)) * load(d);
          odd += row.weight(load(s + E::width)) * load(d + E::width);
        }
        store(level + lane, load(level + lane) + (even + odd));
      }
    }
  }

  // P and dS of the part, from key `at` of the tile's rows and `waiting` of the pairs on.
  void round_part(const Block& block, int64_t at, int64_t waiting) {
    constexpr int L = lanes<A>();
    for (int64_t lane = 0; lane < packs(block) * amx_pack; lane += amx_pack) {
      const RowsOfSoftmax low_row = softmax.row(lane), high_row = softmax.row(lane + L);
      const Vec<A> row_levels[2] = {load(level + lane), load(level + lane + L)};
      for (int64_t j = 0; j < amx_part; j += 2) {
        Bits512 ds[2];
        for (int odd = 0; odd < 2; ++odd) {
          const A *s = logits.row(j + odd) + lane, *d = dp.row(j + odd) + lane;
          const Vec<A> low = low_row.weight(load(s));
          const Vec<A> high = high_row.weight(load(s + L));
          store_bits(p_rows.row(at + j + odd) + lane, round_both(low, high, ~0u));
          ds[odd] = round_both(low * (load(d) - row_levels[0]),
                               high * (load(d + L) - row_levels[1]), ~0u);
          store_bits(ds_rows.row(at + j + odd) + lane, ds[odd]);
        }
        // Within each 128 bits: the queries' order is mended in `write`.
        Pair* pairs = ds_pairs.row((waiting + j) / 2) + lane;
        store_bits(pairs, _mm512_unpacklo_epi16(ds[0], ds[1]));
        store_bits(pairs + L, _mm512_unpackhi_epi16(ds[0], ds[1]));
      }
    }
  }

  void multiply(const Block& block, int64_t first, int64_t last, Rows<A> dq,
                const KeySums<T>& sums) {
    const int64_t queries = packs(block) * amx_pack;
    for (int64_t j0 = first; j0 < last; j0 += E::tile) {
      const int64_t keys = smaller(E::tile, last - j0), waiting = (j0 - first) % waiting_keys;
      for (int64_t at = 0; at < keys; at += amx_part) {
        make_part(block, j0 + at, smaller(amx_part, keys - at));
        round_part(block, at, waiting + at);
      }
      if (args.grads.v.data)
        tile_product<Into::sum>(sums.v.from(j0), constant(p_rows), constant(grad_out.query_pairs),
                                keys, problem.dv, block.queries);
      if (args.grads.k.data)
        tile_product<Into::sum>(sums.k.from(j0), constant(ds_rows), constant(q.query_pairs), keys,
                                problem.d, block.queries);
      const int64_t ready = waiting + keys;
      if (args.grads.q.data && (ready == waiting_keys || j0 + keys == last))
        tile_product<Into::sum>(dq, constant(k.panel(j0 - waiting)), constant(ds_pairs), problem.d,
                                queries, ready, E::tile, dq_rows * E::tile);
    }
  }

  void write(const Block& block, Rows<A> dq) {
    if (!args.grads.q.data) return;
    // unpacklo took queries 0-3, 8-11, … of a pack, unpackhi the others.
    alignas(64) static constexpr int32_t lower[16] = {0, 1, 2, 3, 16, 17, 18, 19,
                                                      4, 5, 6, 7, 20, 21, 22, 23};
    alignas(64) static constexpr int32_t upper[16] = {8,  9,  10, 11, 24, 25, 26, 27,
                                                      12, 13, 14, 15, 28, 29, 30, 31};
    for (int64_t e = 0; e < problem.d; ++e)
      for (int64_t lane = 0; lane < packs(block) * amx_pack; lane += amx_pack) {
        A* at = dq.row(e) + lane;
        const __m512 even = _mm512_loadu_ps(at), odd = _mm512_loadu_ps(at + lanes<A>());
        _mm512_storeu_ps(at, _mm512_permutex2var_ps(even, load_bits(lower), odd));
        _mm512_storeu_ps(at + lanes<A>(), _mm512_permutex2var_ps(even, load_bits(upper), odd));
      }
    for (int64_t i = 0; i < block.queries; ++i) ones[i] = A(problem.scale);
    const Rows<T> to = query_rows<T>(args.grads.q, block.sequence, block.head);
    unpack_transposed<T, A>(to.from(block.i0), constant(dq), block.queries, problem.d, ones);
  }

  const AttentionBackward& args;
  const AttentionProblem& problem;
  const int64_t most_blocks;
  E::Keys k, v;
  E::Queries q, grad_out;
  Rows<A> logits, dp;
  Rows<T> p_rows, ds_rows;
  Rows<Pair> ds_pairs;
  AmxSoftmax softmax;
  A *level, *ones;
  Rows<A> levels;
  int64_t dq_rows;
  Rows<A> all_dq;
  int64_t keys_of_sequence = 0;
};

template <class Each>
inline void run_task(AmxBackwardPass& pass, const Each& each, const KeySums<BFloat16>& sums) {
  pass.run_task(each, sums);
}

}  // namespace GK_LEVEL
}  // namespace genkern
