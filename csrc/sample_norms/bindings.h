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

inline void bind_sample_norms(py::module_& m) {
  const auto launch = [](const auto& launcher, const char* name, const SampleItems& items,
                         const SampleGroups& groups, int function, double center, double weight,
                         int dtype, Address sums, Address value, int threads) {
    std::vector<SampleItem> item_list;
    for (const auto& x : items)
      item_list.push_back({pointer(x[0]), x[1], x[2], x[3], x[4], pointer(x[5])});
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
}

}  // namespace bindings
}  // namespace genkern
