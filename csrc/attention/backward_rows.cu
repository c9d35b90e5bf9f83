// Attention, backward by rows: the gradient of q, and what the other passes need of every row.
//
//   P = exp(S - shift) / sum    dP = Z∘(dO·vᵀ)    level = rowsum(P∘dP) - λ    dS = P∘(dP - level)
//   g = 1 - tanh²(X/softcap), or 1        λ: the cotangent of lse        dq = scale·(g∘dS)·k
//
// Layout as in forward.cu: a block's queries and cotangents stay in shared memory, tiles of keys
// and values come through two stages of it. Plan: once over the keys for the level, once more for
// dq. δ = rowsum(P∘dP) is the sum of the very numbers that are multiplied: as rowsum(dO∘O) with a
// rounded O it would cost digits where a softmax is peaked. Five products. The facts of a row
// (attention.h) are written in between. Of bf16, which has the range for it, the rows are divided
// by their sums of exp at the end.
#include "logits.cuh"
#include "sizes.cuh"

namespace genkern {
namespace cuda {
namespace attention {

template <class T, int D, int DV>
struct BackwardRowsSizes {
  static constexpr bool is_fp32 = !on_tensor_cores<T>, is_wide = D > 128;
  static constexpr int warps = is_fp32 && is_wide ? 2 : 4;
  static constexpr int threads = warps * lanes;
  static constexpr int queries = warps * 16;
  static constexpr int keys = is_fp32 ? (is_wide ? 8 : D > 64 ? 16 : 32) : (is_wide ? 16 : 32);
  // Blocks that a multiprocessor's registers shall hold. Three, with 168 registers a thread, took
  // 0.85 of the time of two on an H100; on sm_80 they would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
  static constexpr int resident = 1;
#else
  static constexpr int resident = on_tensor_cores<T> && D <= 64 && DV <= 64 ? 3 : 1;
#endif
  static constexpr int shared_bytes =
      SharedRows<T, queries, D>::bytes + SharedRows<T, queries, DV>::bytes +
      SharedRows<T, 2 * keys, D>::bytes + SharedRows<T, 2 * keys, DV>::bytes;
};

template <class T, int D, int DV>
__global__ void __launch_bounds__(BackwardRowsSizes<T, D, DV>::threads,
                                  BackwardRowsSizes<T, D, DV>::resident)
    backward_rows(Problem problem, SoftmaxRows rows, Tensor grad_out, RowNumbers grad_lse,
                  RowFacts facts, Heads grad_q, int blocks) {
  using Sizes = BackwardRowsSizes<T, D, DV>;
  constexpr int row_blocks = 1, threads = Sizes::threads, keys = Sizes::keys;
  const BlockOfQueries block = block_of_queries(problem, blocks, Sizes::queries);
  const Place& place = block.place;
  const int first_row = warp() * row_blocks * 16, i0 = block.first + first_row;
  if (block.first >= place.queries) return;

  SharedMemory memory;
  const auto q_tile = memory.rows_of<T, Sizes::queries, D>();
  const auto grad_tile = memory.rows_of<T, Sizes::queries, DV>();
  const auto k_tiles = memory.rows_of<T, 2 * keys, D>();
  const auto v_tiles = memory.rows_of<T, 2 * keys, DV>();
  const auto k_rows = rows_of_keys<T>(problem.k, place, problem.d);
  const auto v_rows = rows_of_keys<T>(problem.v, place, problem.dv);
  TileCopies<threads, T, keys, D, Sizes::resident == 1> of_keys(k_rows);
  TileCopies<threads, T, keys, DV, Sizes::resident == 1> of_values(v_rows);
  const auto fetch = [&](auto is_quick, int j0, int stage) {
    of_keys.copy(is_quick, k_tiles.template part<keys>(stage), j0);
    of_values.copy(is_quick, v_tiles.template part<keys>(stage), j0);
    commit_copies();
  };
  copy_rows<threads>(q_tile, rows_of_queries<T>(problem.q, place, problem.d).from(block.first));
  copy_rows<threads>(grad_tile, rows_of_queries<T>(grad_out, place, problem.dv).from(block.first));
  const LeftInShared<T, row_blocks, D> q(q_tile, first_row);
  const LeftInShared<T, row_blocks, DV> grad(grad_tile, first_row);
  const Softmax<row_blocks> softmax(problem, rows, place, i0);
  constexpr bool divides_late = std::is_same<T, __nv_bfloat16>::value;
  const auto late_factor = [&](int r) { return divides_late ? softmax.inverse[r] : 1; };

  float level[2 * row_blocks] = {};
  Sums<row_blocks, D / 8> sums;
  sums.clear();
  const Span span = key_span(problem, place, block.first, Sizes::queries, keys);
  int stage = 0;
  // In the first sweep, not the last, the level is summed.
  const auto step = [&](auto is_quick, auto is_last, int j0) {
    constexpr bool quick = decltype(is_quick)::value, last = decltype(is_last)::value;
    wait_for_copies<0>();
    __syncthreads();
    if (j0 + keys < span.end) fetch(is_quick, j0 + keys, stage ^ 1);
    const auto k_tile = k_tiles.template part<keys>(stage);
    const Corner<Rows::queries> corner(i0, j0);
    Sums<row_blocks, keys / 8> p, dp, of_tanh;
    p.clear();
    add_pairing(p, q, k_tile);
    if (!quick)
      finish_logits<T>(problem, place, corner, j0 < span.full_first || j0 >= span.full_end, p,
                       &of_tanh);
    softmax.template apply<!divides_late>(problem, p);
    dp.clear();
    add_pairing(dp, grad, v_tiles.template part<keys>(stage));
    if (!quick && problem.seed)
      each_dropout<row_blocks, keys / 8>(problem, place, corner,
                                         [&](int m, int n, int e, float z) { dp.x[m][n][e] *= z; });
    if constexpr (last) {
      each(p, [&](float& x, int m, int n, int e) { x *= dp.x[m][n][e] - level[row_number(m, e)]; });
      if (!quick && problem.softcap != 0)
        each(p, [&](float& x, int m, int n, int e) {
          x *= 1 - of_tanh.x[m][n][e] * of_tanh.x[m][n][e];
        });
      add_product(sums, p, k_tile);
    } else {
      // A tile's sum apart: fewer roundings of large numbers.
      float of_tile[2 * row_blocks] = {};
      each(p,
           [&](float x, int m, int n, int e) { of_tile[row_number(m, e)] += x * dp.x[m][n][e]; });
#pragma unroll
      for (int r = 0; r < 2 * row_blocks; ++r) level[r] += of_tile[r];
    }
    stage ^= 1;
  };

  const auto sweep = [&](auto is_last) {
    if (span.first < span.end) fetch(std::false_type(), span.first, stage);
    each_tile<T>(
        problem, span, keys, k_rows.in_whole_vectors() && v_rows.in_whole_vectors(),
        [&](int j0) { step(std::true_type(), is_last, j0); },
        [&](int j0) { step(std::false_type(), is_last, j0); });
  };
  sweep(std::false_type());
#pragma unroll
  for (int r = 0; r < 2 * row_blocks; ++r) {
    level[r] = row_sum(level[r]) * late_factor(r);
    const int i = i0 + row_of_lane(r);
    if (i >= place.queries) continue;
    if (grad_lse.data) level[r] -= query_numbers(grad_lse, place)[i];
    if (lane() % 4 != 0) continue;
    query_numbers(facts.shift, place)[i] = softmax.shift[r];
    query_numbers(facts.inverse, place)[i] = softmax.inverse[r];
    query_numbers(facts.level, place)[i] = level[r];
  }
  // The second sweep begins in the stage that nobody reads any more.
  if (!grad_q.data) return;
  sweep(std::true_type());
  each(sums,
       [&](float& x, int m, int, int e) { x *= problem.scale * late_factor(row_number(m, e)); });
  store_rows(query_rows<T>(grad_q, place) + i0 * grad_q.row, grad_q.row, place.queries - i0,
             problem.d, sums);
}

}  // namespace attention

Status attention_backward_rows(const AttentionBackward& args, const RowFacts& facts,
                               const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  return with_storage(args.problem.dtype, [&](auto storage) {
    return with_features(problem, [&](auto features) {
      using T = typename decltype(storage)::type;
      constexpr int D = decltype(features)::D, DV = decltype(features)::DV;
      using Sizes = BackwardRowsSizes<T, D, DV>;
      const int64_t blocks = blocks_of(call.longest_q, Sizes::queries);
      const dim3 grid(unsigned(blocks * args.problem.B * args.problem.H));
      return launch(backward_rows<T, D, DV>, grid, Sizes::threads, Sizes::shared_bytes, call.stream,
                    problem, args.rows, tensor_of(args.grad_out, sizeof(T)), args.grad_lse, facts,
                    args.grads.q, int(blocks));
    });
  });
}

}  // namespace cuda
}  // namespace genkern
