// Whole models on a GPU against the same models on the CPU, and what a GPU adds: pages, passes,
// graphs. The same tests run on the device of host/host_device.h, where there is none.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "gemm/cuda/gemm_cuda.h"
#include "generation.h"
#include "model/cpu_runner.h"
#include "model/cuda/runner.h"

namespace nibble::cuda::testing {
namespace {

#define NIBBLE_NEEDS_GPU() \
  if (const auto device = device_info(0); !device.ok()) GTEST_SKIP() << device.status().message()

/// One of the small models of tests/golden on both devices.
struct Pair {
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<Model> model;
  std::unique_ptr<CpuRunner> cpu;
  std::unique_ptr<Runner> gpu;
};

Checkpoint open_golden(const std::string& name) {
  Result<Checkpoint> opened = Checkpoint::open(NIBBLE_GOLDEN_MODELS "/" + name);
  EXPECT_TRUE(opened.ok()) << opened.status().message();
  return std::move(*opened);
}

void load(const std::string& name, const ModelOptions& options, Pair& pair) {
  pair.checkpoint = std::make_unique<Checkpoint>(open_golden(name));
  Result<Model> model = Model::load(*pair.checkpoint, options);
  ASSERT_TRUE(model.ok()) << model.status().message();
  pair.model = std::make_unique<Model>(std::move(*model));
  pair.cpu = std::make_unique<CpuRunner>(*pair.model);
  Result<std::unique_ptr<Runner>> gpu = make_runner(*pair.checkpoint, options);
  ASSERT_TRUE(gpu.ok()) << gpu.status().message();
  pair.gpu = std::move(*gpu);
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>(random() % static_cast<uint64_t>(vocab));
  }
  return tokens;
}

/// Logits of every position; the tokens go in by pieces of `piece`.
std::vector<float> all_logits(Runner& runner, const std::vector<int32_t>& tokens, size_t piece) {
  const auto width = static_cast<size_t>(runner.config().hidden);
  const auto vocab = static_cast<size_t>(runner.config().vocab);
  std::vector<float> hidden(tokens.size() * width), logits(tokens.size() * vocab);
  const std::unique_ptr<SequenceCache> cache = runner.make_cache();
  for (size_t at = 0; at < tokens.size(); at += piece) {
    const SequenceItem item{cache.get(), {tokens.data() + at, std::min(piece, tokens.size() - at)}};
    const Status status = runner.forward({&item, 1}, HiddenRows::all, &hidden[at * width]);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  const Status status =
      runner.logits(hidden.data(), static_cast<int64_t>(tokens.size()), logits.data());
  EXPECT_TRUE(status.ok()) << status.message();
  return logits;
}

double rms_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += d * d;
  }
  return std::sqrt(sum / static_cast<double>(a.size()));
}

double rms(const std::vector<float>& a) { return rms_difference(a, std::vector<float>(a.size())); }

Status set_mode(Runner& runner, Mode mode) {
  return runner.quantized() ? runner.set_plan(uniform_plan(runner.config().layers, mode))
                            : Status();
}

/// What rounding rows to 16 bits between products does: about 8 roundings a layer, each of at most
/// half a unit in the last of `bits` places, added up as if all pulled in one direction.
double rounding_bound(const ModelConfig& config, int bits) {
  return 8.0 * static_cast<double>(config.layers + 1) * std::ldexp(1.0, -bits);
}

