// Perplexity and its companions: the scoring against plain sums in double precision, the statistics
// against llama.cpp's formulas written out, and both on a tiny model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "logit_scores.h"
#include "text_eval.h"

#include "model/cpu_runner.h"
#include "model/model.h"

namespace nibble {
namespace {

std::vector<float> random_logits(int64_t rows, int64_t vocab, float scale, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> logits(static_cast<size_t>(rows * vocab));
  for (float& value : logits) value = normal(random);
  return logits;
}

/// ln p of every token of a row, the plain way.
std::vector<double> log_probabilities(const float* logits, int64_t vocab) {
  const double max = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - max);
  std::vector<double> result;
  for (int64_t i = 0; i < vocab; ++i) result.push_back(logits[i] - max - std::log(sum));
  return result;
}

/// Scores of `subject` against `base` (or alone) for tokens 0, 7, 14, ... of the vocabulary.
std::vector<TokenScore> scores_of(const std::vector<float>& subject, const std::vector<float>* base,
                                  int64_t rows, int64_t vocab, int threads = 1) {
  std::vector<RowNorm> norms(static_cast<size_t>(rows)), base_norms(norms);
  std::vector<int32_t> tokens;
  for (int64_t row = 0; row < rows; ++row) tokens.push_back(static_cast<int32_t>(row * 7 % vocab));
  std::vector<TokenScore> scores(static_cast<size_t>(rows));
  EXPECT_TRUE(normalize_rows(subject.data(), rows, vocab, threads, norms.data()).ok());
  LogitRows reference;
  if (base != nullptr) {
    EXPECT_TRUE(normalize_rows(base->data(), rows, vocab, threads, base_norms.data()).ok());
    reference = {base->data(), base_norms.data()};
  }
  score_rows({subject.data(), norms.data()}, base != nullptr ? &reference : nullptr, tokens.data(),
             rows, vocab, threads, scores.data());
  return scores;
}

TEST(LogitScores, MatchPlainSums) {
  // Around the block of 1024 that the loops work on; far apart and close to each other.
  for (const int64_t vocab : {1, 2, 80, 1023, 1024, 1025, 5000}) {
    for (const float scale : {0.01f, 2.0f, 40.0f}) {
      const int64_t rows = 9;
      const std::vector<float> base = random_logits(rows, vocab, scale, 1);
      std::vector<float> subject = random_logits(rows, vocab, 0.1f * scale, 2);
      for (size_t i = 0; i < subject.size(); ++i) subject[i] += base[i];
      const std::vector<TokenScore> scores = scores_of(subject, &base, rows, vocab);
      for (int64_t row = 0; row < rows; ++row) {
        const auto p = log_probabilities(subject.data() + row * vocab, vocab);
        const auto q = log_probabilities(base.data() + row * vocab, vocab);
        const auto token = static_cast<size_t>(row * 7 % vocab);
        double kld = 0;
        for (size_t i = 0; i < p.size(); ++i) kld += std::exp(q[i]) * (q[i] - p[i]);
        const TokenScore& score = scores[static_cast<size_t>(row)];
        const double tolerance = 2e-6 * (1 + scale);
        EXPECT_NEAR(score.nll, -p[token], tolerance);
        EXPECT_NEAR(score.reference_nll, -q[token], tolerance);
        EXPECT_NEAR(score.kld, kld, tolerance);
        EXPECT_NEAR(score.dp, std::exp(p[token]) - std::exp(q[token]), tolerance);
        EXPECT_EQ(score.same_top, std::max_element(p.begin(), p.end()) - p.begin() ==
                                      std::max_element(q.begin(), q.end()) - q.begin());
      }
    }
  }
}

TEST(LogitScores, LargeLogitsDoNotOverflow) {
  std::vector<float> logits = random_logits(1, 300, 1, 3);
  const double before = scores_of(logits, nullptr, 1, 300)[0].nll;
  for (const float offset : {60000.0f, -60000.0f}) {
    std::vector<float> moved = logits;
    for (float& value : moved) value += offset;
    EXPECT_NEAR(scores_of(moved, nullptr, 1, 300)[0].nll, before, 0.01);  // of the sums' rounding
  }
  // A token that is all but impossible has a large, finite score.
  logits.assign(300, -1e30f);
  logits[5] = 1e30f;
  EXPECT_NEAR(scores_of(logits, nullptr, 1, 300)[0].nll, 2e30, 1e24);
}

TEST(LogitScores, EqualDistributionsDifferByNothing) {
  const std::vector<float> logits = random_logits(5, 3000, 4, 4);
  for (const TokenScore& score : scores_of(logits, &logits, 5, 3000)) {
    EXPECT_EQ(score.kld, 0);
    EXPECT_EQ(score.dp, 0);
    EXPECT_EQ(score.nll, score.reference_nll);
    EXPECT_TRUE(score.same_top);
  }
}

TEST(LogitScores, EveryThreadCountGivesTheSameBits) {
  const std::vector<float> base = random_logits(37, 2000, 3, 5),
                           subject = random_logits(37, 2000, 3, 6);
  const std::vector<TokenScore> one = scores_of(subject, &base, 37, 2000, 1);
  for (const int threads : {2, 3, 8}) {
    const std::vector<TokenScore> more = scores_of(subject, &base, 37, 2000, threads);
    for (size_t i = 0; i < one.size(); ++i) {
      EXPECT_EQ(one[i].nll, more[i].nll);
      EXPECT_EQ(one[i].kld, more[i].kld);
      EXPECT_EQ(one[i].dp, more[i].dp);
    }
  }
}

TEST(LogitScores, NanAndInfinityAreNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    std::vector<float> logits = random_logits(6, 100, 1, 7);
    logits[3 * 100 + 50] = bad;
    logits[5 * 100] = bad;
    std::vector<RowNorm> norms(6);
    const Status status = normalize_rows(logits.data(), 6, 100, 2, norms.data());
    EXPECT_EQ(status.code(), Code::non_finite);
    EXPECT_NE(status.message().find("row 3"), std::string::npos) << status.message();
  }
}

