// Attention, backward, on AMX: backward.cpp's pass for calls without softcap, dropout and gradients
// of biases.
//
// The forward kept its output in fp32, so δ = rowsum(dO∘O) is known before any product. Keys go in
// spans, a task's every `chunks`-th of a head's; a span's K, V, dK and dV stay in the second cache
// while all queries pass, two blocks at a time, and five products are made of each tile of keys:
//
//   P = exp(S - shift) / sum and dS = P∘(dP - δ), rounded; dV += Pᵀ·dO, dK += dSᵀ·Q with the sums
//   over both blocks in one product; dQᵀ += Kᵀ·dSᵀ when enough keys wait
//
// dK and dV of a span are whole then. dQ is a sum over spans: of the task's where it has all of
// them, else a partial one, and the sweep (amx_backward_sweep.h) adds them up.
#pragma once

#include "amx_rows.h"
#include "sweep.h"

namespace genkern {
namespace GK_LEVEL {

// How a head's keys are cut, by the shape alone.
struct KeySpans {
  int64_t keys, count;  // of a span; spans
  int64_t chunks;       // tasks of a head

  explicit KeySpans(const AttentionProblem& problem) {
    const int64_t wanted = ceil_div(sums_wanted, larger(1, problem.B * problem.Hk));
    const int64_t even = round_up(ceil_div(problem.M, wanted), AmxEngine::tile);
    keys = larger(least, smaller(most, even));
    count = larger(1, ceil_div(problem.M, keys));
    chunks = smaller(wanted, count);
  }
  bool has(int64_t span, const Block& block) const {
    return span >= 0 && block.first < smaller(block.last, (span + 1) * keys) &&
           span * keys < block.last;
  }
  bool chunk_has(int64_t chunk, const Block& block) const {
    for (int64_t span = chunk; span < count; span += chunks)
      if (has(span, block)) return true;
    return false;
  }

 private:
  static constexpr int64_t least = 256;  // queries are packed once a span
  static constexpr int64_t most = 512;
};

// dQᵀ of blocks of queries, their queries in the order that `AmxBackwardPass` leaves them in.
struct QuerySums {
  float* data;
  int64_t rows;  // of a block's

  static int64_t numbers(const AttentionProblem& problem, int64_t blocks) {
    return blocks * round_up(problem.d, tile_rows) * AmxEngine::width;
  }
  Rows<float> of(int64_t block) const {
    return {data + block * rows * AmxEngine::width, AmxEngine::width};
  }
};

class AmxBackwardPass {
 public:
  using E = AmxEngine;
  using T = BFloat16;
  using A = float;

  static bool takes(const AttentionBackward& args) {
    const AttentionProblem& problem = args.problem;
    return problem.dtype == DType::bf16 && problem.softcap == 0 && problem.dropout == 0 &&
           args.rows.out.data && !args.grads.bias.data && !args.grads.key_bias.data;
  }

  AmxBackwardPass(const AttentionBackward& args, Carver& carve)
      : args(args),
        problem(args.problem),
        spans(problem),
        units(problem),
        k(carve, spans.keys, problem.d, in_score | in_to_queries),
        v(carve, spans.keys, problem.dv, in_score),
        dk(E::key_sums(carve, spans.keys, problem.d)),
        dv(E::key_sums(carve, spans.keys, problem.dv)),
        halves{{args, carve}, {args, carve}},
        q_pairs(carve.rows<Pair>(E::width, round_up(problem.d, tile_depth))),
        grad_pairs(carve.rows<Pair>(E::width, round_up(problem.dv, tile_depth))),
        logits(carve.rows<A>(amx_part, E::width)),
        dp(carve.rows<A>(amx_part, E::width)),
        p_rows(carve.rows<T>(E::tile, 2 * E::width)),
        ds_rows(carve.rows<T>(E::tile, 2 * E::width)),
        own_dq{carve.array<A>(QuerySums::numbers(problem, spans.chunks > 1  ? 0
                                                          : spans.count > 1 ? units.count
                                                                            : 2)),
               round_up(problem.d, tile_rows)} {}

