// See logit_scores.h. The loops over the vocabulary work on blocks that stay in the first cache:
// exponentials in single precision (a loop that every compiler vectorizes), sums in double.
#include "logit_scores.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/thread_pool.h"

namespace nibble {
namespace {

constexpr int64_t kBlock = 1024;

/// e^x for x <= 0, within 2e-7 relative; below -87 that of -87 (1e-38). No call and no branch, as
/// std::exp would be. The polynomial is Cephes' expf.
inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  // -min(|x|, 87) through integers: a choice between floats would keep the loop from vectorizing
  constexpr uint32_t kMost = std::bit_cast<uint32_t>(87.0f);
  const uint32_t magnitude = std::bit_cast<uint32_t>(x) & 0x7fffffffu;
  x = -std::bit_cast<float>(magnitude < kMost ? magnitude : kMost);
  const float biased = x * 1.44269504f + kRound;
  const float n = biased - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(biased) + 127u) << 23;  // low bits are n
  return p * std::bit_cast<float>(exponent);
}

/// to[i] = e^(from[i] - max)
void exponentials(const float* from, int64_t count, float max, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = exp_nonpositive(from[i] - max);
}

/// Sum of value(i) for i in [0, count): in vector lanes, the same order for the same count.
template <class Value>
double sum_of(int64_t count, const Value& value) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += value(i);
  return sum;
}

bool normalize_row(const float* logits, int64_t vocab, RowNorm& norm) {
  float max = logits[0], not_finite = 0;
#pragma omp simd reduction(max : max) reduction(+ : not_finite)
  for (int64_t i = 0; i < vocab; ++i) {
    max = logits[i] > max ? logits[i] : max;
    not_finite += logits[i] * 0.0f;  // stays 0, or becomes NaN for good
  }
  if (not_finite != 0) return false;
  float block[kBlock];
  double sum = 0;
  for (int64_t at = 0; at < vocab; at += kBlock) {
    const int64_t count = std::min(kBlock, vocab - at);
    exponentials(logits + at, count, max, block);
    sum += sum_of(count, [&](int64_t i) { return static_cast<double>(block[i]); });
  }
  norm.max = max;
  norm.top = static_cast<int32_t>(std::find(logits, logits + vocab, max) - logits);
  norm.log_sum = static_cast<double>(max) + std::log(sum);
  return true;
}

/// The difference of two logarithms is taken per token before it is weighted: two nearly equal
/// distributions then give nearly 0, and equal ones exactly 0.
double row_kld(const float* logits, const RowNorm& norm, const float* reference,
               const RowNorm& reference_norm, int64_t vocab) {
  const double shift = reference_norm.log_sum - norm.log_sum;
  float block[kBlock];
  double weighted = 0;
  for (int64_t at = 0; at < vocab; at += kBlock) {
    const int64_t count = std::min(kBlock, vocab - at);
    exponentials(reference + at, count, reference_norm.max, block);
    weighted += sum_of(count, [&](int64_t i) {
      const double difference =
          static_cast<double>(reference[at + i]) - static_cast<double>(logits[at + i]);
      return static_cast<double>(block[i]) * (difference - shift);
    });
  }
  return weighted * std::exp(static_cast<double>(reference_norm.max) - reference_norm.log_sum);
}

struct Estimate {
  double mean = 0, error = 0;
};

/// Mean and its standard error. `value` maps a score to a number.
template <class Value>
Estimate estimate(const std::vector<TokenScore>& scores, const Value& value) {
  if (scores.empty()) return {};
  const auto count = static_cast<double>(scores.size());
  double sum = 0, squares = 0;
  for (const TokenScore& score : scores) sum += value(score);
  const double mean = sum / count;
  for (const TokenScore& score : scores) {
    squares += (value(score) - mean) * (value(score) - mean);
  }
  return {mean, count > 1 ? std::sqrt(squares / count / (count - 1)) : 0};
}

/// Of sorted values, linear between neighbours.
double percentile(const std::vector<double>& sorted, double percent) {
  const double at = percent / 100 * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  const double share = at - static_cast<double>(below);
  return (1 - share) * sorted[below] + share * sorted[above];
}

template <class Value>
std::vector<double> sorted_values(const std::vector<TokenScore>& scores, const Value& value) {
  std::vector<double> values;
  for (const TokenScore& score : scores) values.push_back(value(score));
  std::sort(values.begin(), values.end());
  return values;
}

void summarize_ratio(const Estimate& nll, EvalResult& r) {
  const Estimate base = estimate(r.scores, [](const TokenScore& s) { return s.reference_nll; });
  // Of the differences, which is sqrt(var + base var - 2 cov) without the cancellation.
  const Estimate ratio =
      estimate(r.scores, [](const TokenScore& s) { return s.nll - s.reference_nll; });
  r.reference_ppl = std::exp(base.mean);
  r.reference_ppl_err = r.reference_ppl * base.error;
  r.log_ratio = ratio.mean;
  r.log_ratio_err = ratio.error;
  r.ppl_ratio = std::exp(ratio.mean);
  r.ppl_ratio_err = r.ppl_ratio * ratio.error;

  const double covariance =
      (nll.error * nll.error + base.error * base.error - ratio.error * ratio.error) / 2;
  r.correlation = nll.error > 0 && base.error > 0 ? 100 * covariance / (nll.error * base.error)
                                                  : std::numeric_limits<double>::quiet_NaN();
  r.ppl_diff = r.ppl - r.reference_ppl;
  r.ppl_diff_err =
      std::sqrt(std::max(0.0, r.ppl_err * r.ppl_err + r.reference_ppl_err * r.reference_ppl_err -
                                  2 * r.ppl * r.reference_ppl * covariance));
}

