// Adversarial losses on the CPU: value, gradient and statistics in one pass over the logits.
//
// Layout: every side of every term is a flat array, cut into chunks (common/chunks.h); a task is
// one chunk of one side (of both where they go in pairs). Plan of a
// task: read lanes of logits once, z = s·x + c, from φ(z) the sums, from φ'(z) the gradient
// factor·φ' + offset (in fp32, rounded once, written where wanted); leave the chunk's sums in a
// table. Afterwards one thread adds the table up in order, in double. Against the other side's mean
// it is three passes: the means, the sums of φ and φ', the gradients, whose offset is what flows
// through the mean. Floor: one read of the logits and one write of the gradients; 64 logits are all
// call cost.
#include "adversarial.h"

#include "../common/chunks.h"
#include "../common/parallel.h"
#include "../common/scratch.h"

namespace genkern {
namespace GK_LEVEL {
namespace {

struct Softplus {
  template <class A>
  static Vec<A> value(Vec<A> z) {
    return max(z, splat(A(0))) + log1p01(exp(select(z < A(0), z, -z)));
  }
  template <class A>
  static Vec<A> slope(Vec<A> z) {
    const Vec<A> e = exp(select(z < A(0), z, -z));
    return select(z < A(0), e, splat(A(1))) / (e + A(1));
  }
};
struct Relu {
  template <class A>
  static Vec<A> value(Vec<A> z) {
    return max(z, splat(A(0)));
  }
  template <class A>
  static Vec<A> slope(Vec<A> z) {
    return select(z <= A(0), splat(A(0)), splat(A(1)));
  }
};
struct Square {
  template <class A>
  static Vec<A> value(Vec<A> z) {
    return z * z;
  }
  template <class A>
  static Vec<A> slope(Vec<A> z) {
    return z + z;
  }
};
struct Identity {
  template <class A>
  static Vec<A> value(Vec<A> z) {
    return z;
  }
  template <class A>
  static Vec<A> slope(Vec<A>) {
    return splat(A(1));
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

// Sums over lanes in the arithmetic type; every `run` vectors they move on to doubles, since a long
// fp32 sum would lose digits that PyTorch's cascade keeps.
template <class A, Pass pass>
struct LaneSums {
  static constexpr int run = 32;
  Vec<A> value{}, logits{}, right{}, slope{};
  Sums total{};
  int added = 0;

  void add(Vec<A> phi, Vec<A> x, Mask<A> is_right, Vec<A> derivative, Mask<A> live) {
    const Vec<A> zero{};
    value += select(live, phi, zero);
    logits += select(live, x, zero);
    right += select(live & is_right, splat(A(1)), zero);
    if (pass == Pass::values_and_slopes) slope += select(live, derivative, zero);
    if (++added == run) flush();
  }
  void flush() {
    for (int i = 0; i < lanes<A>(); ++i) {
      total.value += double(value[i]);
      total.logits += double(logits[i]);
      total.right += double(right[i]);
      if (pass == Pass::values_and_slopes) total.slope += double(slope[i]);
    }
    value = logits = right = slope = Vec<A>{};
    added = 0;
  }
  Sums finish() {
    flush();
    return total;
  }
};

// z = sign·x + shift, and the gradient factor·φ'(z) + offset.
struct Line {
  double sign, shift, factor, offset;
};

// One chunk of one side. `toward`: the sign of a logit on its own side of zero.
template <class T, class F, Pass pass>
Sums one_side(const T* x, int64_t n, const Line& line, double toward, T* grad) {
  using A = Acc<T>;
  const A sign = A(line.sign), shift = A(line.shift), own = A(toward);
  const A factor = A(line.factor), offset = A(line.offset);
  LaneSums<A, pass> sums;
  for (int64_t i = 0; i < n; i += lanes<A>()) {
    const Vec<A> logits = load_some(x + i, n - i), z = logits * sign + shift;
    const Vec<A> slope = pass == Pass::values ? Vec<A>{} : F::template slope<A>(z);
    if (sums_values(pass))
      sums.add(F::template value<A>(z), logits, logits * own > A(0), slope, first_lanes<A>(n - i));
    if (writes_gradients(pass)) store_some(grad + i, slope * factor + offset, n - i);
  }
  return sums.finish();
}

// One chunk of pairs; the real side's sums carry φ.
template <class T, class F, Pass pass>
void one_pair(const T* r, const T* f, int64_t n, const Line& real, const Line& fake, double toward,
              T* grad_real, T* grad_fake, Sums* real_sums, Sums* fake_sums) {
  using A = Acc<T>;
  const A real_sign = A(real.sign), fake_sign = A(fake.sign), shift = A(real.shift);
  const A real_factor = A(real.factor), fake_factor = A(fake.factor), own = A(toward);
  LaneSums<A, pass> of_real, of_fake;
  for (int64_t i = 0; i < n; i += lanes<A>()) {
    const Vec<A> a = load_some(r + i, n - i), b = load_some(f + i, n - i);
    const Vec<A> z = a * real_sign + b * fake_sign + shift;
    const Vec<A> slope = pass == Pass::values ? Vec<A>{} : F::template slope<A>(z);
    if (sums_values(pass)) {
      const Mask<A> live = first_lanes<A>(n - i);
      of_real.add(F::template value<A>(z), a, a * own > A(0), slope, live);
      of_fake.add(Vec<A>{}, b, b * own < A(0), slope, live);
    }
    if (writes_gradients(pass) && grad_real) store_some(grad_real + i, slope * real_factor, n - i);
    if (writes_gradients(pass) && grad_fake) store_some(grad_fake + i, slope * fake_factor, n - i);
  }
  *real_sums = of_real.finish();
  *fake_sums = of_fake.finish();
}

// One term's totals, and what they make of its lines.
struct Both {
  Sums real, fake;
};
struct Lines {
  Line real, fake;
};

double over(double x, int64_t count) { return count > 0 ? x / double(count) : 0; }

// A mean over no logits is NaN, as in PyTorch; a side that takes no part adds nothing.
double mean(double total, int64_t count) { return count < 0 ? 0 : total / double(count); }

// Σ φ(z) + λ·x; without a slope infinite logits have no part in it.
double value_of(const Sums& sums, const LogitLine& line) {
  return line.slope == 0 ? sums.value : sums.value + line.slope * sums.logits;
}

// Passes over a list of terms. Scratch: the totals of each term and the table of the chunks' sums.
template <class T>
class Sweep {
 public:
  Sweep(const AdversarialForm& of, const LogitTerm* its_terms, int64_t how_many, double times,
        int most_threads)
      : form(of), terms(its_terms), count(how_many), factor(times) {
    int64_t logits = 0;
    for (int64_t t = 0; t < count; ++t) {
      if (terms[t].real_count > 0) logits += terms[t].real_count;
      if (terms[t].fake_count > 0) logits += terms[t].fake_count;
      tasks += tasks_of(terms[t]);
    }
    threads = logits < parallel_from ? 1 : most_threads;
    const int64_t bytes = (count + tasks) * int64_t(sizeof(Both));
    totals_ = static_cast<Both*>(bytes <= int64_t(sizeof nearby) ? nearby
                                                                 : far = allocate_scratch(bytes));
    if (totals_)
      for (int64_t t = 0; t < count; ++t) totals_[t] = Both{};
  }
  ~Sweep() { free(far); }
  Sweep(const Sweep&) = delete;
  Sweep& operator=(const Sweep&) = delete;

  bool has_memory() const { return totals_; }
  const Both& totals(int64_t term) const { return totals_[term]; }

  void forward(bool want_gradients) {
    if (form.pairing != Pairing::average)
      return want_gradients ? run<Pass::values_and_gradients>(1) : run<Pass::values>(1);
    means();
    if (!want_gradients) return run<Pass::values>(1);
    run<Pass::values_and_slopes>(1);
    run<Pass::gradients>(1);
  }

  void backward(double upstream) {
    if (form.pairing == Pairing::average) {
      means();
      run<Pass::values_and_slopes>(1);
    }
    run<Pass::gradients>(upstream);
  }

 private:
  const AdversarialForm& form;
  const LogitTerm* terms;
  int64_t count, tasks = 0;
  double factor;
  int threads;
  Both nearby[8];
  void* far = nullptr;
  Both* totals_;

  int64_t tasks_of(const LogitTerm& term) const {
    const int64_t real = chunks_of(term.real_count);
    return form.pairing == Pairing::paired ? real : real + chunks_of(term.fake_count);
  }

  void means() { run<Identity, Pass::values>(1); }

  template <Pass pass>
  void run(double upstream) {
    switch (form.phi) {
      case Phi::softplus:
        return run<Softplus, pass>(upstream);
      case Phi::relu:
        return run<Relu, pass>(upstream);
      case Phi::square:
        return run<Square, pass>(upstream);
      case Phi::identity:
        return run<Identity, pass>(upstream);
    }
  }

  // The sums so far are those of the pass before, which is what `average` needs.
  Lines lines_of(int64_t t, double upstream) const {
    const LogitTerm& term = terms[t];
    const LogitLine &r = form.real, &f = form.fake;
    const double real_scale = upstream * factor * over(r.weight, term.real_count);
    const double fake_scale =
        upstream * factor *
        over(form.pairing == Pairing::paired ? r.weight : f.weight, term.fake_count);
    Lines lines{{r.sign, r.shift, real_scale * r.sign, real_scale * r.slope},
                {f.sign, f.shift, fake_scale * f.sign, fake_scale * f.slope}};
    if (form.pairing == Pairing::average) {
      const Both& sums = totals_[t];
      lines.real.shift -= r.sign * mean(sums.fake.logits, term.fake_count);
      lines.fake.shift -= f.sign * mean(sums.real.logits, term.real_count);
      lines.real.offset = -over(lines.fake.factor * sums.fake.slope, term.real_count);
      lines.fake.offset = -over(lines.real.factor * sums.real.slope, term.fake_count);
    }
    return lines;
  }

  template <class F, Pass pass>
  void run(double upstream) {
    Both* table = totals_ + count;
    parallel(tasks, threads, [&](int64_t task, int) {
      int64_t term = 0, first = 0;
      while (task - first >= tasks_of(terms[term])) first += tasks_of(terms[term++]);
      one_task<F, pass>(terms[term], lines_of(term, upstream), task - first, table + task);
    });
    if (!sums_values(pass)) return;
    const Both* next = table;
    for (int64_t t = 0; t < count; ++t) {
      totals_[t] = Both{};
      for (const Both* end = next + tasks_of(terms[t]); next < end; ++next) {
        add(&totals_[t].real, next->real);
        add(&totals_[t].fake, next->fake);
      }
    }
  }

  static void add(Sums* total, const Sums& part) {
    total->value += part.value;
    total->logits += part.logits;
    total->right += part.right;
    total->slope += part.slope;
  }

  template <class F, Pass pass>
  void one_task(const LogitTerm& term, const Lines& lines, int64_t task, Both* sums) const {
    const T* r = static_cast<const T*>(term.real);
    const T* f = static_cast<const T*>(term.fake);
    T* gr = static_cast<T*>(term.grad_real);
    T* gf = static_cast<T*>(term.grad_fake);
    *sums = Both{};
    const int64_t real_chunks = chunks_of(term.real_count);
    const bool is_real = task < real_chunks;
    const int64_t side = is_real ? term.real_count : term.fake_count, chunk = chunk_size(side);
    const int64_t at = (is_real ? task : task - real_chunks) * chunk;
    const int64_t n = side - at < chunk ? side - at : chunk;
    if (form.pairing == Pairing::paired)
      one_pair<T, F, pass>(r + at, f + at, n, lines.real, lines.fake, form.orientation,
                           gr ? gr + at : nullptr, gf ? gf + at : nullptr, &sums->real,
                           &sums->fake);
    else if (is_real)
      sums->real = one_chunk<F, pass>(r + at, n, lines.real, form.orientation, gr, at);
    else
      sums->fake = one_chunk<F, pass>(f + at, n, lines.fake, -form.orientation, gf, at);
  }

  // A side without a gradient: the pass without its writing.
  template <class F, Pass pass>
  static Sums one_chunk(const T* x, int64_t n, const Line& line, double toward, T* grad,
                        int64_t at) {
    if (grad || !writes_gradients(pass))
      return one_side<T, F, pass>(x, n, line, toward, grad ? grad + at : nullptr);
    return sums_values(pass) ? one_side<T, F, Pass::values>(x, n, line, toward, nullptr) : Sums{};
  }
};

template <class T>
Status forward(const AdversarialForward& args) {
  using A = Acc<T>;
  const AdversarialForm& form = args.form;
  Sweep<T> sweep(form, args.terms, args.count, args.factor, args.threads);
  if (!sweep.has_memory()) return Status::out_of_memory;
  bool want_gradients = false;
  for (int64_t t = 0; t < args.count; ++t)
    if (args.terms[t].grad_real || args.terms[t].grad_fake) want_gradients = true;
  sweep.forward(want_gradients);

  A* stats = static_cast<A*>(args.stats);
  double loss = 0;
  for (int64_t t = 0; t < args.count; ++t) {
    const auto& [real, fake] = sweep.totals(t);
    const int64_t r = args.terms[t].real_count, f = args.terms[t].fake_count;
    loss += form.real.weight * mean(value_of(real, form.real), r);
    if (form.pairing != Pairing::paired)
      loss += form.fake.weight * mean(value_of(fake, form.fake), f);
    if (!stats) continue;
    stats[t] = A(mean(real.logits, r));
    stats[args.count + t] = A(mean(fake.logits, f));
    stats[2 * args.count + t] = A(mean(real.right, r));
    stats[3 * args.count + t] = A(mean(fake.right, f));
  }
  *static_cast<A*>(args.loss) = A(args.factor * loss);
  return Status::ok;
}

template <class T>
Status backward(const AdversarialBackward& args) {
  Sweep<T> sweep(args.form, args.terms, args.count, args.factor, args.threads);
  if (!sweep.has_memory()) return Status::out_of_memory;
  sweep.backward(double(*static_cast<const Acc<T>*>(args.grad_loss)));
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
