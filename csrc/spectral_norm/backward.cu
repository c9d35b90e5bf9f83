// Gradients of spectral normalization, of all layers together:
//
//     dW = dŴ/σ + (dσ - ⟨dŴ, Ŵ⟩/σ) u vᵀ
//
// Two launches. The first reads dŴ and Ŵ, which both lie in memory as W does, as flat arrays: every
// block leaves the sum of its piece of ⟨dŴ, Ŵ⟩ in scratch memory. The second writes tiles of the
// matrix dW [far, near] (layers.cuh), every block adding its layer's sums up, in order, first. Sums
// are doubles: one addition a pack keeps within what consumer GPUs can do of them.
#include <algorithm>
#include <vector>

#include "../common/launch.cuh"
#include "layers.cuh"
#include "work.h"

namespace genkern {
namespace cuda {
namespace spectral {

struct BackwardLayer {
  const void* grad_normalized;  // or null
  const void* normalized;
  const void* sigma;
  const void* grad_sigma;  // or null
  void* grad_weight;
  const void *along_far, *along_near;  // u and v, each in its own order
  int64_t elements;
  int64_t first_part;  // of scratch memory's doubles
  Matrix matrix;
  int far_leading, near_leading;
  int product_blocks, product_loops;
  int write_loops;  // tiles that one block writes, one after another along near
  bool aligned;     // grad_normalized and normalized
};

template <class T>
__device__ Acc<T> inner_product(const Pack<T>& x, const Pack<T>& y) {
  Acc<T> sum = 0;
#pragma unroll
  for (int i = 0; i < pack_size<T>; ++i) sum += Acc<T>(x.elements[i]) * Acc<T>(y.elements[i]);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(threads)
    spectral_norm_inner_product(Table<BackwardLayer> table, double* parts) {
  using A = Acc<T>;
  constexpr int width = pack_size<T>, packs = flat<T> / (threads * width);
  __shared__ double of_warps[warps];
  const int index = layer_of_block(table.firsts, table.count);
  const BackwardLayer& layer = table.layers[index];
  const int block = int(blockIdx.x) - table.firsts[index];
  const T* grad = static_cast<const T*>(layer.grad_normalized);
  const T* normalized = static_cast<const T*>(layer.normalized);
  double sum = 0;
  for (int loop = 0; loop < layer.product_loops; ++loop) {
    const int64_t start = (block * int64_t(layer.product_loops) + loop) * flat<T>;
    if (layer.aligned && start + flat<T> <= layer.elements) {
      const int64_t mine = start + int64_t(threadIdx.x) * width;
      Pack<T> x[packs], y[packs];
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        x[i] = load_pack(grad + mine + i * threads * width);
        y[i] = load_pack(normalized + mine + i * threads * width);
      }
#pragma unroll
      for (int i = 0; i < packs; ++i) sum += double(inner_product(x[i], y[i]));
    } else {
      const int64_t end = min(start + flat<T>, layer.elements);
      for (int64_t i = start + threadIdx.x; i < end; i += threads)
        sum += double(A(grad[i]) * A(normalized[i]));
    }
  }
  sum = block_sum(sum, of_warps);
  if (threadIdx.x == 0) parts[layer.first_part + block] = sum;
}

template <class T, bool packed>
__device__ void write_gradient(const BackwardLayer& layer, int tile, Acc<T> factor,
                               const Reciprocal<Acc<T>>& inverse) {
  using A = Acc<T>;
  constexpr int width = lane_columns<T, packed>;
  constexpr int at_once = packed ? warp_rows : 1;  // rows in registers
  const Matrix& matrix = layer.matrix;
  const int panels = (matrix.far + tile_rows - 1) / tile_rows;
  const int far = (tile % panels) * tile_rows + int(threadIdx.x / 32) * warp_rows;
  const int first = (tile / panels) * layer.write_loops * tile_columns<T, packed>;
  const T* grad = static_cast<const T*>(layer.grad_normalized);
  T* grad_weight = static_cast<T*>(layer.grad_weight);
  const A* along_near = static_cast<const A*>(layer.along_near);
  A scaled[warp_rows];
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
    const int at = own_index(far + r, layer.far_leading, matrix.far);
    scaled[r] = far + r < matrix.far ? factor * static_cast<const A*>(layer.along_far)[at] : A(0);
  }
  for (int loop = 0; loop < layer.write_loops; ++loop) {
    const Columns<T, packed> columns(matrix, first + loop * tile_columns<T, packed>);
    A along[width];
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const int at = own_index(columns.at(i), layer.near_leading, matrix.near);
      along[i] = columns.is_inside(i) ? along_near[at] : A(0);
    }
#pragma unroll
    for (int group = 0; group < warp_rows; group += at_once) {
      Pack<T> pack[at_once];
#pragma unroll
      for (int r = 0; r < at_once; ++r) {
        const int row = far + group + r;
        pack[r] = columns.load(grad + row * matrix.far_stride, grad && row < matrix.far);
      }
#pragma unroll
      for (int r = 0; r < at_once; ++r) {
        const int row = far + group + r;
        if (row >= matrix.far) continue;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const A of_grad = inverse * A(pack[r].elements[i]);
          pack[r].elements[i] = T(of_grad + scaled[group + r] * along[i]);
        }
        columns.store(grad_weight + row * matrix.far_stride, pack[r]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads)
    spectral_norm_gradient(Table<BackwardLayer> table, const double* parts) {
  using A = Acc<T>;
  const int index = layer_of_block(table.firsts, table.count);
  const BackwardLayer& layer = table.layers[index];
  const A sigma = *static_cast<const A*>(layer.sigma);
  const A grad_sigma = layer.grad_sigma ? *static_cast<const A*>(layer.grad_sigma) : A(0);
  // Nothing is multiplied where there is no gradient: 0/0 has no part in it.
  const Reciprocal<A> inverse(layer.grad_normalized ? sigma : A(1));
  const double product = added_up(parts + layer.first_part, layer.product_blocks);
  const A factor = layer.grad_normalized ? grad_sigma - A(product / double(sigma)) : grad_sigma;
  const int tile = int(blockIdx.x) - table.firsts[index];
  if (layer.matrix.packed) {
    write_gradient<T, true>(layer, tile, factor, inverse);
  } else {
    write_gradient<T, false>(layer, tile, factor, inverse);
  }
}

// ---- Plans and launches -------------------------------------------------------------------------

constexpr int64_t blocks_aim = 512;  // that one layer is split into, if its size allows it

template <class T>
BackwardLayer plan(const SpectralBackward& item) {
  BackwardLayer layer{};
  layer.grad_normalized = item.grad_normalized;
  layer.normalized = item.normalized;
  layer.sigma = item.sigma;
  layer.grad_sigma = item.grad_sigma;
  layer.grad_weight = item.grad_weight;
  layer.elements = item.outer * item.rows * item.inner;
  const bool aligned = is_pack_aligned(item.grad_normalized);  // null is
  layer.aligned = aligned && is_pack_aligned(item.normalized);
  const View view = view_of(item.outer, item.rows, item.inner, pack_size<T>,
                            aligned && is_pack_aligned(item.grad_weight));
  layer.matrix = view.matrix;
  layer.along_far = view.far_is_u ? item.u : item.v;
  layer.along_near = view.far_is_u ? item.v : item.u;
  layer.far_leading = view.far_is_u ? 1 : int(item.v_leading);
  layer.near_leading = view.far_is_u ? int(item.v_leading) : 1;
  if (item.grad_normalized) {
    const int64_t loops = ceil_div(layer.elements, flat<T>);
    layer.product_loops = int(ceil_div(loops, blocks_aim));
    layer.product_blocks = int(ceil_div(loops, std::max(1, layer.product_loops)));
  }
  const int64_t panels = ceil_div(layer.matrix.far, tile_rows);
  const int64_t tiles = ceil_div(layer.matrix.near, tile_columns_of<T>(layer.matrix.packed));
  layer.write_loops = int(std::min(tiles, ceil_div(panels * tiles, blocks_aim)));
  return layer;
}

template <class T>
SpectralWork backward_work(const SpectralBackward* list, int64_t count) {
  SpectralWork work{};
  std::vector<BackwardLayer> layers;
  std::vector<int> firsts[2];
  for (int64_t i = 0; i < count; ++i) {
    BackwardLayer layer = plan<T>(list[i]);
    if (layer.elements == 0) continue;
    layer.first_part = work.blocks[0];
    firsts[0].push_back(int(work.blocks[0]));
    firsts[1].push_back(int(work.blocks[1]));
    const int64_t panels = ceil_div(layer.matrix.far, tile_rows);
    const int64_t tiles = ceil_div(layer.matrix.near, tile_columns_of<T>(layer.matrix.packed));
    work.blocks[0] += unsigned(layer.product_blocks);
    work.blocks[1] += unsigned(panels * ceil_div(tiles, layer.write_loops));
    layers.push_back(layer);
  }
  work.layers = int(layers.size());
  work.table = table_of(layers, firsts, 0);
  work.scratch_bytes = work.blocks[0] * int64_t(sizeof(double));
  return work;
}

template <class T>
Status backward(const SpectralWork& work, void* table, void* scratch, void* stream) {
  double* parts = static_cast<double*>(scratch);
  const Table<BackwardLayer> of_products(table, work.layers, 0), of_tiles(table, work.layers, 1);
  const Status status = launch(spectral_norm_inner_product<T>, work.blocks[0], threads, 0, stream,
                               of_products, parts);
  if (status != Status::ok) return status;
  return launch(spectral_norm_gradient<T>, work.blocks[1], threads, 0, stream, of_tiles,
                const_cast<const double*>(parts));
}

}  // namespace spectral

SpectralWork spectral_norm_backward_work(const SpectralBackward* list, int64_t count,
                                         const SpectralOptions& options) {
  SpectralWork work{};
  for_dtype(options.dtype, [&](auto element) {
    work = spectral::backward_work<decltype(element)>(list, count);
    return Status::ok;
  });
  work.dtype = options.dtype;
  return work;
}

Status spectral_norm_backward(const SpectralWork& work, void* table, void* scratch, void* stream) {
  return for_dtype(work.dtype, [&](auto element) {
    return spectral::backward<decltype(element)>(work, table, scratch, stream);
  });
}

}  // namespace cuda
}  // namespace genkern
