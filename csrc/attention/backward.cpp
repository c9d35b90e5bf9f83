// Attention, backward: grad_q, grad_k, grad_v from q, k, v, grad_out and what the forward kept.
//
//   P = exp(scale·(S - shift)) / sum   δ = rowsum(dO∘O)   dP = dO·vᵀ   dS = P∘(dP - δ)
//   dq = scale·dS·k    dk = scale·dSᵀ·q   dv = Pᵀ·dO
//
// Layout: tiles.h. A task is a chunk of one head's query blocks: every `chunks`-th block, so that
// causal chunks cost the same. Block by block it packs Q, dO and their transposes, and for
// every block of keys recomputes Sᵀ and P and makes the five products; dQ is finished with its
// block, dK and dV grow in fp32 (fp64) sums of the task's own. With one chunk a head the task
// writes them out; with more, all chunks' sums are added up in order afterwards. The number of
// chunks follows from the shape alone, so results do not depend on threads.
#include "../common/parallel.h"
#include "tiles.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

constexpr int64_t key_block = 48;
constexpr int64_t tasks_wanted = 8;    // enough to keep some threads busy; each costs a dK and a dV
constexpr int64_t blocks_a_chunk = 4;  // at least
constexpr double parallel_from = 1e5;  // products that pay for waking a second thread

// The sums of dK and dV over one chunk.
template <class A>
struct KeySums {
  Rows<A> k, v;

  KeySums(Carver& carve, const AttentionShape& shape) {
    const int64_t keys = round_up(shape.M, step);
    k = carve.rows<A>(keys, round_up(shape.d, lanes<A>()));
    v = carve.rows<A>(keys, round_up(shape.dv, lanes<A>()));
  }
  void reset(const AttentionShape& shape) const {
    const int64_t keys = round_up(shape.M, step);
    clear(k, keys);
    clear(v, keys);
  }
};

template <class A>
struct Workspace {
  Rows<A> q, o;    // Q and dO as they lie in the tensors
  Rows<A> qt, ot;  // and transposed
  Rows<A> out_t;
  Rows<A> s, dp, dq;
  Rows<A> k, v;
  A *shift, *inverse, *delta, *factor;  // inverse: 1 / sum

  Workspace(Carver& carve, const AttentionShape& shape) {
    const int64_t width = query_block<A>, L = lanes<A>();
    q = carve.rows<A>(width, round_up(shape.d, L));
    o = carve.rows<A>(width, round_up(shape.dv, L));
    qt = carve.rows<A>(round_up(shape.d, L), width);
    ot = carve.rows<A>(round_up(shape.dv, L), width);
    out_t = carve.rows<A>(round_up(shape.dv, L), width);
    s = carve.rows<A>(key_block, width);
    dp = carve.rows<A>(key_block, width);
    dq = carve.rows<A>(round_up(shape.d, most(L, step)), width);
    k = carve.rows<A>(key_block, round_up(shape.d, step));
    v = carve.rows<A>(key_block, round_up(shape.dv, step));
    shift = carve.array<A>(width);
    inverse = carve.array<A>(width);
    delta = carve.array<A>(width);
    factor = carve.array<A>(width);
  }
};

template <class A>
Rows<const A> constant(Rows<A> rows) {
  return {rows.data, rows.stride};
}

// δ, summed in the very order of dP's product: where P is 1 at one key, out is that key's value,
// and dP - δ must come out as exactly zero.
template <class A>
void row_deltas(const Workspace<A>& work, int64_t vectors, int64_t dv) {
  constexpr int L = lanes<A>();
  for (int64_t w = 0; w < vectors; ++w) {
    Vec<A> delta{};
    for (int64_t e = 0; e < dv; ++e)
      delta += load(work.ot.row(e) + w * L) * load(work.out_t.row(e) + w * L);
    store(work.delta + w * L, delta);
  }
}

