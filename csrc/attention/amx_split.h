// The engine of attention's passes for fp32 on AMX, whose tiles multiply bf16. For kernel files.
//
// Its tiles hold floats in pieces (split_products.h). What the pairs of a tile are, and how tiles
// follow one another:
//
//                 left                                      right
//   score         [keys][features], features f and f + 16   [features][queries], the same
//   to_queries    panels of 32 keys, [columns][keys]        [keys][queries], neighbouring keys
//   to_keys       [keys][queries], queries i and i + 16     [queries][columns], the same
//
// An infinity cannot be split, inf - inf being NaN: where the processor notes such an operation,
// the call is left to fused multiply-adds. A NaN is noted too.
#pragma once

#include "split_products.h"

namespace genkern {
namespace GK_LEVEL {

// ---- The engine ---------------------------------------------------------------------------------

// The tiles, and the processor's note of an invalid operation, which stays until it is cleared.
class SplitSession {
 public:
  SplitSession() { _mm_setcsr(_mm_getcsr() & ~invalid_operation); }
  bool noted_invalid() const { return _mm_getcsr() & invalid_operation; }

 private:
  static constexpr unsigned invalid_operation = 1;
  AmxTiles tiles;
};
inline bool refuses(const SplitSession& session) { return session.noted_invalid(); }

struct SplitEngine {
  using T = float;
  using A = float;
  using Session = SplitSession;
  static constexpr int64_t width = 64;
  static constexpr int64_t tile = 32;
  static constexpr int64_t grain = tile_depth;
  static constexpr int64_t tasks_per_thread = 2;  // each packs its keys

