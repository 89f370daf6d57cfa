// Whole models against transformers. Every directory of golden/models is a tiny checkpoint with the
// logits that transformers gives for it; scripts/make_model_goldens.py makes them and shows that
// each feature of each model matters. Then: the same bits however a prompt is fed; what is refused,
// and with which words; config.json files of real models.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "checkpoint_builder.h"
#include "model/model.h"
#include "model/sampler.h"

namespace nibble::test {
namespace {

using nlohmann::json;
using Tokens = std::vector<int32_t>;
using Floats = std::vector<float>;

constexpr double kTolerance = 1e-4;  // of max |logit|; also in scripts/make_model_goldens.py

const char* const kModels[] = {"llama3_rope",      "llama_bias", "mistral",   "qwen2",
                               "qwen2_window",     "qwen3",      "gemma3",    "gemma3_mm",
                               "gemma3_mm_nested", "llama_awq",  "qwen2_awq", "gemma3_awq"};
const char* const kQuantized[] = {"llama_awq", "qwen2_awq", "gemma3_awq"};

std::string golden_directory(const std::string& name) { return NIBBLE_GOLDEN_MODELS "/" + name; }

Checkpoint open_checkpoint(const std::string& directory) {
  Result<Checkpoint> checkpoint = Checkpoint::open(directory);
  if (!checkpoint.ok()) throw std::runtime_error(checkpoint.status().message());
  return std::move(*checkpoint);
}

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

template <class T>
std::vector<T> values_of(const TensorMap& tensors, const std::string& name) {
  const TensorView& tensor = tensors.at(name);
  std::vector<T> values(tensor.bytes / sizeof(T));
  std::memcpy(values.data(), tensor.data, tensor.bytes);
  return values;
}

/// A golden directory, read.
struct Golden {
  Checkpoint checkpoint;
  Tokens tokens, greedy;
  Floats logits;  // (tokens, vocab)
  // (vocab) each: with the cache in "bf16" or "f16", or in mode "w4a8" or "w4a4"
  std::map<std::string, Floats> last_logits;

  explicit Golden(const std::string& name) : checkpoint(open_checkpoint(golden_directory(name))) {
    const Result<MappedFile> file =
        MappedFile::open(golden_directory(name) + "/golden.safetensors");
    check(file.status());
    const Result<SafetensorsIndex> index = parse_safetensors(file->bytes(), "golden.safetensors");
    check(index.status());
    tokens = values_of<int32_t>(index->tensors, "tokens");
    greedy = values_of<int32_t>(index->tensors, "greedy");
    logits = values_of<float>(index->tensors, "logits");
    const std::string prefix = "last_logits_";
    for (const auto& [tensor, view] : index->tensors) {
      if (!tensor.starts_with(prefix)) continue;
      last_logits[tensor.substr(prefix.size())] = values_of<float>(index->tensors, tensor);
    }
  }
};

Model load_model(const Checkpoint& checkpoint, int threads = 2, Dtype kv_dtype = Dtype::f32) {
  ModelOptions options;
  options.threads = threads;
  options.kv_dtype = kv_dtype;
  Result<Model> model = Model::load(checkpoint, options);
  check(model.status());
  return std::move(*model);
}

/// Final hidden states of `tokens`, appended to `cache` in calls of at most `step`.
Floats feed(Model& model, KvCache& cache, std::span<const int32_t> tokens, size_t step) {
  const auto width = static_cast<size_t>(model.config().hidden);
  Floats hidden(tokens.size() * width);
  for (size_t done = 0; done < tokens.size(); done += step) {
    const BatchItem item{&cache, tokens.subspan(done, std::min(step, tokens.size() - done))};
    check(model.forward({&item, 1}, &hidden[done * width]));
  }
  return hidden;
}

Floats hidden_of(Model& model, std::span<const int32_t> tokens, size_t step = SIZE_MAX) {
  KvCache cache = model.make_cache();
  return feed(model, cache, tokens, std::min(step, tokens.size()));
}

Floats logits_of(Model& model, const Floats& hidden) {
  const auto width = static_cast<size_t>(model.config().hidden);
  const size_t rows = hidden.size() / width;
  Floats logits(rows * static_cast<size_t>(model.config().vocab));
  check(model.logits(hidden.data(), static_cast<int64_t>(rows), logits.data()));
  return logits;
}

Floats last_row(const Floats& values, size_t width) {
  return {values.end() - static_cast<ptrdiff_t>(width), values.end()};
}

/// max |a - b| / max |b|; infinite if the sizes differ or something is NaN.
double relative_error(const Floats& a, const Floats& b) {
  if (a.size() != b.size()) return INFINITY;
  double largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(static_cast<double>(a[i]) - b[i]);
    if (!(d <= difference)) difference = std::isnan(d) ? INFINITY : d;
    largest = std::max(largest, std::fabs(static_cast<double>(b[i])));
  }
  return difference / largest;
}

/// Equal bit for bit; says where not.
testing::AssertionResult same_bits(const Floats& a, const Floats& b, int64_t width) {
  if (a.size() != b.size()) return testing::AssertionFailure() << a.size() << " and " << b.size();
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0) {
    return testing::AssertionSuccess();
  }
  size_t i = 0, count = 0;
  for (size_t j = a.size(); j-- > 0;) {
    if (std::memcmp(&a[j], &b[j], sizeof(float)) != 0) i = j, ++count;
  }
  const auto columns = static_cast<size_t>(width);
  return testing::AssertionFailure()
         << count << " of " << a.size() << " differ, first in row " << i / columns << ", column "
         << i % columns << ": " << a[i] << " and " << b[i];
}