// S becomes P, dP becomes dS.
template <class A>
void softmax_backward_step(const Workspace<A>& work, A magnitude, int64_t keys, int64_t vectors) {
  constexpr int L = lanes<A>();
  for (int64_t w = 0; w < vectors; ++w) {
    const Vec<A> shift = load(work.shift + w * L), inverse = load(work.inverse + w * L);
    const Vec<A> delta = load(work.delta + w * L);
    for (int64_t j = 0; j < keys; ++j) {
      A *s = work.s.row(j) + w * L, *dp = work.dp.row(j) + w * L;
      const Vec<A> p = exp((load(s) - shift) * magnitude) * inverse;
      store(s, p);
      store(dp, p * (load(dp) - delta));
    }
  }
}

template <class T>
void query_block_step(const AttentionBackward& args, int64_t batch, int64_t head, int64_t i0,
                      const Workspace<Acc<T>>& work, const KeySums<Acc<T>>& sums) {
  using A = Acc<T>;
  const AttentionShape& shape = args.shape;
  const int64_t d = shape.d, dv = shape.dv;
  const int64_t queries = smaller(query_block<A>, shape.N - i0);
  const int64_t vectors = vectors_for<A>(queries);
  const Rows<T> q = head_of<T>(args.q, batch, head), k = head_of<T>(args.k, batch, head);
  const Rows<T> v = head_of<T>(args.v, batch, head);
  const Rows<T> grad_out = head_of<T>(args.grad_out, batch, head);
  const Rows<A> out = head_of<A>(args.wide_out, batch, head);
  const Scale<A> scale(shape.scale);

  pack<T, A>(work.q, {q.row(i0), q.stride}, queries, d, queries, scale.sign);
  pack<A, A>(work.o, {out.row(i0), out.stride}, queries, dv, queries, A(1));
  transpose<A>(work.out_t, constant(work.o), queries, dv);
  pack<T, A>(work.o, {grad_out.row(i0), grad_out.stride}, queries, dv, queries, A(1));
  transpose<A>(work.qt, constant(work.q), queries, d);
  transpose<A>(work.ot, constant(work.o), queries, dv);
  const A* shift = row_numbers<A>(args.rows.shift, shape, batch, head, i0);
  const A* sum = row_numbers<A>(args.rows.sum, shape, batch, head, i0);
  for (int64_t i = 0; i < vectors * lanes<A>(); ++i) {
    const bool live = i < queries;
    work.shift[i] = live ? shift[i] : A(0);
    work.inverse[i] = live && sum[i] != 0 ? A(1) / sum[i] : A(0);
    work.factor[i] = A(shape.scale);
  }
  row_deltas(work, vectors, dv);
  clear(work.dq, round_up(d, most(lanes<A>(), step)));

  const int64_t visible = visible_keys(shape, i0, queries);
  for (int64_t j0 = 0; j0 < visible; j0 += key_block) {
    const int64_t keys = smaller(key_block, visible - j0);
    const Rows<const A> k_rows = left_operand<T, A>({k.data, k.stride}, j0, keys, d, work.k);
    const Rows<const A> v_rows = left_operand<T, A>({v.data, v.stride}, j0, keys, dv, work.v);
    product<Left::rows, Into::fresh>(work.s, k_rows, constant(work.qt), keys, vectors, d);
    product<Left::rows, Into::fresh>(work.dp, v_rows, constant(work.ot), keys, vectors, dv);
    if (shape.is_causal) hide_future(work.s, i0, j0, keys, vectors, A(-__builtin_inf()));
    softmax_backward_step(work, scale.magnitude, keys, vectors);
    if (args.grad_q.data)
      product<Left::columns, Into::sum>(work.dq, k_rows, constant(work.dp), d, vectors, keys);
    if (args.grad_v.data) {
      const Rows<A> to{sums.v.row(j0), sums.v.stride};
      product<Left::rows, Into::sum>(to, constant(work.s), constant(work.o), keys,
                                     vectors_for<A>(dv), queries);
    }
    if (args.grad_k.data) {
      const Rows<A> to{sums.k.row(j0), sums.k.stride};
      product<Left::rows, Into::sum>(to, constant(work.dp), constant(work.q), keys,
                                     vectors_for<A>(d), queries);
    }
  }
  if (args.grad_q.data) {
    const Rows<T> grad_q = head_of<T>(args.grad_q, batch, head);
    unpack_transposed<T, A>({grad_q.row(i0), grad_q.stride}, constant(work.dq), queries, d,
                            work.factor);
  }
}