// ---- statistics --------------------------------------------------------------------------------

std::vector<TokenScore> random_scores(size_t count) {
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal(0, 1);
  std::vector<TokenScore> scores(count);
  for (TokenScore& score : scores) {
    score.reference_nll = std::abs(3 * normal(random));
    score.nll = std::abs(score.reference_nll + 0.2 * normal(random));
    score.kld = 0.01 * std::exp(normal(random));
    score.dp = std::exp(-score.nll) - std::exp(-score.reference_nll);
    score.same_top = normal(random) < 1.5;
  }
  return scores;
}

TEST(EvalStatistics, AreThoseOfLlamaCpp) {
  const std::vector<TokenScore> scores = random_scores(1001);
  const double n = 1001;
  // Sums, and from sums mean and error, as its perplexity.cpp forms them.
  double a = 0, aa = 0, b = 0, bb = 0, ab = 0, k = 0, kk = 0, d = 0, d2 = 0, d4 = 0, same = 0;
  for (const TokenScore& s : scores) {
    a += s.nll, aa += s.nll * s.nll;
    b += s.reference_nll, bb += s.reference_nll * s.reference_nll, ab += s.nll * s.reference_nll;
    k += s.kld, kk += s.kld * s.kld;
    d += s.dp, d2 += s.dp * s.dp, d4 += s.dp * s.dp * s.dp * s.dp;
    same += s.same_top ? 1 : 0;
  }
  const auto error = [&](double sum, double squares) {
    return std::sqrt((squares / n - sum / n * (sum / n)) / (n - 1));
  };
  const double covariance = (ab / n - a / n * (b / n)) / (n - 1);
  const double ppl = std::exp(a / n), base = std::exp(b / n);
  const double ratio_err =
      std::sqrt(std::pow(error(a, aa), 2) + std::pow(error(b, bb), 2) - 2 * covariance);

  const EvalResult r = summarize(scores, true);
  EXPECT_EQ(r.tokens, 1001);
  EXPECT_TRUE(r.paired);
  EXPECT_NEAR(r.ppl, ppl, 1e-9);
  EXPECT_NEAR(r.ppl_err, ppl * error(a, aa), 1e-9);
  EXPECT_NEAR(r.reference_ppl, base, 1e-9);
  EXPECT_NEAR(r.reference_ppl_err, base * error(b, bb), 1e-9);
  EXPECT_NEAR(r.correlation, 100 * covariance / (error(a, aa) * error(b, bb)), 1e-6);
  EXPECT_NEAR(r.log_ratio, a / n - b / n, 1e-9);
  EXPECT_NEAR(r.log_ratio_err, ratio_err, 1e-9);
  EXPECT_NEAR(r.ppl_ratio, ppl / base, 1e-9);
  EXPECT_NEAR(r.ppl_ratio_err, ppl / base * ratio_err, 1e-9);
  EXPECT_NEAR(r.ppl_diff, ppl - base, 1e-9);
  EXPECT_NEAR(r.ppl_diff_err,
              std::sqrt(std::pow(ppl * error(a, aa), 2) + std::pow(base * error(b, bb), 2) -
                        2 * ppl * base * covariance),
              1e-6);
  EXPECT_NEAR(r.kld_mean, k / n, 1e-12);
  EXPECT_NEAR(r.kld_err, error(k, kk), 1e-9);
  EXPECT_NEAR(r.mean_dp, 100 * d / n, 1e-9);
  EXPECT_NEAR(r.mean_dp_err, 100 * error(d, d2), 1e-9);
  EXPECT_NEAR(r.rms_dp, 100 * std::sqrt(d2 / n), 1e-9);
  EXPECT_NEAR(r.rms_dp_err, 100 * 0.5 / std::sqrt(d2 / n) * error(d2, d4), 1e-9);
  EXPECT_NEAR(r.same_top, 100 * same / n, 1e-9);
  EXPECT_NEAR(r.same_top_err, 100 * std::sqrt(same / n * (1 - same / n) / (n - 1)), 1e-9);
}

