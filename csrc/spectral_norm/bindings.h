// The launchers of spectral normalization under their Python names (bindings.cpp).
#pragma once

#include <pybind11/numpy.h>

#include <array>
#include <string>
#include <vector>

#include "../common/bindings.h"
#include "spectral_norm.h"
#ifdef GK_HAVE_CUDA
#include "work.h"
#endif

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

inline std::vector<SpectralForward> spectral_forwards(const py::list& items) {
  std::vector<SpectralForward> list;
  list.reserve(items.size());
  for (const auto& x : rows_of_numbers<15>(items))
    list.push_back({pointer(x[0]), x[1], x[2], x[3], x[4], x[5], x[6] != 0, pointer(x[7]),
                    pointer(x[8]), pointer(x[9]), pointer(x[10]), pointer(x[11]), pointer(x[12]),
                    pointer(x[13]), pointer(x[14])});
  return list;
}

inline std::vector<SpectralBackward> spectral_backwards(const py::list& items) {
  std::vector<SpectralBackward> list;
  list.reserve(items.size());
  for (const auto& x : rows_of_numbers<11>(items))
    list.push_back({pointer(x[0]), pointer(x[1]), x[2], x[3], x[4], x[5], pointer(x[6]),
                    pointer(x[7]), pointer(x[8]), pointer(x[9]), pointer(x[10])});
  return list;
}

inline void bind_spectral_norm(py::module_& m) {
  m.def("spectral_norm_forward",
        [](const py::list& items, int dtype, int order, double eps, int threads) {
          const auto list = spectral_forwards(items);
          const SpectralOptions options{DType(dtype), UpdateOrder(order), eps, threads};
          py::gil_scoped_release release;
          check(GK_PICK(spectral_norm_forward)(list.data(), int64_t(list.size()), options),
                "spectral_norm_forward");
        });
  m.def("spectral_norm_backward", [](const py::list& items, int dtype, int threads) {
    const auto list = spectral_backwards(items);
    const SpectralOptions options{DType(dtype), UpdateOrder::u_first, 0, threads};
    py::gil_scoped_release release;
    check(GK_PICK(spectral_norm_backward)(list.data(), int64_t(list.size()), options),
          "spectral_norm_backward");
  });
#ifdef GK_HAVE_CUDA
  using cuda::SpectralWork;
  m.attr("spectral_norm_longest_cuda") = cuda::spectral_norm_longest;
  py::class_<SpectralWork>(m, "SpectralWork")
      .def_property_readonly("table",
                             [](const SpectralWork& work) {
                               return py::array_t<int64_t>(py::ssize_t(work.table.size()),
                                                           work.table.data());
                             })
      .def_readonly("scratch_bytes", &SpectralWork::scratch_bytes);
  m.def("spectral_norm_forward_work_cuda",
        [](const py::list& items, int dtype, int order, double eps) {
          const auto list = spectral_forwards(items);
          return cuda::spectral_norm_forward_work(list.data(), int64_t(list.size()),
                                                  {DType(dtype), UpdateOrder(order), eps, 1});
        });
  m.def("spectral_norm_backward_work_cuda", [](const py::list& items, int dtype) {
    const auto list = spectral_backwards(items);
    return cuda::spectral_norm_backward_work(list.data(), int64_t(list.size()),
                                             {DType(dtype), UpdateOrder::u_first, 0, 1});
  });
  m.def("spectral_norm_forward_cuda", [](const SpectralWork& work, Address table, Address scratch,
                                         Address stream) {
    py::gil_scoped_release release;
    check(cuda::spectral_norm_forward(work, pointer(table), pointer(scratch), pointer(stream)),
          "spectral_norm_forward_cuda");
  });
  m.def("spectral_norm_backward_cuda", [](const SpectralWork& work, Address table, Address scratch,
                                          Address stream) {
    py::gil_scoped_release release;
    check(cuda::spectral_norm_backward(work, pointer(table), pointer(scratch), pointer(stream)),
          "spectral_norm_backward_cuda");
  });
#endif
}

}  // namespace bindings
}  // namespace genkern
