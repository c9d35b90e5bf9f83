// Which engine computes a call at this level. For kernel files.
#pragma once

#include "attention.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx_split.h"
#else
#include "operands.h"
#endif

namespace genkern {
namespace GK_LEVEL {

// Of a storage type, whatever the shape.
template <class T>
struct EngineOf {
  using type = FmaEngine<T>;
};
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
template <>
struct EngineOf<BFloat16> {
  using type = AmxEngine;
};

constexpr int64_t most_split_keys = 8192;

// Measured over N = M of 64 to 256 and d of 16 to 128, forward and backward together: splitting
// pays from 64 queries and keys and 24 features on, where the pairs of query and key that are
// computed for nothing, 32 × 32 at a time instead of 16 × 8, are less than a fifth of all. Of more
// keys every thread would hold too much: 12 bytes a number where others hold none.
inline bool pays_to_split(const AttentionProblem& problem) {
  const int64_t split_pairs =
      round_up(problem.N, tile_depth) * round_up(problem.M, SplitEngine::grain);
  const int64_t pairs =
      round_up(problem.N, lanes<float>()) * round_up(problem.M, FmaEngine<float>::grain);
  return problem.dtype == DType::f32 && smaller(problem.N, problem.M) >= 64 &&
         problem.M <= most_split_keys && smaller(problem.d, problem.dv) >= 24 &&
         split_pairs * 5 <= pairs * 6;
}
#endif
template <class T>
using Engine = typename EngineOf<T>::type;

// run(T{}, engine) for the storage type T of a call and the engine that computes it.
template <class Run>
inline Status for_engine(const AttentionProblem& problem, const Run& run) {
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
  if (pays_to_split(problem)) {
    const Status status = run(float{}, SplitEngine{});
    if (status != Status::refused) return status;
  }
#endif
  return for_dtype(problem.dtype, [&](auto t) { return run(t, Engine<decltype(t)>{}); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
