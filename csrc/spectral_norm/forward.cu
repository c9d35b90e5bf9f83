// Spectral normalization, forward: power iterations, σ and Ŵ = W/σ of all layers together.
//
// Each iteration makes two vectors, b from a and then a from b (u first: a = v, b = u; v first: the
// other way round), every one the norm(…) of a product of W or Wᵀ.
//
//     launch 2i        b̃ = product with a        launch 2i + 1        ã = product with b
//     last launch      σ, Ŵ = W/σ, and a and b to where they are wanted
//
// A block multiplies tiles of the matrix [far, near] (layers.cuh): a panel of tile_rows rows,
// summed over some of the columns, or a panel of tile_columns columns, summed over some of the
// rows. Where a panel is split among blocks, the last to arrive adds up what the others left, in
// order. Whoever has the panel's sums x̃ stores them with their Σ x̃², so that every block of the
// next launch has ‖x̃‖ from one number a panel, and divides by max(‖x̃‖, eps) as it reads. Σ x̃² is a
// double: fp32's range squared.
//
// After an update σ = b·W a (or its transpose) is ã·a = ‖ã‖²/max(‖ã‖, eps), whether eps clamps or
// not; without one (no iterations) it is b·b̃, and panels leave Σ b b̃ instead. W is read once a
// launch.
#include "../common/launch.cuh"
#include "forward_plan.cuh"
#include "vectors.cuh"
#include "work.h"

namespace genkern {
namespace cuda {
namespace spectral {

// ---- Products -----------------------------------------------------------------------------------

// Σ_n W(f, n) x(n) over the block's n: sums[f - first].
template <class T, bool packed>
__device__ void multiply_rows(const T* weight, const Matrix& matrix, const Factors<T>& factors,
                              int first, int near, int near_end, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int width = lane_columns<T, packed>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int far = first + warp * warp_rows;
  const T* rows = weight + far * matrix.far_stride;
  A total[warp_rows] = {};
  for (; near < near_end; near += tile_columns<T, packed>) {
    const Columns<T, packed> columns(matrix, near);
    A x[width];
    factors.load(columns, x);
    Pack<T> w[warp_rows];
#pragma unroll
    for (int r = 0; r < warp_rows; ++r)
      w[r] = columns.load(rows + r * matrix.far_stride, far + r < matrix.far);
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < width; ++i) sum += A(w[r].elements[i]) * x[i];
      total[r] += sum;
    }
  }
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
    total[r] = warp_sum(total[r]);
    if (lane == 0) sums[warp * warp_rows + r] = total[r];
  }
}

// Σ_f W(f, n) x(f) over the block's f, of every warp: sums[warp][n - first].
template <class T, bool packed>
__device__ void multiply_columns(const T* weight, const Matrix& matrix, const Factors<T>& factors,
                                 int first, int far, int far_end,
                                 Acc<T> (&sums)[warps][tile_columns<T, true>]) {
  using A = Acc<T>;
  constexpr int width = lane_columns<T, packed>;
  const int warp = threadIdx.x / 32;
  const Columns<T, packed> columns(matrix, first);
  A total[width] = {};
  for (far += warp * warp_rows; far < far_end; far += tile_rows) {
    const T* rows = weight + far * matrix.far_stride;
    Pack<T> w[warp_rows];
#pragma unroll
    for (int r = 0; r < warp_rows; ++r)
      w[r] = columns.load(rows + r * matrix.far_stride, far + r < matrix.far);
#pragma unroll
    for (int r = 0; r < warp_rows; ++r) {
      const A x = factors(far + r);
#pragma unroll
      for (int i = 0; i < width; ++i) total[i] += A(w[r].elements[i]) * x;
    }
  }
#pragma unroll
  for (int i = 0; i < width; ++i) sums[warp][columns.at(i) - first] = total[i];
}

template <class T>
struct ProductMemory {
  Acc<T> of_warps[warps][tile_columns<T, true>];
  double parts[warps];
  bool is_last;
};

