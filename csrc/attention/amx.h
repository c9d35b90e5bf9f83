// The engine of attention's passes on AMX: bf16 in, sums in fp32. For kernel files.
//
// AMX multiplies tiles: C [16][16] fp32 += A [16][32] bf16 · B [32][16] bf16, B's rows interleaved
// in pairs. Here a matrix that comes from the left lies in rows, one from the right in pairs of
// rows (`Pair`), both padded by zeros to whole tiles:
//
//                 left                            right
//   score         keys [keys][features]           queries, in pairs of features
//   to_queries    keysᵀ, in panels of a tile      tile, in pairs of keys
//   to_keys       tile [keys][queries]            queries, in pairs of queries
//
// The passes' tiles are fp32 and centred before they are rounded to bf16 for a product.
#pragma once

#include "operands.h"

namespace genkern {
namespace GK_LEVEL {

// Two elements of neighbouring rows in one column.
struct Pair {
  BFloat16 even, odd;
};

// ---- Tiles --------------------------------------------------------------------------------------

// This thread's tile registers, all of 16 rows of 64 bytes, from construction to destruction.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) Shape {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    // GCC 12's _tile_loadconfig does not tell the compiler that all 64 bytes are read.
    asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// The tiles; and numbers below the normal ones are zero, as AMX itself takes them.
class AmxSession {
 public:
  AmxSession() : control(_mm_getcsr()) {
    _mm_setcsr(control | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  }
  ~AmxSession() { _mm_setcsr(control); }

 private:
  unsigned control;
  AmxTiles tiles;
};

constexpr int tile_rows = 16;   // of A and C; columns of C
constexpr int tile_depth = 32;  // what one product sums over

// One block of C, `high` × `wide` tiles (at most 2 × 2): each loaded tile serves two products. A
// lies in panels of `panel` columns, `next` elements apart.
template <Into into, int high, int wide>
inline void tile_block(Rows<float> c, Rows<const BFloat16> a, Rows<const Pair> b, int64_t depth,
                       int64_t panel, int64_t next) {
  const int64_t c_bytes = c.stride * 4, a_bytes = a.stride * 2, b_bytes = b.stride * 4;
  float* lower = c.row(tile_rows);
  if (into == Into::sum) {
    _tile_loadd(0, c.data, c_bytes);
    if (wide > 1) _tile_loadd(1, c.data + tile_rows, c_bytes);
    if (high > 1) _tile_loadd(2, lower, c_bytes);
    if (high > 1 && wide > 1) _tile_loadd(3, lower + tile_rows, c_bytes);
  } else {
    _tile_zero(0);
    if (wide > 1) _tile_zero(1);
    if (high > 1) _tile_zero(2);
    if (high > 1 && wide > 1) _tile_zero(3);
  }
  const BFloat16* left = a.data;
  for (int64_t k = 0, in_panel = 0; k < depth; k += tile_depth) {
    const Pair* right = b.row(k / 2);
    _tile_loadd(4, left, a_bytes);
    _tile_loadd(6, right, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (wide > 1) {
      _tile_loadd(7, right + tile_rows, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (high > 1) {
      _tile_loadd(5, left + tile_rows * a.stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (wide > 1) _tile_dpbf16ps(3, 5, 7);
    }
    left += tile_depth;
    in_panel += tile_depth;
    if (in_panel == panel) {
      left += next - panel;
      in_panel = 0;
    }
  }
  _tile_stored(0, c.data, c_bytes);
  if (wide > 1) _tile_stored(1, c.data + tile_rows, c_bytes);
  if (high > 1) _tile_stored(2, lower, c_bytes);
  if (high > 1 && wide > 1) _tile_stored(3, lower + tile_rows, c_bytes);
}

// C [rows][columns] (+)= A [rows][depth] · B [depth][columns]. All counts are rounded up to whole
// tiles, and so much must lie in memory. A may lie in panels of `panel` columns, `next` elements
// apart.
template <Into into>
inline void tile_product(Rows<float> c, Rows<const BFloat16> a, Rows<const Pair> b, int64_t rows,
                         int64_t columns, int64_t depth, int64_t panel = 0, int64_t next = 0) {
  // The intrinsics do not tell the compiler that they read memory.
  asm volatile("" : : : "memory");
  for (int64_t i = 0; i < rows; i += 2 * tile_rows) {
    const bool high = rows - i > tile_rows;
    for (int64_t j = 0; j < columns; j += 2 * tile_rows) {
      const bool wide = columns - j > tile_rows;
      const Rows<float> to{c.row(i) + j, c.stride};
      const Rows<const Pair> right{b.data + j, b.stride};
      if (high && wide)
        tile_block<into, 2, 2>(to, a.from(i), right, depth, panel, next);
      else if (high)
        tile_block<into, 2, 1>(to, a.from(i), right, depth, panel, next);
      else if (wide)
        tile_block<into, 1, 2>(to, a.from(i), right, depth, panel, next);
      else
        tile_block<into, 1, 1>(to, a.from(i), right, depth, panel, next);
    }
  }
}

// ---- Forms of matrices --------------------------------------------------------------------------

// 32 elements of bf16.
using Bits512 = __m512i;

inline Bits512 load_bits(const void* from) { return _mm512_loadu_si512(from); }
inline void store_bits(void* to, Bits512 x) { _mm512_storeu_si512(to, x); }

// 16 numbers of each, rounded: `low` in the lower half; 0 where not `seen`.
inline Bits512 round_both(Vec<float> low, Vec<float> high, __mmask32 seen) {
  return bit_cast<Bits512>(
      _mm512_maskz_cvtne2ps_pbh(seen, bit_cast<__m512>(high), bit_cast<__m512>(low)));
}

// The pairs of 16 numbers of an even row and the odd row below it, rounded half up: a fifth of the
// time of the instruction that rounds half to even and a shuffle.
inline Bits512 round_pair(Vec<float> even, Vec<float> odd) {
  const Bits512 half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
  const Bits512 low = _mm512_srli_epi32(_mm512_add_epi32(bit_cast<Bits512>(even), half), 16);
  return _mm512_ternarylogic_epi32(low, _mm512_add_epi32(bit_cast<Bits512>(odd), half), upper,
                                   0xf8 /* low | (odd & upper) */);
}

// Half-words 0, 16, 1, 17, …: the pairs of a register's two halves.
inline Bits512 interleave_halves(Bits512 x) {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(load_bits(order), x);
}

// A copy of `rows` × `columns` elements times 1, -1 or 0, zeros up to `to_rows` × to.stride, a
// multiple of 32.
inline void pack_rows(Rows<BFloat16> to, Rows<const BFloat16> from, int64_t rows, int64_t columns,
                      int64_t to_rows, float factor) {
  const Bits512 sign = _mm512_set1_epi16(factor < 0 ? short(0x8000) : short(0));
  for (int64_t c = 0; c < to.stride; c += tile_depth) {
    const int64_t live = larger(0, smaller(columns - c, tile_depth));
    const __mmask32 seen = __mmask32((uint64_t(1) << live) - 1);
    for (int64_t i = 0; i < rows; ++i) {
      const Bits512 x = _mm512_maskz_loadu_epi16(seen, from.row(i) + c);
      store_bits(to.row(i) + c, _mm512_xor_si512(x, sign));
    }
    for (int64_t i = rows; i < to_rows; ++i) store_bits(to.row(i) + c, Bits512{});
  }
  if (factor == 0)  // what is not finite becomes NaN
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) store_one(to.row(i) + c, load_one(to.row(i) + c) * 0.f);
}

// Rows 2p and 2p + 1 become row p of pairs. Columns are padded to whole tiles in both.
inline void pair_rows(Rows<Pair> to, Rows<const BFloat16> from, int64_t rows, int64_t columns) {
  for (int64_t p = 0; p < rows / 2; ++p)
    for (int64_t c = 0; c < columns; c += tile_rows) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(from.row(2 * p) + c));
      const __m256i odd = _mm256_loadu_si256((const __m256i*)(from.row(2 * p + 1) + c));
      const Bits512 both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      store_bits(to.row(p) + c, interleave_halves(both));
    }
}

// 2^x: as exact as operands in bf16 need (4e-6), exactly 1 at 0, and 0 below the normal numbers by
// the session's mode.
inline Vec<float> power(Vec<float> x) {
  const Vec<float> r = bit_cast<Vec<float>>(_mm512_reduce_ps(bit_cast<__m512>(x), 0x01));
  Vec<float> p = splat(0.0135557465f);  // of r = x - floor(x)
  p = p * r + 0.0520323701f;
  p = p * r + 0.2413797677f;
  p = p * r + 0.6930321455f;
  p = p * r + 1.f;
  return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(x)));
}

// Matrices of 32-bit words, for `transpose`, which only moves them.
template <class T>
inline Rows<float> words(Rows<T> of) {
  return {reinterpret_cast<float*>(of.data), of.stride * int64_t(sizeof(T)) / 4};
}

// ---- The engine ---------------------------------------------------------------------------------

struct AmxEngine {
  using T = BFloat16;
  using A = float;
  using Session = AmxSession;
  static constexpr int64_t width = 64;
  static constexpr int64_t tile = 64;
  static constexpr int64_t grain = tile_depth;
  static constexpr int64_t tasks_per_thread = 2;  // each packs its keys

