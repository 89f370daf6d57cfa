// AWQ's parts against plain second implementations, and the promises of its searches: folding
// leaves the model's function as it is, no search is worse than what it started from, and nothing
// depends on the number of threads. The command as a whole is tested in test_cli_awq.cc.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "awq/block_quantizer.h"
#include "awq/calibration_text.h"
#include "awq/feedback.h"
#include "awq/fold.h"
#include "awq/scale_search.h"
#include "awq/work_directory.h"
#include "checkpoint_builder.h"
#include "format/round_to_nearest.h"
#include "model/model.h"

namespace nibble::awq {
namespace {

using test::TempDir;
using Floats = std::vector<float>;

Floats normal(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> distribution;
  Floats values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

/// Inputs (rows, k) that are correlated across channels; every 16th channel is 20 times larger.
Floats inputs(int64_t rows, int64_t k, uint64_t seed) {
  const Floats noise = normal(static_cast<size_t>(rows * k), seed);
  Floats x(noise.size());
  for (int64_t r = 0; r < rows; ++r) {
    float previous = 0;
    for (int64_t i = 0; i < k; ++i) {
      previous = 0.8f * previous + noise[static_cast<size_t>(r * k + i)];
      x[static_cast<size_t>(r * k + i)] = previous * (i % 16 == 5 ? 20.0f : 1.0f);
    }
  }
  return x;
}

InputStats stats_of(const Floats& x, int64_t k, int threads = 2, int64_t rows_a_call = 1 << 20) {
  auto accumulator = MomentAccumulator::create(k);
  EXPECT_TRUE(accumulator.ok());
  const auto rows = static_cast<int64_t>(x.size()) / k;
  for (int64_t row = 0; row < rows; row += rows_a_call) {
    const int64_t count = std::min(rows_a_call, rows - row);
    EXPECT_TRUE(accumulator->add(x.data() + row * k, count, threads).ok());
  }
  auto stats = accumulator->finish(threads);
  EXPECT_TRUE(stats.ok()) << stats.status().message();
  return std::move(*stats);
}

Floats dense(const PanelMatrix& matrix) {
  Floats values;
  for (int64_t i = 0; i < matrix.size(); ++i) {
    for (int64_t j = 0; j < matrix.size(); ++j) values.push_back(matrix.at(i, j));
  }
  return values;
}

double plain_form(const Floats& c, int64_t k, const float* d) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) sum += double{d[i]} * c[static_cast<size_t>(i * k + j)] * d[j];
  }
  return sum;
}

TEST(AwqMoments, AreMeansOfProducts) {
  for (const int64_t k : {8, 64, 96, 200}) {
    const int64_t rows = 300;
    const Floats x = inputs(rows, k, 3);
    const InputStats stats = stats_of(x, k);
    for (int64_t i = 0; i < k; ++i) {
      double sum_abs = 0;
      for (int64_t r = 0; r < rows; ++r) sum_abs += std::abs(x[static_cast<size_t>(r * k + i)]);
      EXPECT_NEAR(stats.mean_abs[static_cast<size_t>(i)], sum_abs / rows, 1e-5 * sum_abs / rows);
      for (int64_t j = 0; j < k; j += 7) {
        double sum = 0, magnitude = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const double product =
              double{x[static_cast<size_t>(r * k + i)]} * x[static_cast<size_t>(r * k + j)];
          sum += product;
          magnitude += std::abs(product);
        }
        EXPECT_NEAR(stats.moment.at(i, j), sum / rows, 1e-5 * magnitude / rows);
        EXPECT_EQ(stats.moment.at(i, j), stats.moment.at(j, i));
      }
    }
  }
}

TEST(AwqMoments, SameBitsHoweverRowsAreCutAndThreadsRun) {
  const Floats x = inputs(700, 96, 4);
  const Floats expected = dense(stats_of(x, 96, 1).moment);
  EXPECT_EQ(dense(stats_of(x, 96, 4).moment), expected);
  EXPECT_EQ(dense(stats_of(x, 96, 3, 33).moment), expected);
}

