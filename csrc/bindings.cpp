// The one pybind11 file: every launcher under its Python name. Each op's are in its bindings.h.
#include "attention/bindings.h"

#include <pybind11/pybind11.h>

#include <string>

#include "attention/plan.h"
#include "build_info.h"
#include "common/bindings.h"
#include "common/levels.h"
#include "differences/bindings.h"
#include "gaussian_kl/bindings.h"
#include "linear_cross_entropy/bindings.h"
#include "losses/bindings.h"
#include "sample_norms/bindings.h"
#include "spectral_norm/bindings.h"

namespace py = pybind11;
using namespace genkern;

namespace {

constexpr Level all_levels[] = {Level::portable, Level::avx2, Level::avx512, Level::amx};

const char* name_of(Level which) {
  switch (which) {
    case Level::portable:
      return "portable";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::amx:
      return "amx";
  }
  return "unknown";
}

void bind_levels(py::module_& m) {
  m.attr("build_info") = GK_BUILD_INFO;  // JSON
  m.def("cpu_level", [] { return name_of(level()); });
  m.def("cpu_levels", [] {  // lowest first: what was built and this machine can run
    py::list usable;
    for (Level which : all_levels)
      if (level_built(which) && which <= best_level()) usable.append(name_of(which));
    return usable;
  });
  m.def("set_cpu_level", [](const std::string& wanted) {
    for (Level which : all_levels)
      if (wanted == name_of(which) && set_level(which)) return true;
    return false;
  });
}

#ifdef GK_HAVE_CUDA
// hook(kernel, grid, block, shared bytes, [the bytes of each argument]), or None. It is called
// in the place of every launch, and an exception of its own ends the launcher.
void set_launch_hook(const py::object& hook) {
  if (hook.is_none()) {
    cuda::set_launch_hook({});
    return;
  }
  cuda::set_launch_hook([hook](const cuda::LaunchRequest& launch) {
    py::gil_scoped_acquire acquire;
    py::list arguments;
    for (int i = 0; i < launch.count; ++i)
      arguments.append(py::bytes(static_cast<const char*>(launch.arguments[i]), launch.sizes[i]));
    hook(launch.kernel, py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]),
         py::make_tuple(launch.block[0], launch.block[1], launch.block[2]), launch.shared_bytes,
         arguments);
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "genkern's compiled kernels: raw pointers, sizes and strides in, nothing of torch";
  bind_levels(m);
#ifdef GK_HAVE_CUDA
  m.def("set_launch_hook", set_launch_hook);
  bindings::bind_lists(m);
#endif
  bindings::bind_losses(m);
  bindings::bind_differences(m);
  bindings::bind_attention(m);
  bindings::bind_attention_plan(m);
  bindings::bind_spectral_norm(m);
  bindings::bind_sample_norms(m);
  bindings::bind_linear_cross_entropy(m);
  bindings::bind_gaussian_kl(m);
}
