// Cross-entropy of a chunk of logits on the CPU, the gradient in place.
//
// Layout: a token's logits are a row; a task is a row, which stays in a core's cache (32,000 of
// them are 128 KB in fp32). Plan of a task, three passes over the row: the maximum and the sum; the
// sum of exp(z - maximum); the gradient, from the logits once more rather than from stored
// exponentials, which half precision would round. Sums are lanes of fp32 that move on to doubles
// every 64 vectors. The floor is one read and one write of the chunk from memory; the three GEMMs
// beside it take thirty times as long.
#include <math.h>

#include "../common/parallel.h"
#include "../common/vec.h"
#include "linear_cross_entropy.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

// What a logit becomes: itself, or capped.
struct Plain {
  template <class A>
  Vec<A> value(Vec<A> x) const {
    return x;
  }
  template <class A>
  Vec<A> slope(Vec<A>) const {
    return splat(A(1));
  }
};
struct Capped {
  double cap;
  template <class A>
  Vec<A> value(Vec<A> x) const {
    return A(cap) * tanh(x * A(1 / cap));
  }
  template <class A>
  Vec<A> slope(Vec<A> z) const {
    const Vec<A> t = z * A(1 / cap);
    return A(1) - t * t;
  }
};

template <class A>
class LongSum {
 public:
  void add(Vec<A> x) {
    lanes_sum += x;
    if (++added == 64) flush();
  }
  double finish() {
    flush();
    return total;
  }

 private:
  void flush() {
    for (int i = 0; i < lanes<A>(); ++i) total += double(lanes_sum[i]);
    lanes_sum = Vec<A>{};
    added = 0;
  }
  Vec<A> lanes_sum{};
  double total = 0;
  int added = 0;
};

// body(vector, how many of its lanes count, where it begins) along a row.
template <class T, class Body>
inline void along(const T* row, int64_t n, const Body& body) {
  constexpr int step = lanes<Acc<T>>();
  int64_t i = 0;
  for (; n - i >= step; i += step) body(load(row + i), int64_t(step), i);
  if (i < n) body(load_part(row + i, n - i), n - i, i);
}

template <class T, class Z>
void one_token(const TokenLosses& args, int64_t token, const Z& capped) {
  using A = Acc<T>;
  const int64_t n = args.vocabulary, target = args.targets[token];
  T* row = static_cast<T*>(args.logits) + token * n;
  A& loss = static_cast<A*>(args.losses)[token];
  if (target == args.ignored) {
    loss = 0;
    if (args.gradient)
      for (int64_t i = 0; i < n; ++i) row[i] = T{};
    return;
  }

  Vec<A> largest = splat(A(-INFINITY));
  LongSum<A> plain_sum;
  along(row, n, [&](Vec<A> x, int64_t count, int64_t) {
    const Mask<A> live = first_lanes<A>(count);
    const Vec<A> z = capped.template value<A>(x);
    largest = max(select(live, z, largest), largest);
    if (args.label_smoothing != 0) plain_sum.add(select(live, z, Vec<A>{}));
  });
  A top = largest[0];
  for (int i = 1; i < lanes<A>(); ++i)
    if (!(largest[i] <= top)) top = top != top ? top : largest[i];

  LongSum<A> exp_sum;
  along(row, n, [&](Vec<A> x, int64_t count, int64_t) {
    const Vec<A> e = exp(capped.template value<A>(x) - top);
    exp_sum.add(select(first_lanes<A>(count), e, Vec<A>{}));
  });
  const double total = exp_sum.finish();
  const double logsumexp = double(top) + log(total);
  const double right = 1 - args.label_smoothing;
  const double even = args.label_smoothing / double(n);
  const A target_logit = capped.template value<A>(splat(A(load_one(row + target))))[0];
  double value = logsumexp - right * double(target_logit) + args.z_loss * logsumexp * logsumexp;
  if (args.label_smoothing != 0) value -= even * plain_sum.finish();
  loss = A(value);
  if (!args.gradient) return;

  const double scale = args.scales ? double(static_cast<const A*>(args.scales)[token]) : args.scale;
  const double of_all = scale * (1 + 2 * args.z_loss * logsumexp);
  const A share = A(of_all / total), less = A(scale * even);
  const Vec<A> at_target = splat(target_logit);
  const A target_gradient =
      ((A(of_all / total) * exp(at_target - top) - A(scale * (even + right))) *
       capped.template slope<A>(at_target))[0];
  along(row, n, [&](Vec<A> x, int64_t count, int64_t at) {
    const Vec<A> z = capped.template value<A>(x);
    const Vec<A> g = (share * exp(z - top) - less) * capped.template slope<A>(z);
    if (count == lanes<A>())
      store(row + at, g);
    else
      store_part(row + at, g, count);
  });
  store_one(row + target, target_gradient);
}

template <class T>
Status all_tokens(const TokenLosses& args) {
  parallel(args.tokens, args.threads, [&](int64_t token, int) {
    if (args.softcap == 0)
      one_token<T>(args, token, Plain{});
    else
      one_token<T>(args, token, Capped{args.softcap});
  });
  return Status::ok;
}

}  // namespace

Status token_losses(const TokenLosses& args) {
  return for_dtype(args.dtype, [&](auto t) { return all_tokens<decltype(t)>(args); });
}

}  // namespace GK_LEVEL
}  // namespace genkern
