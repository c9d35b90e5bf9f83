// The launchers of the adversarial losses under their Python names (bindings.cpp).
#pragma once

#include <array>
#include <vector>

#include "../common/bindings.h"
#include "adversarial.h"

namespace genkern {
namespace bindings {

// Six numbers a term, in the order of the contract's struct.
inline std::vector<LogitTerm> logit_terms(const py::tuple& numbers) {
  std::vector<int64_t> x;
  x.reserve(numbers.size());
  for (const py::handle number : numbers) x.push_back(number.cast<int64_t>());
  std::vector<LogitTerm> terms;
  terms.reserve(x.size() / 6);
  for (size_t i = 0; i + 6 <= x.size(); i += 6)
    terms.push_back({pointer(Address(x[i])), pointer(Address(x[i + 1])), x[i + 2], x[i + 3],
                     pointer(Address(x[i + 4])), pointer(Address(x[i + 5]))});
  return terms;
}

inline void bind_losses(py::module_& m) {
  py::class_<AdversarialForm>(m, "AdversarialForm")
      .def(py::init([](int phi, int pairing, double orientation, const std::array<double, 4>& real,
                       const std::array<double, 4>& fake) {
        return AdversarialForm{Phi(phi),
                               Pairing(pairing),
                               orientation,
                               {real[0], real[1], real[2], real[3]},
                               {fake[0], fake[1], fake[2], fake[3]}};
      }));
  m.def("adversarial_forward",
        [](const AdversarialForm& form, int dtype, double factor, const py::tuple& numbers,
           Address loss, Address stats, int threads) {
          const auto terms = logit_terms(numbers);
          const AdversarialForward args{
              form,          DType(dtype),   factor, terms.data(), int64_t(terms.size()),
              pointer(loss), pointer(stats), threads};
          py::gil_scoped_release release;
          check(GK_PICK(adversarial_forward)(args), "adversarial_forward");
        });
  m.def("adversarial_backward", [](const AdversarialForm& form, int dtype, double factor,
                                   const py::tuple& numbers, Address grad_loss, int threads) {
    const auto terms = logit_terms(numbers);
    const AdversarialBackward args{form,         DType(dtype),          factor,
                                   terms.data(), int64_t(terms.size()), pointer(grad_loss),
                                   threads};
    py::gil_scoped_release release;
    check(GK_PICK(adversarial_backward)(args), "adversarial_backward");
  });
#ifdef GK_HAVE_CUDA
  m.def("adversarial_cuda_plan",
        [](const AdversarialForm& form, int dtype, const py::tuple& numbers, bool gradients_alone,
           int64_t blocks_aim) {
          const auto terms = logit_terms(numbers);
          return cuda::adversarial_plan(form.pairing, DType(dtype), terms.data(),
                                        int64_t(terms.size()), gradients_alone, blocks_aim);
        });
  m.def("adversarial_forward_cuda",
        [](const cuda::ListPlan& plan, const AdversarialForm& form, int dtype, double factor,
           int64_t count, const ListMemoryArgument& memory, Address totals, Address loss,
           Address stats, Address stream) {
          const AdversarialForward args{form,  DType(dtype),  factor,         nullptr,
                                        count, pointer(loss), pointer(stats), 1};
          py::gil_scoped_release release;
          check(cuda::adversarial_forward(args, plan, list_memory(memory),
                                          static_cast<double*>(pointer(totals)), pointer(stream)),
                "adversarial_forward_cuda");
        });
  m.def("adversarial_backward_cuda",
        [](const cuda::ListPlan& plan, const AdversarialForm& form, int dtype, double factor,
           int64_t count, const ListMemoryArgument& memory, Address totals, Address grad_loss,
           bool is_done_for_one, Address stream) {
          const AdversarialBackward args{form,  DType(dtype),       factor, nullptr,
                                         count, pointer(grad_loss), 1};
          py::gil_scoped_release release;
          check(cuda::adversarial_backward(args, plan, list_memory(memory),
                                           static_cast<double*>(pointer(totals)), is_done_for_one,
                                           pointer(stream)),
                "adversarial_backward_cuda");
        });
#endif
}

}  // namespace bindings
}  // namespace genkern
