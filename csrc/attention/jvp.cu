// Attention, forward mode: the derivatives of out and lse along tangents of the inputs.
//
//   T: the tangent of S (tangents.cuh)     τ = rowsum(P∘T)
//   tangent of out = (Z∘P)·C + (Z∘P∘(T - τ))·v        tangent of lse = τ
//
// Layout: tangents.cuh; a block has queries of one head. Plan: one sweep over the keys, six
// products. T is centred by the mean of the keys seen so far; where a tile moves that mean by Δ,
// the sums (Z∘P∘(T - mean))·v so far change by -Δ·(Z∘P)·v. So no digits are lost where T has a
// large mean. Nothing is written but the results.
#include "tangents.cuh"

namespace genkern {
namespace cuda {
namespace attention {

template <class T, int D, int DV>
struct JvpSizes : SweepSizes<T, D, DV> {
  using Sweep = SweepSizes<T, D, DV>;
  static constexpr int shared_bytes =
      2 * SharedRows<T, Sweep::block, D>::bytes + KeyTiles<T, 2 * Sweep::tile, D, DV>::bytes;
};

template <class T, int D, int DV>
__global__ void __launch_bounds__(JvpSizes<T, D, DV>::threads, 1)
    jvp(Problem problem, Directions along, SoftmaxRows rows, Heads out_tangent,
        RowNumbers lse_tangent, int blocks) {
  using Sizes = JvpSizes<T, D, DV>;
  constexpr int threads = Sizes::threads, keys = Sizes::tile;
  const BlockOfQueries block = block_of_queries(problem, blocks, Sizes::block);
  const Place& place = block.place;
  const int first_row = warp() * 16, i0 = block.first + first_row;
  if (block.first >= place.queries) return;

  SharedMemory memory;
  const auto q = memory.rows_of<T, Sizes::block, D>();
  const auto q_tangent = memory.rows_of<T, Sizes::block, D>();
  const KeyTiles<T, 2 * keys, D, DV> stages(memory);
  const auto rows_from = [&](const Tensor& x) {
    return rows_of_queries<T>(x, place, problem.d).from(block.first);
  };
  copy_rows<threads>(q, rows_from(problem.q));
  if (along.q.data) copy_rows<threads>(q_tangent, rows_from(along.q));
  const Softmax<1> softmax(problem, rows, place, i0);

  Sums<1, DV / 8> out, moved;
  out.clear();
  moved.clear();
  float weight[2] = {}, mean[2] = {};
  const auto fetch = [&](int j0, int stage) {
    KeyTiles<T, keys, D, DV>(stages, stage).template copy<threads>(problem, along, place, j0);
  };
  const auto work = [&](int j0, int stage, bool at_edge) {
    const KeyTiles<T, keys, D, DV> of_keys(stages, stage);
    const Corner<Rows::queries> corner(i0, j0);
    Sums<1, keys / 8> p, t, slope, bend;
    p.clear();
    t.clear();
    add_pairs<Rows::queries>(p, q, of_keys.k, first_row);
    if (along.q.data) add_pairs<Rows::queries>(t, q_tangent, of_keys.k, first_row);
    if (along.k.data) add_pairs<Rows::queries>(t, q, of_keys.k_tangent, first_row);
    finish_logits<T>(problem, place, corner, at_edge, p, &slope);
    softmax.apply(problem, p);
    finish_tangents<T>(problem, along, place, corner, t, slope, bend);

    float of_tile[2] = {}, step[2] = {};
    each(p, [&](float x, int m, int n, int e) {
      const int r = row_number(m, e);
      of_tile[r] += x;
      step[r] += x * (t.x[m][n][e] - mean[r]);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight[r] += row_sum(of_tile[r]);
      step[r] = row_sum(step[r]) / (weight[r] > 0 ? weight[r] : 1);
      mean[r] += step[r];
    }
    if (problem.seed)
      each_dropout<1, keys / 8>(problem, place, corner,
                                [&](int m, int n, int e, float z) { p.x[m][n][e] *= z; });
    each(t,
         [&](float& x, int m, int n, int e) { x = p.x[m][n][e] * (x - mean[row_number(m, e)]); });
    each(moved,
         [&](float& x, int m, int n, int e) { x -= step[row_number(m, e)] * out.x[m][n][e]; });
    add_product(moved, t, of_keys.v);
    add_product(out, p, of_keys.v);
    if (along.v.data) add_product(moved, p, of_keys.v_tangent);
  };
  each_staged_tile(key_span(problem, place, block.first, Sizes::block, keys), keys, fetch, work);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = i0 + row_of_lane(r);
    if (lse_tangent.data && lane() % 4 == 0 && i < place.queries)
      query_numbers(lse_tangent, place)[i] = mean[r];
  }
  store_rows(query_rows<T>(out_tangent, place) + i0 * out_tangent.row, out_tangent.row,
             place.queries - i0, problem.dv, moved);
}

}  // namespace attention

Status attention_jvp(const AttentionJvp& args, const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  return with_storage_and_features(problem, args.problem.dtype, [&](auto storage, auto features) {
    using T = typename decltype(storage)::type;
    constexpr int D = decltype(features)::D, DV = decltype(features)::DV;
    using Sizes = JvpSizes<T, D, DV>;
    const int64_t blocks = blocks_of(call.longest_q, Sizes::block);
    return launch(jvp<T, D, DV>, dim3(unsigned(blocks * args.problem.B * args.problem.H)),
                  Sizes::threads, Sizes::shared_bytes, call.stream, problem,
                  directions_of(args.tangents, sizeof(T)), args.rows, args.out_tangent,
                  args.lse_tangent, int(blocks));
  });
}

}  // namespace cuda
}  // namespace genkern