TEST(EvalStatistics, PercentilesAreInterpolated) {
  std::vector<TokenScore> scores(101);
  for (size_t i = 0; i < scores.size(); ++i) {
    scores[i].kld = static_cast<double>((i * 37) % 101);  // 0..100 in another order
    scores[i].dp = scores[i].kld / 100 - 0.5;
  }
  const EvalResult r = summarize(scores, true);
  EXPECT_EQ(r.kld_min, 0);
  EXPECT_EQ(r.kld_max, 100);
  EXPECT_NEAR(r.kld_median, 50, 1e-12);
  EXPECT_NEAR(r.kld_p99, 99, 1e-12);
  EXPECT_NEAR(r.kld_p999, 99.9, 1e-12);
  EXPECT_NEAR(r.kld_p95, 95, 1e-12);
  EXPECT_NEAR(r.kld_p90, 90, 1e-12);
  EXPECT_NEAR(r.kld_p10, 10, 1e-12);
  EXPECT_NEAR(r.kld_p05, 5, 1e-12);
  EXPECT_NEAR(r.kld_p01, 1, 1e-12);
  EXPECT_NEAR(r.kld_p001, 0.1, 1e-12);
  EXPECT_NEAR(r.dp_median, 0, 1e-12);
  EXPECT_NEAR(r.dp_min, -50, 1e-12);
  EXPECT_NEAR(r.dp_p25, -25, 1e-12);
  EXPECT_NEAR(r.dp_p75, 25, 1e-12);
  EXPECT_NEAR(r.dp_max, 50, 1e-12);
}

