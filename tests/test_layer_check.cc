// The checks behind `nibble verify`: they pass on good layers and, above all, fail on bad ones.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "baseline.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/ref.h"
#include "layer_check.h"
#include "oracle_check.h"
#include "synthetic.h"
#include "timing.h"

namespace nibble {
namespace {

CheckOptions fast_options() {
  CheckOptions options;
  options.rows = 9;
  options.threads = 1;
  options.timing = false;
  return options;
}

/// One small synthetic layer and what is needed to check it.
struct Layer {
  AwqTensors tensors;
  QuantMatrix view;
  LayerToCheck check;

  explicit Layer(const SyntheticWeight& spec) : tensors(make_synthetic_weight(spec, 1)) {
    view = tensors.view();
    check.name = spec.name;
    check.matrix = &view;
  }
};

const ModeResult& mode_of(const LayerResult& result, Mode mode) {
  for (const ModeResult& m : result.modes) {
    if (m.mode == mode) return m;
  }
  throw std::logic_error("mode not checked");
}

TEST(LayerCheck, GoodLayersPassInEveryMode) {
  for (const int64_t group : {32, 64, 128, -1}) {
    for (const bool symmetric : {false, true}) {
      for (const bool negative : {false, true}) {
        Layer layer({.name = "x.q_proj",
                     .k = 256,
                     .n = 72,
                     .group_size = group,
                     .symmetric = symmetric,
                     .negative_scales = negative});
        const Result<LayerResult> result = check_layer(layer.check, fast_options());
        ASSERT_TRUE(result.ok()) << result.status().message();
        EXPECT_TRUE(result->failures.empty());
        EXPECT_EQ(result->symmetric, symmetric);
        EXPECT_EQ(result->notes.empty(), !negative);
        for (const ModeResult& mode : result->modes) {
          EXPECT_TRUE(mode.failures.empty()) << mode_name(mode.mode) << mode.failures.front();
          EXPECT_EQ(mode.kernel.rfind(mode_name(mode.mode), 0), 0u) << mode.kernel;
        }
        EXPECT_GE(mode_of(*result, Mode::w4a16).snr_vs_exact, 100.0);
        EXPECT_GE(mode_of(*result, Mode::w4a8).snr_vs_w4a16, 28.0);
      }
    }
  }
}

/// One run of a small layer in `mode`, correct until a test spoils it.
struct SpoilableRun {
  AwqTensors tensors = make_synthetic_weight({.name = "s", .k = 128, .n = 16, .group_size = 64}, 1);
  ref::Weights weights = ref::unpack(tensors.view());
  std::vector<float> x = make_input(InputKind::normal, 5, 128, 1);
  std::vector<float> y = std::vector<float>(5 * 16);
  std::vector<int32_t> partials = std::vector<int32_t>(5 * 2 * 16);
  FinishedRun run;

  explicit SpoilableRun(Mode mode) {
    run.problem = {.m = 5, .n = 16, .k = 128, .group_size = 64, .mode = mode};
    run.input.x = x.data();
    run.input.x_stride = 128;
    const Plan plan = *plan_gemm(run.problem, nullptr, 1);
    const PackedWeights packed = std::move(*pack_weights(tensors.view()));
    AlignedBuffer workspace = std::move(*AlignedBuffer::zeroed(plan.workspace_bytes));
    const bool quantized = mode != Mode::w4a16;
    const GemmTarget target{&packed, y.data(), 16, quantized ? partials.data() : nullptr};
    EXPECT_TRUE(run_gemm(plan, run.input, {&target, 1}, workspace.data()).ok());
    run.y = y.data();
    run.partials = quantized ? partials.data() : nullptr;
  }
  std::string difference() const { return first_difference(run, weights, nullptr, 5); }
};

TEST(OracleCheck, OneWrongBitOfAnyOutputIsFoundAndPlaced) {
  for (const Mode mode : {Mode::w4a16, Mode::w4a8, Mode::w4a4}) {
    SpoilableRun spoilable(mode);
    ASSERT_EQ(spoilable.difference(), "");
    spoilable.y[3 * 16 + 7] = std::nextafter(spoilable.y[3 * 16 + 7], 1e30f);
    EXPECT_EQ(spoilable.difference().rfind("y of row 3, column 7 is ", 0), 0u)
        << spoilable.difference();
  }
}

TEST(OracleCheck, OneWrongSumIsFoundAndPlaced) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    SpoilableRun spoilable(mode);
    spoilable.partials[(4 * 2 + 1) * 16 + 15] += 1;
    EXPECT_EQ(spoilable.difference().rfind("S of row 4, group 1, column 15 is ", 0), 0u)
        << spoilable.difference();
  }
}