  static Vec<A> exponential(Vec<A> x, A factor) { return power(x * (factor * 1.44269504f)); }

  struct Keys {
    Rows<T> rows;
    Rows<T> panels;  // [panel][columns][tile], panel after panel
    Rows<Pair> pairs;
    int64_t columns;
    int uses;

    Keys(Carver& carve, int64_t keys, int64_t columns, int uses)
        : rows(carve.rows<T>(round_up(keys, tile), round_up(columns, tile_depth))),
          panels(carve.rows<T>(
              uses & in_to_queries ? round_up(keys, tile) / tile * round_up(columns, tile_rows) : 0,
              tile)),
          pairs(
              carve.rows<Pair>(uses & in_to_queries ? tile / 2 : 0, round_up(columns, tile_rows))),
          columns(columns),
          uses(uses) {}

    void take(Rows<const T> from, int64_t keys) {
      pack_rows(rows, from, keys, columns, round_up(keys, tile), 1);
      if (!(uses & in_to_queries)) return;
      for (int64_t j = 0; j < keys; j += tile) {
        pair_rows(pairs, constant(rows.from(j)), tile, pairs.stride);
        transpose<float>(words(panel(j)), constant(words(pairs)), tile / 2, pairs.stride);
      }
    }
    Rows<T> panel(int64_t j0) const {
      return panels.from(j0 / tile * round_up(columns, tile_rows));
    }
  };