TEST(EvalStatistics, FewTokensGiveNoNonsense) {
  const EvalResult none = summarize({}, true);
  EXPECT_EQ(none.tokens, 0);
  EXPECT_FALSE(none.paired);
  const EvalResult one = summarize({{.nll = 1, .reference_nll = 1}}, true);
  EXPECT_NEAR(one.ppl, std::exp(1), 1e-12);
  EXPECT_EQ(one.ppl_err, 0);
  EXPECT_EQ(one.ppl_ratio, 1);
  EXPECT_EQ(one.rms_dp_err, 0);
  EXPECT_TRUE(std::isnan(one.correlation));  // of no spread
}

TEST(EvalStatistics, PoolWeighsEveryTokenTheSame) {
  const std::vector<TokenScore> all = random_scores(300);
  const EvalResult first = summarize({all.begin(), all.begin() + 100}, true);
  const EvalResult second = summarize({all.begin() + 100, all.end()}, true);
  const EvalResult* parts[] = {&first, &second};
  const EvalResult pooled = pool(parts), whole = summarize(all, true);
  EXPECT_EQ(pooled.tokens, 300);
  EXPECT_EQ(pooled.ppl, whole.ppl);
  EXPECT_EQ(pooled.kld_mean, whole.kld_mean);
  EXPECT_EQ(pooled.same_top, whole.same_top);
}

// ---- chunks ------------------------------------------------------------------------------------

std::vector<int32_t> counting(int32_t count) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i) tokens.push_back(i % 70 + 5);
  return tokens;
}

TEST(EvalText, CutsWholeChunksAndPutsBosFirst) {
  const Result<EvalText> text = make_eval_text(counting(35), 1, "a", {.context = 10});
  ASSERT_TRUE(text.ok());
  ASSERT_EQ(text->chunks.size(), 3u);
  EXPECT_EQ(text->chunks[0], (std::vector<int32_t>{1, 6, 7, 8, 9, 10, 11, 12, 13, 14}));
  EXPECT_EQ(text->chunks[2], (std::vector<int32_t>{1, 26, 27, 28, 29, 30, 31, 32, 33, 34}));
  const Result<EvalText> bare = make_eval_text(counting(35), -1, "a", {.context = 10});
  EXPECT_EQ(bare->chunks[1].front(), 15);
  EXPECT_EQ(make_eval_text(counting(35), -1, "a", {.context = 10, .max_chunks = 2})->chunks.size(),
            2u);
}

TEST(EvalText, RefusesLessThanOneChunk) {
  const Result<EvalText> text = make_eval_text(counting(9), -1, "short.txt", {.context = 10});
  EXPECT_EQ(text.status().code(), Code::invalid_argument);
  EXPECT_NE(text.status().message().find("short.txt"), std::string::npos);
}

// ---- on a model --------------------------------------------------------------------------------

/// A tiny checkpoint of golden/models with its model.
class EvaluateModel : public testing::Test {
 protected:
  void load(const std::string& name) {
    Result<Checkpoint> opened = Checkpoint::open(NIBBLE_GOLDEN_MODELS "/" + name);
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    checkpoint_ = std::make_unique<Checkpoint>(std::move(*opened));
    Result<Model> model = Model::load(*checkpoint_, {.threads = 2, .context = 64});
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = std::make_unique<Model>(std::move(*model));
    runner_ = std::make_unique<CpuRunner>(*model_);
  }

  EvalSubject subject(Mode mode) {
    return {runner_.get(), uniform_plan(model_->config().layers, mode), mode_name(mode)};
  }

  /// -ln p of tokens[i + 1] for every i, straight from the model.
  std::vector<double> direct(const EvalSubject& from, const std::vector<int32_t>& tokens) {
    Model& model = *model_;
    EXPECT_TRUE(model.set_plan(from.plan).ok());
    KvCache cache = model.make_cache();
    const BatchItem item{&cache, tokens};
    const ModelConfig& config = model.config();
    std::vector<float> hidden(tokens.size() * static_cast<size_t>(config.hidden));
    std::vector<float> logits(tokens.size() * static_cast<size_t>(config.vocab));
    EXPECT_TRUE(model.forward({&item, 1}, hidden.data()).ok());
    EXPECT_TRUE(
        model.logits(hidden.data(), static_cast<int64_t>(tokens.size()), logits.data()).ok());
    std::vector<double> nll;
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      nll.push_back(-log_probabilities(logits.data() + row * config.vocab,
                                       config.vocab)[static_cast<size_t>(tokens[i + 1])]);
    }
    return nll;
  }

  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<CpuRunner> runner_;
};

