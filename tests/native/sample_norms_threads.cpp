// Norms of samples for driver.h: all functions, dtypes and ways of cutting.
#include "driver.h"
#include "sample_norms/sample_norms.h"

using namespace genkern;
using namespace genkern::driver;

namespace {

struct Shape {
  int64_t samples, size, stride;
};

class Work {
 public:
  Work(SampleFunction wanted_function, DType wanted_dtype, std::vector<Shape> wanted_shapes,
       int thread_count)
      : function(wanted_function),
        dtype(wanted_dtype),
        shapes(std::move(wanted_shapes)),
        team(thread_count) {
    Random random{uint64_t(7 + int(function))};
    for (const Shape& shape : shapes)
      inputs.push_back(random.numbers(dtype, (shape.samples - 1) * shape.stride + shape.size));
    upstream = random.numbers(arithmetic(dtype), shapes[0].samples);
    label = "function " + std::to_string(int(function)) + ", dtype " + std::to_string(int(dtype));
  }

  const char* name() const { return label.c_str(); }

  std::vector<Result> run() const {
    const int64_t samples = shapes[0].samples, wide = size_of(arithmetic(dtype));
    const bool each = function == SampleFunction::squares;
    std::vector<Result> results;
    results.push_back({wide, Bytes(size_t(wide * (each ? samples : 1)), 0xFF)});
    results.push_back({8, Bytes(size_t(8 * samples), 0xFF)});
    for (const Shape& shape : shapes)
      results.push_back(
          {size_of(dtype), Bytes(size_t(shape.samples * shape.size * size_of(dtype)), 0xFF)});
    std::vector<SampleItem> items;
    for (size_t i = 0; i < shapes.size(); ++i)
      items.push_back({inputs[i].data(), shapes[i].samples, shapes[i].size, shapes[i].stride, 0,
                       results[i + 2].bytes.data()});
    const SampleGroup group{0, samples};
    double* sums = reinterpret_cast<double*>(results[1].bytes.data());
    const SampleNorms args{
        items.data(), int64_t(items.size()), &group, 1, function, 0.5, 2.0, dtype, sums, team};
    if (GK_PICK(sample_norms_forward)(args, results[0].bytes.data()) != Status::ok) return {};
    if (GK_PICK(sample_norms_backward)(args, upstream.data()) != Status::ok) return {};
    return results;
  }

 private:
  SampleFunction function;
  DType dtype;
  std::vector<Shape> shapes;
  int team;
  std::vector<Bytes> inputs;
  Bytes upstream;
  std::string label;
};

std::vector<Work> make_work() {
  std::vector<Work> all;
  for (SampleFunction function :
       {SampleFunction::squares, SampleFunction::square, SampleFunction::distance,
        SampleFunction::excess, SampleFunction::largest})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      all.emplace_back(function, dtype, std::vector<Shape>{{3, 5, 8}, {3, 70, 70}}, 1);
      all.emplace_back(function, dtype, std::vector<Shape>{{2, 33001, 33001}}, 2);
    }
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  return main_of("sample_norms_threads", count, arguments, make_work);
}
