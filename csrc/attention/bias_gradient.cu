// Attention: the gradient of a bias with rows and keys of its own, dS summed over the batch and the
// heads that share it. Formulas: backward_rows.cu, whose facts of the rows this reads.
//
// Layout: a block takes a tile of the bias and goes over what shares it, in order: no atomics. Its
// two products sum over pieces of the features, so that one kernel serves heads of every size.
// (Where a bias is broadcast over queries, its gradient is column sums, which the sweep by columns
// has; over keys, it is the row sums of dS, which are λ.)
#include "logits.cuh"
#include "sizes.cuh"

namespace genkern {
namespace cuda {
namespace attention {

struct BiasGradientSizes {
  static constexpr int warps = 4, threads = warps * lanes, queries = warps * 16, keys = 64;
  static constexpr int piece = 64;  // features at a time
};

// Which tile a block has of a bias [batches, heads, N, M], and who shares it.
struct BiasTile {
  int first_query, first_key, batch, head, batches_sharing, heads_sharing;

  __device__ Place place(const Problem& problem, int turn) const {
    return place_of(problem, batch * batches_sharing + turn / heads_sharing,
                    head * heads_sharing + turn % heads_sharing);
  }
};

template <class T>
__global__ void __launch_bounds__(BiasGradientSizes::threads)
    bias_gradient(Problem problem, RowFacts facts, Tensor grad_out, Bias grad, int heads,
                  int batches_sharing, int heads_sharing) {
  using Sizes = BiasGradientSizes;
  constexpr int queries = Sizes::queries, keys = Sizes::keys, piece = Sizes::piece;
  const int key_blocks = (problem.M + keys - 1) / keys;
  const int row_blocks = (problem.N + queries - 1) / queries;
  const int matrix = blockIdx.x / key_blocks / row_blocks;
  const BiasTile tile{int(blockIdx.x) / key_blocks % row_blocks * queries,
                      int(blockIdx.x) % key_blocks * keys,
                      matrix / heads,
                      matrix % heads,
                      batches_sharing,
                      heads_sharing};
  SharedMemory memory;
  const auto left_tile = memory.rows_of<T, queries, piece>();
  const auto right_tile = memory.rows_of<T, keys, piece>();
  const int first_row = warp() * 16, i0 = tile.first_query + first_row, j0 = tile.first_key;

  // left · rightᵀ, over all features.
  const auto pairing = [&](const GlobalRows<T>& left, const GlobalRows<T>& right) {
    Sums<1, keys / 8> products;
    products.clear();
    for (int column = 0; column < left.features; column += piece) {
      __syncthreads();  // until the piece before is read
      copy_rows<Sizes::threads>(left_tile, left.from(tile.first_query).columns_from(column));
      copy_rows<Sizes::threads>(right_tile, right.from(tile.first_key).columns_from(column));
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      add_pairing(products, LeftInShared<T, 1, piece>(left_tile, first_row), right_tile);
    }
    return products;
  };

  Sums<1, keys / 8> sums;
  sums.clear();
  for (int turn = 0; turn < batches_sharing * heads_sharing; ++turn) {
    const Place place = tile.place(problem, turn);
    const Span span = key_span(problem, place, tile.first_query, queries, keys);
    if (j0 + keys <= span.first || j0 >= span.end) continue;
    Sums<1, keys / 8> p = pairing(rows_of_queries<T>(problem.q, place, problem.d),
                                  rows_of_keys<T>(problem.k, place, problem.d));
    const Corner<Rows::queries> corner(i0, j0);
    finish_logits<T>(problem, place, corner, true, p);
    Sums<1, keys / 8> dp = pairing(rows_of_queries<T>(grad_out, place, problem.dv),
                                   rows_of_keys<T>(problem.v, place, problem.dv));
    if (problem.seed)
      each_dropout<1, keys / 8>(problem, place, corner,
                                [&](int m, int n, int e, float z) { dp.x[m][n][e] *= z; });
    float shift[2], inverse[2], level[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = i0 + row_of_lane(r);
      const bool is_row = i < place.queries;
      shift[r] = is_row ? query_numbers(facts.shift, place)[i] : infinity();
      inverse[r] = is_row ? query_numbers(facts.inverse, place)[i] : 0;
      level[r] = is_row ? query_numbers(facts.level, place)[i] : 0;
    }
    each(sums, [&](float& x, int m, int n, int e) {
      const int r = row_number(m, e);
      x += probability(problem, p.x[m][n][e], shift[r], inverse[r]) * (dp.x[m][n][e] - level[r]);
    });
  }

  float* to = static_cast<float*>(grad.data) + tile.batch * grad.batch + tile.head * grad.head;
  const Corner<Rows::queries> corner(i0, j0);
  each(sums, [&](float& x, int m, int n, int e) {
    const int i = corner.query(m, n, e), j = corner.key(m, n, e);
    if (i < problem.N && j < problem.M) to[i * grad.row + j * grad.key] = x;
  });
}

}  // namespace attention

Status attention_bias_gradient(const AttentionBiasGradient& args, const AttentionLaunch& call) {
  using namespace attention;
  using Sizes = BiasGradientSizes;
  const Problem problem = problem_of(args.problem, call.seed);
  if (args.batches == 0 || args.heads == 0) return Status::ok;
  return with_storage(args.problem.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    constexpr int shared_bytes = SharedRows<T, Sizes::queries + Sizes::keys, Sizes::piece>::bytes;
    const int64_t tiles =
        blocks_of(args.problem.N, Sizes::queries) * blocks_of(args.problem.M, Sizes::keys);
    return launch(bias_gradient<T>, dim3(unsigned(tiles * args.batches * args.heads)),
                  Sizes::threads, shared_bytes, call.stream, problem, args.facts,
                  tensor_of(args.grad_out, sizeof(T)), args.grad, int(args.heads),
                  int(args.problem.B / args.batches), int(args.problem.H / args.heads));
  });
}

}  // namespace cuda
}  // namespace genkern
