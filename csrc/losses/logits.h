// One chunk of logits: φ and its derivative, lane by lane, and their sums. For kernel files
// (compiled once per level).
#pragma once

#include <stdint.h>
#include <string.h>

#include "../common/chunks.h"
#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {

template <class A>
struct Point {
  Vec<A> value, slope;
};

// φ and φ' at z. A pass that needs only one of them computes only one, to the same bits.
struct Softplus {
  // log(1 + e) = 2·atanh(e / (e + 2)) and 1 / (1 + e) share one division, the dearest part of both.
  template <class A>
  static Point<A> at(Vec<A> z) {
    const Vec<A> e = exp(select(z < A(0), z, -z));
    const Vec<A> inverse = A(1) / ((e + A(1)) * (e + A(2)));
    const Vec<A> logarithm = twice_atanh(e * (e + A(1)) * inverse);
    const Vec<A> sigmoid = select(z < A(0), e, splat(A(1))) * (e + A(2)) * inverse;
    return {max(z, splat(A(0))) + logarithm, sigmoid};
  }
};
struct Relu {
  template <class A>
  static Point<A> at(Vec<A> z) {
    return {max(z, splat(A(0))), select(z <= A(0), splat(A(0)), splat(A(1)))};
  }
};
struct Square {
  template <class A>
  static Point<A> at(Vec<A> z) {
    return {z * z, z + z};
  }
};
struct Identity {
  template <class A>
  static Point<A> at(Vec<A> z) {
    return {z, splat(A(1))};
  }
};

// What a pass is for.
enum class Pass { values, values_and_gradients, values_and_slopes, gradients };
constexpr bool sums_values(Pass pass) { return pass != Pass::gradients; }
constexpr bool writes_gradients(Pass pass) {
  return pass == Pass::values_and_gradients || pass == Pass::gradients;
}

struct Sums {
  double value, logits, right, slope;  // right: logits on their own side of zero
};

// A sum over lanes in the arithmetic type, which moves on to doubles now and then, since a long
// fp32 sum would lose digits that PyTorch's cascade keeps.
template <class A>
struct LaneSum {
  Vec<A> part{};
  Vec<double> total{};

  void flush() {
    if constexpr (sizeof(A) == sizeof(double)) {
      total += part;
    } else {
      typename VecOf<float, GK_VECTOR_BYTES / 2>::type halves[2];
      memcpy(halves, &part, sizeof halves);
      total += __builtin_convertvector(halves[0], Vec<double>) +
               __builtin_convertvector(halves[1], Vec<double>);
    }
    part = Vec<A>{};
  }
  double finish() {
    flush();
    return sum(total);
  }
};

template <class A, Pass pass>
struct LaneSums {
  static constexpr int run = 32;  // vectors
  const bool of_logits;           // whether anyone wants more than φ
  LaneSum<A> value, logits, right, slope;
  int added = 0;

  explicit LaneSums(bool wanted) : of_logits(wanted) {}

  // `own`: the sign of a logit on its own side of zero.
  void add(const Point<A>& p, Vec<A> x, A own, Mask<A> live) {
    const Vec<A> zero{};
    value.part += select(live, p.value, zero);
    if (pass == Pass::values_and_slopes) slope.part += select(live, p.slope, zero);
    if (of_logits) {
      logits.part += select(live, x, zero);
      right.part += select(live & (x * own > A(0)), splat(A(1)), zero);
    }
    if (++added == run) flush();
  }
  void flush() {
    value.flush();
    if (pass == Pass::values_and_slopes) slope.flush();
    if (of_logits) {
      logits.flush();
      right.flush();
    }
    added = 0;
  }
  Sums finish() { return {value.finish(), logits.finish(), right.finish(), slope.finish()}; }
};

// z = sign·x + shift, and the gradient factor·φ'(z) + offset.
struct Line {
  double sign, shift, factor, offset;
};

// One chunk of one side. `toward`: the sign of a logit on its own side of zero.
template <class T, class F, Pass pass>
Sums one_side(const T* x, int64_t n, const Line& line, double toward, bool of_logits, T* grad) {
  using A = Acc<T>;
  const A sign = A(line.sign), shift = A(line.shift), own = A(toward);
  const A factor = A(line.factor), offset = A(line.offset);
  LaneSums<A, pass> sums(of_logits);
  const auto step = [&](Vec<A> logits, Mask<A> live) {
    const Point<A> p = F::template at<A>(logits * sign + shift);
    if (sums_values(pass)) sums.add(p, logits, own, live);
    return p.slope * factor + offset;
  };
  const Mask<A> all = Mask<A>{} - 1;
  int64_t i = 0;
  for (; n - i >= lanes<A>(); i += lanes<A>()) {
    const Vec<A> gradient = step(load(x + i), all);
    if (writes_gradients(pass)) store(grad + i, gradient);
  }
  if (i < n) {
    const Vec<A> gradient = step(load_part(x + i, n - i), first_lanes<A>(n - i));
    if (writes_gradients(pass)) store_part(grad + i, gradient, n - i);
  }
  return sums.finish();
}

// One chunk of pairs; the real side's sums carry φ.
template <class T, class F, Pass pass>
void one_pair(const T* r, const T* f, int64_t n, const Line& real, const Line& fake, double toward,
              bool of_logits, T* grad_real, T* grad_fake, Sums* real_sums, Sums* fake_sums) {
  using A = Acc<T>;
  const A real_sign = A(real.sign), fake_sign = A(fake.sign), shift = A(real.shift);
  const A real_factor = A(real.factor), fake_factor = A(fake.factor), own = A(toward);
  LaneSums<A, pass> of_real(of_logits), of_fake(of_logits);
  const auto step = [&](Vec<A> a, Vec<A> b, Mask<A> live) {
    const Point<A> p = F::template at<A>(a * real_sign + b * fake_sign + shift);
    if (sums_values(pass)) {
      of_real.add(p, a, own, live);
      if (of_logits) of_fake.add(Point<A>{}, b, -own, live);
    }
    return p.slope;
  };
  const Mask<A> all = Mask<A>{} - 1;
  int64_t i = 0;
  for (; n - i >= lanes<A>(); i += lanes<A>()) {
    const Vec<A> slope = step(load(r + i), load(f + i), all);
    if (writes_gradients(pass) && grad_real) store(grad_real + i, slope * real_factor);
    if (writes_gradients(pass) && grad_fake) store(grad_fake + i, slope * fake_factor);
  }
  if (i < n) {
    const int64_t left = n - i;
    const Vec<A> slope = step(load_part(r + i, left), load_part(f + i, left), first_lanes<A>(left));
    if (writes_gradients(pass) && grad_real) store_part(grad_real + i, slope * real_factor, left);
    if (writes_gradients(pass) && grad_fake) store_part(grad_fake + i, slope * fake_factor, left);
  }
  *real_sums = of_real.finish();
  *fake_sums = of_fake.finish();
}

}  // namespace GK_LEVEL
}  // namespace genkern
