// Attention, second order: the gradient of ⟨backward's results, (A, B, C, β, κ)⟩ for a bias with
// rows and keys of its own, W summed over the batch and the heads that share it. Formulas:
// second.cuh; the facts of the rows are second_rows.cu's. Layout: bias_tiles.cuh. Plan: five
// products and the sum of W for each that shares a tile.
#include "bias_tiles.cuh"
#include "second.cuh"

namespace genkern {
namespace cuda {
namespace attention {

using SecondBiasSizes = BiasTileSizes<32>;

template <class T>
__global__ void __launch_bounds__(SecondBiasSizes::threads, 1)
    second_bias(Problem problem, Directions along, SecondFacts facts, Tensor grad_out, Bias grad,
                int heads, int batches_sharing, int heads_sharing) {
  constexpr int columns_over_8 = SecondBiasSizes::keys / 8;
  const BiasTile<SecondBiasSizes> tile(problem, heads, batches_sharing, heads_sharing);
  SharedMemory memory;
  const BiasTileProducts<T, SecondBiasSizes> products(memory, tile);
  Sums<1, columns_over_8> sums;
  sums.clear();
  tile.each_place(problem, [&](const Place& place) {
    const auto of_queries = [&](const Tensor& x, int features) {
      return rows_of_queries<T>(x, place, features);
    };
    const auto of_keys = [&](const Tensor& x, int features) {
      return rows_of_keys<T>(x, place, features);
    };
    const int d = problem.d, dv = problem.dv;
    Pairs<columns_over_8> x;
    x.p.clear();
    x.t.clear();
    x.dp.clear();
    x.u.clear();
    products.add(x.p, of_queries(problem.q, d), of_keys(problem.k, d));
    if (along.q.data) products.add(x.t, of_queries(along.q, d), of_keys(problem.k, d));
    if (along.k.data) products.add(x.t, of_queries(problem.q, d), of_keys(along.k, d));
    products.add(x.dp, of_queries(grad_out, dv), of_keys(problem.v, dv));
    if (along.v.data) products.add(x.u, of_queries(grad_out, dv), of_keys(along.v, dv));
    finish_pairs<T>(problem, along, place, tile.corner(), true, x);

    float shift[2], inverse[2], level[2], tau[2], rho[2];
    tile.take_numbers(facts.shift, place, infinity(), shift);
    tile.take_numbers(facts.inverse, place, 0, inverse);
    tile.take_numbers(facts.level, place, 0, level);
    tile.take_numbers(facts.tau, place, 0, tau);
    tile.take_numbers(facts.rho, place, 0, rho);
    const auto weights = weights_of(problem, x, [&](int m, int, int e) {
      const int r = row_number(m, e);
      return QueryFacts{shift[r], inverse[r], level[r], tau[r], rho[r]};
    });
    each(sums, [&](float& sum, int m, int n, int e) { sum += weights.w.x[m][n][e]; });
  });
  tile.store(problem, grad, sums);
}

}  // namespace attention

Status attention_second_bias(const AttentionSecondBias& args, const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  if (args.batches == 0 || args.heads == 0) return Status::ok;
  return with_storage(args.problem.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return launch(second_bias<T>,
                  blocks_of_bias<SecondBiasSizes>(args.problem, args.batches, args.heads),
                  SecondBiasSizes::threads, BiasTileProducts<T, SecondBiasSizes>::shared_bytes,
                  call.stream, problem, directions_of(args.tangents, sizeof(T)), args.facts,
                  tensor_of(args.grad_out, sizeof(T)), args.grad, int(args.heads),
                  int(args.problem.B / args.batches), int(args.problem.H / args.heads));
  });
}

}  // namespace cuda
}  // namespace genkern