TEST(AwqMoments, RefuseNonFiniteInputs) {
  Floats x = inputs(10, 64, 5);
  x[64 * 3 + 17] = NAN;
  auto accumulator = MomentAccumulator::create(64);
  ASSERT_TRUE(accumulator.ok());
  ASSERT_TRUE(accumulator->add(x.data(), 10, 1).ok());
  const auto stats = accumulator->finish(1);
  ASSERT_FALSE(stats.ok());
  EXPECT_EQ(stats.status().code(), Code::non_finite);
  EXPECT_NE(stats.status().message().find("channel 17"), std::string::npos);
}

TEST(AwqMoments, QuadraticFormsAreExactErrors) {
  const int64_t k = 96;
  const InputStats stats = stats_of(inputs(300, k, 6), k);
  const Floats d = normal(static_cast<size_t>(5 * k), 7), c = dense(stats.moment);
  double forms[5];
  quadratic_forms(stats.moment, d.data(), 5, k, forms);
  for (int r = 0; r < 5; ++r) {
    const double plain = plain_form(c, k, d.data() + r * k);
    EXPECT_NEAR(forms[r], plain, 1e-4 * std::abs(plain) + 1e-6);
  }
}

TEST(AwqFeedback, IsTheFactorOfTheMoment) {
  for (const int64_t k : {32, 64, 100, 192}) {
    const InputStats stats = stats_of(inputs(4 * k, k, 8), k);
    const auto feedback = feedback_matrix(stats.moment, 0.01, 2);
    ASSERT_TRUE(feedback.ok());
    // C + damping = (F + I) D (F + I)^T in double, from the last column to the first.
    double trace = 0;
    for (int64_t i = 0; i < k; ++i) trace += stats.moment.at(i, i);
    std::vector<double> c(static_cast<size_t>(k * k));
    const auto at = [&](int64_t i, int64_t j) -> double& {
      return c[static_cast<size_t>(i * k + j)];
    };
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) at(i, j) = stats.moment.at(i, j);
      at(i, i) += 0.01 * trace / static_cast<double>(k);
    }
    for (int64_t j = k - 1; j >= 0; --j) {
      std::vector<double> factor(static_cast<size_t>(j));
      for (int64_t i = 0; i < j; ++i) factor[static_cast<size_t>(i)] = at(i, j) / at(j, j);
      for (int64_t i = 0; i < j; ++i) {
        const double f = factor[static_cast<size_t>(i)];
        EXPECT_NEAR(feedback->at(i, j), f, 2e-3 * std::max(1.0, std::abs(f))) << i << "," << j;
        for (int64_t l = 0; l < j; ++l) at(i, l) -= f * factor[static_cast<size_t>(l)] * at(j, j);
      }
    }
  }
}

TEST(AwqFeedback, SurvivesChannelsThatAreNeverUsed) {
  Floats x = inputs(20, 128, 9);  // fewer rows than channels, some channels always zero
  for (size_t i = 0; i < x.size(); ++i) {
    if (i % 128 > 90) x[i] = 0;
  }
  const auto feedback = feedback_matrix(stats_of(x, 128).moment, 0.01, 2);
  ASSERT_TRUE(feedback.ok());
  for (const float value : dense(*feedback)) ASSERT_TRUE(std::isfinite(value));
  const auto nothing = feedback_matrix(stats_of(Floats(64 * 4), 64).moment, 0.01, 1);
  ASSERT_TRUE(nothing.ok());
  for (const float value : dense(*nothing)) ASSERT_TRUE(std::isfinite(value));
}

TEST(AwqSearch, NeverWorseThanRoundingToNearest) {
  for (const int64_t group_size : {32, 64, 128}) {
    for (const bool symmetric : {false, true}) {
      const int64_t k = 128, n = 48;
      const InputStats stats = stats_of(inputs(500, k, 10), k);
      const Floats weight = normal(static_cast<size_t>(n * k), 11);
      const SearchLinear linears[] = {{weight.data(), 32}, {weight.data() + 32 * k, 16}};
      ScaleSearchOptions options;
      options.grid = {group_size, symmetric, Dtype::f16};
      options.sample_rows = 8;  // on so few rows a candidate may look better than it is
      options.threads = 2;
      const ScaleChoice choice = search_scales(linears, stats, options);
      EXPECT_LE(choice.error, choice.plain_error);
      EXPECT_LT(choice.error, 0.8 * choice.plain_error);  // there are large channels to protect
      EXPECT_EQ(choice.error, rounding_error(linears, stats, choice.scales, options.grid, 0, 1, 1));
      options.threads = 1;
      EXPECT_EQ(search_scales(linears, stats, options).scales, choice.scales);
    }
  }
}

