// Adversarial losses in CUDA: value and statistics in one launch (two above 16,384 logits),
// gradients in one. The meaning is adversarial.h's.
//
// Layout: both sides of the one term are flat arrays; a thread strides over them by the whole grid.
// Plan of the forward: each thread sums φ, the logits and their signs for both sides in double, a
// block adds its threads up in a fixed tree and leaves six numbers in scratch; a last block of one
// launch adds the blocks up in the same way. No atomics, so the same bits on every run. The
// backward is elementwise: it reads grad_loss on the device and multiplies by it in fp32 before the
// one rounding. Floor: one read of the logits forward, one read and one write backward.
#include "../common/cuda_types.cuh"
#include "adversarial.h"

namespace genkern {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int max_blocks = 512;
constexpr int sums = 6;  // value, logits, right: of the real side, then of the fake side
constexpr int64_t one_block_to = 16384;

struct Problem {
  AdversarialForm form;
  LogitTerm term;
  double factor;
};

template <class A>
struct Point {
  A value, slope;
};

template <class A>
__device__ Point<A> evaluate(Phi phi, A z) {
  const A zero = 0, one = 1;
  switch (phi) {
    case Phi::softplus: {
      const A e = exp(z < zero ? z : -z);
      return {(z < zero ? zero : z) + log1p(e), (z < zero ? e : one) / (one + e)};
    }
    case Phi::relu:
      return {z < zero ? zero : z, z <= zero ? zero : one};
    case Phi::square:
      return {z * z, z + z};
    default:
      return {z, one};
  }
}

// Σ φ(z) + λ·x of a side's totals; without a slope infinite logits have no part in it.
__device__ double value_of(const double* total, const LogitLine& line) {
  return line.slope == 0 ? total[0] : total[0] + line.slope * total[1];
}

// The six totals, in thread 0, become the loss and the statistics.
template <class A>
__device__ void finish(const double* total, const Problem& problem, A* loss, A* stats) {
  const LogitLine &real = problem.form.real, &fake = problem.form.fake;
  const int64_t real_count = problem.term.real_count, fake_count = problem.term.fake_count;
  const double r = real_count < 0 ? 0 : 1 / double(real_count);
  const double f = fake_count < 0 ? 0 : 1 / double(fake_count);
  double value = real_count < 0 ? 0 : real.weight * (value_of(total, real) * r);
  if (problem.form.pairing == Pairing::separate && fake_count >= 0)
    value += fake.weight * (value_of(total + 3, fake) * f);
  *loss = A(problem.factor * value);
  if (!stats) return;
  stats[0] = A(total[1] * r);
  stats[1] = A(total[4] * f);
  stats[2] = A(total[2] * r);
  stats[3] = A(total[5] * f);
}

template <class T>
__global__ void forward_kernel(Problem problem, Acc<T>* loss, Acc<T>* stats, double* scratch) {
  using A = Acc<T>;
  __shared__ double shared[threads];
  const AdversarialForm& form = problem.form;
  const LogitTerm& term = problem.term;
  const bool paired = form.pairing == Pairing::paired;
  const T* r = static_cast<const T*>(term.real);
  const T* f = static_cast<const T*>(term.fake);
  const A own = A(form.orientation);
  const int64_t first = blockIdx.x * int64_t(threads) + threadIdx.x;
  const int64_t stride = gridDim.x * int64_t(threads);
  double mine[sums] = {};
  for (int64_t i = first; i < term.real_count; i += stride) {
    const A x = A(r[i]);
    A z = x * A(form.real.sign) + A(form.real.shift);
    if (paired) z += A(f[i]) * A(form.fake.sign);
    mine[0] += double(evaluate(form.phi, z).value);
    mine[1] += double(x);
    mine[2] += x * own > A(0);
  }
  for (int64_t i = first; i < term.fake_count; i += stride) {
    const A x = A(f[i]), z = x * A(form.fake.sign) + A(form.fake.shift);
    if (!paired) mine[3] += double(evaluate(form.phi, z).value);
    mine[4] += double(x);
    mine[5] += x * own < A(0);
  }
  double total[sums];
  for (int k = 0; k < sums; ++k) total[k] = block_sum<threads>(mine[k], shared);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    finish(total, problem, loss, stats);
  } else {
    for (int k = 0; k < sums; ++k) scratch[blockIdx.x * sums + k] = total[k];
  }
}