// to = factor·Σ over chunks of rows [first, last) of their sums, which lie `apart` elements apart.
template <class T, class A>
void write_sums(Rows<T> to, Rows<A> sums, int64_t apart, int64_t chunks, int64_t first,
                int64_t last, int64_t columns, A factor) {
  constexpr int L = lanes<A>();
  for (int64_t j = first; j < last; ++j)
    for (int64_t c = 0; c < columns; c += L) {
      Vec<A> total = load(sums.row(j) + c);
      for (int64_t i = 1; i < chunks; ++i) total += load(sums.row(j) + c + i * apart);
      store_part(to.row(j) + c, total * factor, smaller(L, columns - c));
    }
}

template <class T>
void write_key_gradients(const AttentionBackward& args, int64_t batch, int64_t head,
                         const KeySums<Acc<T>>& sums, int64_t apart, int64_t chunks, int64_t first,
                         int64_t last) {
  if (args.grad_k.data)
    write_sums<T, Acc<T>>(head_of<T>(args.grad_k, batch, head), sums.k, apart, chunks, first, last,
                          args.shape.d, Scale<Acc<T>>(args.shape.scale).magnitude);
  if (args.grad_v.data)
    write_sums<T, Acc<T>>(head_of<T>(args.grad_v, batch, head), sums.v, apart, chunks, first, last,
                          args.shape.dv, Acc<T>(1));
}

int64_t chunks_a_head(int64_t heads, int64_t blocks) {
  const int64_t wanted = ceil_div(tasks_wanted, heads);
  return smaller(wanted, ceil_div(blocks, blocks_a_chunk));
}

template <class T>
Status backward(const AttentionBackward& args) {
  using A = Acc<T>;
  const AttentionShape& shape = args.shape;
  const int64_t heads = shape.B * shape.H, blocks = ceil_div(shape.N, query_block<A>);
  if (heads == 0) return Status::ok;
  const int64_t chunks = blocks == 0 ? 1 : chunks_a_head(heads, blocks);
  const double work_size = double(heads) * shape.N * shape.M * (shape.d + shape.dv);
  const int team = work_size < parallel_from ? 1 : shape.threads;

  Carver work_count{nullptr}, sums_count{nullptr};
  const Workspace<A> work_sizes(work_count, shape);
  const KeySums<A> sums_sizes(sums_count, shape);
  const int64_t work_bytes = work_count.used, sums_bytes = sums_count.used;
  // One chunk a head needs its sums only while it runs.
  const int64_t all_sums = chunks == 1 ? team : heads * chunks;
  char* memory = static_cast<char*>(allocate_scratch(work_bytes * team + sums_bytes * all_sums));
  if (!memory) return Status::out_of_memory;
  char* sums_memory = memory + work_bytes * team;

  parallel(heads * chunks, team, [&](int64_t task, int thread) {
    Carver carve_work{memory + work_bytes * thread};
    Carver carve_sums{sums_memory + sums_bytes * (chunks == 1 ? thread : task)};
    const Workspace<A> work(carve_work, shape);
    const KeySums<A> sums(carve_sums, shape);
    const int64_t which = task / chunks, batch = which / shape.H, head = which % shape.H;
    sums.reset(shape);
    for (int64_t block = task % chunks; block < blocks; block += chunks)
      query_block_step<T>(args, batch, head, block * query_block<A>, work, sums);
    if (chunks == 1) write_key_gradients<T>(args, batch, head, sums, 0, 1, 0, shape.M);
  });
  if (chunks > 1) {
    const int64_t slabs = ceil_div(shape.M, key_block);
    parallel(heads * slabs, team, [&](int64_t task, int) {
      const int64_t which = task / slabs, first = task % slabs * key_block;
      Carver carve{sums_memory + sums_bytes * which * chunks};
      const KeySums<A> sums(carve, shape);
      write_key_gradients<T>(args, which / shape.H, which % shape.H, sums,
                             sums_bytes / int64_t(sizeof(A)), chunks, first,
                             smaller(shape.M, first + key_block));
    });
  }
  free(memory);
  return Status::ok;
}

}  // namespace

Status attention_backward(const AttentionBackward& args) {
  return for_dtype(args.shape.dtype, [&](auto t) { return backward<decltype(t)>(args); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