TEST(CudaModel, LogitsAreTheCpusButForRounding) {
  NIBBLE_NEEDS_GPU();
  for (const char* name : {"llama_awq", "qwen2_awq", "gemma3_awq", "qwen3", "qwen2_window",
                           "llama3_rope", "qwen2", "gemma3"}) {
    SCOPED_TRACE(name);
    Pair pair;
    ASSERT_NO_FATAL_FAILURE(
        load(name, {.threads = 2, .kv_dtype = Dtype::f16, .context = 64}, pair));
    const ModelConfig& config = pair.cpu->config();
    const int bits = pair.gpu->quantized() || pair.gpu->head_name() == "f16" ? 11 : 8;
    const std::vector<int32_t> tokens = random_tokens(40, config.vocab, 1);
    ASSERT_TRUE(set_mode(*pair.cpu, Mode::w4a16).ok());
    ASSERT_TRUE(set_mode(*pair.gpu, Mode::w4a16).ok());
    const std::vector<float> expected = all_logits(*pair.cpu, tokens, 64);
    for (const size_t piece : {size_t{64}, size_t{7}, size_t{1}}) {
      const std::vector<float> found = all_logits(*pair.gpu, tokens, piece);
      EXPECT_LE(rms_difference(found, expected), rounding_bound(config, bits) * rms(expected))
          << "pieces of " << piece;
    }
  }
}

TEST(CudaModel, QuantizedActivationsCostWhatTheyCostOnTheCpu) {
  NIBBLE_NEEDS_GPU();
  for (const char* name : {"llama_awq", "qwen2_awq", "gemma3_awq"}) {
    SCOPED_TRACE(name);
    Pair pair;
    ASSERT_NO_FATAL_FAILURE(
        load(name, {.threads = 2, .kv_dtype = Dtype::f16, .context = 64}, pair));
    const std::vector<int32_t> tokens = random_tokens(40, pair.cpu->config().vocab, 2);
    ASSERT_TRUE(set_mode(*pair.cpu, Mode::w4a16).ok());
    const std::vector<float> exact = all_logits(*pair.cpu, tokens, 64);
    for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
      SCOPED_TRACE(mode_name(mode));
      ASSERT_TRUE(set_mode(*pair.cpu, mode).ok());
      ASSERT_TRUE(set_mode(*pair.gpu, mode).ok());
      const std::vector<float> expected = all_logits(*pair.cpu, tokens, 64);
      const std::vector<float> found = all_logits(*pair.gpu, tokens, 64);
      // A rounded row can fall to the next code, which is a step of quantization; these models have
      // few of them. So both are as far from w4a16, and no further apart than that.
      EXPECT_LE(rms_difference(found, expected), rms_difference(exact, expected));
      EXPECT_NEAR(rms_difference(found, exact) / rms_difference(expected, exact), 1, 0.5);
    }
  }
}

/// Of numbers with 4 significant bits: the CPU has no such mode, so w4a16 is what they are held to.
TEST(CudaModel, E4m3ActivationsRoundToFourBits) {
  NIBBLE_NEEDS_GPU();
  for (const char* name : {"llama_awq", "qwen2_awq", "gemma3_awq"}) {
    SCOPED_TRACE(name);
    Pair pair;
    ASSERT_NO_FATAL_FAILURE(
        load(name, {.threads = 2, .kv_dtype = Dtype::f16, .context = 64}, pair));
    const std::vector<int32_t> tokens = random_tokens(40, pair.cpu->config().vocab, 2);
    const auto logits = [&](Runner& runner, Mode mode, size_t piece) {
      EXPECT_TRUE(set_mode(runner, mode).ok());
      return all_logits(runner, tokens, piece);
    };
    const std::vector<float> exact = logits(*pair.cpu, Mode::w4a16, 64);
    const double w4a8 = rms_difference(logits(*pair.cpu, Mode::w4a8, 64), exact);
    const double w4a4 = rms_difference(logits(*pair.cpu, Mode::w4a4, 64), exact);
    ModelPlan fixed =
        uniform_plan(pair.cpu->config().layers, Mode::w4a8_fp8, Granularity::static_tensor);
    for (LinearSpec& spec : fixed.specs) spec.static_scales = {0.125f};  // a power of 2: no loss
    for (const size_t piece : {size_t{64}, size_t{7}}) {                 // by wgmma, and by slabs
      SCOPED_TRACE(piece);
      const std::vector<float> found = logits(*pair.gpu, Mode::w4a8_fp8, piece);
      EXPECT_GT(rms_difference(found, exact), w4a8);
      EXPECT_LT(rms_difference(found, exact), w4a4);
      ASSERT_TRUE(pair.gpu->set_plan(fixed).ok());
      EXPECT_LT(rms_difference(all_logits(*pair.gpu, tokens, piece), exact), w4a4);
    }
    const std::vector<std::string> kernels = pair.gpu->kernels(nullptr);
    const auto of_e4m3 = [](const std::string& kernel) { return kernel.starts_with("w4a8_fp8_"); };
    EXPECT_TRUE(std::any_of(kernels.begin(), kernels.end(), of_e4m3));

    const ModelPlan by_group =
        uniform_plan(pair.cpu->config().layers, Mode::w4a8_fp8, Granularity::group);
    ASSERT_TRUE(pair.gpu->set_plan(by_group).ok());
    const std::unique_ptr<SequenceCache> cache = pair.gpu->make_cache();
    const SequenceItem item{cache.get(), tokens};
    std::vector<float> hidden(tokens.size() * static_cast<size_t>(pair.gpu->config().hidden));
    const Status refused = pair.gpu->forward({&item, 1}, HiddenRows::all, hidden.data());
    EXPECT_EQ(refused.code(), Code::unsupported);
    EXPECT_NE(refused.message().find("w4a8-fp8"), std::string::npos) << refused.message();
    ASSERT_TRUE(set_mode(*pair.cpu, Mode::w4a8_fp8).ok());
    const std::unique_ptr<SequenceCache> cpu_cache = pair.cpu->make_cache();
    const SequenceItem cpu_item{cpu_cache.get(), tokens};
    const Status on_cpu = pair.cpu->forward({&cpu_item, 1}, HiddenRows::all, hidden.data());
    EXPECT_EQ(on_cpu.code(), Code::unsupported);
    EXPECT_NE(on_cpu.message().find("w4a8-fp8"), std::string::npos) << on_cpu.message();
  }
}

