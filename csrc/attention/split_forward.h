// Attention, forward, in fp32 on AMX: forward.cpp's pass for calls without dropout.
//
// Tile products and work on vectors run at once where neither waits for the other. So a block of
// queries is two streams of 32: while the logits of one become weights P = exp(S - shift), a few
// after every round of tile products, the tiles add the other's last weights to its sums, Oᵀ +=
// Vᵀ·Pᵀ, and make its next logits. The shift is the running maximum: of logits in fp32 one below it
// would cost a lone key's weight its exactness.
#pragma once

#include "amx_split.h"
#include "forward_results.h"

namespace genkern {
namespace GK_LEVEL {

class SplitForwardPass {
 public:
  using E = SplitEngine;
  using T = float;
  using A = float;

  SplitForwardPass(const AttentionForward& args, Carver& carve)
      : args(args),
        problem(args.problem),
        factor(exponent_factor<A>(problem)),
        k(carve, problem.M, problem.d, in_score),
        v(carve, problem.M, problem.dv, in_to_queries),
        q(carve, problem.d, in_score),
        streams{Stream(carve), Stream(carve)},
        out_sum(E::query_sums(carve, problem.dv)),
        top(carve.array<A>(E::width)),
        seen_top(carve.array<A>(E::width)),
        shift(carve.array<A>(E::width)),
        sum(carve.array<A>(E::width)) {}

  void enter(const Sequence& sequence, int64_t kv_head) {
    k.take(constant(key_rows<T>(problem.k, sequence, kv_head)), sequence.keys);
    v.take(constant(key_rows<T>(problem.v, sequence, kv_head)), sequence.keys);
  }

  void run(const Block& block) {
    const Rows<T> q_rows = query_rows<T>(problem.q, block.sequence, block.head);
    q.take(constant(q_rows.from(block.i0)), block.queries, Scale<A>(problem.scale).sign);
    for (int64_t i = 0; i < E::width; ++i) {
      top[i] = seen_top[i] = minus_infinity<A>;
      shift[i] = sum[i] = 0;
    }
    E::clear_query_sums(out_sum, problem.dv);
    if (block.first < block.last) {
      if (block.queries > stream_queries)
        run_both(block);
      else
        run_first(block);
    }
    write_forward<T>(args, block, out_sum, top, sum);
  }

 private:
  static constexpr int L = lanes<A>();
  static constexpr int64_t stream_queries = 2 * L;
  // Keys of a stream at a time. As many logits and weights do not fit the first cache, but sums
  // over fewer keys are loaded and stored more often, which costs more.
  static constexpr int64_t part = 128;
  static constexpr int64_t chunk_keys = 8;  // of one vector of queries, weighed at once
  static constexpr int64_t look_keys = 32;  // of both vectors, looked through at once

  struct Stream {
    Rows<A> logits;     // [part][queries]
    uint32_t* weights;  // [part / tile_depth][2], tiles in pairs of keys

    explicit Stream(Carver& carve)
        : logits(carve.rows<A>(part, stream_queries)),
          weights(carve.array<uint32_t>(part / tile_depth * 2 * split_words)) {}
  };

  // What is done between rounds of tile products: first the weights of one stream, a chunk at a
  // time, then looks for the maximum of the logits that the other has by then.
  struct Work {
    int64_t stream = 0, chunks = 0, looks = 0;
    int64_t done = 0, ready = 0;     // of both, one after the other
    int64_t rounds = 0, credit = 0;  // of tile products
  };

  void run_both(const Block& block) {
    score(0, block, block.first, Idle());
    look_through(0, block, block.first);
    for (int64_t j0 = block.first; j0 < block.last; j0 += part) {
      weigh(0, block, j0, j0, j0 - part);
      weigh(1, block, j0, j0 + part, j0);
    }
    add(1, block, block.first + (block.last - 1 - block.first) / part * part, Idle());
  }
  void run_first(const Block& block) {
    for (int64_t j0 = block.first; j0 < block.last; j0 += part) {
      score(0, block, j0, Idle());
      look_through(0, block, j0);
      weigh(0, block, j0, block.last, block.last);
      add(0, block, j0, Idle());
    }
  }

  // The stream's logits of keys j0 … become weights. Meanwhile the other stream's logits of keys
  // `scored` … are made and its weights of keys `added` … are added, where there are such keys.
  void weigh(int64_t stream, const Block& block, int64_t j0, int64_t scored, int64_t added) {
    const bool adds = added >= block.first && added < block.last, scores = scored < block.last;
    const int64_t other = 1 - stream;
    raise(stream);
    memset(part_sums, 0, sizeof part_sums);
    work = {};
    work.stream = stream;
    work.ready = work.chunks = keys_at(block, j0) / chunk_keys * 2;
    if (scores) {
      work.looks = keys_at(block, scored) / look_keys;
      work.rounds += rounds_of(keys_at(block, scored), ceil_div(problem.d, tile_depth));
    }
    if (adds) work.rounds += rounds_of(keys_at(block, added), ceil_div(problem.dv, 2 * tile_rows));
    const auto between = [&] {
      work.credit += work.chunks + work.looks;
      while (work.credit >= work.rounds) {
        work.credit -= work.rounds;
        if (work.done < work.ready) do_some();
      }
    };
    if (scores) {
      score(other, block, scored, between);
      finish(other, block, scored);
      work.ready += work.looks;
    }
    if (adds) add(other, block, added, between);
    while (work.done < work.ready) do_some();
    for (int64_t i = 0; i < stream_queries; ++i)
      sum[stream * stream_queries + i] +=
          (part_sums[0][i] + part_sums[1][i]) + (part_sums[2][i] + part_sums[3][i]);
  }

