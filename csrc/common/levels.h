// Instruction-set levels of the CPU kernels, and the choice among them.
//
// A kernel file is compiled once for each level that the compiler knows (setup.py), everything in
// it inside `namespace genkern::GK_LEVEL`, so that no function compiled with wide instructions can
// be picked up by the linker for another level. A contract header declares its launchers with
// GK_EACH_LEVEL; bindings.cpp calls them through GK_PICK.
#pragma once

#ifdef GK_HAVE_AVX2
#define GK_IN_AVX2(...) \
  namespace avx2 {      \
  __VA_ARGS__           \
  }
#else
#define GK_IN_AVX2(...)
#endif
#ifdef GK_HAVE_AVX512
#define GK_IN_AVX512(...) \
  namespace avx512 {      \
  __VA_ARGS__             \
  }
#else
#define GK_IN_AVX512(...)
#endif
#ifdef GK_HAVE_AMX
#define GK_IN_AMX(...) \
  namespace amx {      \
  __VA_ARGS__          \
  }
#else
#define GK_IN_AMX(...)
#endif

#define GK_EACH_LEVEL(...)  \
  namespace portable {      \
  __VA_ARGS__               \
  }                         \
  GK_IN_AVX2(__VA_ARGS__)   \
  GK_IN_AVX512(__VA_ARGS__) \
  GK_IN_AMX(__VA_ARGS__)

namespace genkern {

enum class Level : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The highest level that was built and that this machine and its operating system allow.
Level best_level();

// The level in use: best_level() until somebody chooses another.
Level level();

// Chooses a level; false, and no change, where it was not built or the machine lacks it.
bool set_level(Level wanted);

bool level_built(Level which);

}  // namespace genkern

#ifdef GK_HAVE_AVX2
#define GK_TRY_AVX2(fn) genkern::level() >= genkern::Level::avx2 ? genkern::avx2::fn:
#else
#define GK_TRY_AVX2(fn)
#endif
#ifdef GK_HAVE_AVX512
#define GK_TRY_AVX512(fn) genkern::level() >= genkern::Level::avx512 ? genkern::avx512::fn:
#else
#define GK_TRY_AVX512(fn)
#endif
#ifdef GK_HAVE_AMX
#define GK_TRY_AMX(fn) genkern::level() >= genkern::Level::amx ? genkern::amx::fn:
#else
#define GK_TRY_AMX(fn)
#endif
#define GK_PICK(fn) (GK_TRY_AMX(fn) GK_TRY_AVX512(fn) GK_TRY_AVX2(fn) genkern::portable::fn)