TEST(CudaModel, EveryActivationScaleRuns) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(
      load("llama_awq", {.threads = 2, .kv_dtype = Dtype::f16, .context = 64}, pair));
  const std::vector<int32_t> tokens = random_tokens(30, 80, 11);
  const int64_t layers = pair.cpu->config().layers;
  ASSERT_TRUE(set_mode(*pair.cpu, Mode::w4a16).ok());
  const std::vector<float> exact = all_logits(*pair.cpu, tokens, 64);
  for (const Granularity granularity :
       {Granularity::tensor, Granularity::token, Granularity::group}) {
    SCOPED_TRACE(granularity_name(granularity));
    const ModelPlan plan = uniform_plan(layers, Mode::w4a8, granularity);
    ASSERT_TRUE(pair.cpu->set_plan(plan).ok());
    ASSERT_TRUE(pair.gpu->set_plan(plan).ok());
    const std::vector<float> expected = all_logits(*pair.cpu, tokens, 64);
    const std::vector<float> found = all_logits(*pair.gpu, tokens, 64);
    EXPECT_LE(rms_difference(found, expected), rms_difference(exact, expected));
  }
  ModelPlan fixed = uniform_plan(layers, Mode::w4a8, Granularity::static_tensor);
  for (LinearSpec& spec : fixed.specs) spec.static_scales = {0.05f};
  ASSERT_TRUE(pair.cpu->set_plan(fixed).ok());
  ASSERT_TRUE(pair.gpu->set_plan(fixed).ok());
  const std::vector<float> expected = all_logits(*pair.cpu, tokens, 64);
  const std::vector<float> found = all_logits(*pair.gpu, tokens, 64);
  EXPECT_LE(rms_difference(found, expected), rms_difference(exact, expected));

  ModelPlan mixed = uniform_plan(layers, Mode::w4a4, Granularity::group);
  mixed.at(1, Slot::o).wide_groups = {1, 0};
  const Status refused = pair.gpu->set_plan(mixed);
  EXPECT_EQ(refused.code(), Code::unsupported);
  EXPECT_NE(refused.message().find("layer 1, o"), std::string::npos) << refused.message();
}

