// The loops around every attention pass: heads, blocks of queries, chunks of work, sums over
// queries. For kernel files.
//
// A family is one head of keys with the heads of queries that look at it (one, without GQA). Its
// units are the blocks of queries of these heads. A task is a chunk of a family: every `chunks`-th
// unit, so that causal chunks cost the same, last and longest first. It converts the family's keys
// once, then for each unit lets the pass work.
//
// Sums over queries (dK, dV, the key bias's gradient) belong to the task. With one chunk a family
// it writes them out; with more, all chunks' sums are added up in order afterwards. The number of
// chunks then follows from the shape alone, so that results do not depend on threads.
#pragma once

#include "../common/parallel.h"
#include "engine.h"
#include "logits.h"

namespace genkern {
namespace GK_LEVEL {

constexpr double parallel_from_products = 1e5;  // that pay for waking a second thread
constexpr double chunk_from_products = 9e5;     // that pay for sums of their own
constexpr int64_t sums_wanted = 8;    // enough to keep some threads busy; each costs a dK and a dV
constexpr int64_t units_a_chunk = 4;  // at least, where a chunk has sums

inline double work_of(const AttentionProblem& problem) {
  return double(problem.B) * problem.H * problem.N * problem.M * (problem.d + problem.dv);
}
inline int team_for(const AttentionProblem& problem) {
  return work_of(problem) < parallel_from_products ? 1 : problem.threads;
}

// The units of a family, and the tasks that they are dealt to.
template <class E>
struct Units {
  int64_t group, blocks, count;

  explicit Units(const AttentionProblem& problem)
      : group(problem.H / problem.Hk),
        blocks(ceil_div(problem.N, E::width)),
        count(group * blocks) {}

  // run(block) for every unit of a chunk that has queries.
  template <class Run>
  void each(const AttentionProblem& problem, const Sequence& sequence, int64_t kv_head,
            int64_t chunk, int64_t chunks, const Run& run) const {
    for (int64_t nth = chunk; nth < count; nth += chunks) {
      const int64_t unit = count - 1 - nth, i0 = unit / group * E::width;
      if (i0 < sequence.queries)
        run(Block(E{}, problem, sequence, kv_head * group + unit % group, i0));
    }
  }
};

// Scratch of a launcher, one at a time in a thread: `each` bytes for every thread, then `rest`.
struct SweepMemory {
  char* base;
  int64_t each, threads;

  SweepMemory(int64_t each, int64_t threads, int64_t rest)
      : base(static_cast<char*>(kept_scratch().take(each * threads + rest))),
        each(each),
        threads(threads) {}
  ~SweepMemory() { kept_scratch().give_back(); }
  Carver of_thread(int thread) const { return {base + each * thread}; }
  char* rest() const { return base + each * threads; }
};

template <class Pass, class Args>
inline int64_t bytes_of(const Args& args) {
  Carver count{nullptr};
  const Pass pass(args, count);
  return count.used;
}

// Whether an engine met numbers that it does not compute with, in any task. (The library's atomics
// would be functions of this level that any other might be linked to.)
class Refusals {
 public:
  template <class Session>
  void look_at(const Session& session) {
    if (refuses(session)) __atomic_store_n(&some, true, __ATOMIC_RELAXED);
  }
  Status status() const {
    return __atomic_load_n(&some, __ATOMIC_RELAXED) ? Status::refused : Status::ok;
  }

 private:
  bool some = false;
};

// ---- Passes whose results belong to queries alone -----------------------------------------------

// pass.enter(sequence, kv_head), then pass.run(block) for every block.
template <class Pass, class Args>
inline Status sweep_queries(const Args& args) {
  using E = typename Pass::E;
  const AttentionProblem& problem = args.problem;
  const Units<E> units(problem);
  const int64_t families = problem.B * problem.Hk;
  if (families * units.count == 0) return Status::ok;
  const int team = team_for(problem);
  const int64_t chunks = smaller(units.count, ceil_div(E::tasks_per_thread * team, families));
  const SweepMemory memory(bytes_of<Pass>(args), team, 0);
  if (!memory.base) return Status::out_of_memory;
  Refusals refused;
  parallel(families * chunks, team, [&](int64_t task, int thread) {
    const typename E::Session session;
    Carver carve = memory.of_thread(thread);
    Pass pass(args, carve);
    const int64_t family = task / chunks, kv_head = family % problem.Hk;
    const Sequence sequence(problem, family / problem.Hk);
    pass.enter(sequence, kv_head);
    units.each(problem, sequence, kv_head, task % chunks, chunks,
               [&](const Block& block) { pass.run(block); });
    refused.look_at(session);
  });
  return refused.status();
}

// ---- Passes with sums over queries --------------------------------------------------------------

// Sums over the queries of one chunk, for all keys of a head.
template <class T, class E = Engine<T>>
struct KeySums {
  using A = Acc<T>;
  Rows<A> k, v;
  A* key_bias;

  KeySums(Carver& carve, const AttentionProblem& problem)
      : k(E::key_sums(carve, problem.M, problem.d)),
        v(E::key_sums(carve, problem.M, problem.dv)),
        key_bias(carve.array<A>(problem.M)) {}

