// The launchers of attention under their Python names (bindings.cpp).
#pragma once

#include <array>
#include <tuple>

#include "../common/bindings.h"
#include "attention.h"

namespace genkern {
namespace bindings {

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

inline Heads heads(const HeadsArgument& tensor) {
  const auto& [address, batch, head, row] = tensor;
  return {pointer(address), batch, head, row};
}
inline RowNumbers numbers(const NumbersArgument& tensor) {
  const auto& [address, batch, head] = tensor;
  return {pointer(address), batch, head};
}
// (address, strides of feature, batch, head).
inline KeptOut kept_out(const HeadsArgument& tensor) {
  const auto& [address, feature, batch, head] = tensor;
  return {pointer(address), feature, batch, head};
}
inline Bias bias(const BiasArgument& tensor) {
  const auto& [address, type, batch, head, row, key] = tensor;
  return {pointer(address), BiasType(type), batch, head, row, key};
}
inline Bias bias_gradient(const BiasGradientArgument& tensor) {
  const auto& [address, batch, head, row, key] = tensor;
  return {pointer(address), BiasType::arithmetic, batch, head, row, key};
}

inline AttentionProblem problem(const ProblemArgument& argument) {
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

#ifdef GK_HAVE_CUDA
// Address of the seed; the longest sequences of queries and of keys; stream.
using LaunchArgument = std::tuple<Address, int64_t, int64_t, Address>;

inline cuda::AttentionLaunch launch_of(const LaunchArgument& argument) {
  const auto& [seed, longest_q, longest_k, stream] = argument;
  return {static_cast<const int64_t*>(pointer(seed)), longest_q, longest_k, pointer(stream)};
}

// The numbers of each kind lie behind one another.
using FactsArgument = std::array<NumbersArgument, 3>;

inline cuda::RowFacts facts_of(const FactsArgument& argument) {
  return {numbers(argument[0]), numbers(argument[1]), numbers(argument[2])};
}

// Shift, inverse, level, τ, ρ.
using SecondFactsArgument = std::array<NumbersArgument, 5>;

inline cuda::SecondFacts second_facts_of(const SecondFactsArgument& argument) {
  const auto& [shift, inverse, level, tau, rho] = argument;
  return {numbers(shift), numbers(inverse), numbers(level), numbers(tau), numbers(rho)};
}

// Of q, k, v, the bias and the key bias.
using TangentsArgument =
    std::tuple<HeadsArgument, HeadsArgument, HeadsArgument, BiasArgument, NumbersArgument>;

inline Tangents tangents_of(const TangentsArgument& argument) {
  const auto& [q, k, v, of_bias, key_bias] = argument;
  return {heads(q), heads(k), heads(v), bias(of_bias), numbers(key_bias)};
}

inline void bind_attention_cuda(py::module_& m) {
  using H = const HeadsArgument&;
  using R = const NumbersArgument&;
  using F = const FactsArgument&;
  using L = const LaunchArgument&;

  m.def("attention_forward_cuda",
        [](const ProblemArgument& p, H out, R shift, R sum, R lse, L launch) {
          const AttentionForward args{
              problem(p), heads(out), {numbers(shift), numbers(sum)}, numbers(lse)};
          py::gil_scoped_release release;
          check(cuda::attention_forward(args, launch_of(launch)), "attention_forward_cuda");
        });
  m.def("attention_backward_rows_cuda", [](const ProblemArgument& p, R shift, R sum, H grad_out,
                                           R grad_lse, H grad_q, F facts, L launch) {
    const AttentionBackward args{problem(p),
                                 {numbers(shift), numbers(sum)},
                                 heads(grad_out),
                                 numbers(grad_lse),
                                 {heads(grad_q)}};
    py::gil_scoped_release release;
    check(cuda::attention_backward_rows(args, facts_of(facts), launch_of(launch)),
          "attention_backward_rows_cuda");
  });
  m.def("attention_backward_columns_cuda",
        [](const ProblemArgument& p, F facts, H grad_out, H grad_k, H grad_v, R sums, L launch) {
          const cuda::AttentionColumns args{problem(p),    facts_of(facts), heads(grad_out),
                                            heads(grad_k), heads(grad_v),   numbers(sums)};
          py::gil_scoped_release release;
          check(cuda::attention_backward_columns(args, launch_of(launch)),
                "attention_backward_columns_cuda");
        });
  m.def("attention_bias_gradient_cuda", [](const ProblemArgument& p, F facts, H grad_out,
                                           const BiasGradientArgument& grad, int64_t batches,
                                           int64_t heads_of_bias, L launch) {
    const cuda::AttentionBiasGradient args{problem(p),          facts_of(facts), heads(grad_out),
                                           bias_gradient(grad), batches,         heads_of_bias};
    py::gil_scoped_release release;
    check(cuda::attention_bias_gradient(args, launch_of(launch)), "attention_bias_gradient_cuda");
  });
  using S = const SecondFactsArgument&;
  using A = const TangentsArgument&;
  m.def("attention_second_rows_cuda", [](const ProblemArgument& p, R shift, R sum, A tangents,
                                         H grad_out, R grad_lse, H of_q, H of_grad_out, S facts,
                                         L launch) {
    const AttentionSecond args{problem(p),        {numbers(shift), numbers(sum)}, heads(grad_out),
                               numbers(grad_lse), tangents_of(tangents),          {heads(of_q)},
                               heads(of_grad_out)};
    py::gil_scoped_release release;
    check(cuda::attention_second_rows(args, second_facts_of(facts), launch_of(launch)),
          "attention_second_rows_cuda");
  });
  m.def("attention_second_columns_cuda", [](const ProblemArgument& p, S facts, A tangents,
                                            H grad_out, H of_k, H of_v, R sums, L launch) {
    const cuda::AttentionSecondColumns args{
        problem(p),  second_facts_of(facts), tangents_of(tangents), heads(grad_out), heads(of_k),
        heads(of_v), numbers(sums)};
    py::gil_scoped_release release;
    check(cuda::attention_second_columns(args, launch_of(launch)), "attention_second_columns_cuda");
  });
  m.def("attention_second_bias_cuda",
        [](const ProblemArgument& p, S facts, A tangents, H grad_out,
           const BiasGradientArgument& grad, int64_t batches, int64_t heads_of_bias, L launch) {
          const cuda::AttentionSecondBias args{
              problem(p),      second_facts_of(facts), tangents_of(tangents),
              heads(grad_out), bias_gradient(grad),    batches,
              heads_of_bias};
          py::gil_scoped_release release;
          check(cuda::attention_second_bias(args, launch_of(launch)), "attention_second_bias_cuda");
        });
  m.def("attention_jvp_cuda", [](const ProblemArgument& p, R shift, R sum, A tangents,
                                 H out_tangent, R lse_tangent, L launch) {
    const AttentionJvp args{problem(p),
                            {numbers(shift), numbers(sum)},
                            tangents_of(tangents),
                            heads(out_tangent),
                            numbers(lse_tangent)};
    py::gil_scoped_release release;
    check(cuda::attention_jvp(args, launch_of(launch)), "attention_jvp_cuda");
  });
}
#endif

inline void bind_attention(py::module_& m) {
  using H = const HeadsArgument&;
  using R = const NumbersArgument&;
  using T = const BiasArgument&;
  using G = const BiasGradientArgument&;

  m.def("attention_forward", [](const ProblemArgument& p, H out, R shift, R sum, H kept, R lse) {
    const AttentionForward args{
        problem(p), heads(out), {numbers(shift), numbers(sum), kept_out(kept)}, numbers(lse)};
    py::gil_scoped_release release;
    check(GK_PICK(attention_forward)(args), "attention_forward");
  });
  m.def("attention_backward",
        [](const ProblemArgument& p, R shift, R sum, H kept, H grad_out, R grad_lse, H grad_q,
           H grad_k, H grad_v, G grad_bias, R grad_key_bias) {
          const AttentionBackward args{problem(p),
                                       {numbers(shift), numbers(sum), kept_out(kept)},
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
           T tangent_bias, R tangent_key_bias, H out_tangent, R lse_tangent, H out, R lse) {
          const AttentionJvp args{problem(p),
                                  {numbers(shift), numbers(sum)},
                                  {heads(tangent_q), heads(tangent_k), heads(tangent_v),
                                   bias(tangent_bias), numbers(tangent_key_bias)},
                                  heads(out_tangent),
                                  numbers(lse_tangent),
                                  heads(out),
                                  numbers(lse)};
          py::gil_scoped_release release;
          check(GK_PICK(attention_jvp)(args), "attention_jvp");
        });
#ifdef GK_HAVE_CUDA
  bind_attention_cuda(m);
#endif
}

}  // namespace bindings
}  // namespace genkern
