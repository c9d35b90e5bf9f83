// Which instruction sets this machine has, asked once; see levels.h.
#include "levels.h"

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace genkern {
namespace {

#if defined(__x86_64__)
// Linux gives out the 8 KB of AMX tile state only to a process that asked for it.
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, tile_bf16 = d >> 22 & 1;
  if (!tile || !tile_bf16) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool vector_bf16 = a >> 5 & 1;
  return vector_bf16 && amx_permitted();
}
#endif

Level machine_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  if (!avx2 || !f16c) return Level::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Level::avx2;
  return has_amx() ? Level::amx : Level::avx512;
#else
  return Level::portable;
#endif
}

Level find_best() {
  const Level machine = machine_level();
  for (Level candidate : {Level::amx, Level::avx512, Level::avx2})
    if (candidate <= machine && level_built(candidate)) return candidate;
  return Level::portable;
}

std::atomic<Level>& current() {
  static std::atomic<Level> chosen{best_level()};
  return chosen;
}

}  // namespace

bool level_built(Level which) {
  switch (which) {
    case Level::portable:
      return true;
    case Level::avx2:
#ifdef GK_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Level::avx512:
#ifdef GK_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case Level::amx:
#ifdef GK_HAVE_AMX
      return true;
#else
      return false;
#endif
  }
  return false;
}

Level best_level() {
  static const Level best = find_best();
  return best;
}

Level level() { return current().load(std::memory_order_relaxed); }

bool set_level(Level wanted) {
  if (wanted > best_level() || !level_built(wanted)) return false;
  current().store(wanted, std::memory_order_relaxed);
  return true;
}

}  // namespace genkern
