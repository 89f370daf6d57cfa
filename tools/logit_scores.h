// Scoring next-token predictions: pure functions over logits, then statistics over tokens under the
// names and definitions of llama.cpp's perplexity tool, so that figures can be compared.
// Not here: where logits come from (text_eval.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"

namespace nibble {

/// What makes one row of logits a distribution: p[i] = exp(logits[i] - log_sum).
struct RowNorm {
  float max = 0;       // the largest logit
  int32_t top = 0;     // its index, the first one of several
  double log_sum = 0;  // ln of the sum of exp(logits)
};

/// Rows of logits with their norms.
struct LogitRows {
  const float* logits = nullptr;   // (rows, vocab) row-major
  const RowNorm* norms = nullptr;  // (rows)
};

/// One scored token. The last four are there only against a reference.
struct TokenScore {
  double nll = 0;            // -ln p(token)
  double reference_nll = 0;  // the same of the reference
  double kld = 0;            // KL divergence of the row: sum of p_ref * ln(p_ref / p)
  double dp = 0;             // p(token) - p_ref(token)
  bool same_top = false;     // both have the same most probable token
};

/// The norm of every row. Sums are in double over single-precision exponentials (2e-7 relative);
/// a row's result does not depend on the threads. non_finite names the first row with NaN or
/// infinity.
Status normalize_rows(const float* logits, int64_t rows, int64_t vocab, int threads,
                      RowNorm* norms);

/// scores (rows) of `tokens` (rows), which are in [0, vocab). reference may be null.
void score_rows(const LogitRows& subject, const LogitRows* reference, const int32_t* tokens,
                int64_t rows, int64_t vocab, int threads, TokenScore* scores);

/// Perplexity of one plan; with a reference also the paired measures. Errors are standard errors of
/// the mean over scored tokens, propagated as llama.cpp does; percentiles are interpolated as
/// there.
struct EvalResult {
  int64_t tokens = 0;  // scored
  double ppl = 0, ppl_err = 0;

  bool paired = false;  // the rest is filled in
  double reference_ppl = 0, reference_ppl_err = 0;
  double correlation = 0;                   // percent, of the two ln PPL
  double log_ratio = 0, log_ratio_err = 0;  // mean ln(PPL / reference PPL)
  double ppl_ratio = 0, ppl_ratio_err = 0;  // exp of mean log ratio, paired
  double ppl_diff = 0, ppl_diff_err = 0;
  double kld_mean = 0, kld_err = 0, kld_median = 0, kld_p90 = 0, kld_p95 = 0, kld_p99 = 0,
         kld_p999 = 0, kld_max = 0, kld_min = 0;
  double kld_p10 = 0, kld_p05 = 0, kld_p01 = 0, kld_p001 = 0;
  double same_top = 0, same_top_err = 0;                            // percent
  double mean_dp = 0, mean_dp_err = 0, rms_dp = 0, rms_dp_err = 0;  // percent
  double dp_max = 0, dp_p999 = 0, dp_p99 = 0, dp_p95 = 0, dp_p90 = 0, dp_p75 = 0, dp_median = 0,
         dp_p25 = 0, dp_p10 = 0, dp_p05 = 0, dp_p01 = 0, dp_p001 = 0, dp_min = 0;  // percent

  std::vector<TokenScore> scores;  // in the order of the text; pool() needs them
};

/// The statistics of these tokens.
EvalResult summarize(std::vector<TokenScore> scores, bool paired);

/// The statistics of the tokens of all results together. All paired or none.
EvalResult pool(std::span<const EvalResult* const> results);

}  // namespace nibble