TEST(AwqSearch, KeepsClassesEqual) {
  const int64_t k = 64;
  const InputStats stats = stats_of(inputs(200, k, 12), k);
  const Floats weight = normal(static_cast<size_t>(16 * k), 13);
  const SearchLinear linear{weight.data(), 16};
  std::vector<int64_t> classes(64);
  for (size_t i = 0; i < 64; ++i) classes[i] = static_cast<int64_t>(i % 32);
  ScaleSearchOptions options;
  options.grid.group_size = 32;
  options.classes = classes;
  const ScaleChoice choice = search_scales({&linear, 1}, stats, options);
  EXPECT_GE(choice.ratio, 0);
  for (size_t i = 0; i < 32; ++i) EXPECT_EQ(choice.scales[i], choice.scales[i + 32]);
}

TEST(AwqClip, NeverWorseThanTheFullRange) {
  const int64_t k = 64, rows = 40;
  const InputStats stats = stats_of(inputs(300, k, 14), k);
  const Floats c = dense(stats.moment);
  Floats weight = normal(static_cast<size_t>(rows * k), 15);
  for (size_t i = 0; i < weight.size(); i += 61) weight[i] *= 6;  // worth cutting
  for (const bool symmetric : {false, true}) {
    const GridOptions options{k, symmetric, Dtype::f16};
    std::vector<Range> ranges(static_cast<size_t>(rows));
    search_ranges(stats.moment, weight.data(), rows, k, options, ranges.data());
    int better = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = weight.data() + r * k;
      const auto error = [&](Range range) {
        const Grid grid = grid_for(range, options);
        Floats d(static_cast<size_t>(k));
        for (int64_t i = 0; i < k; ++i) d[static_cast<size_t>(i)] = grid.rounded(row[i]) - row[i];
        return plain_form(c, k, d.data());
      };
      const double full = error(range_of(row, k)), found = error(ranges[static_cast<size_t>(r)]);
      EXPECT_LE(found, full * (1 + 1e-4));
      better += found < 0.9 * full;
    }
    EXPECT_GT(better, rows / 4);
  }
}

struct RoundingCase {
  int64_t k, n, group_size;
  bool symmetric;
  Dtype dtype;
};

std::vector<RoundingCase> rounding_cases() {
  return {{128, 40, 32, false, Dtype::f16},   {128, 40, 64, true, Dtype::f16},
          {256, 72, 128, false, Dtype::bf16}, {192, 24, 192, false, Dtype::f16},
          {96, 16, 32, false, Dtype::bf16},   {160, 8, 160, true, Dtype::bf16}};
}

RoundedLinear round_or_fail(const Floats& weight, int64_t n, const InputStats& stats,
                            const RoundingOptions& options) {
  const auto context = RoundingContext::create(stats.moment, options);
  EXPECT_TRUE(context.ok());
  auto rounded = round_linear("w", weight.data(), n, *context);
  EXPECT_TRUE(rounded.ok()) << rounded.status().message();
  return std::move(*rounded);
}

TEST(AwqRounding, NearestWithoutClippingIsRoundToNearest) {
  for (const RoundingCase& c : rounding_cases()) {
    const InputStats stats = stats_of(inputs(300, c.k, 16), c.k);
    const Floats weight = normal(static_cast<size_t>(c.n * c.k), 17);
    const RoundedLinear rounded = round_or_fail(
        weight, c.n, stats, {{c.group_size, c.symmetric, c.dtype}, false, Rounding::nearest, 2});
    const TensorView view{TensorDtype::f32,
                          {c.n, c.k},
                          reinterpret_cast<const std::byte*>(weight.data()),
                          weight.size() * sizeof(float)};
    const auto plain = quantize_round_to_nearest("w", view, {c.group_size, c.symmetric, c.dtype});
    ASSERT_TRUE(plain.ok());
    EXPECT_EQ(rounded.tensors.qweight, plain->qweight);
    EXPECT_EQ(rounded.tensors.qzeros, plain->qzeros);
    EXPECT_EQ(rounded.tensors.scales, plain->scales);
    const SearchLinear linear{weight.data(), c.n};
    const Floats ones(static_cast<size_t>(c.k), 1.0f);
    const GridOptions grid{c.group_size, c.symmetric, c.dtype};
    const double expected = rounding_error({&linear, 1}, stats, ones, grid, 0, 1, 1);
    EXPECT_NEAR(rounded.noise, expected, 1e-6 * expected);
  }
}

