// The softmax of a block of queries in the derivatives on AMX, from what the forward kept. For
// kernel files.
#pragma once

#include "softmax.h"

namespace genkern {
namespace GK_LEVEL {

constexpr int64_t amx_part =
    32;  // keys whose logits are made at once: they stay in the first cache
constexpr int64_t amx_pack = 32;  // queries that are rounded at once

// 16 queries: P of a logit.
struct RowsOfSoftmax {
  Vec<float> shift, log_sum;
  float exponent;

  // 2^(…), with the sum in the exponent too; exactly 1 for a lone key.
  Vec<float> weight(Vec<float> logit) const { return power((logit - shift) * exponent - log_sum); }
};

class AmxSoftmax {
 public:
  AmxSoftmax(Carver& carve, const AttentionProblem& problem)
      : exponent(exponent_factor<float>(problem) * 1.44269504f),
        shift(carve.array<float>(AmxEngine::width)),
        log_sum(carve.array<float>(AmxEngine::width)) {}

  void take(const SoftmaxRows& rows, const Block& block) {
    const int64_t queries = round_up(block.queries, amx_pack);
    take_numbers(shift, rows.shift, block, queries / lanes<float>());
    take_numbers(log_sum, rows.sum, block, queries / lanes<float>());
    // P of a query that sees nothing, or is none, is 2^-inf.
    for (int64_t i = 0; i < queries; ++i)
      log_sum[i] = log_sum[i] == 0 ? -minus_infinity<float> : __builtin_log2f(log_sum[i]);
  }
  // exp(S - top) instead of P.
  void take_shift(const float* top, int64_t queries) {
    for (int64_t i = 0; i < queries; ++i) {
      shift[i] = top[i] == minus_infinity<float> ? 0 : top[i];
      log_sum[i] = 0;
    }
  }
  RowsOfSoftmax row(int64_t lane) const {
    return {load(shift + lane), load(log_sum + lane), exponent};
  }

 private:
  float exponent;
  float *shift, *log_sum;
};

// A part's raw products become logits as `weight` takes them; keys up to `amx_part` that there are
// not are hidden, and are zero in `other`.
inline void finish_part(const AttentionProblem& problem, Rows<float> logits, Rows<float> other,
                        const Block& block, int64_t j0, int64_t keys, int64_t vectors) {
  finish_logits<BFloat16>(problem, logits, nullptr, block, j0, keys, vectors);
  for (int64_t j = keys; j < amx_part; ++j)
    for (int64_t i = 0; i < AmxEngine::width; ++i) {
      logits.row(j)[i] = minus_infinity<float>;
      other.row(j)[i] = 0;
    }
}

}  // namespace GK_LEVEL
}  // namespace genkern