  // A function of its own, so that the places between the tile products only call it.
  __attribute__((noinline)) void do_some() {
    if (work.done < work.chunks)
      weigh_chunk(work.done % 2, work.done / 2 * chunk_keys);
    else
      look(1 - work.stream, (work.done - work.chunks) * look_keys);
    ++work.done;
  }

  // Keys of the part from j0 on, whole tiles.
  static int64_t keys_at(const Block& block, int64_t j0) {
    return smaller(part, round_up(block.last - j0, E::tile));
  }
  static int64_t rounds_of(int64_t keys, int64_t blocks) {
    return keys / tile_depth * blocks * split_rounds;
  }

  template <class Between>
  void score(int64_t stream, const Block& block, int64_t j0, const Between& between) {
    SplitTiles queries = q.of_score();
    queries.data += stream * 2 * split_words;
    split_product<Into::fresh>(streams[stream].logits, k.of_score(j0), queries, keys_at(block, j0),
                               stream_queries, problem.d, between);
  }
  template <class Between>
  void add(int64_t stream, const Block& block, int64_t j0, const Between& between) {
    const SplitTiles weights{streams[stream].weights, split_words, 2 * split_words};
    split_product<Into::sum>({out_sum.data + stream * stream_queries, out_sum.stride},
                             v.of_to_queries(j0), weights, problem.dv, stream_queries,
                             keys_at(block, j0), between);
  }

  // Raw products become logits, those of keys that there are not -inf.
  void finish(int64_t stream, const Block& block, int64_t j0) {
    const Rows<A> logits = streams[stream].logits;
    const int64_t keys = smaller(part, block.last - j0);
    Block mine = block;
    mine.i0 += stream * stream_queries;
    mine.queries = smaller(stream_queries, block.queries - stream * stream_queries);
    finish_logits<T>(problem, logits, nullptr, mine, j0, keys, 2);
    for (int64_t j = keys; j < keys_at(block, j0); ++j)
      for (int64_t i = 0; i < stream_queries; ++i) logits.row(j)[i] = minus_infinity<A>;
  }
  void look_through(int64_t stream, const Block& block, int64_t j0) {
    finish(stream, block, j0);
    for (int64_t j = 0; j < keys_at(block, j0); j += look_keys) look(stream, j);
  }

  // seen_top rises to the maximum of the logits of keys j …
  void look(int64_t stream, int64_t j) {
    const A* at = streams[stream].logits.row(j);
    A* tops = seen_top + stream * stream_queries;
    Vec<A> low = load(tops), high = load(tops + L), odd_low = low, odd_high = high;
    for (int64_t i = 0; i < look_keys; i += 2, at += 2 * stream_queries) {
      low = max(low, load(at));
      high = max(high, load(at + L));
      odd_low = max(odd_low, load(at + stream_queries));
      odd_high = max(odd_high, load(at + stream_queries + L));
    }
    store(tops, max(low, odd_low));
    store(tops + L, max(high, odd_high));
  }

  // The shift rises to the maximum that was seen, the sums shrink to it.
  void raise(int64_t stream) {
    for (int64_t lane = stream * stream_queries; lane < (stream + 1) * stream_queries; lane += L) {
      const Vec<A> old_top = load(top + lane), new_top = load(seen_top + lane);
      if (memcmp(&old_top, &new_top, sizeof new_top) == 0) continue;
      const Vec<A> less = E::exponential(old_top - new_top, factor);
      store(top + lane, new_top);
      // All keys so far at -inf: any finite shift gives the zeros that are due.
      store(shift + lane, select(new_top == minus_infinity<A>, Vec<A>{}, new_top));
      store(sum + lane, load(sum + lane) * less);
      for (int64_t e = 0; e < problem.dv; ++e) {
        A* o = out_sum.row(e) + lane;
        store(o, load(o) * less);
      }
    }
  }

  void weigh_chunk(int64_t half, int64_t j) {
    const Stream& stream = streams[work.stream];
    const Vec<A> by = load(shift + work.stream * stream_queries + half * L);
    const A by_factor = factor;  // the stores below might be to it, for all that is known
    const A* at = stream.logits.row(j) + half * L;
    uint32_t* to = stream.weights + (j / tile_depth * 2 + half) * split_words + j % tile_depth * 8;
    Vec<A> even_sum{}, odd_sum{};
    for (int64_t i = 0; i < chunk_keys; i += 2, at += 2 * stream_queries, to += 16) {
      const Vec<A> even = E::exponential(load(at) - by, by_factor);
      const Vec<A> odd = E::exponential(load(at + stream_queries) - by, by_factor);
      even_sum += even;
      odd_sum += odd;
      Bits512 first[split_pieces], second[split_pieces];
      split(even, 0xffff, first);
      split(odd, 0xffff, second);
      store_pairs(to, 0, first, second);
    }
    A* part_sum = part_sums[j / chunk_keys % 4] + half * L;
    store(part_sum, load(part_sum) + (even_sum + odd_sum));
  }

  const AttentionForward& args;
  const AttentionProblem& problem;
  const A factor;
  E::Keys k, v;
  E::Queries q;
  Stream streams[2];
  Rows<A> out_sum;
  A *top, *seen_top, *shift, *sum;  // of every query; seen_top runs ahead
  Work work;
  alignas(64) A part_sums[4][stream_queries];  // of a part's weights; one alone would round more
};

}  // namespace GK_LEVEL
}  // namespace genkern