TEST(AwqRounding, EveryStepLowersTheError) {
  for (const RoundingCase& c : rounding_cases()) {
    const InputStats stats = stats_of(inputs(1000, c.k, 18), c.k);
    const Floats weight = normal(static_cast<size_t>(c.n * c.k), 19);
    const GridOptions grid{c.group_size, c.symmetric, c.dtype};
    const auto noise = [&](bool clip, Rounding rounding) {
      return round_or_fail(weight, c.n, stats, {grid, clip, rounding, 2}).noise;
    };
    const double plain = noise(false, Rounding::nearest);
    EXPECT_LT(noise(false, Rounding::compensated), 0.8 * plain);
    EXPECT_LT(noise(true, Rounding::compensated), 0.8 * plain);
  }
}

TEST(AwqRounding, NoiseIsThatOfTheStoredCodes) {
  const int64_t k = 128, n = 40;
  const InputStats stats = stats_of(inputs(500, k, 20), k);
  const Floats weight = normal(static_cast<size_t>(n * k), 21), c = dense(stats.moment);
  const RoundedLinear rounded =
      round_or_fail(weight, n, stats, {{64, false, Dtype::f16}, true, Rounding::compensated, 2});
  Floats read(weight.size());
  dequantize(rounded.tensors.view(), 0, n, read.data());
  double noise = 0;
  for (int64_t row = 0; row < n; ++row) {
    Floats d(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) {
      d[static_cast<size_t>(i)] =
          weight[static_cast<size_t>(row * k + i)] - read[static_cast<size_t>(i * n + row)];
    }
    noise += plain_form(c, k, d.data());
  }
  EXPECT_NEAR(rounded.noise, noise, 1e-3 * noise);
}

TEST(AwqRounding, NamesWhatCannotBeRounded) {
  const int64_t k = 64, n = 16;
  const InputStats stats = stats_of(inputs(100, k, 22), k);
  Floats weight = normal(static_cast<size_t>(n * k), 23);
  const RoundingOptions options{{32, false, Dtype::f16}, true, Rounding::compensated, 2};
  const auto context = RoundingContext::create(stats.moment, options);
  ASSERT_TRUE(context.ok());
  weight[3 * k + 40] = INFINITY;
  const auto infinite = round_linear("model.w", weight.data(), n, *context);
  ASSERT_FALSE(infinite.ok());
  EXPECT_EQ(infinite.status().code(), Code::non_finite);
  EXPECT_NE(infinite.status().message().find("\"model.w\": NaN or infinity in output channel 3, "
                                             "input channels 32..63"),
            std::string::npos)
      << infinite.status().message();
  weight[3 * k + 40] = 3e6f;
  const auto large = round_linear("model.w", weight.data(), n, *context);
  ASSERT_FALSE(large.ok());
  EXPECT_EQ(large.status().code(), Code::invalid_argument);
}

// ---- folding, on tiny models of every architecture ---------------------------------------------

class AwqFolding : public ::testing::TestWithParam<const char*> {};

/// Final hidden states of a fixed prompt.
Floats run_model(const std::string& directory) {
  const auto checkpoint = Checkpoint::open(directory);
  EXPECT_TRUE(checkpoint.ok());
  ModelOptions options;
  options.kv_dtype = Dtype::f32;
  options.context = 64;
  auto model = Model::load(*checkpoint, options);
  EXPECT_TRUE(model.ok()) << model.status().message();
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 40; ++i) tokens.push_back(i * 7 % 80);
  KvCache cache = model->make_cache();
  EXPECT_TRUE(cache.reserve(40).ok());
  Floats hidden(tokens.size() * static_cast<size_t>(model->config().hidden));
  const BatchItem item{&cache, tokens};
  EXPECT_TRUE(model->forward({&item, 1}, hidden.data()).ok());
  return hidden;
}

