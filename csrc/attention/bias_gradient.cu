// Attention: the gradient of a bias with rows and keys of its own, dS summed over the batch and the
// heads that share it. Formulas: backward_rows.cu, whose facts of the rows this reads. Layout:
// bias_tiles.cuh. Plan: two products and the sum of dS for each that shares a tile.
// (Where a bias is broadcast over queries, its gradient is column sums, which the sweep by columns
// has; over keys, it is the row sums of dS, which are λ.)
#include "bias_tiles.cuh"

namespace genkern {
namespace cuda {
namespace attention {

using BiasGradientSizes = BiasTileSizes<64>;

template <class T>
__global__ void __launch_bounds__(BiasGradientSizes::threads, 1)
    bias_gradient(Problem problem, RowFacts facts, Tensor grad_out, Bias grad, int heads,
                  int batches_sharing, int heads_sharing) {
  constexpr int column_blocks = BiasGradientSizes::keys / 8;
  const BiasTile<BiasGradientSizes> tile(problem, heads, batches_sharing, heads_sharing);
  SharedMemory memory;
  const BiasTileProducts<T, BiasGradientSizes> products(memory, tile);
  Sums<1, column_blocks> sums;
  sums.clear();
  tile.each_place(problem, [&](const Place& place) {
    Sums<1, column_blocks> p, dp;
    p.clear();
    dp.clear();
    products.add(p, rows_of_queries<T>(problem.q, place, problem.d),
                 rows_of_keys<T>(problem.k, place, problem.d));
    finish_logits<T>(problem, place, tile.corner(), true, p);
    products.add(dp, rows_of_queries<T>(grad_out, place, problem.dv),
                 rows_of_keys<T>(problem.v, place, problem.dv));
    if (problem.seed)
      each_dropout<1, column_blocks>(problem, place, tile.corner(),
                                     [&](int m, int n, int e, float z) { dp.x[m][n][e] *= z; });
    float shift[2], inverse[2], level[2];
    tile.take_numbers(facts.shift, place, infinity(), shift);
    tile.take_numbers(facts.inverse, place, 0, inverse);
    tile.take_numbers(facts.level, place, 0, level);
    each(sums, [&](float& x, int m, int n, int e) {
      const int r = row_number(m, e);
      x += probability(problem, p.x[m][n][e], shift[r], inverse[r]) * (dp.x[m][n][e] - level[r]);
    });
  });
  tile.store(problem, grad, sums);
}

}  // namespace attention

Status attention_bias_gradient(const AttentionBiasGradient& args, const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  if (args.batches == 0 || args.heads == 0) return Status::ok;
  return with_storage(args.problem.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return launch(
        bias_gradient<T>, blocks_of_bias<BiasGradientSizes>(args.problem, args.batches, args.heads),
        BiasGradientSizes::threads, BiasTileProducts<T, BiasGradientSizes>::shared_bytes,
        call.stream, problem, args.facts, tensor_of(args.grad_out, sizeof(T)), args.grad,
        int(args.heads), int(args.problem.B / args.batches), int(args.problem.H / args.heads));
  });
}

}  // namespace cuda
}  // namespace genkern
