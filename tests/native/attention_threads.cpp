// Attention's launchers from several threads at once, without torch and OpenMP: test_native.py
// builds this with the sanitizers and runs it.
//
//   attention_threads LEVEL          (portable, avx2, …: one that it was built with)
//
// Every case runs all four passes (driver.h).
#include <vector>

#include "attention/attention.h"
#include "driver.h"

namespace {

using namespace genkern;
using namespace genkern::driver;

constexpr int64_t unbounded = int64_t(1) << 62;

// What a bias has of each dimension: all, or one that is broadcast.
struct BiasOf {
  bool present = false;
  BiasType type = BiasType::storage;
  bool batch = true, head = true, row = true, key = true;
};

struct Case {
  const char* name;
  DType dtype;
  int64_t B, H, Hk, N, M, d, dv;
  double scale = 0.3, softcap = 0, dropout = 0;
  int64_t left = unbounded, right = unbounded;
  bool lower_right = false, heads_inside = false, key_bias = false, all_tangents = true;
  BiasOf bias = {};
  std::vector<int64_t> key_lengths = {}, q_starts = {}, k_starts = {};
};

std::vector<Case> cases() {
  const auto f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const BiasOf full{true}, per_head{true, BiasType::arithmetic, false, true, true, true};
  const BiasOf shared{true, BiasType::storage, false, false, true, true};
  const BiasOf per_query{true, BiasType::storage, true, true, true, false};
  const BiasOf per_key{true, BiasType::arithmetic, true, true, false, true};
  const BiasOf mask{true, BiasType::boolean, true, false, true, true};
  std::vector<Case> list;
  const auto add = [&](const char* name, DType dtype, std::vector<int64_t> s) -> Case& {
    list.push_back({name, dtype, s[0], s[1], s[2], s[3], s[4], s[5], s[6]});
    return list.back();
  };
  // Rows read where they lie; chunks with sums of their own; ragged everywhere.
  add("plain", f32, {1, 1, 1, 230, 100, 16, 24});
  add("ragged", f64, {2, 3, 1, 29, 53, 7, 5}).heads_inside = true;
  for (DType dtype : {f32, bf16, f16, f64}) {
    Case& c = add("everything", dtype, {2, 4, 2, 70, 101, 17, 9});
    c.softcap = 1.5, c.dropout = 0.3, c.key_bias = true, c.bias = full;
    c.left = 40, c.right = 3, c.lower_right = true, c.key_lengths = {101, 47};
    c.heads_inside = true;
  }
  for (DType dtype : {f32, bf16}) {
    Case& c = add("varlen", dtype, {3, 2, 1, 60, 70, 8, 16});
    c.q_starts = {0, 60, 60, 85}, c.k_starts = {0, 10, 40, 110};
    c.right = 0, c.lower_right = true, c.dropout = 0.2, c.key_bias = true, c.heads_inside = true;
  }
  add("bias of a head", f16, {2, 2, 2, 50, 60, 16, 16}).bias = per_head;
  add("bias for all", f32, {2, 2, 2, 50, 60, 16, 16}).bias = shared;
  add("bias of a query", bf16, {2, 2, 1, 50, 60, 32, 32}).bias = per_query;
  add("bias of a key", f64, {2, 2, 2, 50, 60, 9, 8}).bias = per_key;
  add("boolean mask", f32, {2, 2, 2, 50, 60, 8, 8}).bias = mask;
  Case& some = add("some tangents", f32, {1, 2, 2, 50, 60, 8, 8});
  some.all_tangents = false, some.scale = -0.5;
  add("nothing to see", f32, {1, 2, 1, 20, 0, 4, 4});
  return list;
}

// A case's inputs and the launches on them.
class Work {
 public:
  Work(const Case& c, uint64_t seed) : c(c), wide(arithmetic(c.dtype)) {
    Random random(seed);
    queries = c.q_starts.empty() ? c.B * c.N : c.q_starts.back();
    keys = c.k_starts.empty() ? c.B * c.M : c.k_starts.back();
    const auto numbers = [&](int64_t count) { return random.numbers(c.dtype, count); };
    q = numbers(queries * c.H * c.d), t_q = numbers(queries * c.H * c.d);
    k = numbers(keys * c.Hk * c.d), t_k = numbers(keys * c.Hk * c.d);
    v = numbers(keys * c.Hk * c.dv), t_v = numbers(keys * c.Hk * c.dv);
    grad_out = numbers(queries * c.H * c.dv);
    grad_lse = random.numbers(wide, queries * c.H);
    key_bias = random.numbers(wide, keys * c.Hk), t_key_bias = random.numbers(wide, keys * c.Hk);
    if (c.bias.present) {
      const int64_t count = bias_count();
      if (c.bias.type == BiasType::boolean) {
        bias = random.booleans(count);
      } else {
        const DType type = c.bias.type == BiasType::storage ? c.dtype : wide;
        bias = random.numbers(type, count), t_bias = random.numbers(type, count);
      }
    }
  }

