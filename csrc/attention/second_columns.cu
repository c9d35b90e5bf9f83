// Attention, second order by columns: the gradients of ⟨backward's results, (A, B, C, β, κ)⟩ for k
// and v, and the column sums of W that biases need. Formulas: second.cuh, and
//
//   k' = scale·(dS_Xᵀ·A + W_Xᵀ·q)        v' = (Z∘P∘(T - τ))ᵀ·dO
//
// Layout: tangents.cuh; a block has keys of one head, and sweeps over the queries, with their facts
// out of second_rows.cu, of all heads that share them, one after another. A tile of products has
// keys as rows. Plan: eight products; whatever a key's sums need passes by one block, in the same
// order always: no atomics. Heads of more than 64 features have registers for the sums of k or of
// v, and are launched for each.
#include "second.cuh"

namespace genkern {
namespace cuda {
namespace attention {

constexpr int facts_of_query = sizeof(QueryFacts) / sizeof(float);

template <class T, int D, int DV>
struct SecondColumnsSizes : SweepSizes<T, D, DV> {
  using Sweep = SweepSizes<T, D, DV>;
  static constexpr bool in_turns = D > 64;
  static constexpr int shared_bytes = KeyTiles<T, Sweep::block, D, DV>::bytes +
                                      QueryTiles<T, 2 * Sweep::tile, D, DV>::bytes +
                                      2 * facts_of_query * Sweep::tile * int(sizeof(float));
};

template <class T, int D, int DV>
__global__ void __launch_bounds__(SecondColumnsSizes<T, D, DV>::threads, 1)
    second_columns(Problem problem, Directions along, SecondFacts facts, Tensor grad_out,
                   Heads of_k, Heads of_v, RowNumbers column_sums, int blocks) {
  using Sizes = SecondColumnsSizes<T, D, DV>;
  constexpr int threads = Sizes::threads, queries = Sizes::tile, columns_over_8 = queries / 8;
  const BlockOfKeys block = block_of_keys(problem, blocks, Sizes::block);
  const int group = problem.H / problem.Hk;
  Place place = place_of(problem, block.batch, block.kv_head * group);
  const int first_row = warp() * 16, j0 = block.first + first_row;
  if (block.first >= place.key_rows) return;

  SharedMemory memory;
  const KeyTiles<T, Sizes::block, D, DV> of_keys(memory);
  const QueryTiles<T, 2 * queries, D, DV> stages(memory);
  float* const fact_stages = memory.numbers(2 * facts_of_query * queries);
  of_keys.template copy<threads>(problem, along, place, block.first);

  Sums<1, D / 8> k_sums;
  Sums<1, DV / 8> v_sums;  // in turns k_sums takes its place
  k_sums.clear();
  v_sums.clear();
  const bool with_dp = of_k.data || column_sums.data;
  for (int member = 0; member < group; ++member) {
    place = place_of(problem, block.batch, block.kv_head * group + member);
    const auto fetch = [&](int i0, int stage) {
      QueryTiles<T, queries, D, DV>(stages, stage)
          .template copy<threads>(problem, along, grad_out, place, i0);
      const float* const numbers[] = {
          query_numbers(facts.shift, place), query_numbers(facts.inverse, place),
          query_numbers(facts.level, place), query_numbers(facts.tau, place),
          query_numbers(facts.rho, place)};
#pragma unroll
      for (int fact = 0; fact < facts_of_query; ++fact)
        for (int i = threadIdx.x; i < queries; i += threads)
          copy_4_async(shared_address(fact_stages + (stage * facts_of_query + fact) * queries + i),
                       numbers[fact] + i0 + i, i0 + i < place.queries);
    };
    float totals[2] = {};  // of W
    const auto work = [&](int i0, int stage, bool at_edge) {
      const QueryTiles<T, queries, D, DV> of_queries(stages, stage);
      const float* fact = fact_stages + stage * facts_of_query * queries;
      auto weights = weights_of(
          problem,
          pairs_of<Rows::keys, columns_over_8>(problem, along, place, Corner<Rows::keys>(j0, i0),
                                               at_edge, with_dp, first_row, of_queries, of_keys),
          [&](int, int n, int e) {
            const float* of_query = fact + column_of_lane(n, e);
            return QueryFacts{of_query[0], of_query[queries], of_query[2 * queries],
                              of_query[3 * queries], of_query[4 * queries]};
          });
      each(weights.w, [&](float w, int m, int, int e) { totals[row_number(m, e)] += w; });
      if (of_k.data) {
        add_product(k_sums, weights.w_x, of_queries.q);
        if (along.q.data) add_product(k_sums, weights.ds_x, of_queries.q_tangent);
      }
      if constexpr (Sizes::in_turns) {
        if (of_v.data) add_product(k_sums, weights.kept_pt, of_queries.grad);
      } else {
        if (of_v.data) add_product(v_sums, weights.kept_pt, of_queries.grad);
      }
    };
    each_staged_tile(query_span(problem, place, block.first, queries, Sizes::block), queries, fetch,
                     work);

    if (!column_sums.data) continue;
    float* to = query_numbers(column_sums, place) - place.first_query + place.first_key + j0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(totals[r]);
      const int j = row_of_lane(r);
      if (lane() % 4 == 0 && j0 + j < place.key_rows) to[j] = total;
    }
  }
  const auto store = [&](const Heads& to, int features, const auto& sums) {
    store_rows(key_rows<T>(to, place) + j0 * to.row, to.row, place.key_rows - j0, features, sums);
  };
  if constexpr (Sizes::in_turns)
    if (of_v.data) store(of_v, problem.dv, k_sums);
  if (!Sizes::in_turns && of_v.data) store(of_v, problem.dv, v_sums);
  each(k_sums, [&](float& x, int, int, int) { x *= problem.scale; });
  if (of_k.data) store(of_k, problem.d, k_sums);
}

}  // namespace attention

Status attention_second_columns(const AttentionSecondColumns& args, const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  return with_storage_and_features(problem, args.problem.dtype, [&](auto storage, auto features) {
    using T = typename decltype(storage)::type;
    constexpr int D = decltype(features)::D, DV = decltype(features)::DV;
    using Sizes = SecondColumnsSizes<T, D, DV>;
    const int64_t blocks = blocks_of(call.longest_k, Sizes::block);
    const dim3 grid(unsigned(blocks * args.problem.B * args.problem.Hk));
    const auto run = [&](const Heads& of_k, const Heads& of_v, const RowNumbers& sums) {
      return launch(second_columns<T, D, DV>, grid, Sizes::threads, Sizes::shared_bytes,
                    call.stream, problem, directions_of(args.tangents, sizeof(T)), args.facts,
                    tensor_of(args.grad_out, sizeof(T)), of_k, of_v, sums, int(blocks));
    };
    if (!Sizes::in_turns) return run(args.of_k, args.of_v, args.sums);
    const Status of_values = args.of_v.data ? run({}, args.of_v, {}) : Status::ok;
    if (of_values != Status::ok || !(args.of_k.data || args.sums.data)) return of_values;
    return run(args.of_k, {}, args.sums);
  });
}

}  // namespace cuda
}  // namespace genkern