/// Greedy tokens by graphs of decoding steps, and what reading the whole text at once says of each
/// choice.
TEST(CudaModel, DecodingByGraphsChoosesWhatReadingChooses) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(load("llama_awq", {.threads = 2, .context = 64, .sequences = 3}, pair));
  Runner& gpu = *pair.gpu;
  ASSERT_TRUE(set_mode(gpu, Mode::w4a8).ok());
  const auto vocab = static_cast<size_t>(gpu.config().vocab);
  std::vector<std::vector<int32_t>> texts = {random_tokens(5, 80, 3), random_tokens(9, 80, 4),
                                             random_tokens(1, 80, 5)};
  std::vector<std::unique_ptr<SequenceCache>> caches;
  std::vector<int32_t> next(texts.size());
  std::vector<SequenceItem> items;
  for (const auto& text : texts) {
    caches.push_back(gpu.make_cache());
    items.push_back({caches.back().get(), text});
  }
  ASSERT_TRUE(gpu.greedy(items, next).ok());
  std::vector<size_t> prompts;
  for (const auto& text : texts) prompts.push_back(text.size());
  for (int step = 0; step < 20; ++step) {
    for (size_t i = 0; i < texts.size(); ++i) {
      texts[i].push_back(next[i]);
      items[i].tokens = {&next[i], 1};
    }
    ASSERT_TRUE(gpu.greedy(items, next).ok());
  }
  items.clear();
  caches.clear();
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::vector<float> logits = all_logits(gpu, texts[i], 64);
    for (size_t at = prompts[i] - 1; at + 1 < texts[i].size(); ++at) {
      const float* row = logits.data() + at * vocab;
      const float best = *std::max_element(row, row + vocab);
      // Reading and decoding round apart: a near tie may go either way.
      EXPECT_GE(row[texts[i][at + 1]], best - 0.05f * std::abs(best)) << i << " at " << at;
    }
  }
}

using Rules = std::vector<SamplerOptions>;  // none: greedy

/// Tokens chosen after `text`, one by one, the cache going on from one to the next.
std::vector<int32_t> chosen_tokens(Runner& runner, SequenceCache& cache, const Rules& how,
                                   const std::vector<int32_t>& text, int count) {
  std::vector<int32_t> tokens;
  int32_t next = 0;
  SequenceItem item{&cache, text};
  for (int i = 0; i < count; ++i) {
    const Status status = runner.choose({&item, 1}, how, {&next, 1});
    EXPECT_TRUE(status.ok()) << status.message();
    tokens.push_back(next);
    item.tokens = {&next, 1};
  }
  return tokens;
}

/// The same by forward() and logits(), which begin nothing ahead.
std::vector<int32_t> tokens_from_logits(Runner& runner, SequenceCache& cache, const Rules& how,
                                        const std::vector<int32_t>& text, int count) {
  std::vector<int32_t> tokens;
  std::vector<float> hidden(static_cast<size_t>(runner.config().hidden));
  std::vector<float> logits(static_cast<size_t>(runner.config().vocab));
  int32_t next = 0;
  SequenceItem item{&cache, text};
  for (int i = 0; i < count; ++i) {
    EXPECT_TRUE(runner.forward({&item, 1}, HiddenRows::last, hidden.data()).ok());
    EXPECT_TRUE(runner.logits(hidden.data(), 1, logits.data()).ok());
    next = how.empty() ? argmax(logits) : sample_token(logits, how[0], cache.length());
    tokens.push_back(next);
    item.tokens = {&next, 1};
  }
  return tokens;
}

