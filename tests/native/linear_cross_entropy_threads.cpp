// Cross-entropy of chunks of logits for driver.h: all dtypes and options, gradients in place.
#include "driver.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

using namespace genkern;
using namespace genkern::driver;

namespace {

class Work {
 public:
  Work(DType wanted_dtype, double cap, bool want_gradient, bool own_scales, int64_t token_count,
       int64_t classes)
      : dtype(wanted_dtype),
        softcap(cap),
        gradient(want_gradient),
        scaled(own_scales),
        tokens(token_count),
        vocabulary(classes) {
    Random random{uint64_t(classes)};
    logits = random.numbers(dtype, tokens * vocabulary);
    scales = random.numbers(arithmetic(dtype), tokens);
    for (int64_t i = 0; i < tokens; ++i)
      targets.push_back(i % 4 == 3 ? -100 : int64_t(random.bits() % uint64_t(vocabulary)));
    label = "dtype " + std::to_string(int(dtype)) + ", " + std::to_string(vocabulary) + " classes";
  }

  const char* name() const { return label.c_str(); }

  std::vector<Result> run() const {
    const int64_t wide = size_of(arithmetic(dtype));
    std::vector<Result> results;
    results.push_back({wide, Bytes(size_t(wide * tokens), 0xFF)});
    results.push_back({size_of(dtype), logits});
    const TokenLosses args{results[1].bytes.data(),
                           tokens,
                           vocabulary,
                           targets.data(),
                           -100,
                           0.1,
                           softcap,
                           0.01,
                           dtype,
                           results[0].bytes.data(),
                           gradient,
                           scaled ? scales.data() : nullptr,
                           0.5,
                           2};
    return GK_PICK(token_losses)(args) == Status::ok ? results : std::vector<Result>{};
  }

 private:
  DType dtype;
  double softcap;
  bool gradient, scaled;
  int64_t tokens, vocabulary;
  Bytes logits, scales;
  std::vector<int64_t> targets;
  std::string label;
};

std::vector<Work> make_work() {
  std::vector<Work> all;
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (int64_t classes : {1, 5, 33, 2000}) {
      all.emplace_back(dtype, 0.0, true, false, 7, classes);
      all.emplace_back(dtype, 2.0, true, true, 5, classes);
      all.emplace_back(dtype, 0.0, false, false, 3, classes);
    }
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  return main_of("linear_cross_entropy_threads", count, arguments, make_work);
}
