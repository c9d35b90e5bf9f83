// The one pybind11 file: every launcher under its Python name.
//
// Pointers, streams and enums arrive as integers; genkern/ops/<op>/op.py has checked the tensors
// behind them. A launcher runs without the GIL, and a status other than ok becomes an exception
// that names it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "build_info.h"
#include "common/levels.h"
#include "differences/differences.h"
#include "gaussian_kl/gaussian_kl.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "losses/adversarial.h"
#include "sample_norms/sample_norms.h"
#include "spectral_norm/spectral_norm.h"

namespace py = pybind11;
using namespace genkern;

namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void check(Status status, const char* launcher) {
  switch (status) {
    case Status::ok:
      return;
    case Status::unknown_dtype:
      throw std::invalid_argument(std::string(launcher) + ": unknown dtype number");
    case Status::out_of_memory:
      throw std::runtime_error(std::string(launcher) + ": out of memory for its scratch");
    case Status::cuda_error:
      throw std::runtime_error(std::string(launcher) + ": the CUDA launch failed");
  }
}

// ---- Losses -------------------------------------------------------------------------------------

// Six numbers a term, in the order of the contract's struct.
std::vector<LogitTerm> logit_terms(const py::tuple& numbers) {
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

void bind_losses(py::module_& m) {
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
  m.attr("adversarial_cuda_scratch_bytes") = cuda::adversarial_scratch_bytes;
  m.def("adversarial_forward_cuda",
        [](const AdversarialForm& form, int dtype, double factor, const py::tuple& numbers,
           Address loss, Address stats, Address scratch, Address stream) {
          const auto terms = logit_terms(numbers);
          const AdversarialForward args{form, DType(dtype),  factor,         terms.data(),
                                        1,    pointer(loss), pointer(stats), 1};
          py::gil_scoped_release release;
          check(cuda::adversarial_forward(args, pointer(scratch), pointer(stream)),
                "adversarial_forward_cuda");
        });
  m.def("adversarial_backward_cuda",
        [](const AdversarialForm& form, int dtype, double factor, const py::tuple& numbers,
           Address grad_loss, Address stream) {
          const auto terms = logit_terms(numbers);
          const AdversarialBackward args{form, DType(dtype),       factor, terms.data(),
                                         1,    pointer(grad_loss), 1};
          py::gil_scoped_release release;
          check(cuda::adversarial_backward(args, pointer(stream)), "adversarial_backward_cuda");
        });
#endif
}

// ---- Differences --------------------------------------------------------------------------------

// Addresses of a and b, elements, weight, addresses of the gradients.
using PairArgument = std::tuple<Address, Address, int64_t, double, Address, Address>;

std::vector<DifferencePair> difference_pairs(const std::vector<PairArgument>& list) {
  std::vector<DifferencePair> pairs;
  pairs.reserve(list.size());
  for (const auto& [a, b, count, weight, grad_a, grad_b] : list)
    pairs.push_back({pointer(a), pointer(b), count, weight, pointer(grad_a), pointer(grad_b)});
  return pairs;
}

void bind_differences(py::module_& m) {
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
}

// ---- Attention ----------------------------------------------------------------------------------

// (address, batch stride, head stride, row stride); address 0: not there, or not wanted.
using HeadsArgument = std::tuple<Address, int64_t, int64_t, int64_t>;
// (address, batch stride, head stride).
using NumbersArgument = std::tuple<Address, int64_t, int64_t>;
// (address, type, strides of batch, head, row, key); a gradient's has no type.
using BiasArgument = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;
using BiasGradientArgument = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;

// dtype; B, H, Hk, N, M, d, dv; scale, softcap, dropout; left, right, lower right; seed; threads;
// addresses of q_starts, k_starts, key_lengths; bias; key bias; q; k; v.
using ProblemArgument =
    std::tuple<int, std::array<int64_t, 7>, std::array<double, 3>,
               std::tuple<int64_t, int64_t, bool>, uint64_t, int, std::array<Address, 3>,
               BiasArgument, NumbersArgument, HeadsArgument, HeadsArgument, HeadsArgument>;

Heads heads(const HeadsArgument& tensor) {
  const auto& [address, batch, head, row] = tensor;
  return {pointer(address), batch, head, row};
}
RowNumbers numbers(const NumbersArgument& tensor) {
  const auto& [address, batch, head] = tensor;
  return {pointer(address), batch, head};
}
Bias bias(const BiasArgument& tensor) {
  const auto& [address, type, batch, head, row, key] = tensor;
  return {pointer(address), BiasType(type), batch, head, row, key};
}
Bias bias_gradient(const BiasGradientArgument& tensor) {
  const auto& [address, batch, head, row, key] = tensor;
  return {pointer(address), BiasType::arithmetic, batch, head, row, key};
}

AttentionProblem problem(const ProblemArgument& argument) {
  const auto& [dtype, sizes, reals, window, seed, threads, starts, b, key_bias, q, k, v] = argument;
  const auto& [B, H, Hk, N, M, d, dv] = sizes;
  const auto& [scale, softcap, dropout] = reals;
  const auto& [left, right, lower_right] = window;
  const auto whole_numbers = [](Address at) { return static_cast<const int64_t*>(pointer(at)); };
  return {DType(dtype),
          B,
          H,
          Hk,
          N,
          M,
          d,
          dv,
          scale,
          softcap,
          dropout,
          left,
          right,
          lower_right,
          seed,
          threads,
          whole_numbers(starts[0]),
          whole_numbers(starts[1]),
          whole_numbers(starts[2]),
          bias(b),
          numbers(key_bias),
          heads(q),
          heads(k),
          heads(v)};
}

using H = const HeadsArgument&;
using R = const NumbersArgument&;
using T = const BiasArgument&;
using G = const BiasGradientArgument&;

void bind_attention(py::module_& m) {
  m.def("attention_forward", [](const ProblemArgument& p, H out, R shift, R sum, R lse) {
    const AttentionForward args{
        problem(p), heads(out), {numbers(shift), numbers(sum)}, numbers(lse)};
    py::gil_scoped_release release;
    check(GK_PICK(attention_forward)(args), "attention_forward");
  });
  m.def("attention_backward", [](const ProblemArgument& p, R shift, R sum, H grad_out, R grad_lse,
                                 H grad_q, H grad_k, H grad_v, G grad_bias, R grad_key_bias) {
    const AttentionBackward args{problem(p),
                                 {numbers(shift), numbers(sum)},
                                 heads(grad_out),
                                 numbers(grad_lse),
                                 {heads(grad_q), heads(grad_k), heads(grad_v),
                                  bias_gradient(grad_bias), numbers(grad_key_bias)}};
    py::gil_scoped_release release;
    check(GK_PICK(attention_backward)(args), "attention_backward");
  });
  m.def("attention_second", [](const ProblemArgument& p, R shift, R sum, H grad_out, R grad_lse,
                               H tangent_q, H tangent_k, H tangent_v, T tangent_bias,
                               R tangent_key_bias, H out_q, H out_k, H out_v, H out_grad_out,
                               R out_grad_lse, G out_bias, R out_key_bias) {
    const AttentionSecond args{
        problem(p),
        {numbers(shift), numbers(sum)},
        heads(grad_out),
        numbers(grad_lse),
        {heads(tangent_q), heads(tangent_k), heads(tangent_v), bias(tangent_bias),
         numbers(tangent_key_bias)},
        {heads(out_q), heads(out_k), heads(out_v), bias_gradient(out_bias), numbers(out_key_bias)},
        heads(out_grad_out),
        numbers(out_grad_lse)};
    py::gil_scoped_release release;
    check(GK_PICK(attention_second)(args), "attention_second");
  });
  m.def("attention_jvp",
        [](const ProblemArgument& p, R shift, R sum, H tangent_q, H tangent_k, H tangent_v,
           T tangent_bias, R tangent_key_bias, H out_tangent, R lse_tangent) {
          const AttentionJvp args{problem(p),
                                  {numbers(shift), numbers(sum)},
                                  {heads(tangent_q), heads(tangent_k), heads(tangent_v),
                                   bias(tangent_bias), numbers(tangent_key_bias)},
                                  heads(out_tangent),
                                  numbers(lse_tangent)};
          py::gil_scoped_release release;
          check(GK_PICK(attention_jvp)(args), "attention_jvp");
        });
}

// ---- Spectral normalization ---------------------------------------------------------------------

// Each weight is a tuple of numbers, in the order of the contract's struct; addresses among them.
void bind_spectral_norm(py::module_& m) {
  m.def("spectral_norm_forward", [](const std::vector<std::array<int64_t, 15>>& items, int dtype,
                                    int order, double eps, int threads) {
    std::vector<SpectralForward> list;
    list.reserve(items.size());
    for (const auto& x : items)
      list.push_back({pointer(x[0]), x[1], x[2], x[3], x[4], x[5], x[6] != 0, pointer(x[7]),
                      pointer(x[8]), pointer(x[9]), pointer(x[10]), pointer(x[11]), pointer(x[12]),
                      pointer(x[13]), pointer(x[14])});
    const SpectralOptions options{DType(dtype), UpdateOrder(order), eps, threads};
    py::gil_scoped_release release;
    check(GK_PICK(spectral_norm_forward)(list.data(), int64_t(list.size()), options),
          "spectral_norm_forward");
  });
  m.def("spectral_norm_backward",
        [](const std::vector<std::array<int64_t, 11>>& items, int dtype, int threads) {
          std::vector<SpectralBackward> list;
          list.reserve(items.size());
          for (const auto& x : items)
            list.push_back({pointer(x[0]), pointer(x[1]), x[2], x[3], x[4], x[5], pointer(x[6]),
                            pointer(x[7]), pointer(x[8]), pointer(x[9]), pointer(x[10])});
          const SpectralOptions options{DType(dtype), UpdateOrder::u_first, 0, threads};
          py::gil_scoped_release release;
          check(GK_PICK(spectral_norm_backward)(list.data(), int64_t(list.size()), options),
                "spectral_norm_backward");
        });
}

// ---- Norms of samples ---------------------------------------------------------------------------

// Items and groups are tuples of numbers, in the order of the contract's structs.
using SampleItems = std::vector<std::array<int64_t, 6>>;
using SampleGroups = std::vector<std::array<int64_t, 2>>;

void bind_sample_norms(py::module_& m) {
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

// ---- Cross-entropy of a linear layer ------------------------------------------------------------

void bind_linear_cross_entropy(py::module_& m) {
  m.def("token_losses", [](Address logits, int64_t tokens, int64_t vocabulary, Address targets,
                           int64_t ignored, double label_smoothing, double softcap, double z_loss,
                           int dtype, Address losses, bool gradient, Address scales, double scale,
                           int threads) {
    const TokenLosses args{
        pointer(logits), tokens,          vocabulary, static_cast<const int64_t*>(pointer(targets)),
        ignored,         label_smoothing, softcap,    z_loss,
        DType(dtype),    pointer(losses), gradient,   pointer(scales),
        scale,           threads};
    py::gil_scoped_release release;
    check(GK_PICK(token_losses)(args), "token_losses");
  });
}

// ---- KL of Gaussians ----------------------------------------------------------------------------

// Tensors are (address, row stride), in the order mean, logvar, other mean, other logvar.
using RowsArgument = std::tuple<Address, int64_t>;
using GaussiansArgument = std::array<RowsArgument, 4>;

Rows rows_of(const RowsArgument& x) { return {pointer(std::get<0>(x)), std::get<1>(x)}; }

void bind_gaussian_kl(py::module_& m) {
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

// ---- The machine --------------------------------------------------------------------------------

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "genkern's compiled kernels: raw pointers, sizes and strides in, nothing of torch";
  bind_levels(m);
  bind_losses(m);
  bind_differences(m);
  bind_attention(m);
  bind_spectral_norm(m);
  bind_sample_norms(m);
  bind_linear_cross_entropy(m);
  bind_gaussian_kl(m);
}
