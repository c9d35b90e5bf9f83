// Adversarial losses in CUDA: a list of discriminators in one launch forward and one backward. The
// meaning is adversarial.h's.
//
// Layout: an array is one side of one term, all real sides first and then all fake ones; in pairs
// it is both sides of a term, read together. How arrays become blocks, and blocks' sums one sum:
// common/lists.cuh. Plan of the forward: a block reads its logits once, writes their gradients
// where they are wanted already, and leaves its sums; the last block to arrive makes the loss and
// the statistics of them. Against the other side's mean a launch before it leaves the means; both
// keep what the backward needs, and gradients are the backward's alone. Backward, elementwise:
// grad_loss is read on the device and multiplied in before the one rounding. Where the forward has
// written the gradients and grad_loss is 1, nothing is left to do. Floor: one read of the logits
// forward (two against means), one write of the gradients.
#include <math.h>

#include "../common/launch.cuh"
#include "../common/lists.cuh"
#include "adversarial.h"

namespace genkern {
namespace cuda {
namespace adversarial {

struct LogitArray {
  int64_t first, blocks;
  const void *numbers, *others;           // others: the fake side, in pairs
  const void *gradient, *other_gradient;  // where wanted
  int64_t count;                          // -1: the side has no part
  double share;                           // what makes a sum a mean; of no logits NaN
};

struct Problem {
  AdversarialForm form;
  double factor;
  int64_t terms;
};

// What a block adds up: φ, the logits, how many are on their own side of zero; then φ' where means
// are subtracted, and in pairs the same two of the fake side.
enum Sum {
  of_values,
  of_logits,
  of_right,
  of_slopes,
  of_others = of_slopes,
  of_others_right,
  sums
};

enum class Pass : int { means = 0, values = 1 };

// ---- φ ------------------------------------------------------------------------------------------

template <class A>
__device__ void softplus_at(A z, A* value, A* slope) {
  const A zero = 0, one = 1;
  const A e = exp(z < zero ? z : -z);
  *value = (z < zero ? zero : z) + log1p(e);
  *slope = (z < zero ? e : one) / (one + e);
}

// φ(z) and φ'(z).
template <class A, int n>
__device__ void evaluate(Phi phi, const A (&z)[n], A (&values)[n], A (&slopes)[n]) {
  switch (phi) {
    case Phi::softplus:
#pragma unroll
      for (int i = 0; i < n; ++i) softplus_at(z[i], &values[i], &slopes[i]);
      break;
    case Phi::relu:
#pragma unroll
      for (int i = 0; i < n; ++i) {
        values[i] = z[i] < A(0) ? A(0) : z[i];
        slopes[i] = z[i] <= A(0) ? A(0) : A(1);
      }
      break;
    case Phi::square:
#pragma unroll
      for (int i = 0; i < n; ++i) {
        values[i] = z[i] * z[i];
        slopes[i] = z[i] + z[i];
      }
      break;
    case Phi::identity:
#pragma unroll
      for (int i = 0; i < n; ++i) {
        values[i] = z[i];
        slopes[i] = A(1);
      }
      break;
  }
}

// ---- Lines --------------------------------------------------------------------------------------

// z = sign·x + other_sign·y + shift; the gradients are factor·φ'(z) + offset and
// other_factor·φ'(z). `toward`: the sign of a logit on its own side of zero.
template <class A>
struct Line {
  A sign, other_sign, shift, toward, factor, other_factor, offset;
};

__device__ inline LogitLine one_of(bool first, const LogitLine& a, const LogitLine& b) {
  return {first ? a.sign : b.sign, first ? a.shift : b.shift, first ? a.weight : b.weight,
          first ? a.slope : b.slope};
}

// `totals`, where means are subtracted: those of the arrays, then their Σ φ'. Else null.
template <class A>
__device__ Line<A> line_of(const Problem& problem, const List<LogitArray>& list, int array,
                           const double* totals, double upstream) {
  const AdversarialForm& form = problem.form;
  const bool is_real = form.pairing == Pairing::paired || array < problem.terms;
  const LogitLine own = one_of(is_real, form.real, form.fake);
  const LogitLine other = one_of(is_real, form.fake, form.real);
  const double share = entry_of(list, array).share;
  const double scale = upstream * problem.factor * own.weight * share;
  double shift = own.shift, offset = scale * own.slope;
  if (totals) {
    const int64_t opposite = is_real ? array + problem.terms : array - problem.terms;
    shift -= own.sign * totals[opposite];
    const double through =
        upstream * problem.factor * other.weight * other.sign * entry_of(list, opposite).share;
    offset = -through * totals[list.arrays + opposite] * share;
  }
  return {A(own.sign),
          A(form.fake.sign),
          A(shift),
          A(is_real ? form.orientation : -form.orientation),
          A(scale * own.sign),
          A(scale * form.fake.sign),
          A(offset)};
}

// ---- One block ----------------------------------------------------------------------------------

// Reads the block's logits, adds to `mine` where `is_summing`, and writes gradients where wanted.
template <class T, bool is_summing>
__device__ void sweep(const Problem& problem, const List<LogitArray>& list, const double* totals,
                      double upstream, Acc<T> (&mine)[sums]) {
  using A = Acc<T>;
  constexpr int n = width<T>;
  __shared__ Line<A> shared_line;
  const int array = array_of(list);
  const LogitArray entry = entry_of(list, array);
  if (threadIdx.x == 0) shared_line = line_of<A>(problem, list, array, totals, upstream);
  __syncthreads();
  const Line<A> line = shared_line;
  const bool paired = problem.form.pairing == Pairing::paired;
  const bool average = problem.form.pairing == Pairing::average;
  const T* numbers = static_cast<const T*>(entry.numbers);
  const T* others = static_cast<const T*>(entry.others);
  T* gradient = static_cast<T*>(const_cast<void*>(entry.gradient));
  T* other_gradient = static_cast<T*>(const_cast<void*>(entry.other_gradient));
  along<T>(blockIdx.x - entry.first, list.run, entry.count, [&](int64_t at, int64_t left) {
    A x[n], y[n], z[n], values[n], slopes[n];
    load(numbers + at, left, x);
    if (paired) load(others + at, left, y);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      z[i] = x[i] * line.sign + line.shift;
      if (paired) z[i] += y[i] * line.other_sign;
    }
    evaluate(problem.form.phi, z, values, slopes);
    if (is_summing) {
      A some[sums] = {};
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (i < left) some[of_values] += values[i];
        some[of_logits] += x[i];  // zero beyond the end
        some[of_right] += x[i] * line.toward > A(0) ? A(1) : A(0);
        if (paired) {
          some[of_others] += y[i];
          some[of_others_right] += y[i] * line.toward < A(0) ? A(1) : A(0);
        } else if (average && i < left) {
          some[of_slopes] += slopes[i];
        }
      }
#pragma unroll
      for (int k = 0; k < sums; ++k) mine[k] += some[k];
    }
    if (gradient) {
      A product[n];
#pragma unroll
      for (int i = 0; i < n; ++i) product[i] = slopes[i] * line.factor + line.offset;
      store(gradient + at, left, product);
    }
    if (other_gradient) {
      A product[n];
#pragma unroll
      for (int i = 0; i < n; ++i) product[i] = slopes[i] * line.other_factor;
      store(other_gradient + at, left, product);
    }
  });
}

// ---- The last block -----------------------------------------------------------------------------

// Σ φ(z) + λ·x; without a slope infinite logits have no part in it.
__device__ inline double value_of(const double (&total)[sums], const LogitLine& line) {
  return line.slope == 0 ? total[of_values] : total[of_values] + line.slope * total[of_logits];
}

// One term's statistics of one side.
template <class A>
__device__ void store_statistics(A* stats, int64_t terms, bool is_real, int64_t term, double mean,
                                 double share_right) {
  A* to = stats + (is_real ? 0 : terms) + term;
  to[0] = A(mean);
  to[2 * terms] = A(share_right);
}

// All blocks' sums become the means and Σ φ' of the arrays, the loss, the statistics. A warp takes
// an array at a time.
template <class A>
__device__ void finish(const Problem& problem, const List<LogitArray>& list, Pass pass,
                       double* totals, A* loss, A* stats) {
  const bool paired = problem.form.pairing == Pairing::paired;
  double losses[1] = {0};
  for (int64_t array = threadIdx.x / warp_threads; array < list.arrays; array += list_warps) {
    const LogitArray entry = entry_of(list, array);
    double total[sums] = {};
    for (int64_t i = threadIdx.x % warp_threads; i < entry.blocks; i += warp_threads)
#pragma unroll
      for (int k = 0; k < sums; ++k)
        total[k] += list.memory.partials[k * gridDim.x + entry.first + i];
#pragma unroll
    for (int k = 0; k < sums; ++k) total[k] = warp_sum(total[k]);
    if (threadIdx.x % warp_threads != 0) continue;
    const double mean = total[of_logits] * entry.share;
    if (pass == Pass::means) {
      totals[array] = mean;
      continue;
    }
    const bool is_real = paired || array < problem.terms;
    const int64_t term = is_real ? array : array - problem.terms;
    const LogitLine line = one_of(is_real, problem.form.real, problem.form.fake);
    losses[0] += line.weight * (value_of(total, line) * entry.share);
    if (problem.form.pairing == Pairing::average) totals[list.arrays + array] = total[of_slopes];
    if (!stats) continue;
    store_statistics(stats, problem.terms, is_real, term, mean, total[of_right] * entry.share);
    if (paired)
      store_statistics(stats, problem.terms, false, term, total[of_others] * entry.share,
                       total[of_others_right] * entry.share);
  }
  const double everything = block_sums(losses);
  if (threadIdx.x == 0 && pass == Pass::values) *loss = A(problem.factor * everything);
}

// ---- Kernels ------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(list_threads)
    adversarial_forward_kernel(Problem problem, const __grid_constant__ List<LogitArray> list,
                               Pass pass, double* totals, Acc<T>* loss, Acc<T>* stats) {
  Acc<T> mine[sums] = {};
  const bool subtracts = problem.form.pairing == Pairing::average && pass == Pass::values;
  sweep<T, true>(problem, list, subtracts ? totals : nullptr, 1, mine);
  leave(list.memory.partials, mine);
  if (arrives_last(list.memory.counter)) finish(problem, list, pass, totals, loss, stats);
}

// `is_done_for_one`: the gradients are there already, for a grad_loss of 1.
template <class T>
__global__ void __launch_bounds__(list_threads)
    adversarial_backward_kernel(Problem problem, const __grid_constant__ List<LogitArray> list,
                                const double* totals, const Acc<T>* grad_loss,
                                bool is_done_for_one) {
  const Acc<T> upstream = *grad_loss;
  if (is_done_for_one && upstream == Acc<T>(1)) return;
  Acc<T> nothing[sums];
  sweep<T, false>(problem, list, totals, double(upstream), nothing);
}

// ---- Launchers ----------------------------------------------------------------------------------

double share_of(int64_t count) {
  return count < 0 ? 0 : count == 0 ? double(NAN) : 1 / double(count);
}

}  // namespace adversarial