/// Feeds `tokens` in many ways; every way must give the bits of `expected`.
void expect_same_bits_however_fed(const Checkpoint& checkpoint, const ModelPlan* plan,
                                  Dtype kv_dtype, const Tokens& tokens) {
  Model model = load_model(checkpoint, 2, kv_dtype);
  if (plan != nullptr) check(model.set_plan(*plan));
  const int64_t width = model.config().hidden;
  const Floats expected = hidden_of(model, tokens);
  for (const size_t step : {size_t{1}, size_t{7}, size_t{64}}) {
    EXPECT_TRUE(same_bits(hidden_of(model, tokens, step), expected, width)) << "by " << step;
  }

  // In a batch: between a prompt that begins and a sequence that is being decoded.
  Tokens other(tokens.rbegin(), tokens.rend());
  other.resize(23);
  KvCache first = model.make_cache(), ours = model.make_cache(), decoded = model.make_cache();
  feed(model, decoded, other, other.size());
  const auto half = static_cast<ptrdiff_t>(tokens.size() / 2);
  const Tokens one = {5};
  Floats together;
  for (const Tokens& part : {Tokens(tokens.begin(), tokens.begin() + half),
                             Tokens(tokens.begin() + half, tokens.end())}) {
    const BatchItem mixed[] = {{&first, other}, {&ours, part}, {&decoded, one}};
    Floats rows((other.size() + part.size() + 1) * static_cast<size_t>(width));
    check(model.forward(mixed, rows.data()));
    const auto begin = rows.begin() + static_cast<ptrdiff_t>(other.size()) * width;
    together.insert(together.end(), begin, begin + static_cast<ptrdiff_t>(part.size()) * width);
  }
  EXPECT_TRUE(same_bits(together, expected, width)) << "in a batch";

  // Decoding together: one token of each of three sequences.
  ours.set_length(static_cast<int64_t>(tokens.size()) - 1);
  const BatchItem items[] = {{&decoded, one}, {&first, one}, {&ours, {&tokens.back(), 1}}};
  Floats hidden(3 * static_cast<size_t>(width));
  check(model.forward(items, hidden.data()));
  EXPECT_TRUE(same_bits(last_row(hidden, static_cast<size_t>(width)),
                        last_row(expected, static_cast<size_t>(width)), width))
      << "decoded in a batch";

  for (const int threads : {1, 5}) {
    Model another = load_model(checkpoint, threads, kv_dtype);
    if (plan != nullptr) check(another.set_plan(*plan));
    EXPECT_TRUE(same_bits(hidden_of(another, tokens), expected, width)) << threads << " threads";
    EXPECT_TRUE(same_bits(hidden_of(another, tokens, 1), expected, width))
        << threads << " threads, token by token";
    EXPECT_TRUE(
        same_bits(logits_of(another, expected), logits_of(model, expected), model.config().vocab))
        << threads << " threads, logits";
  }
}

// ---- against transformers ----------------------------------------------------------------------

class GoldenModel : public testing::TestWithParam<const char*> {
 protected:
  Golden golden_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Models, GoldenModel, testing::ValuesIn(kModels),
                         [](const auto& one) { return std::string(one.param); });

TEST_P(GoldenModel, LogitsAreThoseOfTransformers) {
  Model model = load_model(golden_.checkpoint);
  EXPECT_EQ(model.quantized(), std::string(GetParam()).ends_with("_awq"));
  const Floats logits = logits_of(model, hidden_of(model, golden_.tokens));
  const double error = relative_error(logits, golden_.logits);
  std::printf("%s: max |error| / max |logit| = %.2g\n", GetParam(), error);
  EXPECT_LE(error, kTolerance);
}

TEST_P(GoldenModel, GreedyContinuationIsThatOfTransformers) {
  Model model = load_model(golden_.checkpoint);
  const auto width = static_cast<size_t>(model.config().hidden);
  KvCache cache = model.make_cache();
  Floats hidden = feed(model, cache, golden_.tokens, golden_.tokens.size());
  Tokens continuation;
  while (continuation.size() < golden_.greedy.size()) {
    continuation.push_back(argmax(logits_of(model, last_row(hidden, width))));
    hidden = feed(model, cache, {&continuation.back(), 1}, 1);
  }
  EXPECT_EQ(continuation, golden_.greedy);
}

/// The last position's logits against transformers with the same roundings in it (`key`). Here and
/// there a value lies so near a tie that it rounds the other way, hence the bound: a quarter of
/// what all the roundings together do. Roundings in another place would do as much as these.
void expect_rounding_of(const Golden& golden, Model& model, const std::string& key) {
  const auto vocab = static_cast<size_t>(model.config().vocab);
  const Floats last = last_row(logits_of(model, hidden_of(model, golden.tokens)), vocab);
  const double effect = relative_error(golden.last_logits.at(key), last_row(golden.logits, vocab));
  const double error = relative_error(last, golden.last_logits.at(key));
  std::printf("%s: %s: error %.2g where the roundings do %.2g\n",
              golden.checkpoint.directory().c_str() + std::strlen(NIBBLE_GOLDEN_MODELS) + 1,
              key.c_str(), error, effect);
  EXPECT_LE(error, effect / 4) << key;
}

