// Attention, forward: out = softmax(scale·q·kᵀ)·v by online softmax over blocks of keys.
//
// Layout: tiles.h. A task is one query block of one head. It packs Qᵀ once, then for every block of
// keys: Sᵀ = K·Qᵀ; the running maximum m, lane by lane; P = exp(scale·(S - m)); the sums l and Oᵀ
// shrink by exp(scale·(m_old - m)); Oᵀ += Vᵀ·Pᵀ. At the end out = Oᵀ / l; m and l are kept.
// Tasks of a causal head run from the last, longest, block to the first.
#include "../common/parallel.h"
#include "tiles.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

constexpr int64_t key_block = 64;
constexpr double parallel_from = 2e5;  // products that pay for waking a second thread

template <class A>
struct Workspace {
  Rows<A> rows;  // one query block as it lies in the tensor
  Rows<A> q, s, o;
  Rows<A> k, v;
  A *top, *sum, *factor;

  Workspace(Carver& carve, const AttentionShape& shape) {
    const int64_t width = query_block<A>, L = lanes<A>();
    rows = carve.rows<A>(width, round_up(shape.d, L));
    q = carve.rows<A>(round_up(shape.d, L), width);
    s = carve.rows<A>(key_block, width);
    o = carve.rows<A>(round_up(shape.dv, most(L, step)), width);
    k = carve.rows<A>(key_block, round_up(shape.d, step));
    v = carve.rows<A>(key_block, round_up(shape.dv, step));
    top = carve.array<A>(width);
    sum = carve.array<A>(width);
    factor = carve.array<A>(width);
  }
};

// S becomes exp(magnitude·(S - m)) with the new running maximum m; o and sum shrink to it.
template <class A>
void softmax_step(const Workspace<A>& work, A magnitude, int64_t keys, int64_t vectors,
                  int64_t dv) {
  constexpr int L = lanes<A>();
  for (int64_t w = 0; w < vectors; ++w) {
    A* s = work.s.data + w * L;
    const int64_t stride = work.s.stride;
    const Vec<A> old_top = load(work.top + w * L);
    Vec<A> top = old_top;
    for (int64_t j = 0; j < keys; ++j) top = max(top, load(s + j * stride));
    // All keys so far at -inf: any finite shift gives the zeros that are due.
    const Vec<A> shift = select(top == A(-__builtin_inf()), Vec<A>{}, top);
    Vec<A> sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<A> p = exp((load(s + j * stride) - shift) * magnitude);
      store(s + j * stride, p);
      sum += p;
    }
    const Vec<A> shrink = exp((old_top - shift) * magnitude);
    store(work.top + w * L, top);
    store(work.sum + w * L, load(work.sum + w * L) * shrink + sum);
    for (int64_t e = 0; e < dv; ++e) {
      A* o = work.o.row(e) + w * L;
      store(o, load(o) * shrink);
    }
  }
}

template <class T>
void query_block_task(const AttentionForward& args, int64_t batch, int64_t head, int64_t i0,
                      const Workspace<Acc<T>>& work) {
  using A = Acc<T>;
  const AttentionShape& shape = args.shape;
  const int64_t queries = smaller(query_block<A>, shape.N - i0);
  const int64_t vectors = vectors_for<A>(queries);
  const Rows<T> q = head_of<T>(args.q, batch, head), out = head_of<T>(args.out, batch, head);
  const Rows<T> k = head_of<T>(args.k, batch, head), v = head_of<T>(args.v, batch, head);

  const Scale<A> scale(shape.scale);

  pack<T, A>(work.rows, {q.row(i0), q.stride}, queries, shape.d, queries, scale.sign);
  transpose<A>(work.q, {work.rows.data, work.rows.stride}, queries, shape.d);
  for (int64_t i = 0; i < vectors * lanes<A>(); ++i) {
    work.top[i] = A(-__builtin_inf());
    work.sum[i] = 0;
  }
  clear(work.o, round_up(shape.dv, most(lanes<A>(), step)));

  const Rows<const A> packed_q{work.q.data, work.q.stride}, p{work.s.data, work.s.stride};
  const int64_t visible = visible_keys(shape, i0, queries);
  for (int64_t j0 = 0; j0 < visible; j0 += key_block) {
    const int64_t keys = smaller(key_block, visible - j0);
    const Rows<const A> k_rows = left_operand<T, A>({k.data, k.stride}, j0, keys, shape.d, work.k);
    product<Left::rows, Into::fresh>(work.s, k_rows, packed_q, keys, vectors, shape.d);
    if (shape.is_causal) hide_future(work.s, i0, j0, keys, vectors, A(-__builtin_inf()));
    softmax_step(work, scale.magnitude, keys, vectors, shape.dv);
    const Rows<const A> v_rows = left_operand<T, A>({v.data, v.stride}, j0, keys, shape.dv, work.v);
    product<Left::columns, Into::sum>(work.o, v_rows, p, shape.dv, vectors, keys);
  }

  A* shift = row_numbers<A>(args.rows.shift, shape, batch, head, i0);
  A* sum = row_numbers<A>(args.rows.sum, shape, batch, head, i0);
  for (int64_t i = 0; i < queries; ++i) {
    shift[i] = work.top[i] == A(-__builtin_inf()) ? A(0) : work.top[i];
    sum[i] = work.sum[i];
    work.factor[i] = work.sum[i] == 0 ? A(0) : A(1) / work.sum[i];
  }
  const Rows<const A> o{work.o.data, work.o.stride};
  unpack_transposed<T, A>({out.row(i0), out.stride}, o, queries, shape.dv, work.factor);
  if (args.wide_out.data) {
    const Rows<A> wide = head_of<A>(args.wide_out, batch, head);
    unpack_transposed<A, A>({wide.row(i0), wide.stride}, o, queries, shape.dv, work.factor);
  }
}

template <class T>
Status forward(const AttentionForward& args) {
  using A = Acc<T>;
  const AttentionShape& shape = args.shape;
  const int64_t heads = shape.B * shape.H, blocks = ceil_div(shape.N, query_block<A>);
  if (heads * blocks == 0) return Status::ok;
  const double work_size = double(heads) * shape.N * shape.M * (shape.d + shape.dv);
  const int team = work_size < parallel_from ? 1 : shape.threads;

  Carver count{nullptr};
  const Workspace<A> sizes(count, shape);
  const int64_t bytes = count.used;
  char* memory = static_cast<char*>(allocate_scratch(bytes * team));
  if (!memory) return Status::out_of_memory;
  parallel(heads * blocks, team, [&](int64_t task, int thread) {
    Carver carve{memory + bytes * thread};
    const Workspace<A> work(carve, shape);
    const int64_t nth = task % blocks, which = task / blocks;
    const int64_t block = shape.is_causal ? blocks - 1 - nth : nth;
    query_block_task<T>(args, which / shape.H, which % shape.H, block * query_block<A>, work);
  });
  free(memory);
  return Status::ok;
}

}  // namespace

Status attention_forward(const AttentionForward& args) {
  return for_dtype(args.shape.dtype, [&](auto t) { return forward<decltype(t)>(args); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
