// A call of attention of which all is known but the addresses: genkern/ops/attention/plans.py keeps
// these, so that a call like an earlier one hands over a few addresses instead of fifty numbers.
#pragma once

#include "bindings.h"

namespace genkern {
namespace bindings {

class AttentionPlan {
 public:
  // Of tensors whose strides are those of every call, with at most one of both biases, the mask.
  // The rows are dense [rows_kept, B, H, N].
  AttentionPlan(const ProblemArgument& problem, const HeadsArgument& out,
                const HeadsArgument& grad_q, const HeadsArgument& grad_k,
                const HeadsArgument& grad_v, int64_t rows_kept)
      : problem_(bindings::problem(problem)),
        out_(heads(out)),
        grad_q_(heads(grad_q)),
        grad_k_(heads(grad_k)),
        grad_v_(heads(grad_v)),
        rows_kept_(rows_kept) {}

  // rows 0: not wanted.
  void forward(Address q, Address k, Address v, Address mask, Address out, Address rows,
               int threads) const {
    const AttentionForward args{at(q, k, v, mask, threads), at(out_, out), rows_at(rows), {}};
    py::gil_scoped_release release;
    check(GK_PICK(attention_forward)(args), "attention_forward");
  }

  // The strides are grad_out's. Results 0: not wanted.
  void backward(Address q, Address k, Address v, Address mask, Address rows, Address grad_out,
                const std::array<int64_t, 4>& strides, Address grad_q, Address grad_k,
                Address grad_v, int threads) const {
    const AttentionBackward args{at(q, k, v, mask, threads),
                                 rows_at(rows),
                                 {pointer(grad_out), strides[0], strides[1], strides[2]},
                                 {},
                                 {at(grad_q_, grad_q), at(grad_k_, grad_k), at(grad_v_, grad_v)}};
    py::gil_scoped_release release;
    check(GK_PICK(attention_backward)(args), "attention_backward");
  }

 private:
  static Heads at(Heads tensor, Address address) {
    tensor.data = pointer(address);
    return tensor;
  }
  AttentionProblem at(Address q, Address k, Address v, Address mask, int threads) const {
    AttentionProblem problem = problem_;
    problem.q.data = pointer(q);
    problem.k.data = pointer(k);
    problem.v.data = pointer(v);
    if (problem.bias.data) problem.bias.data = pointer(mask);
    if (problem.key_bias.data) problem.key_bias.data = pointer(mask);
    problem.threads = threads;
    return problem;
  }
  SoftmaxRows rows_at(Address rows) const {
    if (!rows) return {};
    const int64_t head = problem_.N, batch = head * problem_.H;
    const int64_t bytes = problem_.dtype == DType::f64 ? 8 : 4;
    const int64_t kind = problem_.B * batch;
    const auto of_kind = [&](int64_t nth) { return pointer(rows + Address(nth * kind * bytes)); };
    return {{of_kind(0), batch, head},
            {of_kind(1), batch, head},
            {rows_kept_ > 2 ? of_kind(2) : nullptr, kind, batch, head}};
  }

  AttentionProblem problem_;
  Heads out_, grad_q_, grad_k_, grad_v_;
  int64_t rows_kept_;
};

inline void bind_attention_plan(py::module_& m) {
  using H = const HeadsArgument&;
  py::class_<AttentionPlan>(m, "AttentionPlan")
      .def(py::init<const ProblemArgument&, H, H, H, H, int64_t>())
      .def("forward", &AttentionPlan::forward)
      .def("backward", &AttentionPlan::backward);
}

}  // namespace bindings
}  // namespace genkern