TEST_P(GoldenModel, SixteenBitCacheRoundsKeysAndValuesAndNothingElse) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
    Model model = load_model(golden_.checkpoint, 2, dtype);
    expect_rounding_of(golden_, model, dtype_name(dtype));
    expect_same_bits_however_fed(golden_.checkpoint, nullptr, dtype, golden_.tokens);
  }
}

TEST_P(GoldenModel, SameBitsHoweverFed) {
  expect_same_bits_however_fed(golden_.checkpoint, nullptr, Dtype::f32, golden_.tokens);
}

TEST_P(GoldenModel, ShortenedCacheForgets) {
  Model model = load_model(golden_.checkpoint);
  KvCache cache = model.make_cache();
  const std::span<const int32_t> tokens(golden_.tokens);
  const Floats expected = hidden_of(model, tokens);
  feed(model, cache, tokens, tokens.size());
  cache.set_length(3);
  Tokens wrong(tokens.begin(), tokens.begin() + 30);
  std::reverse(wrong.begin(), wrong.end());
  feed(model, cache, wrong, wrong.size());
  cache.set_length(3);
  const Floats rest = feed(model, cache, tokens.subspan(3), tokens.size());
  const int64_t width = model.config().hidden;
  EXPECT_TRUE(same_bits(rest, Floats(expected.begin() + 3 * width, expected.end()), width));
}

TEST_P(GoldenModel, ObserverSeesEverySlotAndChangesNothing) {
  Model model = load_model(golden_.checkpoint);
  const ModelConfig& c = model.config();
  const Floats expected = hidden_of(model, golden_.tokens);
  const int64_t inputs[kSlots] = {c.hidden, c.heads * c.head_dim, c.hidden, c.intermediate};
  KvCache cache = model.make_cache();
  Floats hidden(expected.size());
  std::vector<std::pair<int64_t, Slot>> seen;
  const BatchItem item{&cache, golden_.tokens};
  check(model.forward({&item, 1}, hidden.data(),
                      [&](int64_t layer, Slot slot, const float* x, int64_t rows, int64_t k) {
                        seen.push_back({layer, slot});
                        EXPECT_EQ(rows, static_cast<int64_t>(golden_.tokens.size()));
                        EXPECT_EQ(k, inputs[static_cast<int>(slot)]);
                        for (int64_t i = 0; i < rows * k; ++i) ASSERT_TRUE(std::isfinite(x[i]));
                      }));
  EXPECT_TRUE(same_bits(hidden, expected, c.hidden));
  ASSERT_EQ(seen.size(), static_cast<size_t>(c.layers * kSlots));
  for (size_t i = 0; i < seen.size(); ++i) {
    EXPECT_EQ(seen[i].first, static_cast<int64_t>(i) / kSlots);
    EXPECT_EQ(static_cast<size_t>(seen[i].second), i % kSlots);
  }
}

// ---- quantized models --------------------------------------------------------------------------

class QuantizedModel : public GoldenModel {};
INSTANTIATE_TEST_SUITE_P(Models, QuantizedModel, testing::ValuesIn(kQuantized),
                         [](const auto& one) { return std::string(one.param); });

TEST_P(QuantizedModel, IntegerModesGiveTheSameBitsHoweverFed) {
  Model model = load_model(golden_.checkpoint);
  const int64_t layers = model.config().layers;
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    for (const std::optional<Granularity>& granularity :
         {std::optional<Granularity>(), {Granularity::token}, {Granularity::group}}) {
      const ModelPlan plan = uniform_plan(layers, mode, granularity);
      SCOPED_TRACE(std::string(mode_name(mode)) + " " +
                   (granularity ? granularity_name(*granularity) : "default"));
      expect_same_bits_however_fed(golden_.checkpoint, &plan, Dtype::bf16, golden_.tokens);
    }
  }
}

TEST_P(QuantizedModel, IntegerModesRoundTheInputsOfLinearsAndNothingElse) {
  Model model = load_model(golden_.checkpoint);
  const int64_t layers = model.config().layers;
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    check(model.set_plan(uniform_plan(layers, mode)));
    expect_rounding_of(golden_, model, mode_name(mode));
  }
  for (const char* mode : {"w4a8", "w4a4"}) {
    bool receipt = false;
    for (const std::string& kernel : model.kernels()) receipt |= kernel.starts_with(mode);
    EXPECT_TRUE(receipt) << mode;
  }
}

TEST_P(QuantizedModel, AllGroupsWideIsW4A8PerGroup) {
  Model model = load_model(golden_.checkpoint);
  const ModelConfig& c = model.config();
  check(model.set_plan(uniform_plan(c.layers, Mode::w4a8, Granularity::group)));
  const Floats expected = hidden_of(model, golden_.tokens);
  ModelPlan plan = uniform_plan(c.layers, Mode::w4a4, Granularity::group);
  const int64_t inputs[kSlots] = {c.hidden, c.heads * c.head_dim, c.hidden, c.intermediate};
  for (size_t i = 0; i < plan.specs.size(); ++i) {
    plan.specs[i].wide_groups.assign(static_cast<size_t>(inputs[i % kSlots] / 32), 1);
  }
  check(model.set_plan(plan));
  EXPECT_TRUE(same_bits(hidden_of(model, golden_.tokens), expected, c.hidden));
  plan.specs[0].wide_groups[0] = 0;
  check(model.set_plan(plan));
  EXPECT_FALSE(same_bits(hidden_of(model, golden_.tokens), expected, c.hidden));
  expect_same_bits_however_fed(golden_.checkpoint, &plan, Dtype::f32, golden_.tokens);
}

