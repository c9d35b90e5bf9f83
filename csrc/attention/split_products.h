// Products of fp32 on AMX, whose tiles multiply bf16. For kernel files.
//
// A float has 24 digits, three numbers of bf16 have 8 each: x = x0 + x1 + x2 exactly. Of the nine
// products of x and y in pieces the six largest are summed up in fp32; what is left out, x1·y2 and
// smaller, is below half a unit in the last place of x·y. Six tile products take 2/5 of the time of
// the fused multiply-adds that they stand for.
//
// A tile of a matrix is 16 rows of 16 pairs of bf16, 1 KB in a row; its three pieces follow one
// another.
#pragma once

#include "amx.h"

namespace genkern {
namespace GK_LEVEL {

constexpr int split_pieces = 3;
constexpr int64_t tile_words = tile_rows * tile_depth / 2;  // of one piece of a tile
constexpr int64_t split_words = split_pieces * tile_words;  // of all pieces

// ---- Splitting ----------------------------------------------------------------------------------

constexpr int upper_half = int(0xffff0000);

// x as three floats that are numbers of bf16 in their upper halves; 0 where not `seen`.
inline void split(Vec<float> x, __mmask16 seen, Bits512 (&piece)[split_pieces]) {
  const Bits512 upper = _mm512_set1_epi32(upper_half), half = _mm512_set1_epi32(0x8000);
  const auto as_float = [](Bits512 bits) { return bit_cast<__m512>(bits); };
  piece[0] = _mm512_maskz_and_epi32(seen, _mm512_add_epi32(bit_cast<Bits512>(x), half), upper);
  const __m512 rest = _mm512_maskz_sub_ps(seen, bit_cast<__m512>(x), as_float(piece[0]));
  // To nearest, so that what the products leave out has no sign of its own.
  piece[1] = _mm512_and_epi32(_mm512_add_epi32(bit_cast<Bits512>(rest), half), upper);
  piece[2] = bit_cast<Bits512>(_mm512_sub_ps(rest, as_float(piece[1])));
}

// Pairs of numbers in upper halves. The lower ones hold digits where a float is subnormal.
inline Bits512 pairs_of(Bits512 even_below, Bits512 odd) {
  constexpr int even_or_upper_odd = 0xf8;
  return _mm512_ternarylogic_epi32(even_below, odd, _mm512_set1_epi32(upper_half),
                                   even_or_upper_odd);
}

// Row `row` of a tile: pairs of `even` and `odd`.
inline void store_pairs(uint32_t* tile, int64_t row, const Bits512 (&even)[split_pieces],
                        const Bits512 (&odd)[split_pieces]) {
  for (int p = 0; p < split_pieces; ++p)
    store_bits(tile + p * tile_words + row * 16, pairs_of(_mm512_srli_epi32(even[p], 16), odd[p]));
}
inline void store_pairs(uint32_t* tile, int64_t row, Vec<float> even, Vec<float> odd) {
  Bits512 first[split_pieces], second[split_pieces];
  split(even, 0xffff, first);
  split(odd, 0xffff, second);
  store_pairs(tile, row, first, second);
}

// ---- Products -----------------------------------------------------------------------------------

// Tiles of a matrix on one side of a product: the tile of row or column r and step s of the depth
// is at data + r·line + s·step.
struct SplitTiles {
  const uint32_t* data;
  int64_t line, step;
};

// c += from, `high` × `wide` tiles.
template <int high, int wide>
inline void add_block(Rows<float> c, const float* from) {
  for (int i = 0; i < high * tile_rows; ++i)
    for (int w = 0; w < wide; ++w) {
      float* to = c.row(i) + w * tile_rows;
      store(to, load(to) + load(from + (i * wide + w) * tile_rows));
    }
}

// Rounds of tile products, one of every pair of tiles, for a step of the depth.
constexpr int64_t split_rounds = 6;

// Nothing to do between them.
struct Idle {
  void operator()() const {}
};

// One block of C, `high` × `wide` tiles (at most 2 × 2). `between` runs after each round.
template <Into into, int high, int wide, class Between>
inline void split_block(Rows<float> c, SplitTiles a, SplitTiles b, int64_t steps,
                        const Between& between) {
  _tile_zero(0);
  if (wide > 1) _tile_zero(1);
  if (high > 1) _tile_zero(2);
  if (high > 1 && wide > 1) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t *left = a.data + s * a.step, *right = b.data + s * b.step;
    const auto take_left = [&](int piece) {
      _tile_loadd(4, left + piece * tile_words, 64);
      if (high > 1) _tile_loadd(5, left + a.line + piece * tile_words, 64);
    };
    const auto take_right = [&](int piece) {
      _tile_loadd(6, right + piece * tile_words, 64);
      if (wide > 1) _tile_loadd(7, right + b.line + piece * tile_words, 64);
    };
    const auto multiply_tiles = [&] {
      _tile_dpbf16ps(0, 4, 6);
      if (wide > 1) _tile_dpbf16ps(1, 4, 7);
      if (high > 1) _tile_dpbf16ps(2, 5, 6);
      if (high > 1 && wide > 1) _tile_dpbf16ps(3, 5, 7);
      between();
    };
    // In this order each piece but one is loaded once.
    take_left(2);
    take_right(0);
    multiply_tiles();
    take_left(1);
    multiply_tiles();
    take_right(1);
    multiply_tiles();
    take_left(0);
    multiply_tiles();
    take_right(2);
    multiply_tiles();
    take_right(0);
    multiply_tiles();
  }
  alignas(64) float apart[into == Into::sum ? high * wide * tile_rows * tile_rows : 1];
  float* to = into == Into::sum ? apart : c.data;
  const int64_t stride = into == Into::sum ? wide * tile_rows : c.stride;
  float* lower = to + tile_rows * stride;
  _tile_stored(0, to, stride * 4);
  if (wide > 1) _tile_stored(1, to + tile_rows, stride * 4);
  if (high > 1) _tile_stored(2, lower, stride * 4);
  if (high > 1 && wide > 1) _tile_stored(3, lower + tile_rows, stride * 4);
  if (into == Into::sum) {
    // Added last: a block's sum is small beside the running one, and keeps more digits so. (The
    // intrinsics do not tell the compiler which memory they write.)
    asm volatile("" : : : "memory");
    add_block<high, wide>(c, apart);
  }
}

// C [rows][columns] (+)= A [rows][depth] · B [depth][columns]. All counts are rounded up to whole
// tiles, and so much must lie in memory.
template <Into into, class Between = Idle>
inline void split_product(Rows<float> c, SplitTiles a, SplitTiles b, int64_t rows, int64_t columns,
                          int64_t depth, const Between& between = {}) {
  // The intrinsics do not tell the compiler that they read memory.
  asm volatile("" : : : "memory");
  const int64_t steps = ceil_div(depth, tile_depth);
  for (int64_t i = 0; i < rows; i += 2 * tile_rows, a.data += 2 * a.line) {
    const bool high = rows - i > tile_rows;
    SplitTiles right = b;
    for (int64_t j = 0; j < columns; j += 2 * tile_rows, right.data += 2 * b.line) {
      const bool wide = columns - j > tile_rows;
      const Rows<float> to{c.row(i) + j, c.stride};
      if (high && wide)
        split_block<into, 2, 2>(to, a, right, steps, between);
      else if (high)
        split_block<into, 2, 1>(to, a, right, steps, between);
      else if (wide)
        split_block<into, 1, 2>(to, a, right, steps, between);
      else
        split_block<into, 1, 1>(to, a, right, steps, between);
    }
  }
}

}  // namespace GK_LEVEL
}  // namespace genkern