TEST(LayerCheck, AnSnrBelowTheGateFails) {
  ModeResult good, bad;
  good.snr_vs_w4a16 = 28.1;
  bad.snr_vs_w4a16 = 27.9;
  const Problem token{.mode = Mode::w4a8, .granularity = Granularity::token};
  check_gate(token, InputKind::normal, good);
  check_gate(token, InputKind::normal, bad);
  EXPECT_TRUE(good.failures.empty());
  ASSERT_EQ(bad.failures.size(), 1u);
  EXPECT_EQ(bad.failures[0], "SNR 27.9 dB is below 28 dB");
  ModeResult exact;
  exact.snr_vs_exact = 44.9;
  check_gate({.mode = Mode::w4a16}, InputKind::outliers, exact);
  EXPECT_EQ(exact.failures.size(), 1u);
  ModeResult ungated;
  check_gate({.mode = Mode::w4a4}, InputKind::normal, ungated);
  EXPECT_TRUE(ungated.failures.empty());
}

TEST(LayerCheck, NonFiniteScaleFailsTheLayerByPlace) {
  Layer layer({.name = "x.q_proj", .k = 256, .n = 16, .group_size = 128});
  layer.tensors.scales[1 * 16 + 3] = 0x7c00;  // +infinity in group 1, column 3
  const Result<LayerResult> result = check_layer(layer.check, fast_options());
  ASSERT_TRUE(result.ok());
  ASSERT_EQ(result->failures.size(), 1u);
  EXPECT_NE(result->failures[0].find("group 1, column 3"), std::string::npos)
      << result->failures[0];
}

TEST(LayerCheck, WrongReferenceWeightsFail) {
  Layer layer({.name = "x.q_proj", .k = 128, .n = 16, .group_size = 64});
  std::vector<float> dense = make_input(InputKind::normal, 16, 128, 99);  // unrelated
  TensorView view;
  view.dtype = TensorDtype::f32;
  view.shape = {16, 128};
  view.data = reinterpret_cast<const std::byte*>(dense.data());
  view.bytes = dense.size() * 4;
  layer.check.dense = &view;
  const Result<LayerResult> result = check_layer(layer.check, fast_options());
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_FALSE(result->failures.empty());
}

TEST(LayerCheck, SwappedNibbleOrderIsCaughtAgainstTheReference) {
  Layer layer({.name = "x.q_proj", .k = 128, .n = 16, .group_size = 64});
  // the true weights, (n, k)
  std::vector<float> kn(128 * 16), dense(128 * 16);
  dequantize(layer.view, 0, 16, kn.data());
  for (int64_t k = 0; k < 128; ++k) {
    for (int64_t n = 0; n < 16; ++n) dense[n * 128 + k] = kn[k * 16 + n];
  }
  TensorView view;
  view.dtype = TensorDtype::f32;
  view.shape = {16, 128};
  view.data = reinterpret_cast<const std::byte*>(dense.data());
  view.bytes = dense.size() * 4;
  layer.check.dense = &view;
  Result<LayerResult> result = check_layer(layer.check, fast_options());
  ASSERT_TRUE(result.ok());
  EXPECT_TRUE(result->failures.empty());
  EXPECT_TRUE(std::isinf(result->weight_snr));
  // nibbles of the codes in reading order instead of 0 2 4 6 1 3 5 7
  for (uint32_t& word : layer.tensors.qweight) {
    constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    uint32_t wrong = 0;
    for (int i = 0; i < 8; ++i) wrong |= ((word >> (4 * i)) & 15u) << (4 * kOrder[i]);
    word = wrong;
  }
  result = check_layer(layer.check, fast_options());
  ASSERT_TRUE(result.ok());
  EXPECT_FALSE(result->failures.empty());
}

TEST(LayerCheck, OutliersHurtTokenScalesMoreThanGroupScales) {
  Layer layer({.name = "x.q_proj", .k = 1024, .n = 64, .group_size = 128});
  CheckOptions options = fast_options();
  options.input = InputKind::outliers;
  options.modes = {Mode::w4a8};
  options.activations = {false, Granularity::token};
  const double token = check_layer(layer.check, options)->modes[0].snr_vs_w4a16;
  options.activations = {false, Granularity::group};
  const double group = check_layer(layer.check, options)->modes[0].snr_vs_w4a16;
  EXPECT_GT(group, token + 3.0);
}