/// Where nothing is quantized, plans change nothing.
TEST(Model, PlansAreIgnoredBySixteenBitWeights) {
  const Golden golden("qwen3");
  Model model = load_model(golden.checkpoint);
  const Floats expected = hidden_of(model, golden.tokens);
  check(model.set_plan(uniform_plan(model.config().layers, Mode::w4a4)));
  EXPECT_TRUE(same_bits(hidden_of(model, golden.tokens), expected, model.config().hidden));
}

TEST(Model, EightBitHeadIsNearOnRequestOnly) {
  for (const char* name : {"qwen3", "gemma3_awq"}) {
    const Golden golden(name);
    ModelOptions options;
    options.kv_dtype = Dtype::f32;
    options.int8_head = true;
    Result<Model> model = Model::load(golden.checkpoint, options);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ(model->head_name(), "int8");
    const double error =
        relative_error(logits_of(*model, hidden_of(*model, golden.tokens)), golden.logits);
    EXPECT_GT(error, 0.0);
    EXPECT_LT(error, 0.02);
  }
}

TEST(Model, LongPromptIsTheSameAsTokenByToken) {
  // more rows than one pass over the layers takes
  const Golden golden("llama3_rope");
  json config = golden.checkpoint.config();
  config["max_position_embeddings"] = 2048;
  const TempDir dir;
  check(write_checkpoint(dir.file("long"), golden.checkpoint.tensors(), config));
  const Checkpoint checkpoint = open_checkpoint(dir.file("long"));
  Tokens tokens;
  for (int32_t i = 0; i < 1100; ++i) tokens.push_back((i * i * 7 + 3 * i + 5) % 80);
  expect_same_bits_however_fed(checkpoint, nullptr, Dtype::bf16, tokens);
}

// ---- what is refused ---------------------------------------------------------------------------

/// A golden directory that is changed before it is loaded.
class Edited {
 public:
  explicit Edited(const std::string& name)
      : source_(open_checkpoint(golden_directory(name))),
        tensors_(source_.tensors()),
        config(source_.config()) {}

  void remove(const std::string& name) { NIBBLE_CHECK(tensors_.erase(name) == 1); }
  /// Of zeros.
  void replace(const std::string& name, TensorDtype dtype, std::vector<int64_t> shape) {
    NIBBLE_CHECK(tensors_.contains(name));
    set(name, dtype, std::move(shape), 0);
  }
  void set(const std::string& name, TensorDtype dtype, std::vector<int64_t> shape, int byte) {
    TensorView view;
    view.dtype = dtype;
    view.shape = std::move(shape);
    view.bytes = static_cast<size_t>(view.elements() * tensor_dtype_bytes(dtype));
    bytes_.emplace_back(view.bytes, static_cast<std::byte>(byte));
    view.data = bytes_.back().data();
    tensors_[name] = view;
  }
  TensorView& at(const std::string& name) { return tensors_.at(name); }

  Checkpoint write() {
    const std::string path = dir_.file("model" + std::to_string(written_++));
    check(write_checkpoint(path, tensors_, config));
    return open_checkpoint(path);
  }
  Status load(const ModelOptions& options = {}) {
    const Checkpoint checkpoint = write();
    return Model::load(checkpoint, options).status();
  }

 private:
  Checkpoint source_;
  TensorMap tensors_;
  std::deque<std::vector<std::byte>> bytes_;
  TempDir dir_;
  int written_ = 0;

 public:
  json config;
};

/// The code, and every one of `words` in the message.
void expect_refusal(const Status& status, Code code, const std::vector<std::string>& words) {
  EXPECT_EQ(status.code(), code) << status.message();
  for (const std::string& word : words) {
    EXPECT_NE(status.message().find(word), std::string::npos)
        << "no '" << word << "' in: " << status.message();
  }
}

TEST(ModelRefusal, TensorThatIsMissing) {
  for (const char* name :
       {"model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight",
        "model.norm.weight", "lm_head.weight"}) {
    Edited edited("qwen3");
    edited.remove(name);
    expect_refusal(edited.load(), Code::corrupt_file, {name});
  }
  for (const char* name : {"model.layers.0.pre_feedforward_layernorm.weight",
                           "model.layers.3.post_feedforward_layernorm.weight"}) {
    Edited edited("gemma3");
    edited.remove(name);
    expect_refusal(edited.load(), Code::corrupt_file, {name});
  }
  Edited edited("qwen3");
  edited.remove("model.embed_tokens.weight");
  expect_refusal(edited.load(), Code::corrupt_file, {"embed_tokens.weight"});
}

