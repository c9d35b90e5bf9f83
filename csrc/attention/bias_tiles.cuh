// Gradients of a bias with rows and keys of its own, tile by tile. For attention's .cu files.
//
// Layout: a block takes a tile of the bias and goes over what shares it, in order: no atomics. Its
// products sum over pieces of the features, so that one kernel serves heads of every size.
#pragma once

#include "logits.cuh"
#include "sizes.cuh"

namespace genkern {
namespace cuda {
namespace attention {

template <int keys_>
struct BiasTileSizes {
  static constexpr int warps = 4, threads = warps * lanes, queries = warps * 16, keys = keys_;
  static constexpr int piece = 64;  // features at a time
};

// Which tile a block has of a bias [batches, heads, N, M], and who shares it.
template <class Sizes>
struct BiasTile {
  int first_query, first_key, batch, head, batches_sharing, heads_sharing;

  __device__ BiasTile(const Problem& problem, int heads, int batches_sharing, int heads_sharing)
      : batches_sharing(batches_sharing), heads_sharing(heads_sharing) {
    const int key_blocks = (problem.M + Sizes::keys - 1) / Sizes::keys;
    const int row_blocks = (problem.N + Sizes::queries - 1) / Sizes::queries;
    const int matrix = blockIdx.x / key_blocks / row_blocks;
    first_query = int(blockIdx.x) / key_blocks % row_blocks * Sizes::queries;
    first_key = int(blockIdx.x) % key_blocks * Sizes::keys;
    batch = matrix / heads;
    head = matrix % heads;
  }

  __device__ int first_row() const { return warp() * 16; }
  __device__ Corner<Rows::queries> corner() const { return {first_query + first_row(), first_key}; }

  // body(place) for all that share the tile and see something of it.
  template <class Body>
  __device__ void each_place(const Problem& problem, const Body& body) const {
    for (int turn = 0; turn < batches_sharing * heads_sharing; ++turn) {
      const Place place = place_of(problem, batch * batches_sharing + turn / heads_sharing,
                                   head * heads_sharing + turn % heads_sharing);
      const Span span = key_span(problem, place, first_query, Sizes::queries, Sizes::keys);
      if (first_key + Sizes::keys > span.first && first_key < span.end) body(place);
    }
  }

  // One number of every row of a lane's; `beyond` where there is no row.
  __device__ void take_numbers(const RowNumbers& x, const Place& place, float beyond,
                               float (&to)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first_query + first_row() + row_of_lane(r);
      to[r] = i < place.queries ? query_numbers(x, place)[i] : beyond;
    }
  }

  __device__ void store(const Problem& problem, const Bias& grad,
                        Sums<1, Sizes::keys / 8>& sums) const {
    float* to = static_cast<float*>(grad.data) + batch * grad.batch + head * grad.head;
    each(sums, [&](float& x, int m, int n, int e) {
      const int i = corner().query(m, n, e), j = corner().key(m, n, e);
      if (i < problem.N && j < problem.M) to[i * grad.row + j * grad.key] = x;
    });
  }
};

// Products of a tile's queries and keys, over all features.
template <class T, class Sizes>
class BiasTileProducts {
 public:
  static constexpr int shared_bytes =
      SharedRows<T, Sizes::queries + Sizes::keys, Sizes::piece>::bytes;

  __device__ BiasTileProducts(SharedMemory& memory, const BiasTile<Sizes>& tile)
      : tile_(tile),
        left_(memory.rows_of<T, Sizes::queries, Sizes::piece>()),
        right_(memory.rows_of<T, Sizes::keys, Sizes::piece>()) {}

  // sums += of_queries · of_keysᵀ
  __device__ void add(Sums<1, Sizes::keys / 8>& sums, const GlobalRows<T>& of_queries,
                      const GlobalRows<T>& of_keys) const {
    constexpr int threads = Sizes::threads, piece = Sizes::piece;
    for (int column = 0; column < of_queries.features; column += piece) {
      __syncthreads();  // until the piece before is read
      copy_rows<threads>(left_, of_queries.from(tile_.first_query).columns_from(column));
      copy_rows<threads>(right_, of_keys.from(tile_.first_key).columns_from(column));
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      add_pairing(sums, LeftInShared<T, 1, piece>(left_, tile_.first_row()), right_);
    }
  }

 private:
  const BiasTile<Sizes>& tile_;
  SharedRows<T, Sizes::queries, Sizes::piece> left_;
  SharedRows<T, Sizes::keys, Sizes::piece> right_;
};

template <class Sizes>
inline dim3 blocks_of_bias(const AttentionProblem& problem, int64_t batches, int64_t heads) {
  return dim3(unsigned(blocks_of(problem.N, Sizes::queries) * blocks_of(problem.M, Sizes::keys) *
                       batches * heads));
}

}  // namespace attention
}  // namespace cuda
}  // namespace genkern