  struct Queries {
    Rows<T> rows;
    Rows<Pair> feature_pairs, query_pairs;
    int64_t columns;
    int uses;

    Queries(Carver& carve, int64_t columns, int uses)
        : rows(carve.rows<T>(width, round_up(columns, tile_depth))),
          feature_pairs(carve.rows<Pair>(rows.stride / 2, width)),
          query_pairs(carve.rows<Pair>(uses & in_to_keys ? width / 2 : 0, rows.stride)),
          columns(columns),
          uses(uses) {}

    void take(Rows<const T> from, int64_t queries, A factor) {
      const int64_t whole = round_up(queries, tile_depth);
      pack_rows(rows, from, queries, columns, whole, factor);
      if (uses & in_score)
        transpose<float>(words(feature_pairs), constant(words(rows)), whole, rows.stride / 2);
      if (uses & in_to_keys) pair_rows(query_pairs, constant(rows), whole, rows.stride);
    }
  };

  struct Operand {
    Rows<T> rows;
    Rows<Pair> pairs;

    explicit Operand(Carver& carve)
        : rows(carve.rows<T>(tile, width)), pairs(carve.rows<Pair>(tile / 2, width)) {}

    void take(Rows<A> from, int64_t keys, int64_t queries, int uses) {
      for (int64_t lane = 0; lane < queries; lane += lanes<A>())
        fill(from, keys, queries, lane, uses,
             [&](int64_t at, int) { return load(from.data + at); });
    }

    template <class Value>
    void fill(Rows<A> in, int64_t keys, int64_t queries, int64_t lane, int uses,
              const Value& value) {
      // Lanes beyond the queries may hold anything, also infinities.
      const int64_t live = smaller(queries - lane, lanes<A>());
      const __mmask32 seen = ((1u << live) - 1) * 0x10001u;
      int64_t j = 0, at = lane;
      for (; j + 2 <= keys; j += 2, at += 2 * in.stride) {
        const Vec<A> even = value(at, 0);
        put(j, lane, uses, round_both(even, value(at + in.stride, 1), seen));
      }
      if (j < keys) {
        put(j, lane, uses, round_both(value(at, 0), Vec<A>{}, seen));
        j += 2;
      }
      for (const int64_t whole = round_up(keys, tile_depth); j < whole; j += 2)
        put(j, lane, uses, Bits512{});
      // Products take queries two vectors at a time.
      const int64_t next = lane + lanes<A>();
      if ((uses & in_to_keys) && next >= queries && next % tile_depth != 0)
        for (j = 0; j < round_up(keys, tile_rows); j += 2) put(j, next, in_to_keys, Bits512{});
    }

   private:
    // 16 numbers of row j in the lower half, of row j + 1 in the upper.
    void put(int64_t j, int64_t lane, int uses, Bits512 both) {
      if (uses & in_to_queries) store_bits(pairs.row(j / 2) + lane, interleave_halves(both));
      if (uses & in_to_keys) {
        _mm256_storeu_si256((__m256i*)(rows.row(j) + lane), _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i*)(rows.row(j + 1) + lane), _mm512_extracti64x4_epi64(both, 1));
      }
    }
  };

  static Rows<A> query_sums(Carver& carve, int64_t columns) {
    return carve.rows<A>(round_up(columns, tile_rows), width);
  }
  static void clear_query_sums(Rows<A> sums, int64_t columns) {
    clear(sums, round_up(columns, tile_rows));
  }
  static Rows<A> key_sums(Carver& carve, int64_t keys, int64_t columns) {
    return carve.rows<A>(round_up(keys, grain), round_up(columns, tile_rows));
  }

  template <Into into>
  static void score(Rows<A> to, const Keys& keys, int64_t j0, int64_t count, const Queries& queries,
                    int64_t vectors) {
    tile_product<into>(to, constant(keys.rows.from(j0)), constant(queries.feature_pairs), count,
                       vectors * 16, keys.rows.stride);
  }
  static void to_queries(Rows<A> sums, const Keys& keys, int64_t j0, int64_t count,
                         const Operand& operand, int64_t vectors) {
    tile_product<Into::sum>(sums, constant(keys.panel(j0)), constant(operand.pairs), keys.columns,
                            vectors * 16, count);
  }
  static void to_keys(Rows<A> sums, int64_t j0, int64_t count, const Operand& operand,
                      const Queries& queries, int64_t live_queries) {
    tile_product<Into::sum>(sums.from(j0), constant(operand.rows), constant(queries.query_pairs),
                            count, queries.columns, live_queries);
  }
};

}  // namespace GK_LEVEL
}  // namespace genkern