// The step after that of a single sequence is begun before anybody asks for it.
TEST(CudaModel, AStepBegunAheadLeavesNothingBehind) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(load("llama_awq", {.threads = 2, .context = 96}, pair));
  Runner& gpu = *pair.gpu;
  ASSERT_TRUE(set_mode(gpu, Mode::w4a8).ok());
  const std::vector<int32_t> prompt = random_tokens(60, 80, 11), other = random_tokens(80, 80, 12);
  for (const Rules& how : {Rules{}, Rules{{1.0f, 20, 0.9f, 4}}}) {
    SCOPED_TRACE(how.empty() ? "greedy" : "sampled");
    // After a prompt, up to a token that is not the one that was begun with, and on from there.
    const auto turned = [&](const auto& choose) {
      const std::unique_ptr<SequenceCache> cache = gpu.make_cache();
      std::vector<int32_t> tokens = choose(gpu, *cache, how, prompt, 6);
      const std::vector<int32_t> after = choose(gpu, *cache, how, {(tokens.back() + 1) % 80}, 5);
      EXPECT_EQ(cache->length(), 60 + 5 + 5);
      tokens.insert(tokens.end(), after.begin(), after.end());
      return tokens;
    };
    const auto fresh = [&](const auto& choose) {
      const std::unique_ptr<SequenceCache> cache = gpu.make_cache();
      return choose(gpu, *cache, how, other, 3);
    };
    const std::vector<int32_t> expected = turned(tokens_from_logits);
    const std::vector<int32_t> expected_fresh = fresh(tokens_from_logits);
    for (int i = 0; i < 3; ++i) {  // kernel by kernel, then by graphs
      EXPECT_EQ(turned(chosen_tokens), expected) << i;
      EXPECT_EQ(fresh(chosen_tokens), expected_fresh) << i;  // in pages of one that is gone
    }
  }
  // Over the border of a page and up to the last position that there is memory for.
  const std::unique_ptr<SequenceCache> cache = gpu.make_cache();
  EXPECT_EQ(chosen_tokens(gpu, *cache, {}, prompt, 37).size(), 37u);
  EXPECT_EQ(cache->length(), 96);
  int32_t next = 0;
  const SequenceItem beyond{cache.get(), {&next, 1}};
  EXPECT_EQ(gpu.greedy({&beyond, 1}, {&next, 1}).code(), Code::out_of_memory);
}

TEST(CudaModel, SamplingDrawsWhatTheHostDraws) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(load("llama_awq", {.threads = 2, .context = 64, .sequences = 4}, pair));
  Runner& gpu = *pair.gpu;
  ASSERT_TRUE(set_mode(gpu, Mode::w4a8).ok());
  const Rules how = {{1.0f, 0, 1.0f, 1}, {}, {0.7f, 10, 1.0f, 2}, {1.5f, 0, 0.8f, 3}};
  std::vector<std::unique_ptr<SequenceCache>> caches;
  std::vector<SequenceItem> items;
  std::vector<int32_t> next = random_tokens(4, 80, 21);
  for (size_t i = 0; i < how.size(); ++i) {
    caches.push_back(gpu.make_cache());
    items.push_back({caches.back().get(), {&next[i], 1}});
  }
  const auto width = static_cast<size_t>(gpu.config().hidden);
  const auto vocab = static_cast<size_t>(gpu.config().vocab);
  std::vector<float> hidden(how.size() * width), logits(how.size() * vocab);
  for (int step = 0; step < 12; ++step) {
    // The same step twice: what the first has written is written again.
    ASSERT_TRUE(gpu.forward(items, HiddenRows::last, hidden.data()).ok());
    ASSERT_TRUE(gpu.logits(hidden.data(), 4, logits.data()).ok());
    std::vector<int32_t> expected;
    for (size_t i = 0; i < how.size(); ++i) {
      expected.push_back(
          sample_token(std::span(logits).subspan(i * vocab, vocab), how[i], step + 1));
      caches[i]->set_length(step);
    }
    ASSERT_TRUE(gpu.choose(items, how, next).ok());
    EXPECT_EQ(next, expected) << step;
  }
}

TEST(CudaModel, SameInputSameBits) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(load("gemma3_awq", {.threads = 2, .context = 64}, pair));
  ASSERT_TRUE(set_mode(*pair.gpu, Mode::w4a8).ok());
  const std::vector<int32_t> tokens = random_tokens(50, pair.gpu->config().vocab, 6);
  EXPECT_EQ(all_logits(*pair.gpu, tokens, 13), all_logits(*pair.gpu, tokens, 13));
}

