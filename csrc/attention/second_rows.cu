// Attention, second order by rows: the gradients of ⟨backward's results, (A, B, C, β, κ)⟩ for q, dO
// and λ, and what the other passes need of every row. Formulas: second.cuh, and
//
//   q' = scale·(dS_X·B + W_X·k)       dO' = (Z∘P)·C + (Z∘P∘(T - τ))·v       λ' = τ
//
// Layout: tangents.cuh; a block has queries of one head. Plan: once over the keys for the facts of
// the rows (attention.h), five products, once more for q' and dO', nine. ρ is the covariance of T
// and dP under P, plus the mean of U: a lane keeps moments of the columns it has seen, centred by
// its own means, and the four lanes of a row join theirs. So nothing is lost where T or dP have
// large means. Heads of more than 64 features have registers for the sums of q' alone: dO' is the
// tangent of out, and jvp.cu has it.
#include "second.cuh"

namespace genkern {
namespace cuda {
namespace attention {

template <class T, int D, int DV>
struct SecondRowsSizes : SweepSizes<T, D, DV> {
  using Sweep = SweepSizes<T, D, DV>;
  static constexpr bool has_out = D <= 64;
  static constexpr int shared_bytes =
      QueryTiles<T, Sweep::block, D, DV>::bytes + KeyTiles<T, 2 * Sweep::tile, D, DV>::bytes;
};

// Of some columns of a row: their weight, the means of dP, T and U, and the sum of products of what
// dP and T are beside their means, all weighed by P.
struct Moments {
  float weight = 0, dp = 0, t = 0, u = 0, products = 0;