using namespace adversarial;

ListPlan adversarial_plan(Pairing pairing, DType dtype, const LogitTerm* terms, int64_t count,
                          bool gradients_alone, int64_t blocks_aim) {
  const bool paired = pairing == Pairing::paired;
  std::vector<LogitArray> arrays;
  for (int64_t t = 0; t < count; ++t) {
    const LogitTerm& x = terms[t];
    arrays.push_back({0, 0, x.real, paired ? x.fake : nullptr, x.grad_real,
                      paired ? x.grad_fake : nullptr, x.real_count, share_of(x.real_count)});
  }
  for (int64_t t = 0; t < count && !paired; ++t) {
    const LogitTerm& x = terms[t];
    arrays.push_back(
        {0, 0, x.fake, nullptr, x.grad_fake, nullptr, x.fake_count, share_of(x.fake_count)});
  }
  const auto size = [&](const LogitArray& x) {
    return gradients_alone && !x.gradient && !x.other_gradient ? 0 : x.count;
  };
  ListPlanner planner(element_bytes(dtype), blocks_aim, gradients_alone ? 0 : sums);
  for (const LogitArray& x : arrays) planner.count(size(x));
  for (LogitArray& x : arrays) {
    x.first = planner.next_block();
    x.blocks = planner.blocks_of_row(size(x));
    planner.add(x, x.blocks);
  }
  return planner.finish();
}

