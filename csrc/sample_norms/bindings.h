// The launchers of norms of samples under their Python names (bindings.cpp).
#pragma once

#include <array>
#include <vector>

#include "../common/bindings.h"
#include "sample_norms.h"

namespace genkern {
namespace bindings {

// Items and groups are tuples of numbers, in the order of the contract's structs.
using SampleItems = std::vector<std::array<int64_t, 6>>;
using SampleGroups = std::vector<std::array<int64_t, 2>>;

inline std::vector<SampleItem> sample_items(const SampleItems& items) {
  std::vector<SampleItem> list;
  list.reserve(items.size());
  for (const auto& x : items)
    list.push_back({pointer(x[0]), x[1], x[2], x[3], x[4], pointer(x[5])});
  return list;
}

inline void bind_sample_norms(py::module_& m) {
  const auto launch = [](const auto& launcher, const char* name, const SampleItems& items,
                         const SampleGroups& groups, int function, double center, double weight,
                         int dtype, Address sums, Address value, int threads) {
    const std::vector<SampleItem> item_list = sample_items(items);
    std::vector<SampleGroup> group_list;
    for (const auto& x : groups) group_list.push_back({x[0], x[1]});
    const SampleNorms args{item_list.data(),
                           int64_t(item_list.size()),
                           group_list.data(),
                           int64_t(group_list.size()),
                           SampleFunction(function),
                           center,
                           weight,
                           DType(dtype),
                           static_cast<double*>(pointer(sums)),
                           threads};
    py::gil_scoped_release release;
    check(launcher(args, pointer(value)), name);
  };
  m.def("sample_norms_forward", [launch](const SampleItems& items, const SampleGroups& groups,
                                         int function, double center, double weight, int dtype,
                                         Address sums, Address value, int threads) {
    launch(
        [](const SampleNorms& args, void* to) { return GK_PICK(sample_norms_forward)(args, to); },
        "sample_norms_forward", items, groups, function, center, weight, dtype, sums, value,
        threads);
  });
  m.def("sample_norms_backward",
        [launch](const SampleItems& items, const SampleGroups& groups, int function, double center,
                 double weight, int dtype, Address sums, Address grad_value, int threads) {
          launch([](const SampleNorms& args,
                    void* grad) { return GK_PICK(sample_norms_backward)(args, grad); },
                 "sample_norms_backward", items, groups, function, center, weight, dtype, sums,
                 grad_value, threads);
        });
#ifdef GK_HAVE_CUDA
  m.def("sample_norms_cuda_plan",
        [](const SampleItems& items, int dtype, bool gradients_alone, int64_t blocks_aim) {
          const std::vector<SampleItem> list = sample_items(items);
          return cuda::sample_norms_plan(DType(dtype), list.data(), int64_t(list.size()),
                                         gradients_alone, blocks_aim);
        });
  const auto problem = [](int function, double center, double weight, int dtype, Address sums) {
    return SampleNorms{nullptr,
                       0,
                       nullptr,
                       0,
                       SampleFunction(function),
                       center,
                       weight,
                       DType(dtype),
                       static_cast<double*>(pointer(sums)),
                       1};
  };
  m.def("sample_norms_forward_cuda",
        [problem](const cuda::ListPlan& plan, int function, double center, double weight, int dtype,
                  const ListMemoryArgument& memory, Address sums, Address value, Address stream) {
          const SampleNorms args = problem(function, center, weight, dtype, sums);
          py::gil_scoped_release release;
          check(cuda::sample_norms_forward(args, plan, list_memory(memory), pointer(value),
                                           pointer(stream)),
                "sample_norms_forward_cuda");
        });
  m.def("sample_norms_backward_cuda",
        [problem](const cuda::ListPlan& plan, int function, double center, double weight, int dtype,
                  const ListMemoryArgument& memory, Address sums, Address grad_value,
                  Address stream) {
          const SampleNorms args = problem(function, center, weight, dtype, sums);
          py::gil_scoped_release release;
          check(cuda::sample_norms_backward(args, plan, list_memory(memory), pointer(grad_value),
                                            pointer(stream)),
                "sample_norms_backward_cuda");
        });
#endif
}

}  // namespace bindings
}  // namespace genkern
