// `nibble quantize` with AWQ as its users meet it: what is written, going on after Ctrl-C, what is
// left on disk when it fails.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "base/check.h"
#include "checkpoint_builder.h"
#include "format/linear_format.h"
#include "model/model.h"
#include "tool_runner.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kVocab = 640;  // the golden tokenizer's, rounded up

/// A Llama-like model that can be run, with a real tokenizer; all its K are multiples of 64.
void write_model(const std::string& directory, int layers, uint64_t seed = 1) {
  constexpr int64_t kHidden = 128, kInter = 192, kKv = 64;
  TensorStore store;
  const auto norm = [&](const std::string& name) {
    std::vector<uint16_t> bits(static_cast<size_t>(kHidden), 0x3c00);  // 1, and some 8
    for (size_t i = 3; i < bits.size(); i += 16) bits[i] = 0x4800;
    store.add(name, TensorDtype::f16, {kHidden}, bits);
  };
  store.add_dense("model.embed_tokens.weight", kVocab, kHidden, Dtype::f16, seed++);
  norm("model.norm.weight");
  for (int layer = 0; layer < layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto add = [&](const char* name, int64_t n, int64_t k) {
      store.add_dense(prefix + name + ".weight", n, k, Dtype::f16, seed++);
    };
    add("self_attn.q_proj", kHidden, kHidden);
    add("self_attn.k_proj", kKv, kHidden);
    add("self_attn.v_proj", kKv, kHidden);
    add("self_attn.o_proj", kHidden, kHidden);
    add("mlp.gate_proj", kInter, kHidden);
    add("mlp.up_proj", kInter, kHidden);
    add("mlp.down_proj", kHidden, kInter);
    for (const char* part : {"q", "k", "v"}) {
      const std::vector<uint16_t> bias(part[0] == 'q' ? kHidden : kKv, 0x3000);
      const auto n = static_cast<int64_t>(bias.size());
      store.add(prefix + "self_attn." + part + "_proj.bias", TensorDtype::f16, {n}, bias);
    }
    norm(prefix + "input_layernorm.weight");
    norm(prefix + "post_attention_layernorm.weight");
  }
  const json config = {{"architectures", {"Qwen2ForCausalLM"}},
                       {"model_type", "qwen2"},
                       {"hidden_size", kHidden},
                       {"intermediate_size", kInter},
                       {"num_hidden_layers", layers},
                       {"num_attention_heads", 4},
                       {"num_key_value_heads", 2},
                       {"vocab_size", kVocab},
                       {"tie_word_embeddings", true}};
  ASSERT_TRUE(write_checkpoint(directory, store.tensors(), config).ok());
  const auto tokenizer = fs::path(NIBBLE_GOLDEN_TOKENIZERS) / "smollm/tokenizer.json";
  fs::copy_file(tokenizer, directory + "/tokenizer.json", fs::copy_options::overwrite_existing);
}

class CliAwq : public ::testing::Test {
 protected:
  std::string source() const { return dir_.file("source"); }
  std::string out(const char* name = "out") const { return dir_.file(name); }
  std::string work(const char* name = "out") const { return out(name) + ".nibble-partial"; }

  std::vector<std::string> words(const char* name, std::vector<std::string> options) const {
    options.insert(options.begin(), {"quantize", source(), out(name), "--group-size", "64",
                                     "--sequences", "8", "--length", "64"});
    return options;
  }
  Outcome quantize(const char* name = "out", const std::vector<std::string>& options = {}) const {
    return run_tool(words(name, options));
  }