  // Joins other columns' (Chan, Golub and LeVeque 1979).
  __device__ void join(const Moments& other) {
    const float total = weight + other.weight;
    const float share = total > 0 ? other.weight / total : 0;
    const float dp_step = other.dp - dp, t_step = other.t - t;
    products += other.products + weight * share * dp_step * t_step;
    dp += share * dp_step;
    t += share * t_step;
    u += share * (other.u - u);
    weight = total;
  }
  // Those of the lane whose number differs in a bit.
  __device__ Moments of_neighbour(int bit) const {
    const auto theirs = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, bit); };
    return {theirs(weight), theirs(dp), theirs(t), theirs(u), theirs(products)};
  }
};

// A tile's columns join the moments of a lane's two rows.
template <int columns_over_8>
__device__ inline void join_tile(Moments (&moments)[2], Pairs<columns_over_8>& x) {
  Moments of_tile[2];
  each(x.p, [&](float p, int m, int n, int e) {
    Moments& sums = of_tile[row_number(m, e)];
    sums.weight += p;
    sums.dp += p * x.dp.x[m][n][e];
    sums.t += p * x.t.x[m][n][e];
    sums.u += p * x.u.x[m][n][e];
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Divided, for the inverse of a weight may be infinite.
    const float weight = of_tile[r].weight > 0 ? of_tile[r].weight : 1;
    of_tile[r].dp /= weight;
    of_tile[r].t /= weight;
    of_tile[r].u /= weight;
  }
  each(x.p, [&](float p, int m, int n, int e) {
    Moments& means = of_tile[row_number(m, e)];
    means.products += p * (x.dp.x[m][n][e] - means.dp) * (x.t.x[m][n][e] - means.t);
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) moments[r].join(of_tile[r]);
}

template <class T, int D, int DV>
__global__ void __launch_bounds__(SecondRowsSizes<T, D, DV>::threads, 1)
    second_rows(Problem problem, Directions along, SoftmaxRows rows, Tensor grad_out,
                RowNumbers grad_lse, SecondFacts facts, Heads of_q, Heads of_out, int blocks) {
  using Sizes = SecondRowsSizes<T, D, DV>;
  constexpr int threads = Sizes::threads, keys = Sizes::tile, columns_over_8 = keys / 8;
  const BlockOfQueries block = block_of_queries(problem, blocks, Sizes::block);
  const Place& place = block.place;
  const int first_row = warp() * 16, i0 = block.first + first_row;
  if (block.first >= place.queries) return;

  SharedMemory memory;
  const QueryTiles<T, Sizes::block, D, DV> of_queries(memory);
  const KeyTiles<T, 2 * keys, D, DV> stages(memory);
  of_queries.template copy<threads>(problem, along, grad_out, place, block.first);
  const auto fetch = [&](int j0, int stage) {
    KeyTiles<T, keys, D, DV>(stages, stage).template copy<threads>(problem, along, place, j0);
  };
  const auto pairs_with = [&](int j0, int stage, bool at_edge) {
    return pairs_of<Rows::queries, columns_over_8>(
        problem, along, place, Corner<Rows::queries>(i0, j0), at_edge, true, first_row, of_queries,
        KeyTiles<T, keys, D, DV>(stages, stage));
  };
  const Span span = key_span(problem, place, block.first, Sizes::block, keys);

  const Softmax<1> softmax(problem, rows, place, i0);
  Moments moments[2];
  each_staged_tile(span, keys, fetch, [&](int j0, int stage, bool at_edge) {
    Pairs<columns_over_8> x = pairs_with(j0, stage, at_edge);
    softmax.apply(problem, x.p);
    join_tile(moments, x);
  });
  QueryFacts of_rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    moments[r].join(moments[r].of_neighbour(1));
    moments[r].join(moments[r].of_neighbour(2));
    // The lanes joined the same in another order: all go on with the first one's.
    const auto of_first = [&](float x) { return __shfl_sync(0xffffffffu, x, 0, 4); };
    const float weight = of_first(moments[r].weight);
    const float covariance = of_first(moments[r].products) / (weight > 0 ? weight : 1);
    const int i = i0 + row_of_lane(r);
    const bool is_row = i < place.queries;
    const float of_lse = is_row && grad_lse.data ? query_numbers(grad_lse, place)[i] : 0;
    of_rows[r] = {softmax.shift[r], softmax.inverse[r], of_first(moments[r].dp) - of_lse,
                  of_first(moments[r].t), covariance + of_first(moments[r].u)};
    if (lane() % 4 != 0 || !is_row) continue;
    query_numbers(facts.shift, place)[i] = of_rows[r].shift;
    query_numbers(facts.inverse, place)[i] = of_rows[r].inverse;
    query_numbers(facts.level, place)[i] = of_rows[r].level;
    query_numbers(facts.tau, place)[i] = of_rows[r].tau;
    query_numbers(facts.rho, place)[i] = of_rows[r].rho;
  }
  if (!of_q.data && !of_out.data) return;

  Sums<1, D / 8> q_sums;
  Sums<1, DV / 8> out_sums;
  q_sums.clear();
  out_sums.clear();
  each_staged_tile(span, keys, fetch, [&](int j0, int stage, bool at_edge) {
    const auto weights = weights_of(problem, pairs_with(j0, stage, at_edge),
                                    [&](int m, int, int e) { return of_rows[row_number(m, e)]; });
    const KeyTiles<T, keys, D, DV> of_keys(stages, stage);
    if (of_q.data) {
      add_product(q_sums, weights.w_x, of_keys.k);
      if (along.k.data) add_product(q_sums, weights.ds_x, of_keys.k_tangent);
    }
    if (Sizes::has_out && of_out.data) {
      add_product(out_sums, weights.kept_pt, of_keys.v);
      if (along.v.data) add_product(out_sums, weights.kept_p, of_keys.v_tangent);
    }
  });
  const auto store = [&](const Heads& to, int features, const auto& sums) {
    store_rows(query_rows<T>(to, place) + i0 * to.row, to.row, place.queries - i0, features, sums);
  };
  each(q_sums, [&](float& x, int, int, int) { x *= problem.scale; });
  if (of_q.data) store(of_q, problem.d, q_sums);
  if (Sizes::has_out && of_out.data) store(of_out, problem.dv, out_sums);
}

}  // namespace attention

Status attention_second_rows(const AttentionSecond& args, const SecondFacts& facts,
                             const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  return with_storage_and_features(problem, args.problem.dtype, [&](auto storage, auto features) {
    using T = typename decltype(storage)::type;
    constexpr int D = decltype(features)::D, DV = decltype(features)::DV;
    using Sizes = SecondRowsSizes<T, D, DV>;
    const int64_t blocks = blocks_of(call.longest_q, Sizes::block);
    const Heads of_out = Sizes::has_out ? args.out_grad_out : Heads{};
    const Status status = launch(
        second_rows<T, D, DV>, dim3(unsigned(blocks * args.problem.B * args.problem.H)),
        Sizes::threads, Sizes::shared_bytes, call.stream, problem,
        directions_of(args.tangents, sizeof(T)), args.rows, tensor_of(args.grad_out, sizeof(T)),
        args.grad_lse, facts, args.grads.q, of_out, int(blocks));
    if (Sizes::has_out || !args.out_grad_out.data || status != Status::ok) return status;
    return attention_jvp({args.problem, args.rows, args.tangents, args.out_grad_out, {}}, call);
  });
}

}  // namespace cuda
}  // namespace genkern