void put_floats(test::TensorStore& store, const std::string& name, Dtype dtype,
                std::vector<int64_t> shape, const Floats& values) {
  std::vector<std::byte> bytes(values.size() * static_cast<size_t>(dtype_bytes(dtype)));
  for (size_t i = 0; i < values.size(); ++i) {
    store_from_float(bytes.data(), static_cast<int64_t>(i), dtype, values[i]);
  }
  const TensorDtype type = dtype == Dtype::f32   ? TensorDtype::f32
                           : dtype == Dtype::f16 ? TensorDtype::f16
                                                 : TensorDtype::bf16;
  store.add_bytes(name, type, std::move(shape), bytes.data(), bytes.size());
}

TEST_P(AwqFolding, LeavesTheModelAsItIs) {
  const std::string source = std::string(NIBBLE_GOLDEN_MODELS "/") + GetParam();
  const auto checkpoint = Checkpoint::open(source);
  ASSERT_TRUE(checkpoint.ok());
  const auto config = parse_model_config(checkpoint->config());
  ASSERT_TRUE(config.ok());
  const auto names = find_model_names(*checkpoint, *config);
  ASSERT_TRUE(names.ok());

  test::TensorStore store;
  for (const auto& [name, view] : checkpoint->tensors()) {
    store.add_bytes(name, view.dtype, view.shape, view.data, view.bytes);
  }
  int folded = 0;
  std::mt19937_64 random(31);
  for (int64_t layer = 0; layer < config->layers; ++layer) {
    auto block = load_block(
        *checkpoint, *names, *config, layer, [](const std::string&) { return true; }, 2);
    ASSERT_TRUE(block.ok()) << block.status().message();
    // What is rounded when it is stored is not what this test is about, except for norms, whose
    // rounding the weights must make up for.
    for (BlockLinear& linear : block->linears) linear.bias_dtype = Dtype::f32;
    for (const Slot slot : {Slot::qkv, Slot::o, Slot::gate_up, Slot::down}) {
      if (!may_scale(*config, *block, slot)) continue;
      ++folded;
      const auto classes = scale_classes(*config, slot);
      Floats scales(static_cast<size_t>(block->at(parts_of(slot)[0]).k));
      std::uniform_real_distribution<float> exponent(-2, 2);
      for (float& scale : scales) scale = std::exp2(exponent(random));
      for (size_t i = 0; i < classes.size(); ++i) {
        scales[i] = scales[static_cast<size_t>(
            std::find(classes.begin(), classes.end(), classes[i]) - classes.begin())];
      }
      const Floats effective = fold_scales(*config, *block, slot, scales, 2);
      for (size_t i = 0; i < scales.size(); ++i) {
        if (effective[i] != 1.0f) {
          EXPECT_NEAR(effective[i] / scales[i], 1, 0.02);
        }
      }
    }
    for (const BlockLinear& linear : block->linears) {
      put_floats(store, linear.name + ".weight", Dtype::f32, {linear.n, linear.k}, linear.weight);
      if (!linear.bias.empty()) {
        put_floats(store, linear.name + ".bias", Dtype::f32, {linear.n}, linear.bias);
      }
    }
    for (const BlockNorm* norm : {&block->input_norm, &block->mlp_norm}) {
      put_floats(store, norm->tensor, norm->dtype, {config->hidden}, norm->weight);
    }
  }
  EXPECT_EQ(folded, config->layers * (config->architecture == Architecture::gemma3 ? 3 : 4));
  TempDir dir;
  ASSERT_TRUE(
      test::write_checkpoint(dir.file("folded"), store.tensors(), checkpoint->config()).ok());
  const Floats before = run_model(source), after = run_model(dir.file("folded"));
  float largest = 0;
  for (const float value : before) largest = std::max(largest, std::abs(value));
  ASSERT_GT(largest, 0);
  double change = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    change = std::max(change, double{std::abs(before[i] - after[i])});
  }
  EXPECT_LT(change, 1e-4 * largest);
}

INSTANTIATE_TEST_SUITE_P(Models, AwqFolding,
                         ::testing::Values("llama3_rope", "llama_bias", "mistral", "qwen2",
                                           "qwen2_window", "qwen3", "gemma3", "gemma3_mm"));

