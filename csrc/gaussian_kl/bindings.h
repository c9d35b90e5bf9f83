// The launchers of the KL divergence of Gaussians under their Python names (bindings.cpp).
#pragma once

#include <array>
#include <tuple>

#include "../common/bindings.h"
#include "gaussian_kl.h"

namespace genkern {
namespace bindings {

// Tensors are (address, row stride), in the order mean, logvar, other mean, other logvar.
using RowsArgument = std::tuple<Address, int64_t>;
using GaussiansArgument = std::array<RowsArgument, 4>;

inline Rows rows_of(const RowsArgument& x) { return {pointer(std::get<0>(x)), std::get<1>(x)}; }

inline GaussianKlGradients gradients_of(const GaussiansArgument& x) {
  return {rows_of(x[0]), rows_of(x[1]), rows_of(x[2]), rows_of(x[3])};
}

inline void bind_gaussian_kl(py::module_& m) {
  const auto problem = [](int64_t rows, int64_t size, const GaussiansArgument& x, int dtype,
                          int threads) {
    return GaussianKl{rows,          size,          rows_of(x[0]), rows_of(x[1]),
                      rows_of(x[2]), rows_of(x[3]), DType(dtype),  threads};
  };
  m.def("gaussian_kl_forward",
        [problem](int64_t rows, int64_t size, const GaussiansArgument& inputs, int dtype,
                  int threads, const RowsArgument& terms, Address sum, double factor) {
          const GaussianKl args = problem(rows, size, inputs, dtype, threads);
          const Rows term_rows = rows_of(terms);
          py::gil_scoped_release release;
          check(GK_PICK(gaussian_kl_forward)(args, term_rows, pointer(sum), factor),
                "gaussian_kl_forward");
        });
  m.def("gaussian_kl_backward",
        [problem](int64_t rows, int64_t size, const GaussiansArgument& inputs, int dtype,
                  int threads, const GaussiansArgument& gradients, Address upstream,
                  const RowsArgument& each_upstream, double factor) {
          const GaussianKl args = problem(rows, size, inputs, dtype, threads);
          const GaussianKlGradients wanted = gradients_of(gradients);
          const Rows each = rows_of(each_upstream);
          py::gil_scoped_release release;
          check(GK_PICK(gaussian_kl_backward)(args, wanted, pointer(upstream), each, factor),
                "gaussian_kl_backward");
        });
#ifdef GK_HAVE_CUDA
  m.def("gaussian_kl_cuda_plan", [](int64_t count, int dtype, bool with_sum, int64_t blocks_aim) {
    return cuda::gaussian_kl_plan(DType(dtype), count, with_sum, blocks_aim);
  });
  m.def("gaussian_kl_forward_cuda",
        [problem](const cuda::ListPlan& plan, int64_t rows, int64_t size,
                  const GaussiansArgument& inputs, int dtype, const ListMemoryArgument& memory,
                  const RowsArgument& terms, Address sum, double factor, Address stream) {
          const GaussianKl args = problem(rows, size, inputs, dtype, 1);
          const Rows term_rows = rows_of(terms);
          py::gil_scoped_release release;
          check(cuda::gaussian_kl_forward(args, plan, list_memory(memory), term_rows, pointer(sum),
                                          factor, pointer(stream)),
                "gaussian_kl_forward_cuda");
        });
  m.def("gaussian_kl_backward_cuda",
        [problem](const cuda::ListPlan& plan, int64_t rows, int64_t size,
                  const GaussiansArgument& inputs, int dtype, const GaussiansArgument& gradients,
                  Address upstream, const RowsArgument& each_upstream, double factor,
                  Address stream) {
          const GaussianKl args = problem(rows, size, inputs, dtype, 1);
          const GaussianKlGradients wanted = gradients_of(gradients);
          const Rows each = rows_of(each_upstream);
          py::gil_scoped_release release;
          check(cuda::gaussian_kl_backward(args, plan, wanted, pointer(upstream), each, factor,
                                           pointer(stream)),
                "gaussian_kl_backward_cuda");
        });
#endif
}

}  // namespace bindings
}  // namespace genkern
