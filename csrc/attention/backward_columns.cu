// Attention, backward by columns: the gradients of k and v, and the column sums of dS that biases
// need. Formulas: backward_rows.cu, whose facts of the rows this reads.
//
//   dk = scale·(g∘dS)ᵀ·q        dv = (Z∘P)ᵀ·dO
//
// Layout: a block takes 16 keys of one head for every warp. Its keys and values stay in shared
// memory; tiles of queries, their cotangents and facts come through two stages of it, of all heads
// that share the keys, one after another. A tile of products has keys as rows.
// Plan: whatever a key's sums need passes by one block, in the same order always: no atomics. Heads
// of more than 128 features have registers for the sums of k or of v, and are launched for each.
#include "logits.cuh"
#include "sizes.cuh"

namespace genkern {
namespace cuda {
namespace attention {

template <class T, int D, int DV>
struct BackwardColumnsSizes {
  static constexpr bool is_fp32 = !on_tensor_cores<T>;
  static constexpr bool in_turns = D > 128;
  static constexpr int warps = is_fp32 ? (in_turns ? 2 : D > 64 ? 3 : 4) : (in_turns ? 3 : 4);
  static constexpr int threads = warps * lanes;
  static constexpr int keys = warps * 16;
  static constexpr int queries = is_fp32 ? (in_turns ? 8 : D > 64 ? 16 : 32) : (D > 64 ? 16 : 32);
  static constexpr int facts = 3;
  static constexpr int shared_bytes =
      SharedRows<T, keys, D>::bytes + SharedRows<T, keys, DV>::bytes +
      SharedRows<T, 2 * queries, D>::bytes + SharedRows<T, 2 * queries, DV>::bytes +
      2 * facts * queries * int(sizeof(float));
};

template <class T, int D, int DV>
__global__ void __launch_bounds__(BackwardColumnsSizes<T, D, DV>::threads, 1)
    backward_columns(Problem problem, RowFacts facts, Tensor grad_out, Heads grad_k, Heads grad_v,
                     RowNumbers column_sums, int blocks) {
  using Sizes = BackwardColumnsSizes<T, D, DV>;
  constexpr int threads = Sizes::threads, queries = Sizes::queries, column_blocks = queries / 8;
  const BlockOfKeys block = block_of_keys(problem, blocks, Sizes::keys);
  const int group = problem.H / problem.Hk;
  Place place = place_of(problem, block.batch, block.kv_head * group);
  const int first_row = warp() * 16, j0 = block.first + first_row;
  if (block.first >= place.key_rows) return;

  SharedMemory memory;
  const auto k_tile = memory.rows_of<T, Sizes::keys, D>();
  const auto v_tile = memory.rows_of<T, Sizes::keys, DV>();
  const auto q_tiles = memory.rows_of<T, 2 * queries, D>();
  const auto grad_tiles = memory.rows_of<T, 2 * queries, DV>();
  float* const fact_tiles = memory.numbers(2 * Sizes::facts * queries);
  static_assert(Sizes::facts * queries <= threads, "a thread copies one number of a tile");
  const int fact_number = threadIdx.x / queries;
  copy_rows<threads>(k_tile, rows_of_keys<T>(problem.k, place, problem.d).from(block.first));
  copy_rows<threads>(v_tile, rows_of_keys<T>(problem.v, place, problem.dv).from(block.first));
  const LeftInShared<T, 1, D> k(k_tile, first_row);
  const LeftInShared<T, 1, DV> v(v_tile, first_row);
  Sums<1, D / 8> k_sums;
  Sums<1, DV / 8> v_sums;  // in turns k_sums takes its place
  k_sums.clear();
  v_sums.clear();

  for (int member = 0; member < group; ++member) {
    place = place_of(problem, block.batch, block.kv_head * group + member);
    const auto q_rows = rows_of_queries<T>(problem.q, place, problem.d);
    const auto grad_rows = rows_of_queries<T>(grad_out, place, problem.dv);
    const float* const of_rows = query_numbers(fact_number == 0   ? facts.shift
                                               : fact_number == 1 ? facts.inverse
                                                                  : facts.level,
                                               place);
    TileCopies<threads, T, queries, D> of_queries(q_rows);
    TileCopies<threads, T, queries, DV> of_grads(grad_rows);
    const auto fetch = [&](auto is_quick, int i0, int stage) {
      of_queries.copy(is_quick, q_tiles.template part<queries>(stage), i0);
      of_grads.copy(is_quick, grad_tiles.template part<queries>(stage), i0);
      const int i = i0 + threadIdx.x % queries;
      if (fact_number < Sizes::facts)
        copy_4_async(shared_address(fact_tiles + stage * Sizes::facts * queries + threadIdx.x),
                     of_rows + i, i < place.queries);
      commit_copies();
    };
    const Span span = query_span(problem, place, block.first, queries, Sizes::keys);
    float totals[2] = {};  // of dS, for biases: no tile is quick where there is one
    int stage = 0;
    const auto step = [&](auto is_quick, int i0) {
      constexpr bool quick = decltype(is_quick)::value;
      wait_for_copies<0>();
      __syncthreads();
      if (i0 + queries < span.end) fetch(is_quick, i0 + queries, stage ^ 1);
      const auto q_tile = q_tiles.template part<queries>(stage);
      const auto grad_tile = grad_tiles.template part<queries>(stage);
      const float* fact = fact_tiles + stage * Sizes::facts * queries;
      const Corner<Rows::keys> corner{j0, i0};
      Sums<1, column_blocks> p, ds, of_tanh;
      p.clear();
      add_pairing(p, k, q_tile);
      if (!quick)
        finish_logits<T>(problem, place, corner, i0 < span.full_first || i0 >= span.full_end, p,
                         &of_tanh);
      ds.clear();
      if (!Sizes::in_turns || !grad_v.data) add_pairing(ds, v, grad_tile);
      each(p, [&](float& x, int, int n, int e) {
        const int c = column_of_lane(n, e);
        x = probability(problem, x, fact[c], fact[queries + c]);
      });
      const auto finish = [&](int n, int e, float z) {
        const float level = fact[2 * queries + column_of_lane(n, e)];
        ds.x[0][n][e] = p.x[0][n][e] * (z * ds.x[0][n][e] - level);
        if (!quick) totals[e / 2] += ds.x[0][n][e];
        p.x[0][n][e] *= z;
      };
      if (!quick && problem.seed)
        each_dropout<1, column_blocks>(problem, place, corner,
                                       [&](int, int n, int e, float z) { finish(n, e, z); });
      else
        each(p, [&](float&, int, int n, int e) { finish(n, e, 1); });
      if (!quick && problem.softcap != 0)
        each(ds, [&](float& x, int, int n, int e) {
          x *= 1 - of_tanh.x[0][n][e] * of_tanh.x[0][n][e];
        });
      if constexpr (Sizes::in_turns) {
        if (grad_v.data)
          add_product(k_sums, p, grad_tile);
        else
          add_product(k_sums, ds, q_tile);
      } else {
        if (grad_v.data) add_product(v_sums, p, grad_tile);
        if (grad_k.data) add_product(k_sums, ds, q_tile);
      }
      stage ^= 1;
    };
    __syncthreads();  // until the last tile of the member before is read
    if (span.first < span.end) fetch(std::false_type(), span.first, 0);
    each_tile<T>(
        problem, span, queries, q_rows.in_whole_vectors() && grad_rows.in_whole_vectors(),
        [&](int at) { step(std::true_type(), at); }, [&](int at) { step(std::false_type(), at); });

    if (!column_sums.data) continue;
    // Early or late: each spills a register where the other does not (sm_80, sm_90).
    const int early = Sizes::in_turns ? 0 : j0, late = j0 - early;
    float* to = static_cast<float*>(column_sums.data) + place.batch * column_sums.batch +
                place.head * column_sums.head + place.first_key + early;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(totals[r]);
      const int j = late + row_of_lane(r);
      if (lane() % 4 == 0 && early + j < place.key_rows) to[j] = total;
    }
  }
  const auto store = [&](const Heads& to, int features, const auto& sums) {
    store_rows(key_rows<T>(to, place) + j0 * to.row, to.row, place.key_rows - j0, features, sums);
  };
  if constexpr (Sizes::in_turns)
    if (grad_v.data) store(grad_v, problem.dv, k_sums);
  if (!Sizes::in_turns && grad_v.data) store(grad_v, problem.dv, v_sums);
  each(k_sums, [&](float& x, int, int, int) { x *= problem.scale; });
  if (grad_k.data) store(grad_k, problem.d, k_sums);
}

}  // namespace attention

Status attention_backward_columns(const AttentionColumns& args, const AttentionLaunch& call) {
  using namespace attention;
  const Problem problem = problem_of(args.problem, call.seed);
  return with_storage(args.problem.dtype, [&](auto storage) {
    return with_features(problem, [&](auto features) {
      using T = typename decltype(storage)::type;
      constexpr int D = decltype(features)::D, DV = decltype(features)::DV;
      using Sizes = BackwardColumnsSizes<T, D, DV>;
      const int64_t blocks = blocks_of(call.longest_k, Sizes::keys);
      const dim3 grid(unsigned(blocks * args.problem.B * args.problem.Hk));
      const auto run = [&](const Heads& grad_k, const Heads& grad_v, const RowNumbers& sums) {
        return launch(backward_columns<T, D, DV>, grid, Sizes::threads, Sizes::shared_bytes,
                      call.stream, problem, args.facts, tensor_of(args.grad_out, sizeof(T)), grad_k,
                      grad_v, sums, int(blocks));
      };
      if (!Sizes::in_turns) return run(args.grad_k, args.grad_v, args.sums);
      const Status of_values = args.grad_v.data ? run({}, args.grad_v, {}) : Status::ok;
      if (of_values != Status::ok || !(args.grad_k.data || args.sums.data)) return of_values;
      return run(args.grad_k, {}, args.sums);
    });
  });
}

}  // namespace cuda
}  // namespace genkern