TEST(ModelRefusal, BiasThatTheModelNeedsIsMissing) {
  for (const char* linear : {"self_attn.q_proj", "self_attn.v_proj"}) {
    Edited edited("qwen2");
    edited.remove(std::string("model.layers.1.") + linear + ".bias");
    expect_refusal(edited.load(), Code::corrupt_file, {linear, ".bias"});
  }
  for (const char* linear :
       {"self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}) {
    Edited edited("llama_bias");
    edited.remove(std::string("model.layers.0.") + linear + ".bias");
    expect_refusal(edited.load(), Code::corrupt_file, {linear, ".bias"});
  }
  Edited edited("qwen2_awq");
  edited.remove("model.layers.0.self_attn.k_proj.bias");
  expect_refusal(edited.load(), Code::corrupt_file, {"k_proj.bias"});
}

TEST(ModelRefusal, ShapeThatDoesNotFitTheConfig) {
  struct Case {
    const char* model;
    const char* name;
    std::vector<int64_t> shape;
    std::vector<std::string> words;  // expected, found
  };
  const Case cases[] = {
      {"qwen3", "model.layers.0.self_attn.q_proj.weight", {120, 48}, {"128", "120"}},
      {"qwen3", "model.layers.1.self_attn.k_proj.weight", {64, 47}, {"48", "47"}},
      {"qwen3", "model.layers.1.mlp.down_proj.weight", {40, 48}, {"40", "48"}},
      {"qwen3", "model.layers.1.mlp.down_proj.weight", {48}, {"48, 40", "[48]"}},
      {"qwen3", "model.layers.1.self_attn.q_norm.weight", {128}, {"[32]", "[128]"}},
      {"qwen3", "model.layers.0.input_layernorm.weight", {47}, {"[48]", "[47]"}},
      {"qwen3", "model.layers.0.input_layernorm.weight", {1, 48}, {"[48]", "[1, 48]"}},
      {"qwen3", "model.norm.weight", {49}, {"[48]", "[49]"}},
      {"qwen3", "model.embed_tokens.weight", {79, 48}, {"80", "79"}},
      {"qwen3", "model.embed_tokens.weight", {80, 50}, {"48", "50"}},
      {"qwen3", "lm_head.weight", {72, 48}, {"80", "72"}},
      {"qwen2", "model.layers.0.self_attn.q_proj.bias", {65}, {"[64]", "[65]"}},
      {"gemma3", "model.layers.0.pre_feedforward_layernorm.weight", {55}, {"[56]", "[55]"}},
  };
  for (const Case& c : cases) {
    Edited edited(c.model);
    edited.replace(c.name, TensorDtype::bf16, c.shape);
    std::string name = c.name;
    if (name.ends_with("proj.weight") || name.starts_with("lm_head")) {
      name.resize(name.size() - std::strlen(".weight"));
    }
    std::vector<std::string> words = c.words;
    words.push_back(name);
    expect_refusal(edited.load(), Code::corrupt_file, words);
  }
  Edited edited("llama_awq");
  edited.config["intermediate_size"] = 96;
  expect_refusal(edited.load(), Code::corrupt_file, {"layers.0.mlp.gate_proj", "96", "64"});
}

TEST(ModelRefusal, TypeThatIsNoWeight) {
  for (const char* name : {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight",
                           "model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"}) {
    Edited edited("qwen3");
    edited.replace(name, TensorDtype::i32, edited.at(name).shape);
    expect_refusal(edited.load(), Code::corrupt_file, {name, "I32"});
  }
}

TEST(ModelRefusal, LinearFormatThatIsNotRun) {
  // GPTQ's layout beside its g_idx
  Edited edited("llama_awq");
  const std::string prefix = "model.layers.0.self_attn.q_proj.";
  edited.replace(prefix + "qweight", TensorDtype::i32, {8, 64});
  edited.set(prefix + "g_idx", TensorDtype::i32, {64}, 0);
  expect_refusal(edited.load(), Code::unsupported, {"q_proj", "gptq"});
}

TEST(ModelRefusal, TiedModelIgnoresAHeadInTheFile) {
  const Golden golden("qwen2");
  Edited edited("qwen2");
  edited.set("lm_head.weight", TensorDtype::bf16, {80, 64}, 0x3f);
  const Checkpoint checkpoint = edited.write();
  Model model = load_model(checkpoint);
  EXPECT_LE(relative_error(logits_of(model, hidden_of(model, golden.tokens)), golden.logits),
            kTolerance);
}

TEST(ModelRefusal, MoreMemoryThanThereIs) {
  Edited edited("llama_awq");
  ModelOptions options;
  options.context = int64_t{1} << 36;
  expect_refusal(edited.load(options), Code::out_of_memory, {"KV cache", "available"});
}

TEST(ModelRefusal, TokensAndPositionsOutOfRange) {
  const Golden golden("llama_awq");
  Model model = load_model(golden.checkpoint);
  KvCache cache = model.make_cache();
  Floats hidden(300 * 64);
  for (const int32_t token : {-1, 80, std::numeric_limits<int32_t>::max()}) {
    const Tokens tokens = {1, token};
    const BatchItem item{&cache, tokens};
    expect_refusal(model.forward({&item, 1}, hidden.data()), Code::invalid_argument,
                   {std::to_string(token), "80"});
    EXPECT_EQ(cache.length(), 0);
  }
  const Tokens long_prompt(257, 3);
  const BatchItem item{&cache, long_prompt};
  expect_refusal(model.forward({&item, 1}, hidden.data()), Code::invalid_argument, {"257", "256"});
  EXPECT_EQ(cache.length(), 0);
  feed(model, cache, std::span(long_prompt).first(256), 256);
  const BatchItem one_more{&cache, std::span(long_prompt).first(1)};
  expect_refusal(model.forward({&one_more, 1}, hidden.data()), Code::invalid_argument, {"256"});
  EXPECT_EQ(cache.length(), 256);
}

TEST(ModelRefusal, PlanThatDoesNotFit) {
  const Golden golden("llama_awq");
  Model model = load_model(golden.checkpoint);
  const int64_t layers = model.config().layers;
  expect_refusal(model.set_plan(uniform_plan(layers + 1, Mode::w4a8)), Code::invalid_argument,
                 {"12", "8"});
  const auto run = [&](const ModelPlan& plan) {
    if (Status status = model.set_plan(plan); !status.ok()) return status;
    KvCache cache = model.make_cache();
    Floats hidden(golden.tokens.size() * 64);
    const BatchItem item{&cache, golden.tokens};
    return model.forward({&item, 1}, hidden.data());
  };
  ModelPlan plan = uniform_plan(layers, Mode::w4a8, Granularity::static_group);
  plan.at(1, Slot::o).static_scales = {0.1f};  // of two groups
  expect_refusal(run(plan), Code::invalid_argument, {});
  plan = uniform_plan(layers, Mode::w4a4, Granularity::group);
  plan.at(0, Slot::down).wide_groups = {1, 0, 1};
  expect_refusal(run(plan), Code::invalid_argument, {});
  plan = uniform_plan(layers, Mode::w4a8, Granularity::token);
  plan.at(0, Slot::down).symmetric = false;
  EXPECT_FALSE(run(plan).ok());
  EXPECT_TRUE(run(uniform_plan(layers, Mode::w4a8)).ok());
}

TEST(ModelRefusal, NotANumber) {
  for (const char* name : {"model.layers.0.input_layernorm.weight", "model.norm.weight",
                           "model.layers.1.post_attention_layernorm.weight"}) {
    for (const Mode mode : {Mode::w4a16, Mode::w4a8, Mode::w4a4}) {
      Edited edited("llama_awq");
      edited.set(name, TensorDtype::f16, {64}, 0x7e);  // 0x7e7e: NaN
      const Checkpoint checkpoint = edited.write();
      Model model = load_model(checkpoint);
      check(model.set_plan(uniform_plan(model.config().layers, mode)));
      KvCache cache = model.make_cache();
      const Tokens tokens = {1, 2, 3};
      Floats hidden(3 * 64), logits(3 * 80);
      const BatchItem item{&cache, tokens};
      Status status = model.forward({&item, 1}, hidden.data());
      if (status.ok()) status = model.logits(hidden.data(), 3, logits.data());
      expect_refusal(status, Code::non_finite, {});
    }
  }
}

/// What a cache in f16 cannot hold is said, not stored as infinity.
TEST(ModelRefusal, ValueBeyondTheRangeOfTheCache) {
  Edited edited("qwen2");
  const std::string bias = "model.layers.1.self_attn.v_proj.bias";
  edited.set(bias, TensorDtype::bf16, {32}, 0x4f);  // 0x4f4f: 3.5e9
  const Checkpoint checkpoint = edited.write();
  const Tokens tokens = {1, 2, 3};
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    Model model = load_model(checkpoint, 2, dtype);
    KvCache cache = model.make_cache();
    Floats hidden(3 * 64);
    const BatchItem item{&cache, tokens};
    const Status status = model.forward({&item, 1}, hidden.data());
    if (dtype == Dtype::bf16) {
      EXPECT_TRUE(status.ok()) << status.message();
    } else {
      expect_refusal(status, Code::non_finite, {"layer 1", "f16"});
    }
  }
}

