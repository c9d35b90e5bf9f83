// The loops around AmxBackwardPass: chunks of keys, and dQ's sums over them. For kernel files.
#pragma once

#include "amx_backward.h"

namespace genkern {
namespace GK_LEVEL {

inline Status amx_backward(const AttentionBackward& args) {
  using E = AmxEngine;
  const AttentionProblem& problem = args.problem;
  const int64_t families = problem.B * problem.Hk;
  if (families == 0) return Status::ok;
  const KeySpans spans(problem);
  const Units<E> units(problem);
  const int team = team_for(problem);
  const int64_t sums = spans.chunks > 1 ? QuerySums::numbers(problem, units.count) : 0;
  const SweepMemory memory(bytes_of<AmxBackwardPass>(args), team,
                           families * spans.chunks * sums * int64_t(sizeof(float)));
  if (!memory.base) return Status::out_of_memory;
  const auto partial = [&](int64_t family, int64_t chunk) {
    return sums ? reinterpret_cast<float*>(memory.rest()) + (family * spans.chunks + chunk) * sums
                : nullptr;
  };

  // The first keys are those that most queries see, where masks are causal.
  parallel(families * spans.chunks, team, [&](int64_t task, int thread) {
    const AmxSession session;
    Carver carve = memory.of_thread(thread);
    AmxBackwardPass pass(args, carve);
    const int64_t family = task % families, chunk = task / families;
    pass.run(Sequence(problem, family / problem.Hk), family % problem.Hk, chunk,
             partial(family, chunk));
  });
  if (spans.chunks == 1 || !args.grads.q.data) return Status::ok;

  parallel(families * units.count, team, [&](int64_t task, int) {
    const int64_t family = task / units.count, unit = task % units.count;
    const int64_t i0 = unit % units.blocks * E::width, kv_head = family % problem.Hk;
    const Sequence sequence(problem, family / problem.Hk);
    if (i0 >= sequence.queries) return;
    const Block block(E{}, problem, sequence, kv_head * units.group + unit / units.blocks, i0);
    Rows<float> total{};
    const int64_t rows = round_up(problem.d, tile_rows);
    for (int64_t chunk = 0; chunk < spans.chunks; ++chunk) {
      if (!spans.chunk_has(chunk, block)) continue;
      const Rows<float> part = QuerySums{partial(family, chunk), rows}.of(unit);
      if (!total.data)
        total = part;
      else
        for (int64_t at = 0; at < rows * E::width; at += lanes<float>())
          store(total.data + at, load(total.data + at) + load(part.data + at));
    }
    if (!total.data) {
      total = QuerySums{partial(family, 0), rows}.of(unit);
      clear(total, rows);
    }
    AmxBackwardPass::write(args, block, total);
  });
  return Status::ok;
}

}  // namespace GK_LEVEL
}  // namespace genkern