  // All of a chunk. `partial`: where dQ's sums belong if the chunk has not all keys of the head.
  void run(const Sequence& sequence, int64_t kv_head, int64_t chunk, A* partial) {
    const QuerySums dq{partial ? partial : own_dq.data, own_dq.rows};
    for (int64_t span = chunk; span < spans.count; span += spans.chunks) {
      enter(sequence, kv_head, span);
      for (int64_t head = 0; head < units.group; ++head)
        for (int64_t b = (units.blocks - 1) / 2 * 2; b >= 0; b -= 2) {
          const int64_t i0 = b * E::width;
          if (i0 >= sequence.queries) continue;
          const Block low(E{}, problem, sequence, kv_head * units.group + head, i0);
          const bool two = i0 + E::width < sequence.queries;
          const Block high = two ? Block(E{}, problem, sequence, low.head, i0 + E::width) : low;
          const int64_t slot = partial || spans.count > 1 ? head * units.blocks + b : 0;
          run_pair(low, dq.of(slot), high, two ? dq.of(slot + 1) : Rows<A>{}, span, !partial);
        }
      leave(sequence, kv_head);
    }
  }

  // dQ of a block from its finished sums.
  static void write(const AttentionBackward& args, const Block& block, Rows<A> dq) {
    if (!args.grads.q.data) return;
    // unpacklo took queries 0-3, 8-11, … of a pack, unpackhi the others.
    alignas(64) static constexpr int32_t lower[16] = {0, 1, 2, 3, 16, 17, 18, 19,
                                                      4, 5, 6, 7, 20, 21, 22, 23};
    alignas(64) static constexpr int32_t upper[16] = {8,  9,  10, 11, 24, 25, 26, 27,
                                                      12, 13, 14, 15, 28, 29, 30, 31};
    for (int64_t e = 0; e < args.problem.d; ++e)
      for (int64_t lane = 0; lane < block.queries; lane += amx_pack) {
        A* at = dq.row(e) + lane;
        const __m512 even = _mm512_loadu_ps(at), odd = _mm512_loadu_ps(at + lanes<A>());
        _mm512_storeu_ps(at, _mm512_permutex2var_ps(even, load_bits(lower), odd));
        _mm512_storeu_ps(at + lanes<A>(), _mm512_permutex2var_ps(even, load_bits(upper), odd));
      }
    A scale[E::width];
    for (int64_t i = 0; i < block.queries; ++i) scale[i] = A(args.problem.scale);
    const Rows<T> to = query_rows<T>(args.grads.q, block.sequence, block.head);
    unpack_transposed<T, A>(to.from(block.i0), constant(dq), block.queries, args.problem.d, scale);
  }

 private:
  static constexpr int64_t waiting_keys = 256;

  // A block of queries, and its dS of keys that wait for the product with K.
  struct Half {
    E::Queries q, grad_out;
    AmxSoftmax softmax;
    A* level;
    Rows<Pair> ds_pairs;
    Rows<A> dq;
    int64_t waiting, waiting_from;
    bool added;  // whether dq holds anything

    Half(const AttentionBackward& args, Carver& carve)
        : q(carve, args.problem.d, in_score),
          grad_out(carve, args.problem.dv, in_score),
          softmax(carve, args.problem),
          level(carve.array<A>(E::width)),
          ds_pairs(carve.rows<Pair>(waiting_keys / 2, E::width)) {}
  };

  static int64_t whole(const Block& block) { return round_up(block.queries, amx_pack); }

