// Where sequences, heads and their rows lie, and which keys a query sees. For kernel files.
//
// Every mask but a bias is an interval of keys per query, lo(i) ≤ j < hi(i), both rising with i: so
// a block of queries sees an interval too, and only its edges need a look at single elements.
#pragma once

#include "attention.h"
#include "products.h"

namespace genkern {
namespace GK_LEVEL {

// One element of the batch, or one of several sequences that lie one after another.
struct Sequence {
  int64_t batch;
  int64_t first_query, first_key;  // rows of the tensors
  int64_t queries, keys;           // `keys` may be seen, of `key_rows` in the tensor
  int64_t key_rows;
  int64_t offset, left, right;

  Sequence(const AttentionProblem& problem, int64_t b)
      : batch(b),
        first_query(problem.q_starts ? problem.q_starts[b] : 0),
        first_key(problem.k_starts ? problem.k_starts[b] : 0),
        queries(problem.q_starts ? problem.q_starts[b + 1] - first_query : problem.N),
        keys(problem.k_starts ? problem.k_starts[b + 1] - first_key : problem.M),
        key_rows(keys),
        offset(problem.lower_right ? keys - queries : 0),
        left(problem.left),
        right(problem.right) {
    if (problem.key_lengths) keys = smaller(keys, problem.key_lengths[b]);
  }

  int64_t first_seen(int64_t i) const { return larger(0, i + offset - left); }
  int64_t last_seen(int64_t i) const { return smaller(keys, i + offset + right + 1); }  // exclusive
};

// One head's rows of one sequence.
template <class T>
inline Rows<T> query_rows(const Heads& tensor, const Sequence& sequence, int64_t head) {
  return {static_cast<T*>(tensor.data) + sequence.batch * tensor.batch + head * tensor.head +
              sequence.first_query * tensor.row,
          tensor.row};
}
template <class T>
inline Rows<T> key_rows(const Heads& tensor, const Sequence& sequence, int64_t head) {
  return {static_cast<T*>(tensor.data) + sequence.batch * tensor.batch + head * tensor.head +
              sequence.first_key * tensor.row,
          tensor.row};
}
template <class A>
inline A* query_numbers(const RowNumbers& numbers, const Sequence& sequence, int64_t head) {
  return static_cast<A*>(numbers.data) + sequence.batch * numbers.batch + head * numbers.head +
         sequence.first_query;
}
template <class A>
inline A* key_numbers(const RowNumbers& numbers, const Sequence& sequence, int64_t head) {
  return static_cast<A*>(numbers.data) + sequence.batch * numbers.batch + head * numbers.head +
         sequence.first_key;
}

// A block of queries of one head, and the keys [first, last) that some of them see.
struct Block {
  Sequence sequence;
  int64_t head, kv_head;
  int64_t i0, queries;
  int64_t first, last;

  // Blocks of E::width queries. `first` is rounded down to whole tiles of keys, `last` up to what
  // the engine's products take at once, as far as there are keys.
  template <class E>
  Block(E, const AttentionProblem& problem, const Sequence& sequence, int64_t head, int64_t i0)
      : sequence(sequence),
        head(head),
        kv_head(head / (problem.H / problem.Hk)),
        i0(i0),
        queries(smaller(E::width, sequence.queries - i0)),
        first(sequence.first_seen(i0) / E::tile * E::tile),
        last(sequence.last_seen(i0 + queries - 1)) {
    last = last <= first ? first : smaller(sequence.keys, round_up(last, E::grain));
  }
};

// s[j, i] = value for the keys j0 + j that query i0 + i does not see.
template <class A>
inline void hide_unseen(Rows<A> s, const Block& block, int64_t j0, int64_t keys, int64_t vectors,
                        A value) {
  constexpr int L = lanes<A>();
  const Sequence& sequence = block.sequence;
  const int64_t last_query = block.i0 + block.queries - 1;
  const bool all_from_first = sequence.first_seen(last_query) <= j0;
  const bool all_to_last = sequence.last_seen(block.i0) >= j0 + keys;
  if (all_from_first && all_to_last) return;
  for (int64_t j = 0; j < keys; ++j) {
    // Hidden: queries before `begin`, who do not see so far, and from `end` on, who see no more.
    const int64_t key = j0 + j - sequence.offset;
    const int64_t begin = all_to_last ? 0 : key - sequence.right - block.i0;
    const int64_t end =
        all_from_first ? block.queries : smaller(block.queries, key + sequence.left + 1 - block.i0);
    if (begin <= 0 && end >= block.queries) continue;
    for (int64_t w = 0; w < vectors; ++w) {
      A* at = s.row(j) + w * L;
      const auto lanes_below = [&](int64_t n) {
        return first_lanes<A>(smaller(larger(n - w * L, 0), L));
      };
      const Mask<A> hidden = lanes_below(begin) | ~lanes_below(larger(end, 0));
      store(at, select(hidden, splat(value), load(at)));
    }
  }
}

}  // namespace GK_LEVEL
}  // namespace genkern