/// What a failed call left in the cache beyond its length must not be seen.
TEST(ModelRefusal, SequenceGoesOnAfterAFailedForward) {
  Edited edited("qwen2");
  const std::string name = "model.layers.0.self_attn.v_proj.bias";
  edited.set(name, TensorDtype::bf16, {32}, 0x4f);  // beyond f16, for every token
  const Checkpoint bad = edited.write(), good = open_checkpoint(golden_directory("qwen2"));
  Model failing = load_model(bad, 2, Dtype::f16), model = load_model(good, 2, Dtype::f16);
  const Tokens tokens = {1, 2, 3, 4, 5, 6};
  KvCache cache = model.make_cache();
  const Floats start = feed(model, cache, std::span(tokens).first(2), 2);
  Floats hidden(6 * 64);
  const BatchItem item{&cache, tokens};
  EXPECT_EQ(failing.forward({&item, 1}, hidden.data()).code(), Code::non_finite);
  EXPECT_EQ(cache.length(), 2);
  Floats rest = feed(model, cache, std::span(tokens).subspan(2), 1);
  rest.insert(rest.begin(), start.begin(), start.end());
  EXPECT_TRUE(same_bits(rest, hidden_of(model, tokens), 64));
}

// ---- config.json -------------------------------------------------------------------------------

ModelConfig parse(const json& document) {
  Result<ModelConfig> config = parse_model_config(document);
  check(config.status());
  return std::move(*config);
}

json llama31_8b() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256})");
}

json gemma3_4b() {
  return json::parse(R"({
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
    "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                    "sliding_window": 1024},
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                      "model_type": "siglip_vision_model", "num_attention_heads": 16,
                      "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false}})");
}

TEST(ModelConfig, Llama31) {
  const ModelConfig c = parse(llama31_8b());
  EXPECT_EQ(c.architecture, Architecture::llama);
  EXPECT_EQ(c.layers, 32);
  EXPECT_EQ(c.hidden, 4096);
  EXPECT_EQ(c.intermediate, 14336);
  EXPECT_EQ(c.heads, 32);
  EXPECT_EQ(c.kv_heads, 8);
  EXPECT_EQ(c.groups(), 4);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.vocab, 128256);
  EXPECT_EQ(c.max_positions, 131072);
  EXPECT_EQ(c.norm_eps, 1e-5);
  EXPECT_FALSE(c.unit_offset_norm || c.qk_norm || c.post_norms || c.tied_head);
  EXPECT_EQ(c.activation, Activation::silu);
  EXPECT_DOUBLE_EQ(c.attention_scale, 1 / std::sqrt(128.0));
  EXPECT_EQ(c.embedding_scale, 1);
  EXPECT_EQ(c.rope.theta, 500000);
  EXPECT_TRUE(c.rope.llama3);
  EXPECT_EQ(c.rope.factor, 8);
  EXPECT_EQ(c.rope.low_freq_factor, 1);
  EXPECT_EQ(c.rope.high_freq_factor, 4);
  EXPECT_EQ(c.rope.original_context, 8192);
  EXPECT_EQ(c.rope.linear_factor, 1);
  EXPECT_EQ(c.window, std::vector<int64_t>(32, 0));
  EXPECT_EQ(c.eos_tokens, (std::vector<int32_t>{128001, 128008, 128009}));
  EXPECT_EQ(c.bos_token, 128000);
}