TEST(LayerCheck, EveryActivationChoiceRuns) {
  Layer layer({.name = "x.q_proj", .k = 256, .n = 16, .group_size = 64});
  CheckOptions options = fast_options();
  for (const Granularity granularity : {Granularity::tensor, Granularity::token, Granularity::group,
                                        Granularity::static_tensor, Granularity::static_group}) {
    options.activations = {false, granularity};
    const Result<LayerResult> result = check_layer(layer.check, options);
    ASSERT_TRUE(result.ok()) << result.status().message();
    for (const ModeResult& mode : result->modes) {
      EXPECT_TRUE(mode.failures.empty()) << mode.failures.front();
    }
  }
}

TEST(LayerCheck, MixUsesGroupScalesWhereAwqCannotSmooth) {
  CheckOptions options = fast_options();
  options.modes = {Mode::w4a8, Mode::w4a4};
  Layer down({.name = "m.layers.0.mlp.down_proj", .k = 128, .n = 16, .group_size = 64});
  Layer query({.name = "m.layers.0.self_attn.q_proj", .k = 128, .n = 16, .group_size = 64});
  EXPECT_EQ(check_layer(down.check, options)->modes[0].activation, "group");
  EXPECT_EQ(check_layer(query.check, options)->modes[0].activation, "token");
  EXPECT_EQ(check_layer(query.check, options)->modes[1].activation, "group-asym");
}

TEST(LayerCheck, JsonHasTheAgreedNames) {
  Layer layer({.name = "x.q_proj", .k = 128, .n = 16, .group_size = 64});
  const nlohmann::json json = to_json(*check_layer(layer.check, fast_options()));
  for (const char* key : {"name", "k", "n", "group_size", "modes"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  for (const char* key : {"kernel", "activation", "snr_db_vs_fp16", "snr_db_vs_w4a16", "rel_err",
                          "cosine", "us_median", "dequant_matmul_us_median", "speedup"}) {
    EXPECT_TRUE(json["modes"]["w4a8"].contains(key)) << key;
  }
}

TEST(LayerCheck, SnrOfKnownNoise) {
  EXPECT_TRUE(std::isinf(snr_db({1, 2}, {1, 2})));
  EXPECT_NEAR(snr_db({10, 0}, {11, 0}), 20.0, 1e-9);
  EXPECT_EQ(decibels(std::numeric_limits<double>::infinity()), "inf");
}

TEST(Baselines, EqualTheDequantizedProduct) {
  const AwqTensors weight =
      make_synthetic_weight({.name = "b", .k = 256, .n = 48, .group_size = 64}, 5);
  const ref::Weights reference = ref::unpack(weight.view());
  for (const int64_t m : {1, 5}) {
    const std::vector<float> x = make_input(InputKind::normal, m, 256, 5);
    const std::vector<double> exact = ref::multiply_fp64(reference, x.data(), m, nullptr);
    auto baselines = make_baselines(weight, x.data(), m, 1);
    if (baselines.empty()) GTEST_SKIP() << "built without OpenBLAS and oneDNN";
    for (const auto& baseline : baselines) {
      baseline->dequantize();
      baseline->multiply();
      const std::vector<float> y = baseline->result();
      EXPECT_GT(snr_db(exact, {y.begin(), y.end()}), 35.0) << baseline->name();
    }
  }
}

TEST(Timing, RoundsTakeTurnsAndMedianIsOfSamples) {
  std::string order;
  std::vector<Contender> contenders = {{"a", {}, [&] { order += 'a'; }, {}},
                                       {"b", [&] { order += '-'; }, [&] { order += 'b'; }, {}}};
  time_interleaved(contenders, {.min_rounds = 3, .max_rounds = 3, .seconds = 0});
  EXPECT_EQ(order, "aba-ba-ba-b");
  EXPECT_EQ(contenders[0].samples.microseconds.size(), 3u);
  EXPECT_EQ((Samples{{5, 1, 3}}).median(), 3.0);
  EXPECT_EQ((Samples{{4, 1, 3, 2}}).median(), 2.5);
}

TEST(Synthetic, WeightsAndInputsArePureFunctionsOfTheSeed) {
  const SyntheticWeight spec{.name = "s", .k = 128, .n = 16, .group_size = 32};
  EXPECT_EQ(make_synthetic_weight(spec, 1).qweight, make_synthetic_weight(spec, 1).qweight);
  EXPECT_NE(make_synthetic_weight(spec, 1).qweight, make_synthetic_weight(spec, 2).qweight);
  const std::vector<float> two = make_input(InputKind::normal, 2, 64, 3);
  const std::vector<float> one = make_input(InputKind::normal, 1, 64, 3);
  EXPECT_TRUE(std::equal(one.begin(), one.end(), two.begin()));
}

}  // namespace
}  // namespace nibble
