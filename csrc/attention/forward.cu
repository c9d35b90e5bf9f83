// Attention, forward: out = (Z∘P)·v, lse, and of every row the shift and sum of its softmax.
//
// Layout: a block takes 16·row_blocks queries of one head for every warp. Its queries lie in shared
// memory (of some sizes in registers), tiles of keys and values come through two stages of it:
// while one is multiplied, the next arrives. Plan, for every tile: S = q·kᵀ; the online softmax
// (Milakov & Gimelshein 2018) in registers: when a tile brings a larger logit, what was summed so
// far is scaled down to it; sums += P·v. Tiles in which nothing is hidden, of a call without
// biases, softcap and dropout, have a loop of their own. One barrier a tile. Nothing is written but
// the results.
#include "logits.cuh"
#include "sizes.cuh"

namespace genkern {
namespace cuda {
namespace attention {

template <class T, int D, int DV>
struct ForwardSizes {
  static constexpr bool is_fp32 = !on_tensor_cores<T>, is_wide = D > 128;
  static constexpr bool is_small = D <= 64 && DV <= 64;
  // A warp of 32 queries reads every key and value half as often as two of 16. Several small blocks
  // on a multiprocessor hide each other's waits: on an H100 4 warps took 0.8 to 0.9 of 8's time.
  static constexpr int row_blocks = is_fp32 ? (D <= 64 ? 2 : 1) : is_small ? 2 : 1;
  static constexpr int warps = is_fp32 && is_wide ? 2 : 4;
  static constexpr int threads = warps * lanes;
  static constexpr int queries = warps * row_blocks * 16;
  static constexpr int keys = is_fp32 ? (is_small ? 32 : 16) : is_wide ? 32 : is_small ? 48 : 64;
  static constexpr bool keeps_queries = on_tensor_cores<T> && (D <= 32 || D == 128);
  static constexpr int query_bytes = SharedRows<T, queries, D>::bytes;
  static constexpr int stage_bytes = SharedRows<T, keys, D>::bytes + SharedRows<T, keys, DV>::bytes;
  static_assert(!keeps_queries || query_bytes <= stage_bytes, "kept queries come through a stage");
  static constexpr int shared_bytes = 2 * stage_bytes + (keeps_queries ? 0 : query_bytes);
};

template <class T, int D, int DV>
__global__ void __launch_bounds__(ForwardSizes<T, D, DV>::threads, 1)
    forward(Problem problem, Heads out, SoftmaxRows rows, RowNumbers lse, int blocks) {
  using Sizes = ForwardSizes<T, D, DV>;
  constexpr int row_blocks = Sizes::row_blocks, threads = Sizes::threads, keys = Sizes::keys;
  const BlockOfQueries block = block_of_queries(problem, blocks, Sizes::queries);
  const Place& place = block.place;
  const int first_row = warp() * row_blocks * 16, i0 = block.first + first_row;
  if (block.first >= place.queries) return;

  SharedMemory memory;
  const auto k_tiles = memory.rows_of<T, 2 * keys, D>();
  const auto v_tiles = memory.rows_of<T, 2 * keys, DV>();
  // The second stage of the keys and that of the values are neighbours: kept queries come through
  // there, before it is first written.
  const auto keys_of = [&](int stage) { return k_tiles.template part<keys>(stage); };
  const auto values_of = [&](int stage) { return v_tiles.template part<keys>(stage ^ 1); };
  const SharedRows<T, Sizes::queries, D> q_tile =
      Sizes::keeps_queries ? SharedRows<T, Sizes::queries, D>{k_tiles.row(keys)}
                           : memory.rows_of<T, Sizes::queries, D>();
  const auto k_rows = rows_of_keys<T>(problem.k, place, problem.d);
  const auto v_rows = rows_of_keys<T>(problem.v, place, problem.dv);
  TileCopies<threads, T, keys, D, false> copies_of_keys(k_rows);
  TileCopies<threads, T, keys, DV, false> copies_of_values(v_rows);
  const auto fetch = [&](auto is_quick, int j0, int stage) {
    if constexpr (Sizes::is_small) {  // on sm_90 no register is left to keep a place in
      constexpr bool always = decltype(is_quick)::value;
      copy_rows<threads, always>(keys_of(stage), k_rows.from(j0));
      copy_rows<threads, always>(values_of(stage), v_rows.from(j0));
    } else {
      copies_of_keys.copy(is_quick, keys_of(stage), j0);
      copies_of_values.copy(is_quick, values_of(stage), j0);
    }
    commit_copies();
  };

  const Span span = key_span(problem, place, block.first, Sizes::queries, keys);
  copy_rows<threads>(q_tile, rows_of_queries<T>(problem.q, place, problem.d).from(block.first));
  fetch(std::false_type(), span.first, 0);
  wait_for_copies<0>();
  __syncthreads();
  const std::conditional_t<Sizes::keeps_queries, LeftInRegisters<T, row_blocks, D>,
                           LeftInShared<T, row_blocks, D>>
      q(q_tile, first_row);
  Sums<row_blocks, DV / 8> sums;
  sums.clear();
  float highest[2 * row_blocks], total[2 * row_blocks];  // total: of the lane's own columns
#pragma unroll
  for (int r = 0; r < 2 * row_blocks; ++r) {
    highest[r] = -infinity();
    total[r] = 0;
  }

  int stage = 0;
  const auto step = [&](auto is_quick, int j0) {
    constexpr bool quick = decltype(is_quick)::value;
    wait_for_copies<0>();
    __syncthreads();
    if (j0 + keys < span.end) fetch(is_quick, j0 + keys, stage ^ 1);
    Sums<row_blocks, keys / 8> p;
    p.clear();
    add_pairing(p, q, keys_of(stage));
    const Corner<Rows::queries> corner{i0, j0};
    if (!quick)
      finish_logits<T>(problem, place, corner, j0 < span.full_first || j0 >= span.full_end, p);
    float shift[2 * row_blocks], shrink[2 * row_blocks], of_tile[2 * row_blocks] = {};
#pragma unroll
    for (int r = 0; r < 2 * row_blocks; ++r) shift[r] = highest[r];
    each(p, [&](float x, int m, int, int e) {
      const int r = row_number(m, e);
      shift[r] = fmaxf(shift[r], x);
    });
#pragma unroll
    for (int r = 0; r < 2 * row_blocks; ++r) {
      const float before = highest[r];
      highest[r] = row_max(shift[r]);
      // Where nothing was seen yet: not -inf - -inf.
      shift[r] = highest[r] == -infinity() ? 0 : highest[r] * problem.exponent;
      // From the very number that was taken off before, rounded: not a product inside of an fma.
      shrink[r] = exp2_approximate(__fmul_rn(before, problem.exponent) - shift[r]);
    }
    each(p, [&](float& x, int m, int, int e) {
      const int r = row_number(m, e);
      x = exp2_approximate(fmaf(x, problem.exponent, -shift[r]));
      of_tile[r] += x;
    });
#pragma unroll
    for (int r = 0; r < 2 * row_blocks; ++r) total[r] = fmaf(total[r], shrink[r], of_tile[r]);
    if (!quick && problem.seed)
      each_dropout<row_blocks, keys / 8>(problem, place, corner,
                                         [&](int m, int n, int e, float z) { p.x[m][n][e] *= z; });
    each(sums, [&](float& x, int m, int, int e) { x *= shrink[row_number(m, e)]; });
    add_product(sums, p, values_of(stage));
    stage ^= 1;
  };
  each_tile<T>(
      problem, span, keys, k_rows.in_whole_vectors() && v_rows.in_whole_vectors(),
      [&](int at) { step(std::true_type(), at); }, [&](int at) { step(std::false_type(), at); });

  float inverse[2 * row_blocks];
#pragma unroll
  for (int r = 0; r < 2 * row_blocks; ++r) {
    const float sum = row_sum(total[r]);
    const bool is_empty = highest[r] == -infinity();
    inverse[r] = sum > 0 ? 1 / sum : 0;
    const int i = i0 + row_of_lane(r);
    if (lane() % 4 != 0 || i >= place.queries) continue;
    query_numbers(rows.shift, place)[i] = is_empty ? 0 : highest[r];
    query_numbers(rows.sum, place)[i] = sum;
    if (lse.data)
      query_numbers(lse, place)[i] =
          is_empty ? -infinity() : (highest[r] * problem.exponent + log2f(sum)) * ln_2;
  }
  each(sums, [&](float& x, int m, int, int e) { x *= inverse[row_number(m, e)]; });
  store_rows(query_rows<T>(out, place) + i0 * out.row, out.row, place.queries - i0, problem.dv,
             sums);
}

}  // namespace attention

Status attention_forward(const AttentionForward& args, const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  return with_storage(args.problem.dtype, [&](auto storage) {
    return with_features(problem, [&](auto features) {
      using T = typename decltype(storage)::type;
      constexpr int D = decltype(features)::D, DV = decltype(features)::DV;
      using Sizes = ForwardSizes<T, D, DV>;
      const int64_t blocks = blocks_of(call.longest_q, Sizes::queries);
      const dim3 grid(unsigned(blocks * args.problem.B * args.problem.H));
      return launch(attention::forward<T, D, DV>, grid, Sizes::threads, Sizes::shared_bytes,
                    call.stream, problem, args.out, args.rows, args.lse, int(blocks));
    });
  });
}

}  // namespace cuda
}  // namespace genkern
