// The adversarial losses' launchers from several threads at once, without torch and OpenMP:
// test_native.py builds this with the sanitizers and runs it.
//
//   losses_threads LEVEL          (portable, avx2, …: one that it was built with)
//
// Every case runs forward and backward (driver.h).
#include <vector>

#include "driver.h"
#include "losses/adversarial.h"

namespace {

using namespace genkern;
using namespace genkern::driver;

struct Case {
  const char* name;
  DType dtype;
  Phi phi;
  Pairing pairing;
  std::vector<int64_t> reals, fakes;  // elements by discriminator; -1: no such side
};

std::vector<Case> cases() {
  const auto f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const auto separate = Pairing::separate, paired = Pairing::paired, average = Pairing::average;
  return {
      {"cut into chunks", f32, Phi::softplus, separate, {33001}, {20000}},
      {"one logit", f64, Phi::softplus, separate, {1}, {1}},
      {"a generator's", bf16, Phi::relu, separate, {-1, -1}, {37, 5}},
      {"many discriminators",
       f16,
       Phi::square,
       separate,
       {3, 17, 1, 40, 2, 9, 16, 33, 8, 5},
       {5, 1, 64, 7, 2, 31, 15, 3, 10, 6}},
      {"linear", f32, Phi::identity, separate, {100}, {7}},
      {"pairs", f32, Phi::softplus, paired, {50, 17000}, {50, 17000}},
      {"pairs in half", bf16, Phi::relu, paired, {33}, {33}},
      {"averages", f64, Phi::softplus, average, {19, 20000}, {33, 5}},
      {"averages in half", f16, Phi::square, average, {19}, {33}},
      {"nothing on one side", f32, Phi::softplus, average, {5}, {0}},
  };
}

class Work {
 public:
  Work(const Case& c, uint64_t seed) : c(c) {
    Random random(seed);
    for (size_t i = 0; i < c.fakes.size(); ++i) {
      real.push_back(random.numbers(c.dtype, c.reals[i] < 0 ? 0 : c.reals[i]));
      fake.push_back(random.numbers(c.dtype, c.fakes[i]));
    }
    upstream = random.numbers(arithmetic(c.dtype), 1);
  }

  std::vector<Result> run() const {
    std::vector<Result> results;
    results.reserve(4 * c.fakes.size() + 2);
    const auto fresh = [&](DType dtype, int64_t count) -> void* {
      const int64_t size = size_of(dtype);
      results.push_back({size, Bytes(size_t(count * size), 0xFF)});
      return results.back().bytes.data();
    };
    const auto terms = [&] {
      std::vector<LogitTerm> list;
      for (size_t i = 0; i < c.fakes.size(); ++i)
        list.push_back({real[i].data(), fake[i].data(), c.reals[i], c.fakes[i],
                        c.reals[i] < 0 ? nullptr : fresh(c.dtype, c.reals[i]),
                        fresh(c.dtype, c.fakes[i])});
      return list;
    };
    const bool smooth = c.pairing == Pairing::separate;
    const AdversarialForm form{
        c.phi, c.pairing, 1, {-1, 0.5, 1, smooth ? 0.1 : 0}, {1, 0.5, 2, smooth ? -0.2 : 0}};
    const auto first = terms(), second = terms();
    const int64_t count = int64_t(first.size());
    const DType wide = arithmetic(c.dtype);
    const AdversarialForward forward{
        form, c.dtype, 1.5, first.data(), count, fresh(wide, 1), fresh(wide, 4 * count), 1};
    if (GK_PICK(adversarial_forward(forward)) != Status::ok) return {};
    const AdversarialBackward backward{form,  c.dtype,         1.5, second.data(),
                                       count, upstream.data(), 1};
    if (GK_PICK(adversarial_backward(backward)) != Status::ok) return {};
    return results;
  }

  const char* name() const { return c.name; }

 private:
  const Case c;
  std::vector<Bytes> real, fake;
  Bytes upstream;
};

}  // namespace

int main(int count, char** arguments) {
  return main_of("losses_threads", count, arguments, [] {
    std::vector<Work> work;
    uint64_t seed = 0;
    for (const Case& c : cases()) work.emplace_back(c, ++seed);
    return work;
  });
}
