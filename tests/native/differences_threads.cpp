// The mean differences' launchers from several threads at once, without torch and OpenMP:
// test_native.py builds this with the sanitizers and runs it.
//
//   differences_threads LEVEL          (portable, avx2, …: one that it was built with)
//
// Every case runs forward and backward (driver.h).
#include <vector>

#include "differences/differences.h"
#include "driver.h"

namespace {

using namespace genkern;
using namespace genkern::driver;

struct Case {
  const char* name;
  DType dtype;
  Distance distance;
  bool grad_a, grad_b;
  std::vector<int64_t> counts;
};

std::vector<Case> cases() {
  const auto absolute = Distance::absolute, square = Distance::square;
  return {
      {"cut into chunks", DType::f32, absolute, true, true, {40001, 3}},
      {"one side", DType::f64, square, false, true, {1, 17, 20000}},
      {"the other", DType::bf16, absolute, true, false, {33, 64}},
      {"half", DType::f16, square, true, true, {5, 100, 31}},
  };
}

class Work {
 public:
  Work(const Case& c, uint64_t seed) : c(c) {
    Random random(seed);
    for (int64_t count : c.counts) {
      a.push_back(random.numbers(c.dtype, count));
      b.push_back(random.numbers(c.dtype, count));
    }
    upstream = random.numbers(arithmetic(c.dtype), 1);
  }

  std::vector<Result> run() const {
    std::vector<Result> results;
    results.reserve(4 * c.counts.size() + 1);
    const auto fresh = [&](DType dtype, int64_t count) -> void* {
      const int64_t size = size_of(dtype);
      results.push_back({size, Bytes(size_t(count * size), 0xFF)});
      return results.back().bytes.data();
    };
    const auto pairs = [&] {
      std::vector<DifferencePair> list;
      for (size_t i = 0; i < c.counts.size(); ++i)
        list.push_back({a[i].data(), b[i].data(), c.counts[i], 0.5,
                        c.grad_a ? fresh(c.dtype, c.counts[i]) : nullptr,
                        c.grad_b ? fresh(c.dtype, c.counts[i]) : nullptr});
      return list;
    };
    const auto first = pairs(), second = pairs();
    const int64_t count = int64_t(first.size());
    const DifferencesForward forward{
        c.distance, c.dtype, first.data(), count, fresh(arithmetic(c.dtype), 1), 1};
    if (GK_PICK(differences_forward(forward)) != Status::ok) return {};
    const DifferencesBackward backward{c.distance, c.dtype,         second.data(),
                                       count,      upstream.data(), 1};
    if (GK_PICK(differences_backward(backward)) != Status::ok) return {};
    return results;
  }

  const char* name() const { return c.name; }

 private:
  const Case c;
  std::vector<Bytes> a, b;
  Bytes upstream;
};

}  // namespace

int main(int count, char** arguments) {
  return main_of("differences_threads", count, arguments, [] {
    std::vector<Work> work;
    uint64_t seed = 0;
    for (const Case& c : cases()) work.emplace_back(c, ++seed);
    return work;
  });
}