  void reset(int64_t keys) const {
    clear(k, round_up(keys, E::grain));
    clear(v, round_up(keys, E::grain));
    memset(key_bias, 0, size_t(keys) * sizeof(A));
  }
};

// to = factor·Σ over chunks of rows [first, last) of their sums, which lie `apart` elements apart;
// rows from `summed` on have no sums and are 0.
template <class T, class A>
inline void write_sums(Rows<T> to, Rows<A> sums, int64_t apart, int64_t chunks, int64_t first,
                       int64_t last, int64_t summed, int64_t columns, A factor) {
  constexpr int L = lanes<A>();
  for (int64_t j = first; j < last; ++j)
    for (int64_t c = 0; c < columns; c += L) {
      Vec<A> total{};
      if (j < summed) {
        total = load(sums.row(j) + c);
        for (int64_t i = 1; i < chunks; ++i) total += load(sums.row(j) + c + i * apart);
      }
      store_some(to.row(j) + c, total * factor, columns - c);
    }
}

// Gradients of keys [first, last) of one head, from its chunks' sums.
template <class T, class Sums>
inline void write_key_gradients(const AttentionProblem& problem, const InputGradients& grads,
                                const Sequence& sequence, int64_t kv_head, const Sums& sums,
                                int64_t apart, int64_t chunks, int64_t first, int64_t last) {
  using A = Acc<T>;
  if (grads.k.data)
    write_sums<T, A>(key_rows<T>(grads.k, sequence, kv_head), sums.k, apart, chunks, first, last,
                     sequence.keys, problem.d, Scale<A>(problem.scale).magnitude);
  if (grads.v.data)
    write_sums<T, A>(key_rows<T>(grads.v, sequence, kv_head), sums.v, apart, chunks, first, last,
                     sequence.keys, problem.dv, A(1));
  if (grads.key_bias.data) {
    A* to = key_numbers<A>(grads.key_bias, sequence, kv_head);
    for (int64_t j = first; j < last; ++j) {
      A total = 0;
      for (int64_t i = 0; i < chunks && j < sequence.keys; ++i)
        total += sums.key_bias[j + i * apart];
      to[j] = total;
    }
  }
}

// How many chunks a family's units are dealt to. A lone family of some work has two at least, for
// two threads.
template <class E>
inline int64_t chunks_with_sums(const AttentionProblem& problem) {
  const int64_t families = larger(1, problem.B * problem.Hk), units = Units<E>(problem).count;
  const bool wants_two = families == 1 && work_of(problem) >= chunk_from_products;
  const int64_t most = larger(ceil_div(units, units_a_chunk), wants_two ? 2 : 1);
  return larger(1, smaller(smaller(ceil_div(sums_wanted, families), most), units));
}
// The most blocks that one of them has.
template <class E>
inline int64_t blocks_of_task(const AttentionProblem& problem) {
  return ceil_div(Units<E>(problem).count, chunks_with_sums<E>(problem));
}

// All blocks of a task: each(run) calls run(block) for one after the other. A pass that wants to go
// over them otherwise has an overload.
template <class Pass, class Each, class Sums>
inline void run_task(Pass& pass, const Each& each, const Sums& sums) {
  each([&](const Block& block) { pass.run(block, sums); });
}

// pass.enter(sequence, kv_head), then pass.run(block, sums) for every block. `Pass::Storage` is the
// storage type; args.grads receives the sums.
template <class Pass, class Args>
inline Status sweep_with_sums(const Args& args) {
  using T = typename Pass::Storage;
  using E = typename Pass::E;
  const AttentionProblem& problem = args.problem;
  const Units<E> units(problem);
  const int64_t families = problem.B * problem.Hk;
  if (families == 0) return Status::ok;
  const int team = team_for(problem);
  const int64_t chunks = chunks_with_sums<E>(problem);

  Carver sums_count{nullptr};
  const KeySums<T, E> sums_sizes(sums_count, problem);
  const int64_t sums_bytes = sums_count.used;
  // With one chunk a family its sums are needed only while it runs.
  const SweepMemory memory(bytes_of<Pass>(args), team,
                           sums_bytes * (chunks == 1 ? team : families * chunks));
  if (!memory.base) return Status::out_of_memory;

  Refusals refused;
  parallel(families * chunks, team, [&](int64_t task, int thread) {
    const typename E::Session session;
    Carver carve = memory.of_thread(thread);
    Carver carve_sums{memory.rest() + sums_bytes * (chunks == 1 ? thread : task)};
    Pass pass(args, carve);
    const KeySums<T, E> sums(carve_sums, problem);
    const int64_t family = task / chunks, kv_head = family % problem.Hk;
    const Sequence sequence(problem, family / problem.Hk);
    sums.reset(sequence.keys);
    pass.enter(sequence, kv_head);
    run_task(
        pass,
        [&](const auto& run) {
          units.each(problem, sequence, kv_head, task % chunks, chunks, run);
        },
        sums);
    if (chunks == 1)
      write_key_gradients<T>(problem, args.grads, sequence, kv_head, sums, 0, 1, 0,
                             sequence.key_rows);
    refused.look_at(session);
  });
  if (chunks > 1) {
    const int64_t slabs = ceil_div(problem.M, E::tile);
    parallel(families * slabs, team, [&](int64_t task, int) {
      const int64_t family = task / slabs, first = task % slabs * E::tile;
      const Sequence sequence(problem, family / problem.Hk);
      Carver carve{memory.rest() + sums_bytes * family * chunks};
      const KeySums<T, E> sums(carve, problem);
      write_key_gradients<T>(problem, args.grads, sequence, family % problem.Hk, sums,
                             sums_bytes / int64_t(sizeof(Acc<T>)), chunks, first,
                             smaller(sequence.key_rows, first + E::tile));
    });
  }
  return refused.status();
}

}  // namespace GK_LEVEL
}  // namespace genkern
