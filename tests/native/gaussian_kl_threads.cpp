// KL of Gaussians for driver.h: both kinds, all dtypes, terms and sums, strided rows.
#include "driver.h"
#include "gaussian_kl/gaussian_kl.h"

using namespace genkern;
using namespace genkern::driver;

namespace {

class Work {
 public:
  Work(DType wanted_dtype, bool with_another, bool each_term, int64_t row_count, int64_t row_size,
       int thread_count)
      : dtype(wanted_dtype),
        another(with_another),
        terms(each_term),
        rows(row_count),
        size(row_size),
        team(thread_count) {
    Random random(11);
    for (int i = 0; i < (another ? 4 : 2); ++i)
      inputs.push_back(random.numbers(dtype, (rows - 1) * (size + 3) + size));
    upstream = random.numbers(arithmetic(dtype), rows * size);
    label = "dtype " + std::to_string(int(dtype)) + (another ? ", another" : ", standard");
  }

  const char* name() const { return label.c_str(); }

  std::vector<Result> run() const {
    const int64_t wide = size_of(arithmetic(dtype)), narrow = size_of(dtype);
    std::vector<Result> results;
    results.push_back({wide, Bytes(size_t(wide * (terms ? rows * size : 1)), 0xFF)});
    for (size_t i = 0; i < inputs.size(); ++i)
      results.push_back({narrow, Bytes(size_t(narrow * rows * size), 0xFF)});
    Rows in[4] = {}, out[4] = {};
    for (size_t i = 0; i < inputs.size(); ++i) {
      in[i] = {const_cast<unsigned char*>(inputs[i].data()), size + 3};
      out[i] = {results[i + 1].bytes.data(), size};
    }
    const GaussianKl args{rows, size, in[0], in[1], in[2], in[3], dtype, team};
    const GaussianKlGradients gradients{out[0], out[1], out[2], out[3]};
    unsigned char* value = results[0].bytes.data();
    unsigned char* grad = const_cast<unsigned char*>(upstream.data());
    const Rows value_rows{terms ? value : nullptr, size}, each{terms ? grad : nullptr, size};
    const Status forward =
        GK_PICK(gaussian_kl_forward)(args, value_rows, terms ? nullptr : value, 0.5);
    const Status backward =
        GK_PICK(gaussian_kl_backward)(args, gradients, terms ? nullptr : grad, each, 0.5);
    return forward == Status::ok && backward == Status::ok ? results : std::vector<Result>{};
  }

 private:
  DType dtype;
  bool another, terms;
  int64_t rows, size;
  int team;
  std::vector<Bytes> inputs;
  Bytes upstream;
  std::string label;
};

std::vector<Work> make_work() {
  std::vector<Work> all;
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (bool another : {false, true}) {
      all.emplace_back(dtype, another, true, 3, 37, 1);
      all.emplace_back(dtype, another, false, 2, 33001, 2);
    }
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  return main_of("gaussian_kl_threads", count, arguments, make_work);
}