  /// Starts a run and interrupts it after its first finished block.
  int interrupt(const char* name, const std::vector<std::string>& options = {}) const {
    const int null = open_or_die("/dev/null", O_RDWR);
    const pid_t child = start_tool(words(name, options), null, null);
    ::close(null);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(120);
    while (!fs::exists(work(name) + "/block-00000.safetensors") && !fs::exists(out(name)) &&
           std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ::kill(child, SIGINT);
    return wait_for(child);
  }

  void expect_same_files(const char* a, const char* b) const {
    const auto names = list_directory(out(a));
    EXPECT_EQ(names, list_directory(out(b)));
    for (const std::string& name : names) {
      EXPECT_EQ(read_text(out(a) + "/" + name), read_text(out(b) + "/" + name)) << name;
    }
  }

  TempDir dir_;
};

TEST_F(CliAwq, WritesAnOrdinaryCheckpoint) {
  write_model(source(), 2);
  const Outcome outcome = quantize("out", {"--json"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_FALSE(fs::exists(work()));
  const json document = parse_output(outcome);
  EXPECT_EQ(document["method"], "awq");
  EXPECT_EQ(document["calibration_tokens"], 8 * 64);
  ASSERT_EQ(document["layers"].size(), 14u);
  for (const json& layer : document["layers"]) {
    EXPECT_GT(layer["snr_db"], layer["rtn_snr_db"]) << layer;
  }
  const auto checkpoint = Checkpoint::open(out());
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ(checkpoint->quant_config().method, "awq");
  EXPECT_EQ(checkpoint->quant_config().version, "gemm");
  const auto linears = find_quantized_linears(*checkpoint);
  ASSERT_EQ(linears.size(), 14u);
  for (const QuantizedLinear& linear : linears) {
    EXPECT_TRUE(linear.status.ok()) << linear.status.message();
    EXPECT_EQ(linear.format, LinearFormat::awq_gemm);
    EXPECT_EQ(linear.matrix.group_size, 64);
  }
  // Every tensor that is not a weight of a quantized linear is there, of the same type and shape.
  const auto original = Checkpoint::open(source());
  ASSERT_TRUE(original.ok());
  int changed = 0;
  for (const auto& [name, view] : original->tensors()) {
    if (name.find("_proj.weight") != std::string::npos) continue;
    const TensorView* found = checkpoint->find(name);
    ASSERT_NE(found, nullptr) << name;
    EXPECT_EQ(found->dtype, view.dtype) << name;
    EXPECT_EQ(found->shape, view.shape) << name;
    changed += !std::equal(view.data, view.data + view.bytes, found->data);
  }
  EXPECT_GE(changed, 4);  // norms with large channels, v's bias
  EXPECT_TRUE(fs::exists(out() + "/tokenizer.json"));
  auto model = Model::load(*checkpoint, {});
  EXPECT_TRUE(model.ok()) << model.status().message();
}

TEST_F(CliAwq, GoesOnAfterCtrlCWithTheSameBytes) {
  write_model(source(), 12);
  ASSERT_EQ(quantize("whole").code, 0);
  ASSERT_EQ(interrupt("out"), 130);
  EXPECT_FALSE(fs::exists(out()));
  ASSERT_TRUE(fs::exists(work()));
  const Outcome outcome = quantize("out", {"--progress", "always"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.err, "kept from an earlier run");
  EXPECT_FALSE(fs::exists(work()));
  expect_same_files("whole", "out");
  // Nor do threads matter.
  ASSERT_EQ(quantize("one", {"--threads", "1"}).code, 0);
  expect_same_files("whole", "one");
  // Nothing but the results and the source.
  EXPECT_EQ(list_directory(dir_.path()).size(), 4u);
}

TEST_F(CliAwq, StartsAnewWithOtherOptions) {
  write_model(source(), 12);
  ASSERT_EQ(interrupt("out", {"--rounding", "nearest"}), 130);
  ASSERT_TRUE(fs::exists(work()));
  const Outcome outcome = quantize("out", {"--progress", "always"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.err.find("kept from"), std::string::npos);
  ASSERT_EQ(quantize("whole").code, 0);
  expect_same_files("whole", "out");
}

TEST_F(CliAwq, AFullDiskLeavesNothingAndSaysSo) {
  write_model(source(), 2);
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small = {16 << 10, limit.rlim_max};
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);  // inherited
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const Outcome outcome = quantize();
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(outcome.code, 4) << outcome.err;
  EXPECT_HAS(outcome.err, "cannot write");
  EXPECT_EQ(list_directory(dir_.path()), std::vector<std::string>{"source"});
}

TEST_F(CliAwq, TakesTheUsersText) {
  write_model(source(), 1);
  std::string text;
  for (int i = 0; i < 300; ++i) text += "line " + std::to_string(i * i) + " of the text\n";
  write_text(dir_.file("a.txt"), text);
  write_text(dir_.file("b.txt"), text + text);
  const Outcome outcome =
      quantize("out", {"-f", dir_.file("a.txt"), "-f", dir_.file("b.txt"), "--no-clip"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.out, "8 sequences of 64 tokens of");
  EXPECT_HAS(outcome.out, "a.txt");
  EXPECT_HAS(outcome.out, "without clipping");
  EXPECT_EQ(quantize("none", {"-f", dir_.file("absent.txt")}).code, 4);
  EXPECT_FALSE(fs::exists(out("none")));
}

TEST_F(CliAwq, LayersThatAreSkippedStayAsTheyAre) {
  write_model(source(), 2);
  const Outcome outcome = quantize("out", {"--skip", "v_proj", "--skip", "layers\\.1\\.mlp"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto before = Checkpoint::open(source()), after = Checkpoint::open(out());
  ASSERT_TRUE(before.ok());
  ASSERT_TRUE(after.ok());
  const auto same = [&](const std::string& name) {
    const TensorView *a = before->find(name), *b = after->find(name);
    return a != nullptr && b != nullptr && a->bytes == b->bytes &&
           std::equal(a->data, a->data + a->bytes, b->data);
  };
  EXPECT_TRUE(same("model.layers.0.self_attn.v_proj.weight"));
  EXPECT_TRUE(same("model.layers.0.self_attn.v_proj.bias"));
  EXPECT_TRUE(same("model.layers.0.input_layernorm.weight"));  // feeds v
  EXPECT_TRUE(same("model.layers.1.mlp.up_proj.weight"));
  EXPECT_TRUE(same("model.layers.1.post_attention_layernorm.weight"));
  EXPECT_FALSE(same("model.layers.0.post_attention_layernorm.weight"));
}

TEST_F(CliAwq, SaysWhatToDoWhereTheModelCannotBeRun) {
  write_model(source(), 1);
  fs::remove(source() + "/tokenizer.json");
  const Outcome outcome = quantize();
  EXPECT_NE(outcome.code, 0);
  EXPECT_HAS(outcome.err, "tokenizer.json");
  EXPECT_HAS(outcome.err, "--method rtn");
  EXPECT_EQ(list_directory(dir_.path()), std::vector<std::string>{"source"});
}

}  // namespace
}  // namespace nibble::test
