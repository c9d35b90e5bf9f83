// Adversarial losses on the CPU: value, gradient and statistics in one pass over the logits.
//
// Layout: both sides are flat arrays. A side is cut into at most 256 chunks whose size depends on
// its length alone; a task is one chunk. Plan of a task: read lanes of logits once, z = s·x + c,
// from φ(z) the sums, from φ'(z) the gradient (scaled in fp32, rounded once, written where wanted);
// leave the chunk's sums in a table. Afterwards one thread adds the table up in order, in double.
// Floor: one read of the logits and one write of the gradients; 64 logits are all call cost.
#include "adversarial.h"

#include "../common/parallel.h"
#include "../common/vec.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

constexpr int64_t max_chunks = 256;
constexpr int64_t min_chunk = 16384;      // a multiple of every vector's lanes
constexpr int64_t parallel_from = 65536;  // logits that pay for waking a second thread

int64_t chunk_size(int64_t count) {
  const int64_t even = (count + max_chunks - 1) / max_chunks;
  return even <= min_chunk ? min_chunk : (even + min_chunk - 1) / min_chunk * min_chunk;
}
int64_t chunks_of(int64_t count) {
  return count <= 0 ? 0 : (count + chunk_size(count) - 1) / chunk_size(count);
}

template <class A>
struct Point {
  Vec<A> value, slope;
};

