// What a forward pass writes at the end of a block of queries. For kernel files.
#pragma once

#include "softmax.h"

namespace genkern {
namespace GK_LEVEL {

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

// The output as it is before it is rounded; `inverse`: 1 / sum.
template <class A>
inline void keep_out(const KeptOut& to, const Block& block, Rows<const A> out_sum, const A* inverse,
                     int64_t features) {
  A* numbers = static_cast<A*>(to.data) + block.sequence.batch * to.batch + block.head * to.head +
               block.sequence.first_query + block.i0;
  for (int64_t e = 0; e < features; ++e, numbers += to.feature)
    for (int64_t i = 0; i < block.queries; i += lanes<A>())
      store_some(numbers + i, load(out_sum.row(e) + i) * load(inverse + i),
                 smaller(lanes<A>(), block.queries - i));
}

// out = out_sumᵀ / sum, lse = top + log sum, and what the derivatives need of both. `top`: what was
// taken off the logits, -inf where a query saw nothing; `sum` is used up.
template <class T>
inline void write_forward(const AttentionForward& args, const Block& block, Rows<Acc<T>> out_sum,
                          const Acc<T>* top, Acc<T>* sum) {
  using A = Acc<T>;
  const AttentionProblem& problem = args.problem;
  const Rows<T> out = query_rows<T>(args.out, block.sequence, block.head);
  const A factor = exponent_factor<A>(problem);
  if (args.rows.shift.data) {
    A* kept_shift = query_numbers<A>(args.rows.shift, block.sequence, block.head) + block.i0;
    A* kept_sum = query_numbers<A>(args.rows.sum, block.sequence, block.head) + block.i0;
    for (int64_t i = 0; i < block.queries; ++i) {
      kept_shift[i] = top[i] == minus_infinity<A> ? A(0) : top[i];
      kept_sum[i] = sum[i];
    }
  }
  if (args.lse.data) {
    A* lse = query_numbers<A>(args.lse, block.sequence, block.head) + block.i0;
    for (int64_t i = 0; i < block.queries; ++i)
      lse[i] = sum[i] == 0 ? minus_infinity<A> : factor * top[i] + logarithm(sum[i]);
  }
  for (int64_t i = 0; i < block.queries; ++i) sum[i] = sum[i] == 0 ? A(0) : A(1) / sum[i];
  if (args.rows.out.data) keep_out(args.rows.out, block, constant(out_sum), sum, problem.dv);
  unpack_transposed<T, A>(out.from(block.i0), constant(out_sum), block.queries, problem.dv, sum);
}

}  // namespace GK_LEVEL
}  // namespace genkern
