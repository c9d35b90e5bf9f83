// The gradient of the general bias: gradients of logits, summed over what it was broadcast along.
// For kernel files.
//
// A bias that is broadcast nowhere is written by the pass itself, block by block. Any other has a
// sweep of its own, that makes the gradients of logits anew: only so does every element of the
// result belong to one task, which adds up all heads and queries that share it in a fixed order. A
// task is one block of queries, or all of them where the bias is the same for every query, of one
// head of the bias.
#pragma once

#include "softmax.h"
#include "sweep.h"

namespace genkern {
namespace GK_LEVEL {

// The part of a bias's gradient that belongs to one head of the bias.
template <class A>
struct BiasGradient {
  A* data;
  int64_t row, key;  // strides, 0 where it is broadcast

  // Of one head of the bias.
  BiasGradient(const Bias& grad, int64_t batch, int64_t head)
      : data(static_cast<A*>(grad.data) + batch * grad.batch + head * grad.head),
        row(grad.row),
        key(grad.key) {}

  A* at(int64_t i, int64_t j) const { return data + i * row + j * key; }

  // Zeros in rows [first, first + count) of `keys`, or in what stands for them.
  void clear(int64_t first, int64_t count, int64_t keys) const {
    for (int64_t i = 0; i < (row == 0 ? 1 : count); ++i)
      memset(at(first + i, 0), 0, size_t(key == 0 ? 1 : keys) * sizeof(A));
  }

  // Adds tile [keys][queries], the gradients of logits of queries i0 … and keys j0 ….
  void add(Rows<A> tile, const Block& block, int64_t j0, int64_t keys, int64_t vectors) const {
    constexpr int L = lanes<A>();
    if (row == 0 && key == 0) {
      for (int64_t j = 0; j < keys; ++j) add_key_totals(data, tile.from(j), 1, vectors);
    } else if (row == 0) {
      add_key_totals(at(0, j0), tile, keys, vectors);
    } else if (key == 0) {
      for (int64_t i = 0; i < block.queries; i += L) {
        Vec<A> total{};
        for (int64_t j = 0; j < keys; ++j) total += load(tile.row(j) + i);
        add_part(at(block.i0 + i, 0), total, smaller(L, block.queries - i));
      }
    } else {
      for (int64_t i = 0; i < block.queries; i += L)
        for (int64_t j = 0; j < keys; j += L) {
          const int64_t some = smaller(L, keys - j);
          Vec<A> x[L];
          for (int64_t l = 0; l < L; ++l) x[l] = l < some ? load(tile.row(j + l) + i) : Vec<A>{};
          transpose_square<L / 2, A>(x);
          for (int64_t l = 0; l < smaller(L, block.queries - i); ++l)
            add_part(at(block.i0 + i + l, j0 + j), x[l], some);
        }
    }
  }

 private:
  static void add_part(A* to, Vec<A> x, int64_t n) { store_part(to, load_part(to, n) + x, n); }
};

// Whether each element of a bias's gradient comes from one query and one key of one head.
inline bool is_of_one_source(const AttentionProblem& problem, const Bias& grad) {
  return grad.data && (grad.batch != 0 || problem.B == 1) && (grad.head != 0 || problem.H == 1) &&
         grad.row != 0 && grad.key != 0;
}

// pass.enter(sequence, kv_head), then pass.run_for_bias(block, gradient) for every block that has a
// part in a task's elements.
template <class Pass, class Args>
inline Status sweep_bias(const Args& args) {
  using A = typename Pass::A;
  using E = typename Pass::E;
  const AttentionProblem& problem = args.problem;
  const Bias& grad = args.grads.bias;
  const int64_t blocks = ceil_div(problem.N, E::width);
  // What the gradient has of each, and how many of each share one of them.
  const int64_t batches = grad.batch == 0 ? 1 : problem.B, heads = grad.head == 0 ? 1 : problem.H;
  const int64_t parts = grad.row == 0 ? 1 : blocks;
  const int64_t all_batches = grad.batch == 0 ? problem.B : 1;
  const int64_t all_heads = grad.head == 0 ? problem.H : 1, all_blocks = grad.row == 0 ? blocks : 1;
  const int team = team_for(problem);
  const SweepMemory memory(bytes_of<Pass>(args), team, 0);
  if (!memory.base) return Status::out_of_memory;

  Refusals refused;
  parallel(batches * heads * parts, team, [&](int64_t task, int thread) {
    const typename E::Session session;
    Carver carve = memory.of_thread(thread);
    Pass pass(args, carve);
    const int64_t part = task % parts, which = task / parts;
    const int64_t first_head = which % heads, first_batch = which / heads;
    const BiasGradient<A> gradient(grad, first_batch, first_head);
    const int64_t first_row = part * E::width;
    gradient.clear(first_row, smaller(E::width, problem.N - first_row), problem.M);
    for (int64_t batch = first_batch; batch < first_batch + all_batches; ++batch)
      for (int64_t head = first_head; head < first_head + all_heads; ++head) {
        const Sequence sequence(problem, batch);
        pass.enter(sequence, head / (problem.H / problem.Hk));
        for (int64_t block = part; block < part + all_blocks; ++block)
          if (block * E::width < sequence.queries)
            pass.run_for_bias(Block(E{}, problem, sequence, head, block * E::width), gradient);
      }
    refused.look_at(session);
  });
  return refused.status();
}

// All results of a pass that has run, for sums and queries, and run_for_bias.
template <class Pass, class Args>
inline Status sweep_gradients(const Args& args, bool only_bias) {
  const Status status = only_bias ? Status::ok : sweep_with_sums<Pass>(args);
  const bool rest =
      args.grads.bias.data && (only_bias || !is_of_one_source(args.problem, args.grads.bias));
  return status == Status::ok && rest ? sweep_bias<Pass>(args) : status;
}

}  // namespace GK_LEVEL
}  // namespace genkern
