// The vocabulary of every attention pass: operands and three products among them. For kernel files.
//
// Orientation: keys in rows, queries in lanes. What belongs to a pair of query and key lives in
// tiles [keys][queries], so that softmax needs no horizontal reduction. Four matrices of one head's
// keys (K, V and the tangents of them) and four of one block of queries (Q, dO, …) meet in
//
//   score         tile (+)= keys · queriesᵀ        Sᵀ = K·Qᵀ       dPᵀ = V·dOᵀ
//   to_queries    sumᵀ  += keysᵀ · tile            Oᵀ += Vᵀ·Pᵀ     dQᵀ += Kᵀ·dSᵀ
//   to_keys       sum   += tile · queries          dV += Pᵀ·dO     dK += dSᵀ·Q
//
// An engine gives the operands' forms in memory and these products on one kind of instructions. All
// sums are of the arithmetic type. This one, on fused multiply-adds, takes tiles just as they are
// and keys where they lie if they are compact and of the arithmetic type; anything else (half
// precision, strides, ragged ends) is converted once per head, rows and columns padded to `step`.
#pragma once

#include "packing.h"

namespace genkern {
namespace GK_LEVEL {

// Which products an operand takes part in, so that an engine makes the forms that these want.
enum Use : int { in_score = 1, in_to_queries = 2, in_to_keys = 4 };

// Whether an engine, in what a thread did in a session, met numbers that it does not compute with.
template <class Session>
inline bool refuses(const Session&) {
  return false;
}

template <class T>
struct FmaEngine {
  using A = Acc<T>;
  struct Session {  // what a thread needs while it uses the engine: nothing
    Session() {}
  };
  static constexpr int64_t width = max_vectors * lanes<A>();  // queries of a block
  static constexpr int64_t tile = 48;                         // keys of a tile
  static constexpr int64_t grain = step;                      // keys that products take at once
  static constexpr int64_t tasks_per_thread = 4;

  static Vec<A> exponential(Vec<A> x, A factor) { return exp(x * factor); }

  // A matrix of one head's keys.
  struct Keys {
    Rows<A> packed;
    Rows<const A> body, tail;
    int64_t tail_from, columns;

    Keys(Carver& carve, int64_t keys, int64_t columns, int /*uses*/)
        : packed(carve.rows<A>(round_up(keys, tile), round_up(columns, step))), columns(columns) {}

    void take(Rows<const T> from, int64_t keys) {
      bool compact = false;
      if constexpr (sizeof(T) == sizeof(A)) compact = from.stride == columns && columns % step == 0;
      if (!compact) {
        pack<T, A>(packed, from, keys, columns, round_up(keys, step), A(1));
        body = tail = constant(packed);
        tail_from = keys;
      } else if constexpr (sizeof(T) == sizeof(A)) {
        body = from;
        tail_from = keys % step == 0 ? keys : keys / tile * tile;
        const int64_t rest = keys - tail_from;
        pack<T, A>(packed, from.from(tail_from), rest, columns, round_up(rest, step), A(1));
        tail = constant(packed);
      }
    }
    // j0 is a multiple of `tile`.
    Rows<const A> from(int64_t j0) const { return j0 < tail_from ? body.from(j0) : tail; }
  };

  // A matrix of one block of queries: as it is, where it lies if it can, and transposed.
  struct Queries {
    Rows<A> packed, transposed;
    Rows<const A> rows;
    int64_t columns;
    int uses;

    Queries(Carver& carve, int64_t columns, int uses)
        : packed(carve.rows<A>(uses & in_to_keys ? width : 0, round_up(columns, lanes<A>()))),
          transposed(carve.rows<A>(uses & in_score ? round_up(columns, lanes<A>()) : 0, width)),
          columns(columns),
          uses(uses) {}

    void take(Rows<const T> from, int64_t queries, A factor) {
      if (uses & in_score) pack_transposed<T, A>(transposed, from, queries, columns, factor);
      if (!(uses & in_to_keys)) return;
      if constexpr (sizeof(T) == sizeof(A))
        if (factor == 1 && columns % lanes<A>() == 0) {
          rows = from;
          return;
        }
      pack<T, A>(packed, from, queries, columns, queries, factor);
      rows = constant(packed);
    }
  };

  // A tile in the form that to_queries and to_keys want: one that lies ready, or, `lane` by `lane`,
  // numbers value(offset in the tile, part), each asked for once and in the order of keys. `part`,
  // a constant of 0 to 3, says in which of four sums a sum over keys should have it.
  struct Operand {
    Rows<const A> tile;

    explicit Operand(Carver&) {}
    void take(Rows<A> from, int64_t /*keys*/, int64_t /*queries*/, int /*uses*/) {
      tile = constant(from);
    }
    template <class Value>
    void fill(Rows<A> in, int64_t keys, int64_t /*queries*/, int64_t lane, int /*uses*/,
              const Value& value) {
      tile = constant(in);
      const auto put = [&](int64_t at, int part) { store(in.data + at, value(at, part)); };
      int64_t j = 0, at = lane;
      for (; j + 4 <= keys; j += 4, at += 4 * in.stride) {
        put(at, 0);
        put(at + in.stride, 1);
        put(at + 2 * in.stride, 2);
        put(at + 3 * in.stride, 3);
      }
      for (; j < keys; ++j, at += in.stride) put(at, 0);
    }
  };

  // Sums over keys, transposed: [columns][queries].
  static Rows<A> query_sums(Carver& carve, int64_t columns) {
    return carve.rows<A>(round_up(columns, most(lanes<A>(), step)), width);
  }
  static void clear_query_sums(Rows<A> sums, int64_t columns) {
    clear(sums, round_up(columns, most(lanes<A>(), step)));
  }

  // Sums over queries, of all keys of a head: [keys][columns].
  static Rows<A> key_sums(Carver& carve, int64_t keys, int64_t columns) {
    return carve.rows<A>(round_up(keys, step), round_up(columns, lanes<A>()));
  }

  template <Into into>
  static void score(Rows<A> to, const Keys& keys, int64_t j0, int64_t count, const Queries& queries,
                    int64_t vectors) {
    product<Left::rows, into>(to, keys.from(j0), constant(queries.transposed), count, vectors,
                              keys.columns);
  }
  static void to_queries(Rows<A> sums, const Keys& keys, int64_t j0, int64_t count,
                         const Operand& operand, int64_t vectors) {
    product<Left::columns, Into::sum>(sums, keys.from(j0), operand.tile, keys.columns, vectors,
                                      count);
  }
  static void to_keys(Rows<A> sums, int64_t j0, int64_t count, const Operand& operand,
                      const Queries& queries, int64_t live_queries) {
    product<Left::rows, Into::sum>(sums.from(j0), operand.tile, queries.rows, count,
                                   vectors_for<A>(queries.columns), live_queries);
  }
};

}  // namespace GK_LEVEL
}  // namespace genkern