  void enter(const Sequence& sequence, int64_t kv_head, int64_t span) {
    span_from = span * spans.keys;
    const int64_t keys = larger(0, smaller(spans.keys, sequence.keys - span_from));
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head).from(span_from)), keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head).from(span_from)), keys);
    for (bool& tile : touched) tile = false;
  }

  void leave(const Sequence& sequence, int64_t kv_head) {
    const int64_t rows = smaller(spans.keys, sequence.key_rows - span_from);
    const int64_t keys = smaller(spans.keys, sequence.keys - span_from);
    for (int64_t j = 0; j < keys; j += E::tile)
      if (!touched[j / E::tile]) {
        clear(dk.from(j), E::tile);
        clear(dv.from(j), E::tile);
      }
    if (args.grads.k.data)
      write_sums<T, A>(key_rows<T>(args.grads.k, sequence, kv_head).from(span_from), dk, 0, 1, 0,
                       rows, keys, problem.d, Scale<A>(problem.scale).magnitude);
    if (args.grads.v.data)
      write_sums<T, A>(key_rows<T>(args.grads.v, sequence, kv_head).from(span_from), dv, 0, 1, 0,
                       rows, keys, problem.dv, A(1));
  }

  void take(Half& half, const Block& block, Rows<A> dq, int64_t span, int64_t at) {
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    const Rows<T> grad_rows = query_rows<T>(args.grad_out, block.sequence, block.head);
    half.q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    half.grad_out.take(constant(grad_rows.from(block.i0)), block.queries, A(1));
    pair_rows(q_pairs.from(at / 2), constant(half.q.rows), whole(block), half.q.rows.stride);
    pair_rows(grad_pairs.from(at / 2), constant(half.grad_out.rows), whole(block),
              half.grad_out.rows.stride);
    half.softmax.take(args.rows, block);
    take_level(half, block);
    half.dq = dq;
    half.waiting = 0;
    half.added = spans.has(span - spans.chunks, block);
  }

  // level = δ - λ.
  void take_level(Half& half, const Block& block) {
    take_numbers(half.level, args.grad_lse, block, whole(block) / lanes<A>());
    const KeptOut& out = args.rows.out;
    const A* numbers = static_cast<const A*>(out.data) + block.sequence.batch * out.batch +
                       block.head * out.head + block.sequence.first_query + block.i0;
    const Bits512 upper = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t lane = 0; lane < block.queries; lane += lanes<A>()) {
      const int64_t live = smaller(lanes<A>(), block.queries - lane);
      Vec<A> even{}, odd{};
      const A* at = numbers + lane;
      for (int64_t e = 0; e < problem.dv; e += 2, at += 2 * out.feature) {
        const Bits512 grads = load_bits(half.grad_out.feature_pairs.row(e / 2) + lane);
        even += bit_cast<Vec<A>>(_mm512_slli_epi32(grads, 16)) * load_some(at, live);
        if (e + 1 < problem.dv)
          odd +=
              bit_cast<Vec<A>>(_mm512_and_si512(grads, upper)) * load_some(at + out.feature, live);
      }
      store(half.level + lane, (even + odd) - load(half.level + lane));
    }
  }

  void run_pair(const Block& low, Rows<A> low_dq, const Block& high, Rows<A> high_dq, int64_t span,
                bool finish) {
    const bool has_low = spans.has(span, low), has_high = high_dq.data && spans.has(span, high);
    if (has_low) take(halves[0], low, low_dq, span, 0);
    if (has_high) take(halves[1], high, high_dq, span, E::width);
    const int64_t begin = span_from, end = begin + spans.keys;
    const int64_t first = larger(begin, !has_high  ? low.first
                                        : !has_low ? high.first
                                                   : smaller(low.first, high.first));
    const int64_t last = smaller(end, !has_high  ? low.last
                                      : !has_low ? high.last
                                                 : larger(low.last, high.last));
    if (has_low || has_high)
      for (int64_t j0 = first; j0 < last; j0 += E::tile) {
        const int64_t of_low = has_low && j0 >= low.first ? keys_from(low, j0, end) : 0;
        const int64_t of_high = has_high && j0 >= high.first ? keys_from(high, j0, end) : 0;
        const int64_t keys = larger(of_low, of_high);
        if (keys == 0) continue;
        if (of_low) round_tile(halves[0], low, j0, of_low, keys, 0);
        if (of_high) round_tile(halves[1], high, j0, of_high, keys, E::width);
        const int64_t from = of_low ? 0 : E::width;
        add_keys(j0, keys, from, of_high ? E::width + whole(high) : whole(low));
        if (of_low) add_queries(halves[0], low, j0, of_low, end);
        if (of_high) add_queries(halves[1], high, j0, of_high, end);
      }
    if (finish) {
      finish_block(halves[0], low, low_dq, span, has_low);
      if (high_dq.data) finish_block(halves[1], high, high_dq, span, has_high);
    }
  }
  static int64_t keys_from(const Block& block, int64_t j0, int64_t end) {
    return larger(0, smaller(E::tile, smaller(block.last, end) - j0));
  }

  void finish_block(Half& half, const Block& block, Rows<A> dq, int64_t span, bool has) {
    if (block.first == block.last && span == 0) {
      clear(dq, own_dq.rows);
      write(args, block, dq);
    } else if (has && !spans.has(span + spans.chunks, block)) {
      write(args, block, half.dq);
    }
  }

  // P and dS of a tile, from query `at` of the rows on; zeros from `count` keys on.
  void round_tile(Half& half, const Block& block, int64_t j0, int64_t count, int64_t keys,
                  int64_t at) {
    if (half.waiting == 0) half.waiting_from = j0;
    const int64_t vectors = whole(block) / lanes<A>();
    for (int64_t part = 0; part < round_up(keys, amx_part); part += amx_part) {
      const int64_t some = smaller(amx_part, count - part);
      if (some <= 0) {
        for (int64_t j = part; j < part + amx_part; ++j)
          for (int64_t lane = 0; lane < whole(block); lane += amx_pack) {
            store_bits(p_rows.row(j) + at + lane, Bits512{});
            store_bits(ds_rows.row(j) + at + lane, Bits512{});
          }
        continue;
      }
      E::score<Into::fresh>(logits, k, j0 - span_from + part, some, half.q, vectors);
      E::score<Into::fresh>(dp, v, j0 - span_from + part, some, half.grad_out, vectors);
      finish_part(problem, logits, dp, block, j0 + part, some, vectors);
      round_part(half, whole(block), part, half.waiting + part, at);
    }
  }

  void round_part(const Half& half, int64_t queries, int64_t part, int64_t waiting, int64_t at) {
    constexpr int L = lanes<A>();
    for (int64_t lane = 0; lane < queries; lane += amx_pack) {
      const RowsOfSoftmax low_row = half.softmax.row(lane), high_row = half.softmax.row(lane + L);
      const Vec<A> levels[2] = {load(half.level + lane), load(half.level + lane + L)};
      for (int64_t j = 0; j < amx_part; j += 2) {
        Bits512 ds[2];
        for (int odd = 0; odd < 2; ++odd) {
          const A *s = logits.row(j + odd) + lane, *d = dp.row(j + odd) + lane;
          const Vec<A> low = low_row.weight(load(s));
          const Vec<A> high = high_row.weight(load(s + L));
          store_bits(p_rows.row(part + j + odd) + at + lane, round_both(low, high, ~0u));
          ds[odd] = round_both(low * (load(d) - levels[0]), high * (load(d + L) - levels[1]), ~0u);
          store_bits(ds_rows.row(part + j + odd) + at + lane, ds[odd]);
        }
        // Within each 128 bits: the queries' order is mended in `write`.
        Pair* pairs = half.ds_pairs.row((waiting + j) / 2) + lane;
        store_bits(pairs, _mm512_unpacklo_epi16(ds[0], ds[1]));
        store_bits(pairs + L, _mm512_unpackhi_epi16(ds[0], ds[1]));
      }
    }
  }

  // dV and dK of a tile, summed over the queries [from, to) of both blocks.
  void add_keys(int64_t j0, int64_t keys, int64_t from, int64_t to) {
    const int64_t j = j0 - span_from;
    bool& is_sum = touched[j / E::tile];
    const auto product = is_sum ? tile_product<Into::sum> : tile_product<Into::fresh>;
    if (args.grads.v.data)
      product(dv.from(j), {p_rows.data + from, p_rows.stride}, constant(grad_pairs.from(from / 2)),
              keys, problem.dv, to - from, 0, 0);
    if (args.grads.k.data)
      product(dk.from(j), {ds_rows.data + from, ds_rows.stride}, constant(q_pairs.from(from / 2)),
              keys, problem.d, to - from, 0, 0);
    const int64_t written = round_up(keys, amx_part);
    if (!is_sum && written < E::tile) {
      clear(dv.from(j + written), E::tile - written);
      clear(dk.from(j + written), E::tile - written);
    }
    is_sum = true;
  }

  void add_queries(Half& half, const Block& block, int64_t j0, int64_t keys, int64_t end) {
    half.waiting += keys;
    if (half.waiting < waiting_keys && j0 + keys < smaller(block.last, end)) return;
    const auto product = half.added ? tile_product<Into::sum> : tile_product<Into::fresh>;
    if (args.grads.q.data)
      product(half.dq, constant(k.panel(half.waiting_from - span_from)), constant(half.ds_pairs),
              problem.d, whole(block), half.waiting, E::tile, own_dq.rows * E::tile);
    half.added = true;
    half.waiting = 0;
  }

  const AttentionBackward& args;
  const AttentionProblem& problem;
  const KeySpans spans;
  const Units<E> units;
  E::Keys k, v;
  Rows<A> dk, dv;
  Half halves[2];
  Rows<Pair> q_pairs, grad_pairs;
  Rows<A> logits, dp;
  Rows<T> p_rows, ds_rows;
  const QuerySums own_dq;
  int64_t span_from = 0;
  bool touched[8];  // tiles of the span whose dK and dV hold anything
};

}  // namespace GK_LEVEL
}  // namespace genkern