/// States after reading a prompt and after each of `steps` tokens that follow it, greedily; beside
/// `others` sequences.
std::vector<float> states_beside(Runner& runner, const std::vector<int32_t>& prompt, int steps,
                                 size_t others) {
  const auto width = static_cast<size_t>(runner.config().hidden);
  std::vector<std::vector<int32_t>> texts = {prompt};
  for (size_t i = 0; i < others; ++i) {
    texts.push_back(random_tokens(static_cast<int64_t>(3 + 5 * i), 80, static_cast<uint32_t>(i)));
  }
  std::vector<std::unique_ptr<SequenceCache>> caches;
  std::vector<SequenceItem> items;
  for (const auto& text : texts) {
    caches.push_back(runner.make_cache());
    items.push_back({caches.back().get(), text});
  }
  std::vector<float> all, states(texts.size() * width);
  std::vector<int32_t> next(texts.size());
  const auto keep = [&] { all.insert(all.end(), states.begin(), states.begin() + width); };
  EXPECT_TRUE(runner.forward(items, HiddenRows::last, states.data()).ok());
  keep();
  for (size_t i = 0; i < texts.size(); ++i) items[i].tokens = {&next[i], 1};
  for (int step = 0; step < steps; ++step) {
    EXPECT_TRUE(runner.forward(items, HiddenRows::last, states.data()).ok());
    keep();
    EXPECT_TRUE(runner.greedy(items, next).ok());
  }
  return all;
}

TEST(CudaModel, BatchInvariantMeansTheSameBits) {
  NIBBLE_NEEDS_GPU();
  for (const char* name : {"llama_awq", "gemma3_awq"}) {
    Pair pair;
    ASSERT_NO_FATAL_FAILURE(
        load(name, {.threads = 2, .context = 128, .sequences = 6, .batch_invariant = true}, pair));
    for (const Mode mode : {Mode::w4a16, Mode::w4a8, Mode::w4a8_fp8, Mode::w4a4}) {
      SCOPED_TRACE(std::string(name) + " " + mode_name(mode));
      ASSERT_TRUE(set_mode(*pair.gpu, mode).ok());
      const std::vector<int32_t> prompt = random_tokens(30, 80, 9);
      const std::vector<float> alone = states_beside(*pair.gpu, prompt, 8, 0);
      EXPECT_EQ(states_beside(*pair.gpu, prompt, 8, 2), alone);
      EXPECT_EQ(states_beside(*pair.gpu, prompt, 8, 5), alone);
    }
  }
}

size_t free_memory() {
  size_t free = 0, total = 0;
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  return free;
}

TEST(CudaModel, AThousandRequestsLeaveNothingBehind) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(load("llama_awq", {.threads = 2, .context = 64, .sequences = 16}, pair));
  ASSERT_TRUE(set_mode(*pair.gpu, Mode::w4a8).ok());
  std::mt19937 random(7);
  const auto run = [&](size_t count) {
    std::vector<Sequence> sequences(count);
    for (size_t i = 0; i < count; ++i) {
      const auto length = static_cast<int64_t>(1 + random() % 40);
      sequences[i].prompt = random_tokens(length, 80, static_cast<uint32_t>(random()));
      sequences[i].limit = static_cast<int64_t>(1 + random() % 20);
    }
    GenerateOptions options;
    options.batch = 16;
    options.pass_tokens = 100;
    GenerateTimes times;
    const Status status = generate(*pair.gpu, sequences, options, times);
    ASSERT_TRUE(status.ok()) << status.message();
    for (const Sequence& sequence : sequences) {
      ASSERT_EQ(static_cast<int64_t>(sequence.tokens.size()), sequence.limit);
    }
  };
  ASSERT_NO_FATAL_FAILURE(run(200));  // graphs for every number of sequences
  const size_t before = free_memory();
  ASSERT_NO_FATAL_FAILURE(run(1000));
  EXPECT_EQ(free_memory(), before);
}