template <class A>
__global__ void finish_kernel(const double* scratch, int blocks, Problem problem, A* loss,
                              A* stats) {
  __shared__ double shared[threads];
  double total[sums];
  for (int k = 0; k < sums; ++k) {
    double mine = 0;
    for (int block = threadIdx.x; block < blocks; block += threads)
      mine += scratch[block * sums + k];
    total[k] = block_sum<threads>(mine, shared);
  }
  if (threadIdx.x == 0) finish(total, problem, loss, stats);
}

template <class T>
__global__ void backward_kernel(Problem problem, const Acc<T>* grad_loss) {
  using A = Acc<T>;
  const LogitTerm& term = problem.term;
  const LogitLine &real = problem.form.real, &fake = problem.form.fake;
  const Phi phi = problem.form.phi;
  const bool paired = problem.form.pairing == Pairing::paired;
  const T* r = static_cast<const T*>(term.real);
  const T* f = static_cast<const T*>(term.fake);
  T* grad_real = static_cast<T*>(term.grad_real);
  T* grad_fake = static_cast<T*>(term.grad_fake);
  const int64_t first = blockIdx.x * int64_t(threads) + threadIdx.x;
  const int64_t stride = gridDim.x * int64_t(threads);
  const double upstream = double(*grad_loss) * problem.factor;
  const double real_scale = upstream * real.weight / double(term.real_count);
  const double fake_scale = upstream * fake.weight / double(term.fake_count);
  for (int64_t i = first; i < term.real_count; i += stride) {
    A z = A(r[i]) * A(real.sign) + A(real.shift);
    if (paired) z += A(f[i]) * A(fake.sign);
    const A slope = evaluate(phi, z).slope;
    if (grad_real) grad_real[i] = T(slope * A(real_scale * real.sign) + A(real_scale * real.slope));
    if (paired && grad_fake) grad_fake[i] = T(slope * A(real_scale * fake.sign));
  }
  if (paired || !grad_fake) return;
  for (int64_t i = first; i < term.fake_count; i += stride) {
    const A slope = evaluate(phi, A(f[i]) * A(fake.sign) + A(fake.shift)).slope;
    grad_fake[i] = T(slope * A(fake_scale * fake.sign) + A(fake_scale * fake.slope));
  }
}

int64_t longest(const LogitTerm& term) {
  return term.real_count > term.fake_count ? term.real_count : term.fake_count;
}

int blocks_for(int64_t count) {
  if (count <= one_block_to) return 1;
  const int64_t wanted = (count + 4 * threads - 1) / (4 * threads);
  return wanted < max_blocks ? int(wanted) : max_blocks;
}

Status launched() { return cudaGetLastError() == cudaSuccess ? Status::ok : Status::cuda_error; }

template <class T>
Status forward(const AdversarialForward& args, double* scratch, cudaStream_t stream) {
  using A = Acc<T>;
  const Problem problem{args.form, *args.terms, args.factor};
  const int blocks = blocks_for(longest(problem.term));
  A* loss = static_cast<A*>(args.loss);
  A* stats = static_cast<A*>(args.stats);
  forward_kernel<T><<<blocks, threads, 0, stream>>>(problem, loss, stats, scratch);
  if (blocks > 1)
    finish_kernel<A><<<1, threads, 0, stream>>>(scratch, blocks, problem, loss, stats);
  return launched();
}

template <class T>
Status backward(const AdversarialBackward& args, cudaStream_t stream) {
  const Problem problem{args.form, *args.terms, args.factor};
  const int64_t wanted = (longest(problem.term) + threads - 1) / threads;
  const int blocks = wanted < 1 ? 1 : wanted < 65536 ? int(wanted) : 65536;
  backward_kernel<T>
      <<<blocks, threads, 0, stream>>>(problem, static_cast<const Acc<T>*>(args.grad_loss));
  return launched();
}

}  // namespace

Status adversarial_forward(const AdversarialForward& args, void* scratch, void* stream) {
  double* sums_of_blocks = static_cast<double*>(scratch);
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32:
      return forward<float>(args, sums_of_blocks, on);
    case DType::f64:
      return forward<double>(args, sums_of_blocks, on);
    case DType::bf16:
      return forward<__nv_bfloat16>(args, sums_of_blocks, on);
    case DType::f16:
      return forward<__half>(args, sums_of_blocks, on);
  }
  return Status::unknown_dtype;
}

Status adversarial_backward(const AdversarialBackward& args, void* stream) {
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f32:
      return backward<float>(args, on);
    case DType::f64:
      return backward<double>(args, on);
    case DType::bf16:
      return backward<__nv_bfloat16>(args, on);
    case DType::f16:
      return backward<__half>(args, on);
  }
  return Status::unknown_dtype;
}

}  // namespace cuda
}  // namespace genkern
