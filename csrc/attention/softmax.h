// The softmax of a block of queries, from what the forward kept; and tiles of one kind for all keys
// that the block sees. For kernel files.
//
// A derivative's sums over keys (δ, τ, …) must be known before its products begin, so every such
// pass goes twice over the keys of a block of queries: first the tiles and the sums, then the
// products with them. The tiles in between stay in scratch, [keys][queries] each, cheaper than
// making them anew; memory grows with M, not with N·M. The sums are those of the very numbers that
// are multiplied: Σ P·dP rather than dO·O, where a rounded O would cost digits.
#pragma once

#include "engine.h"
#include "logits.h"

namespace genkern {
namespace GK_LEVEL {

// Tiles of one kind, [keys][queries], for keys [first, last) of a block.
template <class E>
class Tiles {
 public:
  using A = typename E::A;

  Tiles() : all{} {}
  Tiles(Carver& carve, int64_t keys) : all(carve.rows<A>(round_up(keys, E::tile), E::width)) {}

  Rows<A> at(const Block& block, int64_t j0) const { return all.from(j0 - block.first); }

 private:
  Rows<A> all;
};

// run(j0, keys) for every tile of keys that a block sees.
template <class E, class Run>
inline void each_tile(const Block& block, const Run& run) {
  for (int64_t j0 = block.first; j0 < block.last; j0 += E::tile)
    run(j0, smaller(E::tile, block.last - j0));
}

// Numbers of the queries of a block, in lanes.
template <class A>
inline void take_numbers(A* to, const RowNumbers& from, const Block& block, int64_t vectors) {
  const A* numbers =
      from.data ? query_numbers<A>(from, block.sequence, block.head) + block.i0 : nullptr;
  for (int64_t i = 0; i < vectors * lanes<A>(); ++i)
    to[i] = numbers && i < block.queries ? numbers[i] : A(0);
}
template <class A>
inline void put_numbers(const RowNumbers& to, const A* from, const Block& block) {
  if (!to.data) return;
  A* numbers = query_numbers<A>(to, block.sequence, block.head) + block.i0;
  for (int64_t i = 0; i < block.queries; ++i) numbers[i] = from[i];
}

// shift and 1 / sum of the queries of a block.
template <class E>
class Softmax {
 public:
  using A = typename E::A;

  explicit Softmax(Carver& carve)
      : shift(carve.array<A>(E::width)), inverse(carve.array<A>(E::width)) {}

  void take(const SoftmaxRows& rows, const Block& block, int64_t vectors) {
    take_numbers(shift, rows.shift, block, vectors);
    take_numbers(inverse, rows.sum, block, vectors);
    for (int64_t i = 0; i < vectors * lanes<A>(); ++i)
      inverse[i] = inverse[i] == 0 ? A(0) : A(1) / inverse[i];
  }

  // Logits, as finish_logits leaves them, become P.
  void apply(Rows<A> tile, A factor, int64_t keys, int64_t vectors) const {
    for (int64_t w = 0; w < vectors; ++w) {
      const Vec<A> row_shift = load(shift + w * lanes<A>());
      const Vec<A> row_inverse = load(inverse + w * lanes<A>());
      A* at = tile.data + w * lanes<A>();
      for (int64_t j = 0; j < keys; ++j, at += tile.stride)
        store(at, E::exponential(load(at) - row_shift, factor) * row_inverse);
    }
  }

 private:
  A *shift, *inverse;
};

// tile = tile∘by.
template <class A>
inline void multiply(Rows<A> tile, Rows<A> by, int64_t keys, int64_t vectors) {
  each_vector<A>(tile.stride, keys, vectors, [&](int64_t at) {
    store(tile.data + at, load(tile.data + at) * load(by.data + at));
  });
}

// sums[j] += Σ over queries of tile[j].
template <class A>
inline void add_key_totals(A* sums, Rows<A> tile, int64_t keys, int64_t vectors) {
  for (int64_t j = 0; j < keys; ++j) {
    Vec<A> total{};
    for (int64_t w = 0; w < vectors; ++w) total += load(tile.row(j) + w * lanes<A>());
    sums[j] += sum(total);
  }
}

// sums[i] += Σ over keys of body(offset in the tile) for every lane i.
template <class A, class Body>
inline void add_query_totals(A* sums, int64_t stride, int64_t keys, int64_t vectors,
                             const Body& body) {
  for (int64_t w = 0; w < vectors; ++w) {
    const int64_t lane = w * lanes<A>();
    const Vec<A> total = sum_over_keys<A>(keys, [&](int64_t j) { return body(j * stride + lane); });
    store(sums + lane, load(sums + lane) + total);
  }
}

}  // namespace GK_LEVEL
}  // namespace genkern