TEST(CudaModel, OperationsAreTimedWithoutChangingWhatComesOut) {
  NIBBLE_NEEDS_GPU();
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(load("qwen2_awq", {.threads = 2, .context = 64, .sequences = 3}, pair));
  ASSERT_TRUE(set_mode(*pair.gpu, Mode::w4a8).ok());
  const std::vector<int32_t> tokens = random_tokens(20, 80, 10);
  const auto after = [&](bool timed) {
    const std::unique_ptr<SequenceCache> cache = pair.gpu->make_cache();
    std::vector<int32_t> next(1);
    for (const size_t count : {size_t{19}, size_t{1}}) {  // a prompt, then a step
      const SequenceItem item{cache.get(), {tokens.data() + 20 - count, count}};
      if (!timed) {
        EXPECT_TRUE(pair.gpu->greedy({&item, 1}, next).ok());
        continue;
      }
      const auto times = pair.gpu->profile({&item, 1});
      EXPECT_TRUE(times.ok()) << times.status().message();
      if (!times.ok()) continue;
      const auto found = std::find_if(times->begin(), times->end(), [](const OperationTime& time) {
        return time.name.find("gate_up product") != std::string::npos;
      });
      EXPECT_NE(found, times->end());
      if (found != times->end()) {
        EXPECT_EQ(found->launches, pair.gpu->config().layers);
      }
    }
    EXPECT_EQ(cache->length(), 20);
    const SequenceItem item{cache.get(), {tokens.data(), 1}};
    EXPECT_TRUE(pair.gpu->greedy({&item, 1}, next).ok());
    return next[0];
  };
  for (const bool invariant : {false, true}) {
    pair.gpu->set_batch_invariant(invariant);
    EXPECT_EQ(after(true), after(false)) << invariant;
    std::vector<std::unique_ptr<SequenceCache>> caches;
    std::vector<SequenceItem> step;
    for (int i = 0; i < 2; ++i) {
      caches.push_back(pair.gpu->make_cache());
      step.push_back({caches.back().get(), {tokens.data(), 1}});
    }
    const auto times = pair.gpu->profile(step);
    EXPECT_TRUE(times.ok()) << times.status().message();
  }
}

TEST(CudaModel, RefusesWhatDoesNotFit) {
  NIBBLE_NEEDS_GPU();
  const Checkpoint checkpoint = open_golden("llama_awq");
  const auto refusal = [&](const ModelOptions& options) {
    const Result<std::unique_ptr<Runner>> runner = make_runner(checkpoint, options);
    EXPECT_FALSE(runner.ok());
    return runner.status();
  };
  EXPECT_EQ(refusal({.int8_head = true}).code(), Code::unsupported);
  EXPECT_EQ(refusal({.kv_dtype = Dtype::f32}).code(), Code::unsupported);
  const Status large = refusal({.context = int64_t{1} << 24, .sequences = 1000});
  EXPECT_EQ(large.code(), Code::out_of_memory);
  EXPECT_NE(large.message().find("KV cache"), std::string::npos);

  Result<std::unique_ptr<Runner>> runner = make_runner(checkpoint, {.context = 16});
  ASSERT_TRUE(runner.ok()) << runner.status().message();
  const std::vector<int32_t> tokens = random_tokens(17, 80, 8);
  const std::unique_ptr<SequenceCache> cache = (*runner)->make_cache();
  const std::unique_ptr<SequenceCache> second = (*runner)->make_cache();
  std::vector<float> hidden(17 * 64);
  const auto read = [&](SequenceCache* into, size_t count, int32_t first) {
    std::vector<int32_t> text(tokens.begin(), tokens.begin() + static_cast<int64_t>(count));
    text[0] = first;
    const SequenceItem item{into, text};
    return (*runner)->forward({&item, 1}, HiddenRows::all, hidden.data());
  };
  EXPECT_EQ(read(cache.get(), 17, 1).code(), Code::out_of_memory);
  EXPECT_EQ(read(cache.get(), 3, 80).code(), Code::invalid_argument);
  EXPECT_TRUE(read(cache.get(), 16, 1).ok());
  EXPECT_EQ(read(second.get(), 3, 1).code(), Code::out_of_memory);  // memory for one sequence
}

}  // namespace
}  // namespace nibble::cuda::testing