  // All results of all passes; empty where a launcher fails.
  std::vector<Result> run() const {
    std::vector<Result> results;
    const auto fresh = [&](DType dtype, int64_t count) -> unsigned char* {
      const int64_t size = size_of(dtype);
      results.push_back({size, Bytes(size_t(count * size), 0xFF)});
      return results.back().bytes.data();
    };
    const auto out_like = [&] { return of_queries(fresh(c.dtype, queries * c.H * c.dv), c.dv); };
    const auto q_like = [&] { return of_queries(fresh(c.dtype, queries * c.H * c.d), c.d); };
    const auto k_like = [&] { return of_keys(fresh(c.dtype, keys * c.Hk * c.d), c.d); };
    const auto v_like = [&] { return of_keys(fresh(c.dtype, keys * c.Hk * c.dv), c.dv); };
    const auto row_numbers = [&] { return per_query(fresh(wide, queries * c.H)); };
    const auto gradients = [&] {
      InputGradients grads = {q_like(), k_like(), v_like(), {}, {}};
      if (has_bias_gradient()) {
        grads.bias = bias_at(fresh(wide, bias_count()));
        grads.bias.type = BiasType::arithmetic;
      }
      if (c.key_bias) grads.key_bias = per_key(fresh(wide, keys * c.Hk));
      return grads;
    };

    const AttentionProblem p = problem();
    const AttentionForward forward{p, out_like(), {row_numbers(), row_numbers()}, row_numbers()};
    if (GK_PICK(attention_forward(forward)) != Status::ok) return {};
    const Heads cotangent = of_queries(at(grad_out), c.dv);
    const RowNumbers lse_cotangent = per_query(at(grad_lse));
    const AttentionBackward backward{p, forward.rows, cotangent, lse_cotangent, gradients()};
    if (GK_PICK(attention_backward(backward)) != Status::ok) return {};
    const AttentionJvp jvp{p, forward.rows, tangents(), out_like(), row_numbers(), {}, {}};
    if (GK_PICK(attention_jvp(jvp)) != Status::ok) return {};
    const AttentionJvp with_out{p,          {},           tangents(), out_like(), row_numbers(),
                                out_like(), row_numbers()};
    if (GK_PICK(attention_jvp(with_out)) != Status::ok) return {};
    const AttentionSecond second{p,          forward.rows, cotangent,  lse_cotangent,
                                 tangents(), gradients(),  out_like(), row_numbers()};
    if (GK_PICK(attention_second(second)) != Status::ok) return {};
    return results;
  }

  const char* name() const { return c.name; }

  const Case& c;

 private:
  // The launchers take tensors that they only read as plain pointers too.
  static unsigned char* at(const Bytes& bytes) { return const_cast<unsigned char*>(bytes.data()); }

  bool has_bias_gradient() const { return c.bias.present && c.bias.type != BiasType::boolean; }
  int64_t bias_count() const {
    return (c.bias.batch ? c.B : 1) * (c.bias.head ? c.H : 1) * (c.bias.row ? c.N : 1) *
           (c.bias.key ? c.M : 1);
  }
  Bias bias_at(void* data) const {
    const int64_t keys_of = c.bias.key ? c.M : 1, rows_of = c.bias.row ? c.N : 1;
    const int64_t heads_of = c.bias.head ? c.H : 1;
    return {data,
            c.bias.type,
            c.bias.batch ? heads_of * rows_of * keys_of : 0,
            c.bias.head ? rows_of * keys_of : 0,
            c.bias.row ? keys_of : 0,
            c.bias.key ? 1 : 0};
  }
  Heads matrix(void* data, bool packed, int64_t heads, int64_t all_rows, int64_t columns) const {
    const int64_t rows = packed ? all_rows : all_rows / c.B;
    const int64_t batch = packed ? 0 : heads * rows * columns;
    if (c.heads_inside) return {data, batch, columns, heads * columns};
    return {data, batch, rows * columns, columns};
  }
  Heads of_queries(void* data, int64_t columns) const {
    return matrix(data, !c.q_starts.empty(), c.H, queries, columns);
  }
  Heads of_keys(void* data, int64_t columns) const {
    return matrix(data, !c.k_starts.empty(), c.Hk, keys, columns);
  }
  RowNumbers per_query(void* data) const {
    const int64_t rows = c.q_starts.empty() ? c.N : queries;
    return {data, c.q_starts.empty() ? c.H * rows : 0, rows};
  }
  RowNumbers per_key(void* data) const {
    const int64_t rows = c.k_starts.empty() ? c.M : keys;
    return {data, c.k_starts.empty() ? c.Hk * rows : 0, rows};
  }
  AttentionProblem problem() const {
    const auto list = [](const std::vector<int64_t>& x) { return x.empty() ? nullptr : x.data(); };
    return {c.dtype,
            c.B,
            c.H,
            c.Hk,
            c.N,
            c.M,
            c.d,
            c.dv,
            c.scale,
            c.softcap,
            c.dropout,
            c.left,
            c.right,
            c.lower_right,
            0x0123456789ABCDEFu,
            1,
            list(c.q_starts),
            list(c.k_starts),
            list(c.key_lengths),
            c.bias.present ? bias_at(at(bias)) : Bias{},
            c.key_bias ? per_key(at(key_bias)) : RowNumbers{},
            of_queries(at(q), c.d),
            of_keys(at(k), c.d),
            of_keys(at(v), c.dv)};
  }
  Tangents tangents() const {
    Tangents t{};
    t.k = of_keys(at(t_k), c.d);
    if (!c.all_tangents) return t;
    t.q = of_queries(at(t_q), c.d);
    t.v = of_keys(at(t_v), c.dv);
    if (has_bias_gradient()) t.bias = bias_at(at(t_bias));
    if (c.key_bias) t.key_bias = per_key(at(t_key_bias));
    return t;
  }

  DType wide;
  int64_t queries, keys;  // rows in all, of the batch or of all sequences
  Bytes q, k, v, t_q, t_k, t_v, grad_out, grad_lse, bias, t_bias, key_bias, t_key_bias;
};

}  // namespace

int main(int count, char** arguments) {
  return driver::main_of("attention_threads", count, arguments, [] {
    static const std::vector<Case> list = cases();
    std::vector<Work> work;
    for (size_t i = 0; i < list.size(); ++i) work.emplace_back(list[i], i);
    return work;
  });
}