TEST(AwqFold, TouchesNothingThatStaysIn16Bits) {
  ModelConfig config;
  config.heads = config.kv_heads = 1;
  Block block;
  for (BlockLinear& linear : block.linears) linear.quantized = true;
  EXPECT_TRUE(may_scale(config, block, Slot::qkv));
  block.at(Part::v).quantized = false;
  EXPECT_FALSE(may_scale(config, block, Slot::qkv));  // would change v's columns
  EXPECT_FALSE(may_scale(config, block, Slot::o));    // would change v's rows
  EXPECT_TRUE(may_scale(config, block, Slot::gate_up));
  block.at(Part::up).quantized = false;
  EXPECT_FALSE(may_scale(config, block, Slot::down));
  config.architecture = Architecture::gemma3;
  block.at(Part::v).quantized = true;
  EXPECT_FALSE(may_scale(config, block, Slot::qkv));
}

// ---- a whole block ------------------------------------------------------------------------------

TEST(AwqBlock, BeatsRoundToNearestAndIsTheSameForAnyThreads) {
  TempDir dir;
  test::TensorStore store;
  const int64_t hidden = 128, inter = 192, kv = 64, vocab = 40;
  store.add_dense("model.embed_tokens.weight", vocab, hidden, Dtype::f16, 1);
  const std::string layer = "model.layers.0.";
  uint64_t seed = 2;
  const auto add = [&](const char* name, int64_t n, int64_t k) {
    store.add_dense(layer + name + ".weight", n, k, Dtype::f16, seed++);
  };
  add("self_attn.q_proj", hidden, hidden);
  add("self_attn.k_proj", kv, hidden);
  add("self_attn.v_proj", kv, hidden);
  add("self_attn.o_proj", hidden, hidden);
  add("mlp.gate_proj", inter, hidden);
  add("mlp.up_proj", inter, hidden);
  add("mlp.down_proj", hidden, inter);
  Floats norm(static_cast<size_t>(hidden), 1.0f);
  for (size_t i = 5; i < norm.size(); i += 16) norm[i] = 20;  // channels to protect
  for (const char* name : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
    put_floats(store, layer + name, Dtype::bf16, {hidden}, norm);
  }
  put_floats(store, "model.norm.weight", Dtype::bf16, {hidden}, norm);
  const nlohmann::json json = {{"architectures", {"LlamaForCausalLM"}},
                               {"model_type", "llama"},
                               {"hidden_size", hidden},
                               {"intermediate_size", inter},
                               {"num_hidden_layers", 1},
                               {"num_attention_heads", 4},
                               {"num_key_value_heads", 2},
                               {"vocab_size", vocab},
                               {"tie_word_embeddings", true}};
  ASSERT_TRUE(test::write_checkpoint(dir.file("m"), store.tensors(), json).ok());
  const auto checkpoint = Checkpoint::open(dir.file("m"));
  ASSERT_TRUE(checkpoint.ok());
  const auto config = parse_model_config(checkpoint->config());
  ASSERT_TRUE(config.ok()) << config.status().message();
  const auto names = find_model_names(*checkpoint, *config);
  ASSERT_TRUE(names.ok());
  Sequences sequences;
  std::mt19937_64 random(3);
  for (int i = 0; i < 6; ++i) {
    auto& sequence = sequences.emplace_back();
    for (int t = 0; t < 50 + i; ++t) sequence.push_back(static_cast<int32_t>(random() % vocab));
  }

  std::vector<QuantizedBlock> results;
  for (const int threads : {1, 4}) {
    auto run = CalibrationRun::create(*checkpoint, *names, *config, sequences, threads);
    ASSERT_TRUE(run.ok());
    auto stats = run->measure_block({});
    ASSERT_TRUE(stats.ok()) << stats.status().message();
    auto block = load_block(
        *checkpoint, *names, *config, 0, [](const std::string&) { return true; }, threads);
    ASSERT_TRUE(block.ok());
    QuantizeOptions options;
    options.grid.group_size = 32;
    options.threads = threads;
    auto result = quantize_block(*config, std::move(*block), std::move(*stats), options, {});
    ASSERT_TRUE(result.ok()) << result.status().message();
    results.push_back(std::move(*result));
  }
  ASSERT_EQ(results[0].linears.size(), 7u);
  for (size_t i = 0; i < 7; ++i) {
    const QuantizedLinearResult &a = results[0].linears[i], &b = results[1].linears[i];
    EXPECT_GT(a.snr_db, a.plain_snr_db + 1) << a.name;
    EXPECT_EQ(a.tensors.qweight, b.tensors.qweight) << a.name;
    EXPECT_EQ(a.tensors.scales, b.tensors.scales) << a.name;
    EXPECT_EQ(a.tensors.qzeros, b.tensors.qzeros) << a.name;
  }
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(results[0].norms[i].weight, results[1].norms[i].weight);
  EXPECT_NE(results[0].norms[0].weight, norm);

  // A stop is heard.
  auto run = CalibrationRun::create(*checkpoint, *names, *config, sequences, 1);
  ASSERT_TRUE(run.ok());
  EXPECT_EQ(run->measure_block([] { return true; }).status().code(), Code::interrupted);
}