TEST_F(EvaluateModel, ScoresTheSecondHalfOfEveryChunk) {
  load("llama_awq");
  const EvalOptions options{.context = 32};
  const EvalText text = *make_eval_text(counting(70), 1, "t", options);
  const EvalSubject subjects[] = {subject(Mode::w4a8), subject(Mode::w4a16)};
  const EvalSubject reference = subject(Mode::w4a16);
  int64_t calls = 0;
  const auto results = evaluate(text, &reference, subjects, options, {},
                                [&](int64_t chunk) { EXPECT_EQ(chunk, calls++); });
  ASSERT_TRUE(results.ok()) << results.status().message();
  EXPECT_EQ(calls, 2);
  ASSERT_EQ(results->size(), 2u);
  for (size_t s = 0; s < 2; ++s) {
    const EvalResult& result = (*results)[s];
    EXPECT_EQ(result.tokens, 2 * 15);  // 16..30 of 32 predict a token of their chunk
    size_t at = 0;
    for (const auto& chunk : text.chunks) {
      const std::vector<double> nll = direct(subjects[s], chunk);
      for (size_t i = 16; i < nll.size(); ++i) EXPECT_NEAR(result.scores[at++].nll, nll[i], 1e-5);
    }
  }
  const EvalResult& same = (*results)[1];
  EXPECT_EQ(same.kld_max, 0);
  EXPECT_EQ(same.ppl_ratio, 1);
  EXPECT_EQ(same.same_top, 100);
  EXPECT_GT((*results)[0].kld_mean, 0);
  EXPECT_EQ((*results)[0].reference_ppl, same.ppl);
}

TEST_F(EvaluateModel, ScoresEveryTokenOnRequest) {
  load("qwen3");  // 16-bit weights: the plan does not matter
  const EvalOptions options{.context = 20, .score_all = true};
  const EvalText text = *make_eval_text(counting(20), -1, "t", options);
  const EvalSubject subjects[] = {subject(Mode::w4a16)};
  const auto results = evaluate(text, nullptr, subjects, options);
  ASSERT_TRUE(results.ok()) << results.status().message();
  EXPECT_EQ((*results)[0].tokens, 19);
  EXPECT_FALSE((*results)[0].paired);
  const std::vector<double> nll = direct(subjects[0], text.chunks[0]);
  double sum = 0;
  for (const double value : nll) sum += value;
  EXPECT_NEAR((*results)[0].ppl, std::exp(sum / 19), 1e-3);
}

TEST_F(EvaluateModel, StopsWhenAsked) {
  load("llama_awq");
  const EvalOptions options{.context = 32};
  const EvalText text = *make_eval_text(counting(70), 1, "t", options);
  const EvalSubject subjects[] = {subject(Mode::w4a8)};
  int asked = 0;
  const auto results = evaluate(text, nullptr, subjects, options, [&] { return ++asked > 2; });
  EXPECT_EQ(results.status().code(), Code::interrupted);
}

TEST_F(EvaluateModel, RefusesTokensThatTheModelLacks) {
  load("llama_awq");
  const EvalOptions options{.context = 8};
  std::vector<int32_t> tokens = counting(8);
  tokens[3] = 80;  // of 80
  const EvalText text = *make_eval_text(tokens, -1, "t", options);
  const EvalSubject subjects[] = {subject(Mode::w4a8)};
  const auto results = evaluate(text, nullptr, subjects, options);
  EXPECT_EQ(results.status().code(), Code::corrupt_file);
  EXPECT_NE(results.status().message().find("80"), std::string::npos);
}

}  // namespace
}  // namespace nibble
