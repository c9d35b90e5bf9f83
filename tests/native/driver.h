// What the drivers of this folder share: numbers, results, and the launchers called from several
// threads at once.
//
// A driver has a type Work with `const char* name() const` and `std::vector<Result> run() const`
// (empty where a launcher failed). The bits of a sequential run are what each thread must get
// again: while other threads work on other cases, and while all work on the same inputs. Every
// tensor is an allocation of its own of just its size, results begin as NaN and must end without
// one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "common/dtype.h"
#include "common/levels.h"

namespace genkern {
namespace driver {

constexpr int threads = 4;

using Bytes = std::vector<unsigned char>;

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
inline DType arithmetic(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

struct Format {
  int mantissa, bias;  // bits of the mantissa, bias of the exponent
};
inline Format format_of(DType dtype) {
  if (dtype == DType::f64) return {52, 1023};
  if (dtype == DType::f32) return {23, 127};
  if (dtype == DType::bf16) return {7, 127};
  return {10, 15};
}

class Random {
 public:
  explicit Random(uint64_t seed) : state(seed) {}

  // splitmix64 (Steele et al. 2014).
  uint64_t bits() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }

  // Numbers of either sign with absolute values in [0.25, 1).
  Bytes numbers(DType dtype, int64_t count) {
    const int64_t size = size_of(dtype);
    const Format format = format_of(dtype);
    Bytes result(size_t(count * size));
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t random = bits();
      const uint64_t sign = random >> 63 << (size * 8 - 1);
      const uint64_t exponent = uint64_t(format.bias) - 1 - (random >> 62 & 1);
      const uint64_t number =
          sign | exponent << format.mantissa | (random & ((uint64_t(1) << format.mantissa) - 1));
      memcpy(&result[size_t(i * size)], &number, size_t(size));
    }
    return result;
  }

  Bytes booleans(int64_t count) {
    Bytes result(size_t(count), 0);
    for (unsigned char& seen : result) seen = bits() % 4 != 0;
    return result;
  }

 private:
  uint64_t state;
};

struct Result {
  int64_t size;  // of an element
  Bytes bytes;
  bool operator==(const Result& other) const { return bytes == other.bytes; }
};

// Whether some element still has the bits that all results begin with.
inline bool has_unwritten(const Result& result) {
  const Bytes unwritten(size_t(result.size), 0xFF);
  for (auto at = result.bytes.begin(); at != result.bytes.end(); at += result.size)
    if (std::equal(unwritten.begin(), unwritten.end(), at)) return true;
  return false;
}

// Lets `threads` threads run body(thread) at the same moment.
template <class Body>
void together(const Body& body) {
  std::atomic<int> waiting{threads};
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      body(t);
    });
  for (std::thread& thread : all) thread.join();
}

inline bool choose(const std::string& name) {
  for (const auto& [known, level] :
       {std::pair{"portable", Level::portable}, std::pair{"avx2", Level::avx2},
        std::pair{"avx512", Level::avx512}, std::pair{"amx", Level::amx}})
    if (name == known) return set_level(level);
  return false;
}

// The main function of a driver called `program`, on the work that make_work() gives.
template <class MakeWork>
int main_of(const char* program, int count, char** arguments, const MakeWork& make_work) {
  if (count != 2 || !choose(arguments[1])) {
    fprintf(stderr, "usage: %s LEVEL, one that was built and that the CPU has\n", program);
    return 2;
  }
  const auto work = make_work();
  std::vector<std::vector<Result>> expected;
  for (const auto& one : work) {
    expected.push_back(one.run());
    if (expected.back().empty()) return fprintf(stderr, "%s: a launcher failed\n", one.name()), 1;
    for (const Result& result : expected.back())
      if (has_unwritten(result))
        return fprintf(stderr, "%s: a result was not written\n", one.name()), 1;
  }

  std::atomic<int> different{0};
  const auto repeat = [&](size_t which) {
    if (work[which].run() == expected[which]) return;
    ++different;
    fprintf(stderr, "%s: other bits than alone\n", work[which].name());
  };
  together([&](int thread) {
    for (size_t i = 0; i < work.size(); ++i)
      repeat((i + size_t(thread) * work.size() / threads) % work.size());
  });
  for (size_t i = 0; i < work.size(); ++i) together([&](int) { repeat(i); });
  if (different) return 1;
  printf("%zu cases on %d threads: the same bits\n", work.size(), threads);
  return 0;
}

}  // namespace driver
}  // namespace genkern