TEST(ModelConfig, Llama31AsTransformers5WritesIt) {
  json document = llama31_8b();
  json rope = document["rope_scaling"];
  rope["rope_theta"] = document["rope_theta"];
  document.erase("rope_scaling");
  document.erase("rope_theta");
  document["rope_parameters"] = rope;
  document["head_dim"] = 128;
  const ModelConfig c = parse(document);
  EXPECT_EQ(c.rope.theta, 500000);
  EXPECT_TRUE(c.rope.llama3);
  EXPECT_EQ(c.rope.factor, 8);
  EXPECT_EQ(c.rope.original_context, 8192);
}

TEST(ModelConfig, RopeTypeUnderItsOldName) {
  json document = llama31_8b();
  document["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
  const ModelConfig c = parse(document);
  EXPECT_EQ(c.rope.linear_factor, 4);
  EXPECT_FALSE(c.rope.llama3);
  document["rope_scaling"] = nullptr;
  EXPECT_EQ(parse(document).rope.linear_factor, 1);
}

TEST(ModelConfig, Mistral01) {
  json document = json::parse(R"({
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
    "use_cache": true, "vocab_size": 32000})");
  const ModelConfig c = parse(document);
  EXPECT_EQ(c.architecture, Architecture::mistral);
  EXPECT_EQ(c.kv_heads, 8);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.rope.theta, 10000);
  EXPECT_EQ(c.local_rope.theta, 10000);
  EXPECT_EQ(c.window, std::vector<int64_t>(32, 4096));
  EXPECT_EQ(c.eos_tokens, std::vector<int32_t>{2});
  document["sliding_window"] = nullptr;  // v0.2 and later
  document["rope_theta"] = 1000000.0;
  EXPECT_EQ(parse(document).window, std::vector<int64_t>(32, 0));
  EXPECT_EQ(parse(document).rope.theta, 1000000);
}

TEST(ModelConfig, Qwen25) {
  json document = json::parse(R"({
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false,
    "vocab_size": 151936})");
  const ModelConfig c = parse(document);
  EXPECT_EQ(c.architecture, Architecture::qwen2);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.groups(), 7);
  EXPECT_TRUE(c.tied_head);
  EXPECT_FALSE(c.qk_norm);
  EXPECT_EQ(c.window, std::vector<int64_t>(24, 0));
  document["use_sliding_window"] = true;
  const std::vector<int64_t> window = parse(document).window;
  EXPECT_EQ(window[20], 0);
  EXPECT_EQ(window[21], 32768);
}

TEST(ModelConfig, Qwen3) {
  const ModelConfig c = parse(json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "quantization_config": {"bits": 4, "group_size": 128, "modules_to_not_convert": null,
                            "quant_method": "awq", "version": "gemm", "zero_point": true},
    "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
    "tie_word_embeddings": true, "torch_dtype": "float16", "transformers_version": "4.51.3",
    "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})"));
  EXPECT_EQ(c.architecture, Architecture::qwen3);
  EXPECT_EQ(c.heads * c.head_dim, 4096);
  EXPECT_EQ(c.hidden, 2560);
  EXPECT_TRUE(c.qk_norm && c.tied_head);
  EXPECT_FALSE(c.unit_offset_norm || c.post_norms);
  EXPECT_EQ(c.rope.theta, 1000000);
  EXPECT_EQ(c.window, std::vector<int64_t>(36, 0));
}

TEST(ModelConfig, Gemma3WithVision) {
  const ModelConfig c = parse(gemma3_4b());
  EXPECT_EQ(c.architecture, Architecture::gemma3);
  EXPECT_EQ(c.layers, 34);
  EXPECT_EQ(c.hidden, 2560);
  EXPECT_EQ(c.intermediate, 10240);
  EXPECT_EQ(c.heads, 8);
  EXPECT_EQ(c.kv_heads, 4);
  EXPECT_EQ(c.head_dim, 256);
  EXPECT_EQ(c.vocab, 262208);
  EXPECT_EQ(c.max_positions, 131072);
  EXPECT_EQ(c.norm_eps, 1e-6);
  EXPECT_TRUE(c.unit_offset_norm && c.qk_norm && c.post_norms && c.tied_head);
  EXPECT_EQ(c.activation, Activation::gelu_tanh);
  EXPECT_DOUBLE_EQ(c.attention_scale, 1 / 16.0);
  EXPECT_NEAR(c.embedding_scale, std::sqrt(2560.0), 0.1);
  EXPECT_EQ(c.rope.theta, 1000000);
  EXPECT_EQ(c.rope.linear_factor, 8);
  EXPECT_EQ(c.local_rope.theta, 10000);
  EXPECT_EQ(c.local_rope.linear_factor, 1);
  for (size_t i = 0; i < 34; ++i) EXPECT_EQ(c.window[i], (i + 1) % 6 == 0 ? 0 : 1024) << i;
  // above text_config in this file, and what a chat ends with
  EXPECT_EQ(c.eos_tokens, (std::vector<int32_t>{1, 106}));
}