struct Softplus {
  template <class A>
  static Point<A> at(Vec<A> z) {
    const Vec<A> magnitude = select(z < A(0), -z, z);
    const Vec<A> e = exp(-magnitude), inverse = A(1) / (e + A(1));
    return {max(z, splat(A(0))) + log1p01(e), select(z < A(0), e * inverse, inverse)};
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

struct Sums {
  double value, logits, right;  // right: logits on their own side of zero
};

// Sums over lanes in the arithmetic type; every `run` vectors they move on to doubles, since a long
// fp32 sum would lose digits that PyTorch's cascade keeps.
template <class A>
struct LaneSums {
  static constexpr int run = 32;
  Vec<A> value{}, logits{}, right{};
  Sums total{};
  int added = 0;

  void add(Vec<A> phi, Vec<A> x, Mask<A> is_right, Mask<A> live) {
    const Vec<A> zero{};
    value += select(live, phi, zero);
    logits += select(live, x, zero);
    right += select(live & is_right, splat(A(1)), zero);
    if (++added == run) flush();
  }
  void flush() {
    for (int i = 0; i < lanes<A>(); ++i) {
      total.value += double(value[i]);
      total.logits += double(logits[i]);
      total.right += double(right[i]);
    }
    value = logits = right = Vec<A>{};
    added = 0;
  }
  Sums finish() {
    flush();
    return total;
  }
};

// One chunk of one side. `scale` is dloss/dz per unit of slope, without the side's sign.
template <class T, class F>
Sums one_side(const T* x, int64_t n, bool is_real, const LogitSide& side, double scale, T* grad) {
  using A = Acc<T>;
  const A sign = A(side.sign), shift = A(side.shift), factor = A(scale * side.sign);
  LaneSums<A> sums;
  for (int64_t i = 0; i < n; i += lanes<A>()) {
    const bool whole = n - i >= lanes<A>();
    const Vec<A> logits = whole ? load(x + i) : load_part(x + i, n - i);
    const Point<A> p = F::template at<A>(logits * sign + shift);
    sums.add(p.value, logits, is_real ? logits > A(0) : logits < A(0), first_lanes<A>(n - i));
    if (!grad) continue;
    if (whole)
      store(grad + i, p.slope * factor);
    else
      store_part(grad + i, p.slope * factor, n - i);
  }
  return sums.finish();
}

// One chunk of pairs; the real side's sums carry φ.
template <class T, class F>
void one_pair(const T* r, const T* f, int64_t n, const LogitSide& real, const LogitSide& fake,
              double scale, T* grad_real, T* grad_fake, Sums* real_sums, Sums* fake_sums) {
  using A = Acc<T>;
  const A real_sign = A(real.sign), fake_sign = A(fake.sign), shift = A(real.shift);
  const A real_factor = A(scale * real.sign), fake_factor = A(scale * fake.sign);
  LaneSums<A> of_real, of_fake;
  for (int64_t i = 0; i < n; i += lanes<A>()) {
    const bool whole = n - i >= lanes<A>();
    const Vec<A> a = whole ? load(r + i) : load_part(r + i, n - i);
    const Vec<A> b = whole ? load(f + i) : load_part(f + i, n - i);
    const Point<A> p = F::template at<A>(a * real_sign + b * fake_sign + shift);
    const Mask<A> live = first_lanes<A>(n - i);
    of_real.add(p.value, a, a > A(0), live);
    of_fake.add(Vec<A>{}, b, b < A(0), live);
    const int64_t part = whole ? lanes<A>() : n - i;
    if (grad_real) store_part(grad_real + i, p.slope * real_factor, part);
    if (grad_fake) store_part(grad_fake + i, p.slope * fake_factor, part);
  }
  *real_sums = of_real.finish();
  *fake_sums = of_fake.finish();
}

struct Totals {
  Sums real, fake;
};

double per_logit(const LogitSide& side) {
  return side.count > 0 ? side.weight / double(side.count) : 0;
}

Sums add_up(const Sums* table, int64_t chunks) {
  Sums total{};
  for (int64_t i = 0; i < chunks; ++i) {
    total.value += table[i].value;
    total.logits += table[i].logits;
    total.right += table[i].right;
  }
  return total;
}

// The whole pass: sums for both sides, gradients times `upstream` where wanted.
template <class T, class F>
Totals sweep(const LogitSide& real, const LogitSide& fake, bool paired, double upstream,
             void* grad_real, void* grad_fake, int threads) {
  const T* r = static_cast<const T*>(real.logits);
  const T* f = static_cast<const T*>(fake.logits);
  T* gr = static_cast<T*>(grad_real);
  T* gf = static_cast<T*>(grad_fake);
  const int64_t real_chunk = chunk_size(real.count), fake_chunk = chunk_size(fake.count);
  const int64_t real_chunks = chunks_of(real.count);
  const int64_t tasks = paired ? real_chunks : real_chunks + chunks_of(fake.count);
  const double real_scale = upstream * per_logit(real), fake_scale = upstream * per_logit(fake);
  const int team = real.count + fake.count < parallel_from ? 1 : threads;

  Sums real_table[max_chunks], fake_table[max_chunks];
  parallel(tasks, team, [&](int64_t task, int) {
    if (task < real_chunks) {
      const int64_t at = task * real_chunk;
      const int64_t n = real.count - at < real_chunk ? real.count - at : real_chunk;
      if (paired)
        one_pair<T, F>(r + at, f + at, n, real, fake, real_scale, gr ? gr + at : nullptr,
                       gf ? gf + at : nullptr, &real_table[task], &fake_table[task]);
      else
        real_table[task] =
            one_side<T, F>(r + at, n, true, real, real_scale, gr ? gr + at : nullptr);
    } else {
      const int64_t at = (task - real_chunks) * fake_chunk;
      const int64_t n = fake.count - at < fake_chunk ? fake.count - at : fake_chunk;
      fake_table[task - real_chunks] =
          one_side<T, F>(f + at, n, false, fake, fake_scale, gf ? gf + at : nullptr);
    }
  });

  return {add_up(real_table, real_chunks),
          add_up(fake_table, paired ? real_chunks : tasks - real_chunks)};
}

template <class T>
Totals sweep(Phi phi, const LogitSide& real, const LogitSide& fake, bool paired, double upstream,
             void* grad_real, void* grad_fake, int threads) {
  switch (phi) {
    case Phi::softplus:
      return sweep<T, Softplus>(real, fake, paired, upstream, grad_real, grad_fake, threads);
    case Phi::relu:
      return sweep<T, Relu>(real, fake, paired, upstream, grad_real, grad_fake, threads);
    case Phi::square:
      return sweep<T, Square>(real, fake, paired, upstream, grad_real, grad_fake, threads);
    case Phi::identity:
      break;
  }
  return sweep<T, Identity>(real, fake, paired, upstream, grad_real, grad_fake, threads);
}

// A mean over no logits is NaN, as in PyTorch; a side that takes no part adds nothing.
double mean(double total, const LogitSide& side) {
  return side.count < 0 ? 0 : total / double(side.count);
}

template <class T>
Status forward(const AdversarialForward& args) {
  using A = Acc<T>;
  const Totals t = sweep<T>(args.phi, args.real, args.fake, args.paired, 1, args.grad_real,
                            args.grad_fake, args.threads);
  double loss = args.real.weight * mean(t.real.value, args.real);
  if (!args.paired) loss += args.fake.weight * mean(t.fake.value, args.fake);
  *static_cast<A*>(args.loss) = A(loss);
  if (A* stats = static_cast<A*>(args.stats)) {
    stats[0] = A(mean(t.real.logits, args.real));
    stats[1] = A(mean(t.fake.logits, args.fake));
    stats[2] = A(mean(t.real.right, args.real));
    stats[3] = A(mean(t.fake.right, args.fake));
  }
  return Status::ok;
}

template <class T>
Status backward(const AdversarialBackward& args) {
  const double upstream = double(*static_cast<const Acc<T>*>(args.grad_loss));
  sweep<T>(args.phi, args.real, args.fake, args.paired, upstream, args.grad_real, args.grad_fake,
           args.threads);
  return Status::ok;
}

}  // namespace

Status adversarial_forward(const AdversarialForward& args) {
  return for_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args); });
}

Status adversarial_backward(const AdversarialBackward& args) {
  return for_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
