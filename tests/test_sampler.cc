// Drawing tokens: what top-k and top-p leave, how often each token comes, and that a draw depends
// on nothing but its arguments.
#include "model/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace nibble {
namespace {

std::vector<float> random_logits(size_t count, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(count);
  std::ranges::generate(logits, [&] { return normal(random); });
  return logits;
}

/// Ids, the likeliest first, lower ones first among equals.
std::vector<size_t> ranked(const std::vector<float>& logits) {
  std::vector<size_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), size_t{0});
  std::ranges::stable_sort(ids, [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  return ids;
}

/// Probabilities of all tokens, worked out in double precision by sorting.
std::vector<double> probabilities(const std::vector<float>& logits, const SamplerOptions& options) {
  const std::vector<size_t> ids = ranked(logits);
  size_t count = ids.size();
  if (options.top_k > 0) count = std::min(count, static_cast<size_t>(options.top_k));
  std::vector<double> p(logits.size());
  double total = 0;
  for (size_t i = 0; i < count; ++i) {
    p[ids[i]] = std::exp((double{logits[ids[i]]} - logits[ids[0]]) / options.temperature);
    total += p[ids[i]];
  }
  double kept = 0;
  size_t last = 0;
  while (last < count && (last == 0 || kept < options.top_p * total)) kept += p[ids[last++]];
  for (size_t i = last; i < count; ++i) p[ids[i]] = 0;
  for (double& v : p) v /= kept;
  return p;
}

TEST(Sampler, TokensComeAsOftenAsTheyAreLikely) {
  constexpr int kDraws = 20000;
  for (const SamplerOptions options :
       {SamplerOptions{1.0f, 0, 1.0f, 1}, SamplerOptions{0.5f, 5, 1.0f, 2},
        SamplerOptions{1.5f, 0, 0.7f, 3}, SamplerOptions{2.0f, 12, 0.9f, 4}}) {
    SCOPED_TRACE(options.seed);
    std::vector<float> logits = random_logits(20, 2.0f, 7);
    logits[3] = logits[11] = logits[12] = *std::ranges::max_element(logits) - 0.5f;  // ties
    const std::vector<double> p = probabilities(logits, options);
    std::vector<int> counts(logits.size());
    for (int i = 0; i < kDraws; ++i) {
      ++counts[static_cast<size_t>(sample_token(logits, options, i))];
    }
    double chi_square = 0;
    int cells = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      if (p[i] == 0) {
        EXPECT_EQ(counts[i], 0) << i;
        continue;
      }
      const double expected = p[i] * kDraws;
      chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
      ++cells;
    }
    // Five standard deviations of a chi-square distribution and its skewness.
    EXPECT_LT(chi_square, cells + 5 * std::sqrt(2.0 * cells) + 10);
  }
}

TEST(Sampler, TopKLeavesTheKLikeliest) {
  std::vector<float> logits = random_logits(1000, 0.2f, 11);
  for (size_t i = 0; i < logits.size(); i += 7) logits[i] = 0.25f;  // many ties
  logits[500] = -0.0f;
  logits[501] = 0.0f;
  const std::vector<size_t> ids = ranked(logits);
  for (const int64_t k : {1, 2, 60, 999, 1000, 5000}) {
    SCOPED_TRACE(k);
    const auto kept = std::min(static_cast<size_t>(k), ids.size());
    const std::set<size_t> expected(ids.begin(), ids.begin() + static_cast<int64_t>(kept));
    std::set<size_t> found;
    for (int i = 0; i < 30000; ++i) {
      // So hot that all are as good as equally likely.
      found.insert(static_cast<size_t>(sample_token(logits, {1000.0f, k, 1.0f, 5}, i)));
    }
    EXPECT_EQ(found, expected);
  }
}

TEST(Sampler, TopPLeavesTheFewestThatReachIt) {
  // Equal logits: n of 100 reach a share of n / 100, lower ids first.
  const std::vector<float> logits(100, 1.5f);
  for (const auto& [top_p, kept] : {std::pair{0.0f, 1}, {0.005f, 1}, {0.255f, 26}, {0.995f, 100}}) {
    SCOPED_TRACE(top_p);
    int32_t largest = 0;
    for (int i = 0; i < 5000; ++i) {
      largest = std::max(largest, sample_token(logits, {1.0f, 0, top_p, 6}, i));
    }
    EXPECT_EQ(largest, kept - 1);
  }
}

TEST(Sampler, ExtremesAreOrdinary) {
  const std::vector<float> one = {-3.0f};
  EXPECT_EQ(sample_token(one, {1.0f, 1, 0.5f, 0}, 0), 0);
  const float largest = std::numeric_limits<float>::max();
  const std::vector<float> wide = {-largest, largest, 0.0f, -1.0f};
  for (const float temperature : {1e-40f, 1e-3f, 1.0f, 1e30f}) {
    for (int i = 0; i < 100; ++i) {
      EXPECT_EQ(sample_token(wide, {temperature, 0, 0.99f, 1}, i), 1) << temperature;
    }
  }
  // Greedy: the first of several.
  const std::vector<float> ties = {0.0f, 2.0f, 2.0f};
  EXPECT_EQ(sample_token(ties, SamplerOptions{}, 9), 1);
  // Nearly no temperature is greedy but for ties.
  const std::vector<float> logits = random_logits(500, 1.0f, 3);
  const auto best = static_cast<int32_t>(std::ranges::max_element(logits) - logits.begin());
  for (int i = 0; i < 100; ++i) EXPECT_EQ(sample_token(logits, {1e-6f, 0, 1.0f, 2}, i), best);
}

TEST(Sampler, ADrawDependsOnSeedAndPosition) {
  const std::vector<float> logits = random_logits(5000, 1.0f, 12);
  const auto draws = [&](uint64_t seed, int64_t first) {
    std::vector<int32_t> tokens;
    for (int64_t i = first; i < first + 20; ++i) {
      tokens.push_back(sample_token(logits, {1.0f, 0, 1.0f, seed}, i));
    }
    return tokens;
  };
  EXPECT_EQ(draws(1, 0), draws(1, 0));
  EXPECT_NE(draws(1, 0), draws(2, 0));
  EXPECT_NE(draws(1, 0), draws(1, 1));
  const std::vector<int32_t> some = draws(1, 0);
  EXPECT_GT(std::set(some.begin(), some.end()).size(), 10u);
}

}  // namespace
}  // namespace nibble