TEST(ModelConfig, Gemma3AsTransformers5WritesIt) {
  json document = gemma3_4b();
  json& text = document["text_config"];
  text.erase("rope_scaling");
  text["rope_parameters"] = {
      {"full_attention", {{"factor", 8.0}, {"rope_theta", 1e6}, {"rope_type", "linear"}}},
      {"sliding_attention", {{"rope_theta", 5000.0}, {"rope_type", "default"}}}};
  text["layer_types"] = json::array();
  for (int i = 0; i < 34; ++i) {
    text["layer_types"].push_back(i % 4 == 1 ? "full_attention" : "sliding_attention");
  }
  text["query_pre_attn_scalar"] = 168;
  const ModelConfig c = parse(document);
  EXPECT_EQ(c.rope.linear_factor, 8);
  EXPECT_EQ(c.rope.theta, 1000000);
  EXPECT_EQ(c.local_rope.theta, 5000);
  EXPECT_EQ(c.local_rope.linear_factor, 1);
  EXPECT_DOUBLE_EQ(c.attention_scale, 1 / std::sqrt(168.0));
  for (size_t i = 0; i < 34; ++i) EXPECT_EQ(c.window[i], i % 4 == 1 ? 0 : 1024) << i;
}

TEST(ModelConfig, WhatIsNotRunIsUnsupported) {
  const auto refused = [](json document, const char* pointer, const json& value,
                          const std::vector<std::string>& words) {
    document[json::json_pointer(pointer)] = value;
    expect_refusal(parse_model_config(document).status(), Code::unsupported, words);
  };
  refused(llama31_8b(), "/architectures", {"Phi3ForCausalLM"}, {"Phi3ForCausalLM"});
  refused(llama31_8b(), "/architectures", {"Qwen3MoeForCausalLM"}, {"Qwen3MoeForCausalLM"});
  refused(llama31_8b(), "/rope_scaling/rope_type", "yarn", {"yarn"});
  refused(llama31_8b(), "/rope_scaling/rope_type", "dynamic", {"dynamic"});
  refused(llama31_8b(), "/rope_parameters", {{"rope_type", "longrope"}}, {"longrope"});
  refused(llama31_8b(), "/rope_parameters",
          {{"rope_type", "default"}, {"rope_theta", 1e4}, {"partial_rotary_factor", 0.5}},
          {"partial_rotary_factor"});
  refused(llama31_8b(), "/hidden_act", "relu", {"relu"});
  refused(gemma3_4b(), "/text_config/hidden_activation", "gelu", {"gelu"});
  refused(gemma3_4b(), "/text_config/attn_logit_softcapping", 50.0, {"attn_logit_softcapping"});
  refused(gemma3_4b(), "/text_config/final_logit_softcapping", 30.0, {"final_logit_softcapping"});
  refused(gemma3_4b(), "/text_config/use_bidirectional_attention", true, {"bidirectional"});
}

TEST(ModelConfig, KeysThatAreMissingOrWrongAreNamed) {
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "vocab_size"}) {
    json document = llama31_8b();
    document.erase(key);
    expect_refusal(parse_model_config(document).status(), Code::corrupt_file, {key});
    for (const json& wrong : {json("4096"), json(-1), json(0), json(1.5), json::array({1}),
                              json(int64_t{1} << 40), json(UINT64_MAX)}) {
      document[key] = wrong;
      expect_refusal(parse_model_config(document).status(), Code::corrupt_file, {key});
    }
  }
  const auto corrupt = [](const char* key, const json& value,
                          const std::vector<std::string>& words) {
    json document = llama31_8b();
    document[key] = value;
    expect_refusal(parse_model_config(document).status(), Code::corrupt_file, words);
  };
  corrupt("num_key_value_heads", 5, {"32", "5"});
  corrupt("num_key_value_heads", 64, {"num_key_value_heads", "64"});
  corrupt("head_dim", 127, {"head_dim", "127"});
  corrupt("rms_norm_eps", "small", {"rms_norm_eps", "small"});
  corrupt("rms_norm_eps", -1.0, {"rms_norm_eps", "-1"});
  corrupt("rope_theta", 0.0, {"rope_theta"});
  corrupt("rope_scaling", "llama3", {"rope_scaling"});
  corrupt("rope_scaling", {{"rope_type", "linear"}}, {"factor"});
  corrupt("rope_scaling", {{"rope_type", 3}}, {"rope_type"});
  corrupt("tie_word_embeddings", "no", {"tie_word_embeddings"});
  corrupt("eos_token_id", json::array({1, "x"}), {"eos_token_id"});
  corrupt("eos_token_id", -5, {"eos_token_id"});
  json document = gemma3_4b();
  document["text_config"]["layer_types"] = json::array({"full_attention"});
  expect_refusal(parse_model_config(document).status(), Code::corrupt_file, {"layer_types", "34"});
  document["text_config"]["layer_types"] = json(std::vector<std::string>(34, "chunked_attention"));
  EXPECT_FALSE(parse_model_config(document).ok());
  for (const json& nothing : {json(), json::array(), json("llama")}) {
    EXPECT_EQ(parse_model_config(nothing).status().code(), Code::corrupt_file);
  }
}

}  // namespace
}  // namespace nibble::test
