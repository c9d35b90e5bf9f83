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

// Smaller ones do not fill the tiles, or the splitting costs more than it gains (measured). Of more
// keys every thread would hold too much: 12 bytes a number where others hold none.
inline bool pays_to_split(const AttentionProblem& problem) {
  return problem.dtype == DType::f32 && smaller(problem.N, problem.M) >= 64 &&
         problem.M <= most_split_keys && smaller(problem.d, problem.dv) >= 16;
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
