// What the ops' bindings share.
//
// Pointers, streams and enums arrive as integers; genkern/ops/<op>/op.py has checked the tensors
// behind them. A launcher runs without the GIL, and a status other than ok becomes an exception
// that names it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdint.h>

#include <array>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "launch.h"
#include "levels.h"
#include "lists.h"

namespace genkern {
namespace bindings {

namespace py = pybind11;

using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline void check(Status status, const char* launcher) {
  switch (status) {
    case Status::ok:
      return;
    case Status::unknown_dtype:
      throw std::invalid_argument(std::string(launcher) + ": unknown dtype number");
    case Status::out_of_memory:
      throw std::runtime_error(std::string(launcher) + ": out of memory for its scratch");
    case Status::cuda_error:
#ifdef GK_HAVE_CUDA
      throw std::runtime_error(std::string(launcher) + ": the CUDA launch of " +
                               cuda::last_launch_error());
#endif
      throw std::runtime_error(std::string(launcher) + ": a CUDA error");
    case Status::refused:
      throw std::logic_error(std::string(launcher) + ": no engine took the call");
  }
}

#ifdef GK_HAVE_CUDA
// The addresses of its members.
using ListMemoryArgument = std::array<Address, 3>;

inline cuda::ListMemory list_memory(const ListMemoryArgument& at) {
  return {pointer(at[0]), static_cast<unsigned long long*>(pointer(at[1])),
          static_cast<double*>(pointer(at[2]))};
}

inline void bind_lists(py::module_& m) {
  py::class_<cuda::ListPlan>(m, "ListPlan")
      .def_readonly("table", &cuda::ListPlan::table)
      .def_readonly("blocks", &cuda::ListPlan::blocks)
      .def_readonly("arrays", &cuda::ListPlan::arrays)
      .def_readonly("run", &cuda::ListPlan::run)
      .def_readonly("sums", &cuda::ListPlan::sums)
      .def_property_readonly("needs_table", [](const cuda::ListPlan& plan) {
        return plan.arrays > cuda::nearby_arrays;
      });
}
#endif

}  // namespace bindings
}  // namespace genkern