void summarize_kld(EvalResult& r) {
  const Estimate kld = estimate(r.scores, [](const TokenScore& s) { return s.kld; });
  r.kld_mean = kld.mean;
  r.kld_err = kld.error;
  const std::vector<double> sorted =
      sorted_values(r.scores, [](const TokenScore& s) { return s.kld; });
  r.kld_max = sorted.back();
  r.kld_p999 = percentile(sorted, 99.9);
  r.kld_p99 = percentile(sorted, 99);
  r.kld_p95 = percentile(sorted, 95);
  r.kld_p90 = percentile(sorted, 90);
  r.kld_median = percentile(sorted, 50);
  r.kld_p10 = percentile(sorted, 10);
  r.kld_p05 = percentile(sorted, 5);
  r.kld_p01 = percentile(sorted, 1);
  r.kld_p001 = percentile(sorted, 0.1);
  r.kld_min = sorted.front();
}

void summarize_probabilities(EvalResult& r) {
  const Estimate dp = estimate(r.scores, [](const TokenScore& s) { return 100 * s.dp; });
  r.mean_dp = dp.mean;
  r.mean_dp_err = dp.error;
  const Estimate square = estimate(r.scores, [](const TokenScore& s) { return 1e4 * s.dp * s.dp; });
  r.rms_dp = std::sqrt(square.mean);
  r.rms_dp_err = r.rms_dp > 0 ? 0.5 / r.rms_dp * square.error : 0;
  const std::vector<double> sorted =
      sorted_values(r.scores, [](const TokenScore& s) { return 100 * s.dp; });
  r.dp_max = sorted.back();
  r.dp_p999 = percentile(sorted, 99.9);
  r.dp_p99 = percentile(sorted, 99);
  r.dp_p95 = percentile(sorted, 95);
  r.dp_p90 = percentile(sorted, 90);
  r.dp_p75 = percentile(sorted, 75);
  r.dp_median = percentile(sorted, 50);
  r.dp_p25 = percentile(sorted, 25);
  r.dp_p10 = percentile(sorted, 10);
  r.dp_p05 = percentile(sorted, 5);
  r.dp_p01 = percentile(sorted, 1);
  r.dp_p001 = percentile(sorted, 0.1);
  r.dp_min = sorted.front();

  const Estimate same =
      estimate(r.scores, [](const TokenScore& s) { return s.same_top ? 100.0 : 0.0; });
  r.same_top = same.mean;
  r.same_top_err = same.error;
}

}  // namespace

Status normalize_rows(const float* logits, int64_t rows, int64_t vocab, int threads,
                      RowNorm* norms) {
  parallel_for(threads, rows, [&](int64_t row) {
    if (!normalize_row(logits + row * vocab, vocab, norms[row])) norms[row].top = -1;
  });
  for (int64_t row = 0; row < rows; ++row) {
    if (norms[row].top >= 0) continue;
    return Status(Code::non_finite, fmt::format("NaN or infinity in row {} of the logits", row));
  }
  return {};
}

void score_rows(const LogitRows& subject, const LogitRows* reference, const int32_t* tokens,
                int64_t rows, int64_t vocab, int threads, TokenScore* scores) {
  parallel_for(threads, rows, [&](int64_t row) {
    const float* logits = subject.logits + row * vocab;
    const RowNorm& norm = subject.norms[row];
    TokenScore score;
    score.nll = norm.log_sum - static_cast<double>(logits[tokens[row]]);
    if (reference != nullptr) {
      const float* base = reference->logits + row * vocab;
      const RowNorm& base_norm = reference->norms[row];
      score.reference_nll = base_norm.log_sum - static_cast<double>(base[tokens[row]]);
      score.kld = row_kld(logits, norm, base, base_norm, vocab);
      score.dp = std::exp(-score.nll) - std::exp(-score.reference_nll);
      score.same_top = norm.top == base_norm.top;
    }
    scores[row] = score;
  });
}

EvalResult summarize(std::vector<TokenScore> scores, bool paired) {
  EvalResult result;
  result.scores = std::move(scores);
  result.tokens = static_cast<int64_t>(result.scores.size());
  if (result.scores.empty()) return result;
  const Estimate nll = estimate(result.scores, [](const TokenScore& s) { return s.nll; });
  result.ppl = std::exp(nll.mean);
  result.ppl_err = result.ppl * nll.error;
  result.paired = paired;
  if (!paired) return result;
  summarize_ratio(nll, result);
  summarize_kld(result);
  summarize_probabilities(result);
  return result;
}

EvalResult pool(std::span<const EvalResult* const> results) {
  std::vector<TokenScore> scores;
  for (const EvalResult* result : results) {
    scores.insert(scores.end(), result->scores.begin(), result->scores.end());
  }
  return summarize(std::move(scores), !results.empty() && results.front()->paired);
}

}  // namespace nibble
