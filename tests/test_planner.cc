// The planner with oracles that are formulas, and the plan in config.json: what is written is what
// is read, and what is wrong in it is named. No model runs here.
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <sys/stat.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/sha256.h"
#include "checkpoint_builder.h"
#include "model/plan_config.h"
#include "model/planner.h"

namespace nibble {
namespace {

using nlohmann::json;
using test::TempDir;

// ---- random problems ---------------------------------------------------------------------------

double random_between(double low, double high) {
  return low + (high - low) * *rc::gen::inRange(0, 1'000'000) / 1e6;
}

Rung make_rung(double loss, double cost, double kept = 0) {
  Rung rung;
  rung.loss = loss;
  rung.cost = cost;
  rung.kept = kept;
  return rung;
}

/// Ladders whose rungs cost more and hurt less as they go up; now and then one is no better.
std::vector<Ladder> random_ladders() {
  std::vector<Ladder> ladders;
  const int count = *rc::gen::inRange(1, 40);
  for (int i = 0; i < count; ++i) {
    Ladder ladder{.layer = i / kSlots, .slot = static_cast<Slot>(i % kSlots), .rungs = {}};
    Rung rung = make_rung(random_between(0, 1), 10, 1);
    const int rungs = *rc::gen::inRange(1, 6);
    for (int r = 0; r < rungs; ++r) {
      rung.spec.clip = static_cast<float>(r + 1) / 8;  // marks the rung
      ladder.rungs.push_back(rung);
      rung.loss *= random_between(0, 1.1);
      rung.cost += random_between(0, 3);
      rung.kept *= random_between(0, 1);
    }
    ladders.push_back(std::move(ladder));
  }
  return ladders;
}

ModelPlan base_plan(const std::vector<Ladder>& ladders) {
  ModelPlan plan;
  plan.specs.resize(static_cast<size_t>((ladders.back().layer + 1) * kSlots));
  return plan;
}

/// Rung of every ladder in `plan`, by the mark random_ladders left.
std::vector<size_t> rungs_of(const std::vector<Ladder>& ladders, const ModelPlan& plan) {
  std::vector<size_t> rungs;
  for (const Ladder& ladder : ladders) {
    const float clip = plan.at(ladder.layer, ladder.slot).clip;
    rungs.push_back(static_cast<size_t>(std::lround(clip * 8)) - 1);
  }
  return rungs;
}

double total(const std::vector<Ladder>& ladders, const std::vector<size_t>& rungs,
             double Rung::*field) {
  double sum = 0;
  for (size_t i = 0; i < ladders.size(); ++i) sum += ladders[i].rungs[rungs[i]].*field;
  return sum;
}

Gates kld_gate(double most) { return {.max_ppl_ratio = 10, .max_kld = most, .min_same_top = 0}; }

/// Quality is the sum of the losses.
QualityOracle additive_oracle(const std::vector<Ladder>& ladders) {
  return [&ladders](const ModelPlan& plan, bool) -> Result<Quality> {
    return Quality{.kld = total(ladders, rungs_of(ladders, plan), &Rung::loss)};
  };
}

// ---- ranking -----------------------------------------------------------------------------------

TEST(Planner, PromotionsClimbEveryLadderAndEachSavesLoss) {
  rc::check([] {
    const auto ladders = random_ladders();
    const auto order = rank_promotions(ladders);
    std::vector<size_t> at(ladders.size(), 0);
    for (const Promotion& promotion : order) {
      RC_ASSERT(promotion.from == at[promotion.ladder]);
      RC_ASSERT(promotion.to > promotion.from);
      RC_ASSERT(promotion.loss_saved > 0);
      at[promotion.ladder] = promotion.to;
    }
    RC_ASSERT(at == rungs_after(ladders, order, order.size()));
    // Nothing better is left above.
    for (size_t i = 0; i < ladders.size(); ++i) {
      const auto& rungs = ladders[i].rungs;
      for (size_t r = at[i]; r < rungs.size(); ++r) RC_ASSERT(rungs[r].loss >= rungs[at[i]].loss);
    }
  });
}

TEST(Planner, BestReductionPerCostComesFirst) {
  std::vector<Ladder> ladders(2);
  ladders[0].rungs = {make_rung(1.0, 10), make_rung(0.5, 20)};  // 0.05 a unit
  ladders[1].slot = Slot::o;
  ladders[1].rungs = {make_rung(0.4, 10), make_rung(0.1, 11)};  // 0.3 a unit
  const auto order = rank_promotions(ladders);
  ASSERT_EQ(order.size(), 2u);
  EXPECT_EQ(order[0].ladder, 1u);
  EXPECT_EQ(order[1].ladder, 0u);
}

TEST(Planner, SkipsARungThatIsWorthLessThanTheNext) {
  std::vector<Ladder> ladders(1);
  ladders[0].rungs = {make_rung(1, 10), make_rung(0.9, 15), make_rung(0.1, 16)};
  const auto order = rank_promotions(ladders);
  ASSERT_EQ(order.size(), 1u);
  EXPECT_EQ(order[0].to, 2u);
}

TEST(Planner, FreePromotionsAreRankedByWhatTheySave) {
  std::vector<Ladder> ladders(3);
  for (size_t i = 0; i < 3; ++i) ladders[i].slot = static_cast<Slot>(i);
  ladders[0].rungs = {make_rung(0.1, 10), make_rung(0, 9)};
  ladders[1].rungs = {make_rung(0.9, 10), make_rung(0, 10.01)};
  ladders[2].rungs = {make_rung(0.5, 10), make_rung(0, 10)};
  const auto order = rank_promotions(ladders);
  ASSERT_EQ(order.size(), 3u);
  EXPECT_EQ(order[0].ladder, 1u);
  EXPECT_EQ(order[1].ladder, 2u);
  EXPECT_EQ(order[2].ladder, 0u);
}

// ---- search ------------------------------------------------------------------------------------

TEST(Planner, FindsTheShortestPrefixThatPasses) {
  rc::check([] {
    const auto ladders = random_ladders();
    const auto order = rank_promotions(ladders);
    const double start = total(ladders, rungs_after(ladders, order, 0), &Rung::loss);
    const Gates gates = kld_gate(start * random_between(0, 1.2) - 1e-6);
    const auto search =
        search_plan(ladders, order, base_plan(ladders), gates, {}, additive_oracle(ladders));
    RC_ASSERT(search.ok());
    const auto loss_at = [&](size_t count) {
      return total(ladders, rungs_after(ladders, order, count), &Rung::loss);
    };
    RC_ASSERT(search->rungs == rungs_after(ladders, order, search->promotions));
    RC_ASSERT(rungs_of(ladders, search->plan) == search->rungs);
    RC_ASSERT(search->quality.kld == loss_at(search->promotions));
    RC_ASSERT(search->met == gates.met_by(search->quality));
    if (search->met) {
      if (search->promotions > 0) {
        RC_ASSERT(loss_at(search->promotions - 1) > gates.max_kld);
      }
    } else {
      RC_ASSERT(search->promotions == order.size());
    }
    // Bisection, one look at the start and the thorough test.
    const double bound = std::log2(static_cast<double>(order.size()) + 1) + 3;
    RC_ASSERT(static_cast<double>(search->evaluations.size()) <= bound);
  });
}

TEST(Planner, NoiseOnTheSampleNeverPassesWhatFailsThoroughly) {
  rc::check([] {
    const auto ladders = random_ladders();
    const auto order = rank_promotions(ladders);
    const double start = total(ladders, rungs_after(ladders, order, 0), &Rung::loss);
    const Gates gates = kld_gate(start * random_between(0, 1));
    SearchLimits limits;
    limits.max_evaluations = *rc::gen::inRange(1, 30);
    int thorough_calls = 0;
    const auto search =
        search_plan(ladders, order, base_plan(ladders), gates, limits,
                    [&](const ModelPlan& plan, bool thorough) -> Result<Quality> {
                      thorough_calls += thorough;
                      const double loss = total(ladders, rungs_of(ladders, plan), &Rung::loss);
                      return Quality{.kld = thorough ? loss : loss * random_between(0.3, 3)};
                    });
    RC_ASSERT(search.ok());
    RC_ASSERT(thorough_calls >= 1);
    RC_ASSERT(static_cast<int>(search->evaluations.size()) <= limits.max_evaluations);
    RC_ASSERT(search->evaluations.back().thorough);
    RC_ASSERT(search->quality.kld == total(ladders, search->rungs, &Rung::loss));
    RC_ASSERT(search->met == gates.met_by(search->quality));
    // A refusal is one of everything that was allowed.
    RC_ASSERT(search->met || search->promotions == order.size());
  });
}

TEST(Planner, LimitsAreKept) {
  rc::check([] {
    const auto ladders = random_ladders();
    const auto order = rank_promotions(ladders);
    const auto none = rungs_after(ladders, order, 0);
    SearchLimits limits;
    limits.min_kept = total(ladders, none, &Rung::kept) * random_between(0, 1);
    limits.max_cost = total(ladders, none, &Rung::cost) * random_between(1, 1.3);
    const auto search = search_plan(ladders, order, base_plan(ladders), kld_gate(-1), limits,
                                    additive_oracle(ladders));
    RC_ASSERT(search.ok());
    RC_ASSERT(!search->met);
    RC_ASSERT(search->promotions == search->most_allowed);
    RC_ASSERT(total(ladders, search->rungs, &Rung::kept) >= limits.min_kept - 1e-6);
    RC_ASSERT(total(ladders, search->rungs, &Rung::cost) <= limits.max_cost + 1e-6);
    if (search->most_allowed < order.size()) {
      const auto next = rungs_after(ladders, order, search->most_allowed + 1);
      RC_ASSERT(total(ladders, next, &Rung::kept) < limits.min_kept + 1e-6 ||
                total(ladders, next, &Rung::cost) > limits.max_cost - 1e-6);
    }
  });
}

TEST(Planner, ImpossibleLimitsAndOracleFailuresAreErrors) {
  std::vector<Ladder> ladders(1);
  ladders[0].rungs = {make_rung(1, 10, 1), make_rung(0, 20, 0)};
  const auto order = rank_promotions(ladders);
  const auto search = [&](const SearchLimits& limits, const QualityOracle& oracle) {
    return search_plan(ladders, order, base_plan(ladders), kld_gate(0.5), limits, oracle).status();
  };
  const auto fine = [](const ModelPlan&, bool) -> Result<Quality> { return Quality{}; };
  EXPECT_EQ(search({.min_kept = 2}, fine).code(), Code::invalid_argument);
  EXPECT_EQ(search({.max_cost = 5}, fine).code(), Code::invalid_argument);
  const auto stopped = [](const ModelPlan&, bool) -> Result<Quality> {
    return Status(Code::interrupted, "stopped");
  };
  EXPECT_EQ(search({}, stopped).code(), Code::interrupted);
}

TEST(Planner, NothingToPromoteIsTestedOnce) {
  std::vector<Ladder> ladders(1);
  ladders[0].rungs = {make_rung(1, 10)};
  const auto search =
      search_plan(ladders, {}, base_plan(ladders), kld_gate(0.5), {},
                  [](const ModelPlan&, bool) -> Result<Quality> { return Quality{.kld = 0.7}; });
  ASSERT_TRUE(search.ok());
  EXPECT_FALSE(search->met);
  EXPECT_EQ(search->evaluations.size(), 1u);
}

TEST(Planner, GatesNameWhatFails) {
  const Gates gates{.max_ppl_ratio = 1.1, .max_kld = 0.1, .min_same_top = 88};
  EXPECT_TRUE(gates.met_by({.ppl_ratio = 1.1, .kld = 0.1, .same_top = 88}));
  EXPECT_EQ(gates.failures({.ppl_ratio = 1, .kld = 0.05, .same_top = 90}), "");
  EXPECT_FALSE(gates.met_by({.ppl_ratio = NAN, .kld = 0.1, .same_top = 88}));
  EXPECT_EQ(gates.failures({.ppl_ratio = 1.2, .kld = 0.05, .same_top = 80}),
            "PPL ratio 1.2000 exceeds 1.1000; same top token 80.00 % is below 88.00 %");
}

// ---- the plan in config.json -------------------------------------------------------------------

constexpr int64_t kHidden = 256, kIntermediate = 768;

ModelConfig small_config(int64_t layers) {
  ModelConfig config;
  config.layers = layers;
  config.hidden = kHidden;
  config.intermediate = kIntermediate;
  config.heads = 8;
  config.head_dim = 16;
  return config;
}

LinearSpec random_spec(int64_t k) {
  LinearSpec spec;
  spec.mode = *rc::gen::element(Mode::w4a16, Mode::w4a8, Mode::w4a4);
  if (spec.mode == Mode::w4a16) return spec;
  spec.granularity = *rc::gen::element(Granularity::token, Granularity::group,
                                       Granularity::static_tensor, Granularity::static_group);
  spec.clip = static_cast<float>(random_between(0.5, 1));
  const bool dynamic =
      spec.granularity == Granularity::token || spec.granularity == Granularity::group;
  const auto groups = static_cast<size_t>(k / *rc::gen::element<int64_t>(32, 64, 128));
  if (spec.mode == Mode::w4a4 && dynamic) spec.symmetric = *rc::gen::arbitrary<bool>();
  if (!dynamic) {
    const size_t count = spec.granularity == Granularity::static_tensor ? 1 : groups;
    for (size_t i = 0; i < count; ++i) {
      spec.static_scales.push_back(static_cast<float>(random_between(1e-6, 3)));
    }
  }
  if (spec.mode == Mode::w4a4 && spec.granularity == Granularity::group) {
    spec.wide_groups.assign(groups, 0);
    bool any = false;
    for (uint8_t& flag : spec.wide_groups) any |= (flag = *rc::gen::arbitrary<bool>());
    if (!any) spec.wide_groups.clear();
  }
  return spec;
}

bool same(const LinearSpec& a, const LinearSpec& b) {
  return a.mode == b.mode && a.granularity == b.granularity && a.symmetric == b.symmetric &&
         a.clip == b.clip && a.static_scales == b.static_scales && a.wide_groups == b.wide_groups;
}

TEST(PlanConfig, WhatIsWrittenIsWhatIsRead) {
  rc::check([] {
    const ModelConfig config = small_config(*rc::gen::inRange(1, 5));
    ModelPlan plan;
    for (int64_t i = 0; i < config.layers * kSlots; ++i) {
      plan.specs.push_back(random_spec(slot_channels(config, static_cast<Slot>(i % kSlots))));
    }
    json block = plan_to_json(plan);
    block["gates"] = {{"kld", 0.1}};  // what else is there is not read
    const std::string text = json{{"quantization_config", {{"nibble", block}}}}.dump();
    const auto read = plan_from_config(json::parse(text), config);
    RC_ASSERT(read.ok());
    RC_ASSERT(read->specs.size() == plan.specs.size());
    for (size_t i = 0; i < plan.specs.size(); ++i) RC_ASSERT(same(read->specs[i], plan.specs[i]));
  });
}

/// The message for a one-layer plan changed by a merge patch of layer 0, or "" if it is read.
std::string refusal(const json& patch) {
  json block = plan_to_json(uniform_plan(1, Mode::w4a4));
  block["layers"][0].merge_patch(patch);
  const auto plan =
      plan_from_config({{"quantization_config", {{"nibble", block}}}}, small_config(1));
  if (plan.ok()) return "";
  EXPECT_EQ(plan.status().code(), Code::corrupt_file) << plan.status().message();
  return plan.status().message();
}

TEST(PlanConfig, RefusalsNameTheKeyTheExpectedAndTheFound) {
  EXPECT_EQ(refusal(json::object()), "");
  const std::string place = "config.json: quantization_config.nibble.layers[0].";
  const auto expect = [&](const char* patch, const std::string& key, const std::string& part) {
    const std::string message = refusal(json::parse(patch));
    EXPECT_EQ(message.find(place + key), 0u) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(R"({"qkv": null})", "qkv", "expected an object, found null");
  expect(R"({"qkv": {"mode": "w4a5"}})", "qkv.mode", "w4a16, w4a8, w4a4, found \"w4a5\"");
  expect(R"({"o": {"granularity": null}})", "o.granularity", "found null");
  expect(R"({"down": {"clip": 1.5}})", "down.clip", "(0, 1], found 1.5");
  expect(R"({"down": {"clip": "1"}})", "down.clip", "found \"1\"");
  expect(R"({"down": {"clip": 1e-60}})", "down.clip", "found");
  expect(R"({"down": {"symmetric": 1}})", "down.symmetric", "true or false, found 1");
  expect(R"({"qkv": {"mode": "w4a8"}})", "qkv.symmetric", "found false");
  expect(R"({"qkv": {"zero": 1}})", "qkv", "unknown key \"zero\"");
  expect(R"({"qkv": {"mode": "w4a16"}})", "qkv of mode w4a16", "unknown key");
  expect(R"({"qkv": {"static_scales": [1]}})", "qkv.static_scales", "none");
  expect(R"({"qkv": {"granularity": "static-tensor", "symmetric": true}})", "qkv.static_scales",
         "found null");
  const char* statics = R"({"qkv": {"granularity": "static-group", "symmetric": true,
                                    "static_scales": )";
  expect((std::string(statics) + "[1, 1, 1]}}").c_str(), "qkv.static_scales", "K = 256");
  expect((std::string(statics) + "[]}}").c_str(), "qkv.static_scales", "found an array of 0");
  expect((std::string(statics) + "[1, -1]}}").c_str(), "qkv.static_scales[1]", "found -1");
  expect((std::string(statics) + "[1, 1e300]}}").c_str(), "qkv.static_scales[1]", "1e+300");
  expect(R"({"down": {"wide_groups": [1]}})", "down.wide_groups", "an object");
  expect(R"({"down": {"wide_groups": {"of": 7, "groups": []}}})", "down.wide_groups.of", "768");
  expect(R"({"down": {"wide_groups": {"of": 0, "groups": []}}})", "down.wide_groups.of", "0");
  expect(R"({"down": {"wide_groups": {"of": 12}}})", "down.wide_groups.groups", "null");
  expect(R"({"down": {"wide_groups": {"of": 12, "groups": [3, 3]}}})", "down.wide_groups.groups[1]",
         "below 12, found 3");
  expect(R"({"down": {"wide_groups": {"of": 12, "groups": [12]}}})", "down.wide_groups.groups[0]",
         "found 12");
  expect(R"({"down": {"wide_groups": {"of": 12, "groups": [-1]}}})", "down.wide_groups.groups[0]",
         "found -1");
  expect(R"({"down": {"granularity": "token", "wide_groups": {"of": 12, "groups": [1]}}})",
         "down.wide_groups", "per group");
  EXPECT_EQ(refusal(json::parse(R"({"mlp": {}})")),
            "config.json: quantization_config.nibble.layers[0]: unknown key \"mlp\"; known are "
            "qkv, o, gate_up, down");
}

TEST(PlanConfig, BlocksThatAreNoPlanAreRefused) {
  const auto code = [](const char* text) {
    return plan_from_config(json::parse(text), small_config(1)).status().code();
  };
  EXPECT_EQ(code("{}"), Code::invalid_argument);
  EXPECT_EQ(code("[]"), Code::invalid_argument);
  EXPECT_EQ(code(R"({"quantization_config": []})"), Code::invalid_argument);
  EXPECT_EQ(code(R"({"quantization_config": {}})"), Code::invalid_argument);
  EXPECT_EQ(code(R"({"quantization_config": {"nibble": 3}})"), Code::corrupt_file);
  EXPECT_EQ(code(R"({"quantization_config": {"nibble": {"layers": []}}})"), Code::corrupt_file);
  EXPECT_EQ(code(R"({"quantization_config": {"nibble": {"schema_version": 2, "layers": []}}})"),
            Code::corrupt_file);
  EXPECT_EQ(code(R"({"quantization_config": {"nibble": {"schema_version": 1, "layers": []}}})"),
            Code::corrupt_file);
  EXPECT_EQ(code(R"({"quantization_config": {"nibble": {"schema_version": 1, "layers": [0]}}})"),
            Code::corrupt_file);
}

TEST(PlanConfig, AnyJsonIsReadOrRefusedCleanly) {
  rc::check([] {
    // A plan with one value somewhere replaced by another kind of value.
    const ModelConfig config = small_config(1);
    ModelPlan plan;
    for (int i = 0; i < kSlots; ++i) {
      plan.specs.push_back(random_spec(slot_channels(config, static_cast<Slot>(i))));
    }
    const json document = {{"quantization_config", {{"nibble", plan_to_json(plan)}}}};
    json flat = document.flatten();
    const auto at =
        std::next(flat.begin(), *rc::gen::inRange<int>(0, static_cast<int>(flat.size())));
    *at = *rc::gen::element<json>(json(), json(-1), json(1e300), json(""), json("\xc3\xa9"),
                                  json(true), json(uint64_t{1} << 63));
    const auto read = plan_from_config(flat.unflatten(), config);
    RC_ASSERT(read.ok() || read.status().code() == Code::corrupt_file);
  });
}

TEST(PlanConfig, StoringKeepsEverythingElseInItsOrder) {
  TempDir dir;
  const std::string path = dir.file("config.json");
  test::write_text(path, R"({"z": 1e-05, "quantization_config": {"quant_method": "awq", "bits": 4},
                             "a": [1, null, "\u00e9"]})");
  const json block = plan_to_json(uniform_plan(1, Mode::w4a8));
  ASSERT_TRUE(store_plan(dir.path(), block).ok());
  ASSERT_TRUE(store_plan(dir.path(), block).ok());  // replaces
  const auto document = nlohmann::ordered_json::parse(test::read_text(path));
  std::string keys;
  for (const auto& item : document.items()) keys += item.key() + " ";
  EXPECT_EQ(keys, "z quantization_config a ");
  EXPECT_EQ(document["z"], 1e-05);
  EXPECT_EQ(document["a"][2], "\xc3\xa9");
  EXPECT_EQ(document["quantization_config"]["quant_method"], "awq");
  EXPECT_EQ(document["quantization_config"]["bits"], 4);
  EXPECT_TRUE(plan_from_config(json::parse(test::read_text(path)), small_config(1)).ok());
  EXPECT_EQ(test::list_directory(dir.path()), std::vector<std::string>{"config.json"});
}

TEST(PlanConfig, StoringFindsTheBlockOfATextPart) {
  TempDir dir;
  test::write_text(dir.file("config.json"),
                   R"({"text_config": {"quantization_config": {"quant_method": "awq"}}})");
  ASSERT_TRUE(store_plan(dir.path(), plan_to_json(uniform_plan(1, Mode::w4a8))).ok());
  const json document = json::parse(test::read_text(dir.file("config.json")));
  EXPECT_TRUE(document["text_config"]["quantization_config"].contains("nibble"));
  EXPECT_TRUE(plan_from_config(document, small_config(1)).ok());
}

TEST(PlanConfig, StoringWithoutABlockChangesNothing) {
  TempDir dir;
  const std::string text = R"({"model_type": "llama"})";
  test::write_text(dir.file("config.json"), text);
  EXPECT_EQ(store_plan(dir.path(), json::object()).code(), Code::unsupported);
  EXPECT_EQ(test::read_text(dir.file("config.json")), text);
  test::write_text(dir.file("config.json"), std::string(300, '['));
  EXPECT_EQ(store_plan(dir.path(), json::object()).code(), Code::corrupt_file);
  EXPECT_EQ(store_plan(dir.file("absent"), json::object()).code(), Code::io_error);
}

TEST(Sha256, IsTheStandardHash) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  rc::check([] {  // however it is cut
    const auto text = *rc::gen::container<std::string>(rc::gen::arbitrary<char>());
    const auto cut =
        static_cast<size_t>(*rc::gen::inRange<int>(0, static_cast<int>(text.size()) + 1));
    Sha256 hash;
    hash.update(text.substr(0, cut));
    hash.update(text.substr(cut));
    RC_ASSERT(hash.finish() == sha256_hex(text));
  });
}

}  // namespace
}  // namespace nibble
