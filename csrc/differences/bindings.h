// The launchers of differences under their Python names (bindings.cpp).
#pragma once

#include <tuple>
#include <vector>

#include "../common/bindings.h"
#include "differences.h"

namespace genkern {
namespace bindings {

// Addresses of a and b, elements, weight, addresses of the gradients.
using PairArgument = std::tuple<Address, Address, int64_t, double, Address, Address>;

inline std::vector<DifferencePair> difference_pairs(const std::vector<PairArgument>& list) {
  std::vector<DifferencePair> pairs;
  pairs.reserve(list.size());
  for (const auto& [a, b, count, weight, grad_a, grad_b] : list)
    pairs.push_back({pointer(a), pointer(b), count, weight, pointer(grad_a), pointer(grad_b)});
  return pairs;
}

inline void bind_differences(py::module_& m) {
  m.def("differences_forward", [](const std::vector<PairArgument>& list, int distance, int dtype,
                                  Address loss, int threads) {
    const auto pairs = difference_pairs(list);
    const DifferencesForward args{Distance(distance),    DType(dtype),  pairs.data(),
                                  int64_t(pairs.size()), pointer(loss), threads};
    py::gil_scoped_release release;
    check(GK_PICK(differences_forward)(args), "differences_forward");
  });
  m.def("differences_backward", [](const std::vector<PairArgument>& list, int distance, int dtype,
                                   Address grad_loss, int threads) {
    const auto pairs = difference_pairs(list);
    const DifferencesBackward args{Distance(distance),    DType(dtype),       pairs.data(),
                                   int64_t(pairs.size()), pointer(grad_loss), threads};
    py::gil_scoped_release release;
    check(GK_PICK(differences_backward)(args), "differences_backward");
  });
#ifdef GK_HAVE_CUDA
  m.def("differences_cuda_plan", [](const std::vector<PairArgument>& list, int dtype,
                                    bool gradients_alone, int64_t blocks_aim) {
    const auto pairs = difference_pairs(list);
    return cuda::differences_plan(DType(dtype), pairs.data(), int64_t(pairs.size()),
                                  gradients_alone, blocks_aim);
  });
  m.def("differences_forward_cuda", [](const cuda::ListPlan& plan, int distance, int dtype,
                                       const ListMemoryArgument& memory, Address loss,
                                       Address stream) {
    const DifferencesForward args{Distance(distance), DType(dtype), nullptr, 0, pointer(loss), 1};
    py::gil_scoped_release release;
    check(cuda::differences_forward(args, plan, list_memory(memory), pointer(stream)),
          "differences_forward_cuda");
  });
  m.def("differences_backward_cuda",
        [](const cuda::ListPlan& plan, int distance, int dtype, const ListMemoryArgument& memory,
           Address grad_loss, bool is_done_for_one, Address stream) {
          const DifferencesBackward args{
              Distance(distance), DType(dtype), nullptr, 0, pointer(grad_loss), 1};
          py::gil_scoped_release release;
          check(cuda::differences_backward(args, plan, list_memory(memory), is_done_for_one,
                                           pointer(stream)),
                "differences_backward_cuda");
        });
#endif
}

}  // namespace bindings
}  // namespace genkern