  // 2^(factor·log2(e)·x) within 2 units in the last place, exactly 1 at 0.
  static Vec<A> exponential(Vec<A> x, A factor) {
    const Vec<A> y = x * (factor * 1.44269504f);
    const Vec<A> r = bit_cast<Vec<A>>(_mm512_reduce_ps(bit_cast<__m512>(y), 0x01));  // y - floor(y)
    Vec<A> p = splat(0.000217150227f);
    p = p * r + 0.00124408782f;
    p = p * r + 0.00967806391f;
    p = p * r + 0.0554841533f;
    p = p * r + 0.240229517f;
    p = p * r + 0.693147004f;
    p = p * r + 1.f;
    // Below the normal numbers: 0. A NaN stays.
    const __mmask16 stays =
        _mm512_cmp_ps_mask(bit_cast<__m512>(y), _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return bit_cast<Vec<A>>(
        _mm512_maskz_scalef_ps(stays, bit_cast<__m512>(p), bit_cast<__m512>(y)));
  }

  struct Keys {
    uint32_t *rows, *panels;
    int64_t columns, feature_steps, column_tiles;
    int uses;

    Keys(Carver& carve, int64_t keys, int64_t columns, int uses)
        : columns(columns),
          feature_steps(ceil_div(columns, tile_depth)),
          column_tiles(ceil_div(columns, tile_rows)),
          uses(uses) {
      const int64_t whole = round_up(keys, tile);
      rows = carve.array<uint32_t>(uses & in_score ? whole / tile_rows * feature_steps * split_words
                                                   : 0);
      panels = carve.array<uint32_t>(
          uses & in_to_queries ? whole / tile_depth * column_tiles * split_words : 0);
    }

    void take(Rows<const T> from, int64_t keys) {
      if (uses & in_score) take_rows(from, keys);
      if (uses & in_to_queries) take_panels(from, keys);
    }
    SplitTiles of_score(int64_t j0) const {
      const int64_t line = feature_steps * split_words;
      return {rows + j0 / tile_rows * line, line, split_words};
    }
    SplitTiles of_to_queries(int64_t j0) const {
      return {panels + j0 / tile_depth * column_tiles * split_words, split_words,
              column_tiles * split_words};
    }

   private:
    static Vec<A> features(const T* row, int64_t first, int64_t columns) {
      return first < columns ? load_some(row + first, columns - first) : Vec<A>{};
    }
    void take_rows(Rows<const T> from, int64_t keys) {
      for (int64_t j = 0; j < round_up(keys, tile_rows); ++j)
        for (int64_t s = 0; s < feature_steps; ++s) {
          const int64_t f = s * tile_depth, there = j < keys ? columns : 0;
          uint32_t* to = rows + (j / tile_rows * feature_steps + s) * split_words;
          store_pairs(to, j % tile_rows, features(from.row(j), f, there),
                      features(from.row(j), f + 16, there));
        }
    }
    void take_panels(Rows<const T> from, int64_t keys) {
      for (int64_t j = 0; j < round_up(keys, tile_depth); j += tile_depth)
        for (int64_t c = 0; c < column_tiles; ++c) {
          Vec<A> even[16], odd[16];
          for (int64_t l = 0; l < 16; ++l) {
            const auto row = [&](int64_t key) {
              return key < keys ? features(from.row(key), c * 16, columns) : Vec<A>{};
            };
            even[l] = row(j + 2 * l);
            odd[l] = row(j + 2 * l + 1);
          }
          transpose_square<8, A>(even);
          transpose_square<8, A>(odd);
          uint32_t* to = panels + (j / tile_depth * column_tiles + c) * split_words;
          for (int64_t l = 0; l < 16; ++l) store_pairs(to, l, even[l], odd[l]);
        }
    }
  };

  struct Queries {
    Rows<A> rows, transposed;
    uint32_t *features, *queries;
    int64_t columns;
    int uses;

    Queries(Carver& carve, int64_t columns, int uses)
        : rows(carve.rows<A>(width, round_up(columns, tile_depth))),
          transposed(carve.rows<A>(uses & in_score ? rows.stride : 0, width)),
          columns(columns),
          uses(uses) {
      const int64_t tiles = rows.stride / tile_depth * (width / tile_rows);
      features = carve.array<uint32_t>(uses & in_score ? tiles * split_words : 0);
      queries = carve.array<uint32_t>(uses & in_to_keys ? tiles * split_words : 0);
    }

    void take(Rows<const T> from, int64_t count, A factor) {
      const int64_t whole = round_up(count, tile_depth);
      pack<T, A>(rows, from, count, columns, whole, factor);
      if (uses & in_score) {
        transpose<A>(transposed, constant(rows), whole, rows.stride);
        for (int64_t f = 0; f < rows.stride; ++f) {
          if (f % tile_depth >= 16) continue;
          for (int64_t i = 0; i < whole; i += 16)
            store_pairs(features + (f / tile_depth * (width / 16) + i / 16) * split_words,
                        f % tile_depth, load(transposed.row(f) + i),
                        load(transposed.row(f + 16) + i));
        }
      }
      if (uses & in_to_keys)
        for (int64_t i = 0; i < whole; ++i) {
          if (i % tile_depth >= 16) continue;
          for (int64_t c = 0; c < round_up(columns, 16); c += 16)
            store_pairs(queries + (i / tile_depth * (rows.stride / 16) + c / 16) * split_words,
                        i % tile_depth, load(rows.row(i) + c), load(rows.row(i + 16) + c));
        }
    }
    SplitTiles of_score() const { return {features, split_words, width / 16 * split_words}; }
    SplitTiles of_to_keys() const { return {queries, split_words, rows.stride / 16 * split_words}; }
  };

  struct Operand {
    uint32_t *pairs, *rows;

    explicit Operand(Carver& carve)
        : pairs(carve.array<uint32_t>(tile / tile_depth * (width / 16) * split_words)),
          rows(carve.array<uint32_t>(tile / 16 * (width / tile_depth) * split_words)) {}

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
      const __mmask16 seen = __mmask16((1u << live) - 1);
      Bits512 even[split_pieces], odd[split_pieces];
      uint32_t* to = pairs_of_lane(lane);
      int64_t j = 0, at = lane;
      for (; j + 2 <= keys; j += 2, at += 2 * in.stride) {
        split(value(at, 0), seen, even);
        split(value(at + in.stride, 1), seen, odd);
        store_pairs(to + j / tile_depth * step_words, j % tile_depth / 2, even, odd);
      }
      split(Vec<A>{}, 0, odd);
      for (const int64_t whole = round_up(keys, tile_depth); j < whole; j += 2) {
        split(j < keys ? value(at, 0) : Vec<A>{}, seen, even);
        store_pairs(to + j / tile_depth * step_words, j % tile_depth / 2, even, odd);
      }
      const int64_t next = lane + lanes<A>();
      if ((uses & in_to_keys) && (next % tile_depth == 0 || next >= queries))
        fill_rows(keys, lane / tile_depth, next % tile_depth == 0);
    }

    SplitTiles of_to_queries() const { return {pairs, split_words, step_words}; }
    SplitTiles of_to_keys() const { return {rows, width / tile_depth * split_words, split_words}; }

   private:
    static constexpr int64_t step_words = width / 16 * split_words;

    uint32_t* pairs_of_lane(int64_t lane) const { return pairs + lane / 16 * split_words; }

    // From pairs of keys to pairs of queries, 32 queries.
    void fill_rows(int64_t keys, int64_t step, bool has_odd) {
      const uint32_t* from = pairs_of_lane(step * tile_depth);
      const Bits512 upper = _mm512_set1_epi32(upper_half);
      for (int64_t j = 0; j < keys; j += 2) {
        const uint32_t* first = from + j / tile_depth * step_words + j % tile_depth / 2 * 16;
        uint32_t* to = rows + (j / 16 * (width / tile_depth) + step) * split_words + j % 16 * 16;
        for (int p = 0; p < split_pieces; ++p, first += tile_words, to += tile_words) {
          const Bits512 even = load_bits(first);
          const Bits512 odd = has_odd ? load_bits(first + split_words) : Bits512{};
          store_bits(to, pairs_of(_mm512_andnot_epi32(upper, even), _mm512_slli_epi32(odd, 16)));
          store_bits(to + 16, pairs_of(_mm512_srli_epi32(even, 16), odd));
        }
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
    split_product<into>(to, keys.of_score(j0), queries.of_score(), count, vectors * 16,
                        keys.columns);
  }
  static void to_queries(Rows<A> sums, const Keys& keys, int64_t j0, int64_t count,
                         const Operand& operand, int64_t vectors) {
    split_product<Into::sum>(sums, keys.of_to_queries(j0), operand.of_to_queries(), keys.columns,
                             vectors * 16, count);
  }
  static void to_keys(Rows<A> sums, int64_t j0, int64_t count, const Operand& operand,
                      const Queries& queries, int64_t live_queries) {
    split_product<Into::sum>(sums.from(j0), operand.of_to_keys(), queries.of_to_keys(), count,
                             queries.columns, live_queries);
  }
};

}  // namespace GK_LEVEL
}  // namespace genkern
