// How a call of the forward is cut into blocks, on the host: forward.cu says what they do.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.cuh"
#include "work.h"

namespace genkern {
namespace cuda {
namespace spectral {

constexpr int64_t blocks_aim = 512;  // that one layer is split into, if its size allows it
constexpr int64_t least_steps = 4, most_splits = 32;

// Enough splits for the GPU to be busy, few enough that adding them up is cheap.
inline void cut(Vector& vector, int64_t panel_width, int64_t tiles) {
  const int64_t panels = std::max<int64_t>(1, ceil_div(vector.length, panel_width));
  tiles = std::max<int64_t>(1, tiles);
  const int64_t wanted = std::min({blocks_aim / panels, tiles / least_steps, most_splits});
  const int64_t steps = ceil_div(tiles, std::max<int64_t>(1, wanted));
  vector.panels = int(panels);
  vector.steps = int(steps);
  vector.splits = int(ceil_div(tiles, steps));
}

// Gives out scratch memory and counters.
struct Places {
  int64_t bytes = 0;
  int64_t counters = 0;

  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, pack_bytes) * pack_bytes;
    return at;
  }
  void give(Vector& vector, int64_t sum_size) {
    vector.sums = take(vector.splits > 1 ? vector.splits * vector.length * sum_size : 0);
    vector.product = take(vector.length * sum_size);
    vector.parts = take(vector.panels * int64_t(sizeof(double)));
    vector.first_counter = int(counters);
    counters += vector.panels;
  }
};

template <class T>
ForwardLayer plan(const SpectralForward& item, UpdateOrder order, Places& places) {
  ForwardLayer layer{};
  layer.aligned = is_pack_aligned(item.weight) && is_pack_aligned(item.normalized);
  const View view = view_of(item.outer, item.rows, item.inner, pack_size<T>, layer.aligned);
  layer.weight = item.weight;
  layer.normalized = item.normalized;
  layer.sigma = item.sigma;
  layer.matrix = view.matrix;
  layer.iterations = int(item.iterations);
  layer.wide_state = item.wide_state;
  Vector u{}, v{};
  u.before = item.u, u.state = item.new_u, u.store = item.store_u, u.leading = 1;
  v.before = item.v, v.state = item.new_v, v.store = item.store_v, v.leading = int(item.v_leading);
  u.length = int(item.rows), v.length = int(item.outer * item.inner);
  Vector &far = view.far_is_u ? u : v, &near = view.far_is_u ? v : u;
  const int columns = tile_columns_of<T>(view.matrix.packed);
  cut(far, tile_rows, ceil_div(near.length, columns));
  cut(near, columns, ceil_div(far.length, tile_rows));
  places.give(u, sizeof(Acc<T>));
  places.give(v, sizeof(Acc<T>));
  const bool u_first = order == UpdateOrder::u_first;
  layer.a = u_first ? v : u;
  layer.b = u_first ? u : v;
  layer.b_is_far = u_first == view.far_is_u;
  layer.elements = item.outer * item.rows * item.inner;
  const int64_t loops = std::max<int64_t>(1, ceil_div(layer.elements, flat<T>));
  layer.write_loops = int(ceil_div(loops, blocks_aim));
  layer.write_blocks = int(ceil_div(loops, layer.write_loops));
  return layer;
}

template <class T>
SpectralWork forward_work(const SpectralForward* list, int64_t count, UpdateOrder order) {
  SpectralWork work{};
  Places places;
  std::vector<ForwardLayer> layers;
  std::vector<int> firsts[3];
  for (int64_t i = 0; i < count; ++i) {
    layers.push_back(plan<T>(list[i], order, places));
    const ForwardLayer& layer = layers.back();
    const int64_t blocks[] = {layer.b.panels * int64_t(layer.b.splits),
                              layer.a.panels * int64_t(layer.a.splits), layer.write_blocks};
    for (int launch = 0; launch < 3; ++launch) {
      firsts[launch].push_back(int(work.blocks[launch]));
      work.blocks[launch] += unsigned(blocks[launch]);
    }
    work.steps = std::max(work.steps, std::max(1, 2 * layer.iterations));
  }
  work.table = table_of(layers, firsts, places.counters);
  work.scratch_bytes = places.bytes;
  work.layers = int(count);
  return work;
}

}  // namespace spectral
}  // namespace cuda
}  // namespace genkern
