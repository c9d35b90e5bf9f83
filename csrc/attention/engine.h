// Which engine a storage type is computed by at this level. For kernel files.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx.h"
#else
#include "operands.h"
#endif

namespace genkern {
namespace GK_LEVEL {

template <class T>
struct EngineOf {
  using type = FmaEngine<T>;
};
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
template <>
struct EngineOf<BFloat16> {
  using type = AmxEngine;
};
#endif
template <class T>
using Engine = typename EngineOf<T>::type;

}  // namespace GK_LEVEL
}  // namespace genkern
