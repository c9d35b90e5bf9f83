// The launchers of spectral normalization under their Python names (bindings.cpp).
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../common/bindings.h"
#include "spectral_norm.h"

namespace genkern {
namespace bindings {

// Each weight is a tuple of numbers, in the order of the contract's struct; addresses among them.
// pybind11's own conversion takes longer than the kernel does for small weights.
template <size_t n>
inline std::vector<std::array<int64_t, n>> rows_of_numbers(const py::list& items) {
  std::vector<std::array<int64_t, n>> rows(items.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const py::handle item = PyList_GET_ITEM(items.ptr(), py::ssize_t(i));
    if (!PyTuple_CheckExact(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != py::ssize_t(n))
      throw py::type_error("every item must be a tuple of " + std::to_string(n) + " numbers");
    for (size_t j = 0; j < n; ++j)
      rows[i][j] = PyLong_AsLongLong(PyTuple_GET_ITEM(item.ptr(), py::ssize_t(j)));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return rows;
}

inline void bind_spectral_norm(py::module_& m) {
  m.def("spectral_norm_forward",
        [](const py::list& items, int dtype, int order, double eps, int threads) {
          std::vector<SpectralForward> list;
          list.reserve(items.size());
          for (const auto& x : rows_of_numbers<15>(items))
            list.push_back({pointer(x[0]), x[1], x[2], x[3], x[4], x[5], x[6] != 0, pointer(x[7]),
                            pointer(x[8]), pointer(x[9]), pointer(x[10]), pointer(x[11]),
                            pointer(x[12]), pointer(x[13]), pointer(x[14])});
          const SpectralOptions options{DType(dtype), UpdateOrder(order), eps, threads};
          py::gil_scoped_release release;
          check(GK_PICK(spectral_norm_forward)(list.data(), int64_t(list.size()), options),
                "spectral_norm_forward");
        });
  m.def("spectral_norm_backward", [](const py::list& items, int dtype, int threads) {
    std::vector<SpectralBackward> list;
    list.reserve(items.size());
    for (const auto& x : rows_of_numbers<11>(items))
      list.push_back({pointer(x[0]), pointer(x[1]), x[2], x[3], x[4], x[5], pointer(x[6]),
                      pointer(x[7]), pointer(x[8]), pointer(x[9]), pointer(x[10])});
    const SpectralOptions options{DType(dtype), UpdateOrder::u_first, 0, threads};
    py::gil_scoped_release release;
    check(GK_PICK(spectral_norm_backward)(list.data(), int64_t(list.size()), options),
          "spectral_norm_backward");
  });
}

}  // namespace bindings
}  // namespace genkern