Status adversarial_forward(const AdversarialForward& args, const ListPlan& plan,
                           const ListMemory& memory, double* totals, void* stream) {
  const Problem problem{args.form, args.factor, args.count};
  const auto list = list_of<LogitArray>(plan, memory);
  return for_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const auto pass = [&](Pass which, const Problem& its_problem) {
      return launch(adversarial_forward_kernel<T>, unsigned(plan.blocks), list_threads, 0, stream,
                    its_problem, list, which, totals, static_cast<A*>(args.loss),
                    static_cast<A*>(args.stats));
    };
    if (args.form.pairing == Pairing::average) {
      Problem of_means = problem;
      of_means.form.phi = Phi::identity;
      const Status status = pass(Pass::means, of_means);
      if (status != Status::ok) return status;
    }
    return pass(Pass::values, problem);
  });
}

Status adversarial_backward(const AdversarialBackward& args, const ListPlan& plan,
                            const ListMemory& memory, const double* totals, bool is_done_for_one,
                            void* stream) {
  const Problem problem{args.form, args.factor, args.count};
  const auto list = list_of<LogitArray>(plan, memory);
  return for_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch(adversarial_backward_kernel<T>, unsigned(plan.blocks), list_threads, 0, stream,
                  problem, list, totals, static_cast<const Acc<T>*>(args.grad_loss),
                  is_done_for_one);
  });
}

}  // namespace cuda
}  // namespace genkern