// Whether this block is the last of `count` to arrive at a counter, which starts and ends at zero:
// then all that the others stored before can be seen.
inline __device__ bool arrives_last(unsigned* counter, int count, bool& shared) {
  __syncthreads();  // what the block's other threads stored comes before the fence
  if (threadIdx.x == 0) {
    __threadfence();
    shared = atomicAdd(counter, 1u) == unsigned(count - 1);
    if (shared) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return shared;
}

// Thread i of the first `width` has the block's sum of element first + i of the vector `made`.
template <class T>
__device__ void finish_panel(const Vector& made, const ForwardLayer& layer, int panel, int split,
                             int width, Acc<T> sum, unsigned char* scratch, unsigned* counters,
                             ProductMemory<T>& memory) {
  using A = Acc<T>;
  const int at = panel * width + int(threadIdx.x);
  const bool mine = int(threadIdx.x) < width && at < made.length;
  if (made.splits > 1) {
    A* sums = at_offset<A>(scratch, made.sums);
    if (mine) sums[split * int64_t(made.length) + at] = sum;
    unsigned* counter = counters + made.first_counter + panel;
    if (!arrives_last(counter, made.splits, memory.is_last)) return;
    sum = 0;
#pragma unroll 4
    for (int i = 0; mine && i < made.splits; ++i)
      sum += __ldcg(sums + i * int64_t(made.length) + at);
  }
  double part = 0;
  if (mine) {
    at_offset<A>(scratch, made.product)[at] = sum;
    const A other = layer.iterations > 0 ? sum : before<T>(made, layer.wide_state, at);
    part = double(sum) * double(other);
  }
  part = block_sum(part, memory.parts);
  if (threadIdx.x == 0) at_offset<double>(scratch, made.parts)[panel] = part;
}

// Launch number `step`: odd ones make ã from b, the others b̃ from a, the first from what the
// caller gave.
template <class T>
__global__ void __launch_bounds__(threads, 2)  // more blocks at once would spill
    spectral_norm_product(Table<ForwardLayer> table, int step, double eps, unsigned char* scratch,
                          unsigned* counters) {
  using A = Acc<T>;
  __shared__ ProductMemory<T> memory;
  const int index = layer_of_block(table.firsts, table.count);
  const ForwardLayer& layer = table.layers[index];
  // A layer of fewer iterations sits out.
  if (step >= 2 * layer.iterations && step > 0) return;
  const Matrix& matrix = layer.matrix;
  const bool odd = step % 2 != 0;
  const Vector &given = odd ? layer.b : layer.a, &made = odd ? layer.a : layer.b;
  const Factors<T> factors = step == 0 ? Factors<T>(given, layer.wide_state)
                                       : Factors<T>(given, at_offset<A>(scratch, given.product),
                                                    divisor_of(norm_of<A>(given, scratch), eps));
  const int tile = int(blockIdx.x) - table.firsts[index];
  const int panel = tile % made.panels, split = tile / made.panels;
  const T* weight = static_cast<const T*>(layer.weight);
  const int thread = threadIdx.x;
  auto& sums = memory.of_warps;
  const bool makes_far = layer.b_is_far != odd;
  const int columns = tile_columns_of<T>(matrix.packed);
  const int width = makes_far ? tile_rows : columns;  // of a panel
  const int step_width = made.steps * (makes_far ? columns : tile_rows);
  const int first = split * step_width;
  const int end = min(int64_t(first) + step_width, int64_t(makes_far ? matrix.near : matrix.far));
  if (makes_far && matrix.packed) {
    multiply_rows<T, true>(weight, matrix, factors, panel * width, first, end, sums[0]);
  } else if (makes_far) {
    multiply_rows<T, false>(weight, matrix, factors, panel * width, first, end, sums[0]);
  } else if (matrix.packed) {
    multiply_columns<T, true>(weight, matrix, factors, panel * width, first, end, sums);
  } else {
    multiply_columns<T, false>(weight, matrix, factors, panel * width, first, end, sums);
  }
  __syncthreads();
  A sum = 0;
  if (thread < width) {
    sum = sums[0][thread];
#pragma unroll
    for (int warp = 1; warp < warps; ++warp)
      if (!makes_far) sum += sums[warp][thread];
  }
  finish_panel<T>(made, layer, panel, split, width, sum, scratch, counters, memory);
}

// ---- σ and Ŵ ------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(threads, 4)  // more blocks at once would spill
    spectral_norm_write(Table<ForwardLayer> table, double eps, unsigned char* scratch) {
  using A = Acc<T>;
  constexpr int width = pack_size<T>, packs = flat<T> / (threads * width);
  const int index = layer_of_block(table.firsts, table.count);
  const ForwardLayer& layer = table.layers[index];
  const int block = int(blockIdx.x) - table.firsts[index];
  A sigma, divisor_a = A(1), divisor_b = A(1);
  if (layer.iterations > 0) {
    const A norm = norm_of<A>(layer.a, scratch);
    divisor_a = divisor_of(norm, eps);
    divisor_b = divisor_of(norm_of<A>(layer.b, scratch), eps);
    sigma = norm * (norm / divisor_a);
  } else {
    sigma = A(added_up(at_offset<double>(scratch, layer.b.parts), layer.b.panels));
  }
  if (block == 0 && threadIdx.x == 0) *static_cast<A*>(layer.sigma) = sigma;
  keep<T>(layer.a, layer, block, divisor_a, scratch);
  keep<T>(layer.b, layer, block, divisor_b, scratch);

  const T* weight = static_cast<const T*>(layer.weight);
  T* normalized = static_cast<T*>(layer.normalized);
  for (int loop = 0; loop < layer.write_loops; ++loop) {
    const int64_t start = (block * int64_t(layer.write_loops) + loop) * flat<T>;
    if (layer.aligned && start + flat<T> <= layer.elements) {
      const int64_t mine = start + int64_t(threadIdx.x) * width;
      Pack<T> w[packs];
#pragma unroll
      for (int i = 0; i < packs; ++i) w[i] = load_pack(weight + mine + i * threads * width);
#pragma unroll
      for (int i = 0; i < packs; ++i) {
#pragma unroll
        for (int j = 0; j < width; ++j) w[i].elements[j] = T(A(w[i].elements[j]) / sigma);
        store_pack(normalized + mine + i * threads * width, w[i]);
      }
    } else {
      const int64_t end = min(start + flat<T>, layer.elements);
      for (int64_t i = start + threadIdx.x; i < end; i += threads)
        normalized[i] = T(A(weight[i]) / sigma);
    }
  }
}

// ---- Launches -----------------------------------------------------------------------------------

template <class T>
Status forward(const SpectralWork& work, void* table, void* scratch_memory, void* stream) {
  unsigned char* scratch = static_cast<unsigned char*>(scratch_memory);
  const auto of_launch = [&](int launch) {
    return Table<ForwardLayer>(table, work.layers, launch);
  };
  unsigned* counters =
      reinterpret_cast<unsigned*>(const_cast<int*>(of_launch(3).firsts));  // what follows launch 2
  for (int step = 0; step < work.steps; ++step) {
    const Status status = launch(spectral_norm_product<T>, work.blocks[step % 2], threads, 0,
                                 stream, of_launch(step % 2), step, work.eps, scratch, counters);
    if (status != Status::ok) return status;
  }
  return launch(spectral_norm_write<T>, work.blocks[2], threads, 0, stream, of_launch(2), work.eps,
                scratch);
}

}  // namespace spectral

SpectralWork spectral_norm_forward_work(const SpectralForward* list, int64_t count,
                                        const SpectralOptions& options) {
  SpectralWork work{};
  for_dtype(options.dtype, [&](auto element) {
    work = spectral::forward_work<decltype(element)>(list, count, options.order);
    return Status::ok;
  });
  work.dtype = options.dtype;
  work.eps = options.eps;
  return work;
}

Status spectral_norm_forward(const SpectralWork& work, void* table, void* scratch, void* stream) {
  return for_dtype(work.dtype, [&](auto element) {
    return spectral::forward<decltype(element)>(work, table, scratch, stream);
  });
}

}  // namespace cuda
}  // namespace genkern