// ---- the text and the work directory -----------------------------------------------------------

TEST(AwqText, SequencesAreSpreadOverTheTextAndBeginAsTheTokenizerSays) {
  EXPECT_GT(bundled_calibration_text().size(), 100'000u);
  for (const char* name : {"smollm", "llama3"}) {
    const auto tokenizer = Tokenizer::load(std::string(NIBBLE_GOLDEN_TOKENIZERS "/") + name);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    const bool bos = std::string(name) == "llama3";
    std::string text;
    for (int i = 0; i < 2000; ++i) text += "some words and " + std::to_string(i) + " ";
    const auto sequences = make_sequences(*tokenizer, {{text, "short one"}}, {6, 64});
    ASSERT_TRUE(sequences.ok());
    ASSERT_EQ(sequences->size(), 6u);
    for (const auto& sequence : *sequences) {
      EXPECT_LE(sequence.size(), 64u);
      if (bos) {
        EXPECT_EQ(sequence.front(), tokenizer->encode("a", true).front());
      }
    }
    EXPECT_NE((*sequences)[0], (*sequences)[1]);
    const auto few = make_sequences(*tokenizer, {{std::string("word")}}, {6, 64});
    ASSERT_FALSE(few.ok());
    EXPECT_EQ(few.status().code(), Code::invalid_argument);
  }
}

TEST(AwqWork, KeepsBlocksOfTheSameKeyOnly) {
  TempDir dir;
  const std::string path = dir.file("work");
  const std::vector<int32_t> values = {1, 2, 3};
  test::TensorStore store;
  store.add("t", TensorDtype::i32, {3}, values);
  {
    auto work = WorkDirectory::open(path, "key a");
    ASSERT_TRUE(work.ok()) << work.status().message();
    EXPECT_EQ(work->finished(), 0);
    ASSERT_TRUE(work->save(store.tensors(), {{"note", "x"}}).ok());
    const auto second = WorkDirectory::open(path, "key a");
    ASSERT_FALSE(second.ok());  // in use
    EXPECT_EQ(second.status().code(), Code::invalid_argument);
  }
  {
    auto work = WorkDirectory::open(path, "key a");
    ASSERT_TRUE(work.ok());
    EXPECT_EQ(work->finished(), 1);
    const auto block = work->load(0);
    ASSERT_TRUE(block.ok());
    EXPECT_EQ(block->index.metadata.at("note"), "x");
    EXPECT_EQ(block->index.tensors.at("t").bytes, 12u);
  }
  {
    auto work = WorkDirectory::open(path, "key b");
    ASSERT_TRUE(work.ok());
    EXPECT_EQ(work->finished(), 0);
    ASSERT_TRUE(work->remove().ok());
  }
  EXPECT_TRUE(test::list_directory(dir.path()).empty());
}

TEST(AwqWork, LeavesForeignDirectoriesAlone) {
  TempDir dir;
  const std::string path = dir.file("work");
  { ASSERT_TRUE(WorkDirectory::open(path, "k").ok()); }
  test::write_text(path + "/thesis.txt", "years of work");
  const auto work = WorkDirectory::open(path, "other");
  ASSERT_FALSE(work.ok());
  EXPECT_NE(work.status().message().find("thesis.txt"), std::string::npos);
  EXPECT_EQ(test::read_text(path + "/thesis.txt"), "years of work");
}

}  // namespace
}  // namespace nibble::awq
