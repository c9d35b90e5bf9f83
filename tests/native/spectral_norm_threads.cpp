// Spectral normalization's launchers from several threads at once, without torch and OpenMP:
// test_native.py builds this with the sanitizers and runs it.
//
//   spectral_norm_threads LEVEL          (portable, avx2, …: one that it was built with)
//
// Every case is one list of weights, forward and backward (driver.h).
#include <vector>

#include "driver.h"
#include "spectral_norm/spectral_norm.h"

namespace {

using namespace genkern;
using namespace genkern::driver;

struct Weight {
  int64_t outer, rows, inner, v_leading = 1, iterations = 1;
  int64_t count() const { return outer * rows * inner; }
  int64_t cols() const { return outer * inner; }
};

struct Case {
  const char* name;
  DType dtype;
  UpdateOrder order;
  std::vector<Weight> weights;
  double eps = 1e-12;
  bool update = true, wide_state = false, grad_of_weights = true, grad_of_sigma = true;
};

std::vector<Case> cases() {
  const auto f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const auto u_first = UpdateOrder::u_first, v_first = UpdateOrder::v_first;
  // Rows below, at and above a tile and a vector, of all three layouts; columns in other orders.
  const std::vector<Weight> small = {
      {1, 1, 1},  {1, 5, 3},      {1, 12, 36, 4},     {33, 4, 1},       {3, 70, 9},
      {5, 9, 16}, {2, 13, 40, 5}, {1, 37, 130, 1, 2}, {1, 6, 17, 1, 0}, {4, 3, 2, 1, 3}};
  const std::vector<Weight> cut = {{1, 205, 1003, 17}, {1003, 205, 1, 1, 2}, {65, 37, 90}};
  return {
      {"f32", f32, u_first, small},
      {"f32, cut", f32, u_first, cut},
      {"f32, v first, σ alone", f32, v_first, small, 1e-12, true, false, false, true},
      {"f32, v first, cut", f32, v_first, cut},
      {"f64, not stored", f64, u_first, small, 1e-12, false},
      {"bf16, clamped", bf16, u_first, small, 30.0, true, true},
      {"f16, no σ", f16, v_first, small, 1e-12, true, false, true, false},
  };
}

class Work {
 public:
  Work(const Case& one, uint64_t seed) : c(one), wide(arithmetic(one.dtype)) {
    Random random(seed);
    for (const Weight& w : c.weights) {
      const DType state = c.wide_state ? wide : c.dtype;
      inputs.push_back({random.numbers(c.dtype, w.count()), random.numbers(c.dtype, w.count()),
                        random.numbers(state, w.rows), random.numbers(state, w.cols()),
                        random.numbers(wide, 1)});
    }
  }

  std::vector<Result> run() const {
    std::vector<Result> results;
    results.reserve(c.weights.size() * 7);  // addresses of results are taken while they grow
    const auto fresh = [&](DType dtype, int64_t count) -> void* {
      const int64_t size = size_of(dtype);
      results.push_back({size, Bytes(size_t(count * size), 0xFF)});
      return results.back().bytes.data();
    };
    const DType state = c.wide_state ? wide : c.dtype;
    std::vector<SpectralForward> forward;
    std::vector<SpectralBackward> backward;
    for (size_t i = 0; i < c.weights.size(); ++i) {
      const Weight& w = c.weights[i];
      const Input& in = inputs[i];
      void* store_u = c.update ? fresh(state, w.rows) : nullptr;
      void* store_v = c.update ? fresh(state, w.cols()) : nullptr;
      void *new_u = fresh(wide, w.rows), *new_v = fresh(wide, w.cols());
      void *normalized = fresh(c.dtype, w.count()), *sigma = fresh(wide, 1);
      forward.push_back({in.weight.data(), w.outer, w.rows, w.inner, w.v_leading, w.iterations,
                         c.wide_state, in.u.data(), in.v.data(), store_u, store_v, new_u, new_v,
                         normalized, sigma});
      backward.push_back({c.grad_of_weights ? in.grad.data() : nullptr, normalized, w.outer, w.rows,
                          w.inner, w.v_leading, new_u, new_v, sigma,
                          c.grad_of_sigma ? in.grad_sigma.data() : nullptr,
                          fresh(c.dtype, w.count())});
    }
    const SpectralOptions options{c.dtype, c.order, c.eps, 1};
    const int64_t count = int64_t(c.weights.size());
    if (GK_PICK(spectral_norm_forward)(forward.data(), count, options) != Status::ok) return {};
    if (GK_PICK(spectral_norm_backward)(backward.data(), count, options) != Status::ok) return {};
    return results;
  }

  const char* name() const { return c.name; }

 private:
  struct Input {
    Bytes weight, grad, u, v, grad_sigma;
  };
  const Case& c;
  DType wide;
  std::vector<Input> inputs;
};

}  // namespace

int main(int count, char** arguments) {
  return driver::main_of("spectral_norm_threads", count, arguments, [] {
    static const std::vector<Case> list = cases();
    std::vector<Work> work;
    work.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) work.emplace_back(list[i], i);
    return work;
  });
}
