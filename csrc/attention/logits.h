// From products to logits: scale, softcap, biases; and dropout's mask. For kernel files.
//
// A tile of logits lies as [keys][queries]. The sign of the scale is in the packed queries, which
// stays exact, so a tile arrives as X̂ = sign·q·k with X = magnitude·X̂. Without softcap and bias it
// stays so, and the magnitude multiplies X̂ - shift inside exp's argument: in this order the largest
// P is exactly 1. Otherwise the tile becomes S itself.
#pragma once

#include "packing.h"
#include "sequences.h"

namespace genkern {
namespace GK_LEVEL {

template <class A>
struct Scale {
  A factor, sign, magnitude;

  explicit Scale(double scale)
      : factor(A(scale)),
        sign(factor > 0   ? 1
             : factor < 0 ? -1
                          : 0),
        magnitude(factor == 0  ? A(1)
                  : factor < 0 ? -factor
                               : factor) {}
};

inline bool is_plain(const AttentionProblem& problem) {
  return problem.softcap == 0 && !problem.bias.data && !problem.key_bias.data;
}

// ---- Biases -------------------------------------------------------------------------------------

struct Boolean {
  uint8_t seen;
};

template <class A>
constexpr A minus_infinity = A(-__builtin_inf());

template <class A, class S>
inline A bias_number(const S* at) {
  if constexpr (sizeof(S) == 1)
    return at->seen ? A(0) : minus_infinity<A>;
  else
    return A(load_one(at));
}

// n ≤ lanes numbers of a bias, `stride` apart; the other lanes are 0.
template <class A, class S>
inline Vec<A> bias_vector(const S* at, int64_t stride, int64_t n) {
  if constexpr (sizeof(S) > 1)
    if (stride == 1) return load_part(at, n);
  A numbers[lanes<A>()] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = bias_number<A>(at + i * stride);
  return load(numbers);
}

// tile[j, i] += bias of query i0 + i and key j0 + j.
template <class A, class S>
inline void add_bias_of_type(Rows<A> tile, const Bias& bias, const Block& block, int64_t j0,
                             int64_t keys) {
  constexpr int L = lanes<A>();
  const S* all = static_cast<const S*>(bias.data) + block.sequence.batch * bias.batch +
                 block.head * bias.head + block.i0 * bias.row + j0 * bias.key;
  const auto add = [&](int64_t j, int64_t i, Vec<A> x) {
    store(tile.row(j) + i, load(tile.row(j) + i) + x);
  };
  for (int64_t i = 0; i < block.queries; i += L) {
    const int64_t live = smaller(L, block.queries - i);
    if (bias.row == 0) {
      for (int64_t j = 0; j < keys; ++j) add(j, i, splat(bias_number<A>(all + j * bias.key)));
    } else if (bias.key == 0) {
      const Vec<A> column = bias_vector<A>(all + i * bias.row, bias.row, live);
      for (int64_t j = 0; j < keys; ++j) add(j, i, column);
    } else {
      for (int64_t j = 0; j < keys; j += L) {
        const int64_t some = smaller(L, keys - j);
        Vec<A> x[L];
        for (int64_t l = 0; l < L; ++l)
          x[l] = l < live ? bias_vector<A>(all + (i + l) * bias.row + j * bias.key, bias.key, some)
                          : Vec<A>{};
        transpose_square<L / 2, A>(x);
        for (int64_t l = 0; l < some; ++l) add(j + l, i, x[l]);
      }
    }
  }
}

template <class T>
inline void add_bias(Rows<Acc<T>> tile, const Bias& bias, const Block& block, int64_t j0,
                     int64_t keys) {
  using A = Acc<T>;
  if (!bias.data) return;
  if (bias.type == BiasType::boolean)
    add_bias_of_type<A, Boolean>(tile, bias, block, j0, keys);
  else if (bias.type == BiasType::arithmetic)
    add_bias_of_type<A, A>(tile, bias, block, j0, keys);
  else
    add_bias_of_type<A, T>(tile, bias, block, j0, keys);
}

template <class A>
inline void add_key_bias(Rows<A> tile, const RowNumbers& key_bias, const Block& block, int64_t j0,
                         int64_t keys, int64_t vectors) {
  if (!key_bias.data) return;
  const A* number = key_numbers<A>(key_bias, block.sequence, block.kv_head) + j0;
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t w = 0; w < vectors; ++w) {
      A* at = tile.row(j) + w * lanes<A>();
      store(at, load(at) + number[j]);
    }
}

// ---- Sums over keys -----------------------------------------------------------------------------

// Σ of body(j) over the keys of a tile, in four sums side by side: one alone would round as often
// as there are keys, and a row's sums (of exp, P·dP, …) enter each of its numbers.
template <class A, class Body>
inline Vec<A> sum_over_keys(int64_t keys, const Body& body) {
  Vec<A> sums[4] = {};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    sums[0] += body(j);
    sums[1] += body(j + 1);
    sums[2] += body(j + 2);
    sums[3] += body(j + 3);
  }
  for (; j < keys; ++j) sums[j % 4] += body(j);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// ---- Logits -------------------------------------------------------------------------------------

// body(offset in elements) for every vector of a tile.
template <class A, class Body>
inline void each_vector(int64_t stride, int64_t keys, int64_t vectors, const Body& body) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t w = 0; w < vectors; ++w) body(j * stride + w * lanes<A>());
}

