// Loops over independent tasks, for kernel files (compiled once per level).
//
// Results must not depend on which thread ran a task: a partial sum belongs to a task, never to a
// thread. `thread` (0 … threads-1) is only for picking scratch memory. At one thread no parallel
// region is opened: OpenMP in a forked child (a DataLoader worker) would hang.
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace genkern {
namespace GK_LEVEL {

constexpr int64_t parallel_from = 65536;  // elements that pay for waking a second thread

// Runs body(task, thread) for every task in [0, tasks). Tasks start in order, longest first pays.
template <class Body>
inline void parallel(int64_t tasks, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    const int team = tasks < threads ? int(tasks) : threads;
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) body(task, thread);
    }
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace GK_LEVEL
}  // namespace genkern
