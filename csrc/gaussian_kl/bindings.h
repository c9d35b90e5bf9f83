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
          const GaussianKlGradients wanted{rows_of(gradients[0]), rows_of(gradients[1]),
                                           rows_of(gradients[2]), rows_of(gradients[3])};
          const Rows each = rows_of(each_upstream);
          py::gil_scoped_release release;
          check(GK_PICK(gaussian_kl_backward)(args, wanted, pointer(upstream), each, factor),
                "gaussian_kl_backward");
        });
}

}  // namespace bindings
}  // namespace genkern