// X̂ becomes the logits that exp wants, hidden ones -inf. `tanh_tile`: where tanh(X/softcap) is
// kept, or null.
template <class T>
inline void finish_logits(const AttentionProblem& problem, Rows<Acc<T>> tile, Acc<T>* tanh_tile,
                          const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
  using A = Acc<T>;
  if (!is_plain(problem)) {
    const A magnitude = Scale<A>(problem.scale).magnitude;
    const A softcap = A(problem.softcap);
    if (softcap == 0) {
      each_vector<A>(tile.stride, keys, vectors,
                     [&](int64_t at) { store(tile.data + at, load(tile.data + at) * magnitude); });
    } else {
      const A inner = A(double(magnitude) / problem.softcap);
      each_vector<A>(tile.stride, keys, vectors, [&](int64_t at) {
        const Vec<A> t = tanh(load(tile.data + at) * inner);
        if (tanh_tile) store(tanh_tile + at, t);
        store(tile.data + at, t * softcap);
      });
    }
    add_bias<T>(tile, problem.bias, block, j0, keys);
    add_key_bias(tile, problem.key_bias, block, j0, keys, vectors);
  }
  hide_unseen(tile, block, j0, keys, vectors, minus_infinity<A>);
}

// What exp's argument is multiplied by after the shift is taken off.
template <class A>
inline A exponent_factor(const AttentionProblem& problem) {
  return is_plain(problem) ? Scale<A>(problem.scale).magnitude : A(1);
}

// ---- Dropout ------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011) on the counters (query, key / 4, batch·H + head, 0): word
// key % 4 of the answer is the key's. The same in every pass, and in reference.py.
struct Philox {
  uint32_t key[2];

  explicit Philox(uint64_t seed) : key{uint32_t(seed), uint32_t(seed >> 32)} {}

  // words[k][l] for the queries first_query + l.
  template <int L>
  void draw(uint32_t first_query, uint32_t key_quad, uint32_t head, uint32_t (&words)[4][L]) const {
    uint32_t k0 = key[0], k1 = key[1];
    for (int l = 0; l < L; ++l) {
      words[0][l] = first_query + uint32_t(l);
      words[1][l] = key_quad;
      words[2][l] = head;
      words[3][l] = 0;
    }
    for (int round = 0; round < 10; ++round) {
      for (int l = 0; l < L; ++l) {
        const uint64_t even = uint64_t(0xD2511F53u) * words[0][l];
        const uint64_t odd = uint64_t(0xCD9E8D57u) * words[2][l];
        words[0][l] = uint32_t(odd >> 32) ^ words[1][l] ^ k0;
        words[1][l] = uint32_t(odd);
        words[2][l] = uint32_t(even >> 32) ^ words[3][l] ^ k1;
        words[3][l] = uint32_t(even);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// tile = Z: 1/(1 - p) where a key is kept, 0 where it is dropped. j0 is a multiple of 4.
template <class A>
inline void dropout_tile(const AttentionProblem& problem, Rows<A> tile, const Block& block,
                         int64_t j0, int64_t keys, int64_t vectors) {
  constexpr int L = lanes<A>();
  const Philox philox(problem.seed);
  const uint32_t head = uint32_t(block.sequence.batch * problem.H + block.head);
  const double limit = problem.dropout * 4294967296.;
  const uint64_t dropped_below = uint64_t(limit);
  const A kept = problem.dropout < 1 ? A(1 / (1 - problem.dropout)) : A(0);
  for (int64_t j = 0; j < keys; j += 4)
    for (int64_t w = 0; w < vectors; ++w) {
      uint32_t words[4][L];
      philox.draw<L>(uint32_t(block.i0 + w * L), uint32_t((j0 + j) / 4), head, words);
      for (int64_t k = 0; k < smaller(4, keys - j); ++k) {
        A* at = tile.row(j + k) + w * L;
        for (int l = 0; l < L; ++l) at[l] = words[k][l] < dropped_below ? A(0) : kept;
      }
    }
}

}  // namespace GK_LEVEL
}  // namespace genkern
