// The built tool as its users meet it: exit codes, JSON, what is left on disk. Each test starts the
// real program (NIBBLE_CLI) on checkpoints it makes in a temporary directory.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/check.h"
#include "checkpoint_builder.h"
#include "format/checkpoint.h"
#include "tool_runner.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// A Llama-like model in `dtype`: `layers` decoder layers with a biased q_proj, embeddings, a norm
/// and lm_head. K is 256 for all but down_proj, where it is 192: no multiple of 128.
void write_dense_model(const std::string& directory, int layers = 2, Dtype dtype = Dtype::f16) {
  TensorStore store;
  uint64_t seed = 1;
  store.add_dense("model.embed_tokens.weight", 64, 256, dtype, seed++);
  store.add_dense("lm_head.weight", 64, 256, dtype, seed++);
  const std::vector<uint16_t> ones(256, 0x3c00);
  store.add("model.norm.weight", TensorDtype::f16, {256}, ones);
  for (int layer = 0; layer < layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
      store.add_dense(prefix + "self_attn." + name + ".weight", 64, 256, dtype, seed++);
    }
    const std::vector<uint16_t> bias(64, 0x3800);
    store.add(prefix + "self_attn.q_proj.bias", TensorDtype::f16, {64}, bias);
    store.add_dense(prefix + "mlp.gate_proj.weight", 192, 256, dtype, seed++);
    store.add_dense(prefix + "mlp.up_proj.weight", 192, 256, dtype, seed++);
    store.add_dense(prefix + "mlp.down_proj.weight", 256, 192, dtype, seed++);
    store.add(prefix + "input_layernorm.weight", TensorDtype::f16, {256}, ones);
  }
  const json config = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}};
  ASSERT_TRUE(write_checkpoint(directory, store.tensors(), config).ok());
}

json inspect_json(const std::string& directory, std::vector<std::string> options = {}) {
  options.insert(options.begin(), {"inspect", directory, "--json"});
  return parse_output(run_tool(options));
}

std::map<std::string, std::string> digests(const std::string& directory) {
  std::map<std::string, std::string> result;
  const json document = inspect_json(directory, {"--digest"});
  for (const json& layer : document["layers"]) {
    result[layer["name"]] = layer["digest"];
  }
  return result;
}

std::map<std::string, std::string> contents(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const std::string& name : list_directory(directory)) {
    files[name] = read_text(directory + "/" + name);
  }
  return files;
}

// ---- the tool as a whole -----------------------------------------------------------------------

TEST(Cli, HelpAndVersionGoToStdout) {
  const Outcome version = run_tool({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_HAS(version.out, "nibble ");
  EXPECT_HAS(version.out, "commit");
  EXPECT_EQ(version.err, "");
  for (const char* command :
       {"bench", "doctor", "generate", "inspect", "perplexity", "quantize", "verify"}) {
    const Outcome help = run_tool({command, "--help"});
    EXPECT_EQ(help.code, 0) << command;
    EXPECT_HAS(help.out, "Usage: nibble " + std::string(command));
    EXPECT_EQ(help.err, "");
    EXPECT_HAS(run_tool({"--help"}).out, command);
  }
}

TEST(Cli, UsageErrorsExitWith2AndPointToHelp) {
  const std::vector<std::vector<std::string>> wrong = {
      {},
      {"frobnicate"},
      {"inspect"},
      {"inspect", "/nowhere", "--frobnicate"},
      {"quantize", "/nowhere"},
      {"quantize", "/nowhere", "/nowhere-out", "--group-size", "100"},
      {"quantize", "/nowhere", "/nowhere-out", "--progress", "sometimes"},
      {"doctor", "--explain", "w4a8,16"},
      {"doctor", "--explain", "w9a9,1,64,64,64"},
      {"doctor", "--explain", "w4a8,one,64,64,64"}};
  for (const auto& arguments : wrong) {
    const Outcome outcome = run_tool(arguments);
    EXPECT_EQ(outcome.code, 2) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_HAS(outcome.err, "--help");
  }
  EXPECT_HAS(run_tool({"inspect"}).err, "nibble inspect --help");
}

TEST(Cli, UnknownMethodListsTheKnownOnes) {
  const Outcome outcome = run_tool({"quantize", "/nowhere", "/nowhere-out", "--method", "magic"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_HAS(outcome.err, "rtn");
}

TEST(Cli, ReportsAFullStdout) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  for (const char* command : {"doctor", "--help", "--version"}) {
    const Outcome outcome = run_tool({command}, {.stdout_path = "/dev/full"});
    EXPECT_EQ(outcome.code, 4) << command;
    EXPECT_HAS(outcome.err, "standard output");
  }
}

TEST(Cli, ReportsAClosedPipe) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  ::close(ends[0]);
  TempDir dir;
  const int err = open_or_die(dir.file("err"), O_RDWR | O_CREAT);
  const int code = wait_for(start_tool({"doctor"}, ends[1], err));
  ::close(ends[1]);
  ::close(err);
  EXPECT_EQ(code, 4);
  EXPECT_HAS(read_text(dir.file("err")), "standard output");
}

// ---- doctor ------------------------------------------------------------------------------------

TEST(CliDoctor, ListsKernelsAndPicks) {
  const Outcome outcome = run_tool({"doctor"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  for (const char* part : {"w4a16_scalar", "w4a8_scalar", "w4a4_scalar", "M=512", "OpenMP", "CUDA",
                           "w4a8_mma_sm80", "NIBBLE_KERNEL"}) {
    EXPECT_HAS(outcome.out, part);
  }
  const json document = parse_output(run_tool({"doctor", "--json"}));
  for (const char* key : {"schema_version", "version", "commit", "command", "device", "threads",
                          "clocks", "cpu", "features", "kernels", "picked", "cuda"}) {
    EXPECT_TRUE(document.contains(key)) << key;
  }
  EXPECT_EQ(document["command"], "nibble doctor --json");
  EXPECT_EQ(document["picked"].size(), 12u);  // three modes, four M
  for (const json& row : document["kernels"]) {
    EXPECT_TRUE(row["runs_here"].get<bool>() || !row["reason"].get<std::string>().empty());
  }
}

TEST(CliDoctor, EveryCudaKernelRunsOrSaysWhyNot) {
  const json cuda = parse_output(run_tool({"doctor", "--json"}))["cuda"];
  EXPECT_EQ(cuda["devices"].empty(), cuda.contains("reason"));
  EXPECT_FALSE(cuda["kernels"].empty());
  for (const json& row : cuda["kernels"]) {
    EXPECT_TRUE(row["runs_here"].get<bool>() || !row["reason"].get<std::string>().empty());
  }
}

TEST(CliCuda, WithoutAGpuCommandsSayWhyAndExitWith3) {
  const json cuda = parse_output(run_tool({"doctor", "--json"}))["cuda"];
  if (!cuda["devices"].empty()) GTEST_SKIP() << "there is a GPU";
  for (const auto& command : std::vector<std::vector<std::string>>{
           {"bench", "gemm", "--device", "cuda"}, {"verify", "--device", "cuda"}}) {
    const Outcome outcome = run_tool(command);
    EXPECT_EQ(outcome.code, 3);
    EXPECT_HAS(outcome.err, cuda["reason"].get<std::string>());
  }
}

TEST(CliDoctor, FollowsForcedKernels) {
  const Outcome forced =
      run_tool({"doctor", "--json"}, {.kernel = "w4a8_scalar,w4a16_scalar,w4a4_scalar"});
  EXPECT_EQ(forced.code, 0) << forced.err;
  const json document = parse_output(forced);
  for (const json& pick : document["picked"]) {
    EXPECT_HAS(pick["kernel"].get<std::string>(), "_scalar");
  }
  const Outcome nonsense = run_tool({"doctor"}, {.kernel = "nonsense"});
  EXPECT_EQ(nonsense.code, 2);
  EXPECT_HAS(nonsense.err, "nonsense");
  EXPECT_HAS(nonsense.out, "w4a8_scalar");  // the names to choose from
}

TEST(CliDoctor, KernelThatCannotRunHereExitsWith3) {
  const json document = parse_output(run_tool({"doctor", "--json"}));
  for (const json& row : document["kernels"]) {
    if (row["runs_here"].get<bool>()) continue;
    const Outcome outcome = run_tool({"doctor"}, {.kernel = row["name"]});
    EXPECT_EQ(outcome.code, 3) << row;
    return;
  }
  GTEST_SKIP() << "every kernel runs on this CPU";
}

TEST(CliDoctor, ExplainsOneProduct) {
  const Outcome fine = run_tool({"doctor", "--explain", "w4a8,16,4096,4096,128"});
  EXPECT_EQ(fine.code, 0) << fine.err;
  EXPECT_HAS(fine.out, "chosen");
  EXPECT_HAS(fine.out, "M=16");
  EXPECT_EQ(run_tool({"doctor", "--explain", "w4a8,16,64,64,-1"}).code, 0);
  const Outcome misfit = run_tool({"doctor", "--explain", "w4a8,16,64,100,64"});
  EXPECT_EQ(misfit.code, 2);
  EXPECT_HAS(misfit.err, "100");
}

// ---- inspect -----------------------------------------------------------------------------------

TEST(CliInspect, PrintsEveryLayerAndAllPromisedKeys) {
  TempDir dir;
  ASSERT_TRUE(
      write_checkpoint(
          dir.path(),
          {{.name = "model.layers.0.mlp.down_proj", .k = 256, .n = 64},
           {.name = "model.layers.1.mlp.down_proj", .k = 256, .n = 64, .bias = true, .seed = 2}},
          {.dense_tensors = true})
          .ok());
  const Outcome text = run_tool({"inspect", dir.path(), "--digest", "--values"});
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_EQ(text.err, "");
  for (const char* part : {"LlamaForCausalLM", "awq-gemm (2 layers)", "layers.1.mlp.down_proj",
                           "asym", "f16", "lm_head", "0..15"}) {
    EXPECT_HAS(text.out, part);
  }

  const json document = inspect_json(dir.path());
  for (const char* key : {"schema_version", "version", "commit", "command", "device",
                          "architecture", "format", "layers", "bytes", "bits_per_weight"}) {
    EXPECT_TRUE(document.contains(key)) << key;
  }
  EXPECT_EQ(document["architecture"], "LlamaForCausalLM");
  EXPECT_EQ(document["format"], "awq-gemm");
  ASSERT_EQ(document["layers"].size(), 2u);
  const json& layer = document["layers"][0];
  EXPECT_EQ(layer["name"], "model.layers.0.mlp.down_proj");
  EXPECT_EQ(layer["format"], "awq-gemm");
  EXPECT_EQ(layer["k"], 256);
  EXPECT_EQ(layer["n"], 64);
  EXPECT_EQ(layer["group_size"], 64);
  EXPECT_EQ(layer["symmetric"], false);
  EXPECT_EQ(layer["scale_dtype"], "f16");
  EXPECT_FALSE(layer["bias"].get<bool>());
  EXPECT_TRUE(document["layers"][1]["bias"].get<bool>());
  // 4 bits, (4 + 16) / 64 for zero point and scale, and one bias of 64 * 16 bits.
  const double expected = 4 + 20.0 / 64 + 64 * 16 / (2.0 * 256 * 64);
  EXPECT_NEAR(document["bits_per_weight"].get<double>(), expected, 1e-9);
}

TEST(CliInspect, DigestIsTheDocumentedHash) {
  TempDir dir;
  const LayerSpec spec = {.name = "model.layers.0.mlp.up_proj", .k = 64, .n = 16, .group_size = 32};
  ASSERT_TRUE(write_checkpoint(dir.path(), {spec}).ok());
  const LogicalLayer layer = make_layer(spec);
  uint64_t hash = 14695981039346656037u;
  const auto add = [&](uint8_t byte) { hash = (hash ^ byte) * 1099511628211u; };
  for (const uint8_t code : layer.codes) add(code);
  for (const uint8_t zero : layer.zeros) add(zero);
  for (const uint16_t scale : layer.scales) {
    add(static_cast<uint8_t>(scale & 255));
    add(static_cast<uint8_t>(scale >> 8));
  }
  for (const char c : std::string("f16")) add(static_cast<uint8_t>(c));
  char expected[17];
  std::snprintf(expected, sizeof expected, "%016llx", static_cast<unsigned long long>(hash));
  EXPECT_EQ(digests(dir.path())[spec.name], expected);
}

TEST(CliInspect, DigestsAgreeAcrossFormats) {
  const auto digests_as = [](LinearFormat format, bool symmetric, uint64_t seed) {
    TempDir dir;
    const LayerSpec spec = {.name = "model.layers.0.mlp.up_proj",
                            .k = 256,
                            .n = 64,
                            .group_size = 64,
                            .format = format,
                            .symmetric = symmetric,
                            .seed = seed};
    EXPECT_TRUE(write_checkpoint(dir.path(), {spec}).ok());
    return digests(dir.path());
  };
  const auto gemm = digests_as(LinearFormat::awq_gemm, false, 1);
  ASSERT_EQ(gemm.size(), 1u);
  EXPECT_EQ(gemm, digests_as(LinearFormat::awq_gemv, false, 1));
  EXPECT_EQ(gemm, digests_as(LinearFormat::ct_pack_asymmetric, false, 1));
  EXPECT_NE(gemm, digests_as(LinearFormat::awq_gemm, false, 2));
  EXPECT_EQ(digests_as(LinearFormat::awq_gemm, true, 1),
            digests_as(LinearFormat::ct_pack_symmetric, true, 1));
}

TEST(CliInspect, MissingDirectoryExitsWith4) {
  const Outcome outcome = run_tool({"inspect", "/nowhere/at/all"});
  EXPECT_EQ(outcome.code, 4);
  EXPECT_HAS(outcome.err, "/nowhere/at/all");
  EXPECT_EQ(outcome.out, "");
}

TEST(CliInspect, TruncatedFileExitsWith4) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {{}}).ok());
  const std::string file = dir.file("model.safetensors");
  fs::resize_file(file, fs::file_size(file) - 1);
  const Outcome outcome = run_tool({"inspect", dir.path(), "--json"});
  EXPECT_EQ(outcome.code, 4);
  EXPECT_HAS(outcome.err, "model.safetensors");
  EXPECT_EQ(outcome.out, "");
}

TEST(CliInspect, UnsupportedFormatExitsWith3AndNamesShapes) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {{.format = LinearFormat::gptq}}).ok());
  const Outcome text = run_tool({"inspect", dir.path()});
  EXPECT_EQ(text.code, 3);
  EXPECT_HAS(text.out, "gptq");
  EXPECT_HAS(text.out, "I32 [32, 64]");
  EXPECT_HAS(text.err, "unsupported");
  const Outcome as_json = run_tool({"inspect", dir.path(), "--json"});
  EXPECT_EQ(as_json.code, 3);
  const json layer = parse_output(as_json)["layers"][0];
  EXPECT_EQ(layer["status"], "unsupported");
  EXPECT_EQ(layer["format"], "gptq");
  EXPECT_HAS(layer["problem"].get<std::string>(), "I32 [32, 64]");
}

TEST(CliInspect, NonFiniteScaleExitsWith4NamingThePlace) {
  TempDir dir;
  LogicalLayer layer = make_layer({});
  layer.scales[64 + 17] = 0x7e00;  // NaN in group 1, column 17
  TensorStore store;
  add_layer(store, {}, layer);
  ASSERT_TRUE(write_checkpoint(dir.path(), store.tensors(), make_config({})).ok());
  const Outcome outcome = run_tool({"inspect", dir.path()});
  EXPECT_EQ(outcome.code, 4);
  EXPECT_HAS(outcome.out, "group 1, column 17");
  EXPECT_HAS(outcome.err, "non-finite");
}

TEST(CliInspect, NamesNegativeScales) {
  TempDir dir;
  LogicalLayer layer = make_layer({});
  layer.scales[5] |= 0x8000;
  TensorStore store;
  add_layer(store, {}, layer);
  ASSERT_TRUE(write_checkpoint(dir.path(), store.tensors(), make_config({})).ok());
  const Outcome outcome = run_tool({"inspect", dir.path()});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_HAS(outcome.out, "negative scales in 1 layer: model.layers.0.mlp.down_proj");
  const json values = inspect_json(dir.path(), {"--values"})["layers"][0]["values"];
  EXPECT_EQ(values["negative_scales"], 1);
}

TEST(CliInspect, NotesFusedSiblingsThatDisagree) {
  TempDir dir;
  const json no_group_size = {{"quantization_config", {{"group_size", nullptr}}}};
  ASSERT_TRUE(write_checkpoint(dir.path(),
                               {{.name = "model.layers.0.mlp.gate_proj", .group_size = 64},
                                {.name = "model.layers.0.mlp.up_proj", .group_size = 128}},
                               {.config_patch = no_group_size})
                  .ok());
  const Outcome outcome = run_tool({"inspect", dir.path()});
  EXPECT_EQ(outcome.code, 0) << outcome.out << outcome.err;
  EXPECT_HAS(outcome.out, "fused layers disagree");
}

TEST(CliInspect, DenseDirectoryIsListedAndFine) {
  TempDir dir;
  write_dense_model(dir.path());
  const Outcome outcome = run_tool({"inspect", dir.path()});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.out, "no quantized linear layer");
  EXPECT_HAS(outcome.out, "model.layers.1.mlp.down_proj");
  const json document = inspect_json(dir.path());
  EXPECT_EQ(document["format"], "none");
  EXPECT_TRUE(document["layers"].empty());
  EXPECT_TRUE(document["bits_per_weight"].is_null());
  EXPECT_EQ(document["dense"].size(), 13u);
}

TEST(CliInspect, HostileNamesCannotWriteToTheTerminal) {
  TempDir dir;
  ASSERT_TRUE(write_checkpoint(dir.path(), {{.name = "model.layers.0.\x1b[2Jlayer"}}).ok());
  const Outcome outcome = run_tool({"inspect", dir.path()});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_EQ(outcome.out.find('\x1b'), std::string::npos);
  EXPECT_HAS(outcome.out, "\\x1b[2Jlayer");
}

// ---- quantize ----------------------------------------------------------------------------------

class CliQuantize : public testing::Test {
 protected:
  Outcome quantize(std::vector<std::string> options) {
    options.insert(options.begin(), {"quantize", source(), out(), "--method", "rtn"});
    return run_tool(options);
  }
  /// The only thing beside the source; fails the test if there is more.
  void expect_nothing_left() {
    EXPECT_EQ(list_directory(dir_.path()), std::vector<std::string>{"source"});
  }
  std::string source() const { return dir_.file("source"); }
  std::string out() const { return dir_.file("out"); }

  TempDir dir_;
};

TEST_F(CliQuantize, WritesACompleteAwqDirectory) {
  write_dense_model(source());
  const auto before = contents(source());
  const Outcome outcome = quantize({"--group-size", "64", "--progress", "never"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  for (const char* part : {"12 layers", "dB", "free", "bits per quantized weight", "lm_head"}) {
    EXPECT_HAS(outcome.out, part);
  }
  EXPECT_EQ(contents(source()), before);
  EXPECT_EQ(list_directory(dir_.path()), (std::vector<std::string>{"out", "source"}));
  EXPECT_EQ(list_directory(out()),
            (std::vector<std::string>{"config.json", "model.safetensors", "tokenizer.json"}));
  EXPECT_EQ(read_text(out() + "/tokenizer.json"), before.at("tokenizer.json"));

  const json config = json::parse(read_text(out() + "/config.json"));
  EXPECT_EQ(config["model_type"], "llama");
  const json expected = {{"quant_method", "awq"}, {"zero_point", true},
                         {"group_size", 64},      {"bits", 4},
                         {"version", "gemm"},     {"modules_to_not_convert", nullptr}};
  EXPECT_EQ(config["quantization_config"], expected);

  const json document = inspect_json(out());
  EXPECT_EQ(document["format"], "awq-gemm");
  ASSERT_EQ(document["layers"].size(), 12u);
  size_t biases = 0;
  for (const json& layer : document["layers"]) {
    EXPECT_EQ(layer["group_size"], 64);
    EXPECT_EQ(layer["symmetric"], false);
    EXPECT_EQ(layer["scale_dtype"], "f16");
    biases += layer["bias"].get<bool>();
  }
  EXPECT_EQ(biases, 2u);
  ASSERT_EQ(document["dense"].size(), 1u);
  EXPECT_EQ(document["dense"][0]["name"], "lm_head");

  // Everything else has the same bytes.
  const auto source_checkpoint = Checkpoint::open(source());
  const auto out_checkpoint = Checkpoint::open(out());
  ASSERT_TRUE(source_checkpoint.ok() && out_checkpoint.ok());
  for (const char* name : {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
                           "model.layers.0.self_attn.q_proj.bias"}) {
    const TensorView* was = source_checkpoint->find(name);
    const TensorView* is = out_checkpoint->find(name);
    ASSERT_TRUE(was != nullptr && is != nullptr) << name;
    EXPECT_EQ(is->dtype, was->dtype);
    EXPECT_EQ(is->shape, was->shape);
    EXPECT_TRUE(std::equal(is->data, is->data + is->bytes, was->data, was->data + was->bytes));
  }
  EXPECT_EQ(out_checkpoint->find("model.layers.0.mlp.down_proj.weight"), nullptr);
}

TEST_F(CliQuantize, StoresWhatTheOptionsSay) {
  write_dense_model(source(), 1, Dtype::bf16);
  ASSERT_EQ(quantize({"--group-size", "-1", "--symmetric", "--scale-dtype", "bf16"}).code, 0);
  const json document = inspect_json(out());
  for (const json& layer : document["layers"]) {
    EXPECT_EQ(layer["group_size"], layer["k"]);
    EXPECT_EQ(layer["symmetric"], true);
    EXPECT_EQ(layer["scale_dtype"], "bf16");
  }
  const json config = json::parse(read_text(out() + "/config.json"))["quantization_config"];
  EXPECT_EQ(config["zero_point"], false);
  EXPECT_EQ(config["group_size"], -1);
  // AutoAWQ stores zero points in symmetric files, too: 8 everywhere.
  const auto checkpoint = Checkpoint::open(out());
  ASSERT_TRUE(checkpoint.ok());
  const TensorView* zeros = checkpoint->find("model.layers.0.mlp.up_proj.qzeros");
  ASSERT_NE(zeros, nullptr);
  for (size_t i = 0; i < zeros->bytes; ++i) ASSERT_EQ(zeros->data[i], std::byte{0x88});
}

TEST_F(CliQuantize, IsReproducibleAndReportsJson) {
  write_dense_model(source(), 1, Dtype::f32);
  const Outcome first = quantize({"--group-size", "32", "--json"});
  ASSERT_EQ(first.code, 0) << first.err;
  const json document = parse_output(first);
  ASSERT_EQ(document["layers"].size(), 6u);
  for (const json& layer : document["layers"]) {
    // Uniform values in 15 steps: about 20 log10(15) = 23.5 dB.
    EXPECT_GT(layer["snr_db"].get<double>(), 18.0);
    EXPECT_LT(layer["snr_db"].get<double>(), 30.0);
  }
  EXPECT_NEAR(document["bits_per_weight"].get<double>(),
              inspect_json(out())["bits_per_weight"].get<double>(), 1e-9);
  EXPECT_EQ(document["bytes"], inspect_json(out())["bytes"]);
  const auto before = contents(out());
  fs::remove_all(out());
  ASSERT_EQ(quantize({"--group-size", "32"}).code, 0);
  EXPECT_EQ(contents(out()), before);
}

TEST_F(CliQuantize, SkippedLayersStayAndAreListed) {
  write_dense_model(source());
  const Outcome outcome =
      quantize({"--group-size", "64", "--skip", "layers\\.0\\.mlp", "--skip", "v_proj$"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.out, "fused layers disagree");  // q and k without v
  const json listed = json::parse(
      read_text(out() + "/config.json"))["quantization_config"]["modules_to_not_convert"];
  const json expected = {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj",
                         "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.v_proj",
                         "model.layers.1.self_attn.v_proj"};
  EXPECT_EQ(listed, expected);
  EXPECT_EQ(inspect_json(out())["layers"].size(), 7u);
  fs::remove_all(out());
  EXPECT_EQ(quantize({"--skip", "("}).code, 2);
  EXPECT_EQ(quantize({"--skip", "."}).code, 3);
  expect_nothing_left();
}

TEST_F(CliQuantize, LeavesRoutersAndOtherEncodersAlone) {
  TensorStore store;
  const std::vector<std::string> left = {
      "model.layers.0.mlp.gate", "multi_modal_projector.linear_1",
      "vision_tower.encoder.layers.0.mlp.fc1", "visual.blocks.0.attn.proj"};
  for (const std::string& name : left) store.add_dense(name + ".weight", 64, 64, Dtype::f16, 1);
  store.add_dense("model.layers.0.mlp.experts.3.up_proj.weight", 64, 64, Dtype::f16, 2);
  ASSERT_TRUE(write_checkpoint(source(), store.tensors(), {{"model_type", "x"}}).ok());
  ASSERT_EQ(quantize({"--group-size", "32"}).code, 0);
  const json document = inspect_json(out());
  ASSERT_EQ(document["layers"].size(), 1u);
  EXPECT_EQ(document["layers"][0]["name"], "model.layers.0.mlp.experts.3.up_proj");
  const json config = json::parse(read_text(out() + "/config.json"));
  EXPECT_EQ(config["quantization_config"]["modules_to_not_convert"], json(left));
}

TEST_F(CliQuantize, NamesEveryLayerTheGroupSizeDoesNotFit) {
  write_dense_model(source());
  const Outcome outcome = quantize({"--group-size", "128"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_HAS(outcome.err, "model.layers.0-1.mlp.down_proj: K = 192");
  EXPECT_EQ(outcome.err.find("q_proj"), std::string::npos);
  EXPECT_HAS(outcome.err, "64, 32, -1");
  expect_nothing_left();
}

TEST_F(CliQuantize, RefusesQuantizedInput) {
  ASSERT_TRUE(write_checkpoint(source(), {{}}).ok());
  const Outcome outcome = quantize({});
  EXPECT_EQ(outcome.code, 3);
  EXPECT_HAS(outcome.err, "quantized already");
  expect_nothing_left();
}

TEST_F(CliQuantize, RefusesOutputThatWouldMixOrOverwrite) {
  write_dense_model(source());
  const auto before = contents(source());
  const auto code = [&](const std::string& target) {
    const Outcome outcome =
        run_tool({"quantize", source(), target, "--method", "rtn", "--group-size", "64"});
    EXPECT_HAS(outcome.err, "OUT");
    return outcome.code;
  };
  EXPECT_EQ(code(source()), 2);
  EXPECT_EQ(code(source() + "/inside"), 2);
  EXPECT_EQ(code(source() + "/../source/deep/inside"), 2);
  EXPECT_EQ(code(source() + "/config.json"), 2);
  EXPECT_EQ(contents(source()), before);
  fs::create_directory(out());
  write_text(out() + "/mine", "precious");
  EXPECT_EQ(code(out()), 2);
  EXPECT_EQ(read_text(out() + "/mine"), "precious");
  fs::remove(out() + "/mine");
  EXPECT_EQ(quantize({"--group-size", "64"}).code, 0);  // an empty directory is taken
}

TEST_F(CliQuantize, NonFiniteWeightExitsWith4AndLeavesNothing) {
  TensorStore store;
  store.add_dense("model.layers.0.mlp.up_proj.weight", 8, 64, Dtype::f16, 1);
  std::vector<uint16_t> values(8 * 64, 0x3c00);
  values[100] = 0x7c00;
  store.add("model.layers.1.mlp.up_proj.weight", TensorDtype::f16, {8, 64}, values);
  ASSERT_TRUE(write_checkpoint(source(), store.tensors(), {{"model_type", "llama"}}).ok());
  const Outcome outcome = quantize({"--group-size", "32"});
  EXPECT_EQ(outcome.code, 4);
  EXPECT_HAS(outcome.err, "model.layers.1.mlp.up_proj");
  expect_nothing_left();
}

TEST_F(CliQuantize, InterruptLeavesNothing) {
  write_dense_model(source(), 4);
  const auto before = contents(source());
  const int out_file = open_or_die("/dev/null", O_WRONLY);
  FullPipe err;
  const pid_t child = start_tool({"quantize", source(), out(), "--method", "rtn", "--group-size",
                                  "64", "--progress", "always"},
                                 out_file, err.input());
  ::close(out_file);
  // The tool stops at its first line of progress, which the pipe does not take: the output has
  // begun and cannot be finished, however slow or fast this machine is.
  using namespace std::chrono;
  const auto deadline = steady_clock::now() + seconds(60);
  while (list_directory(dir_.path()).size() < 2 && steady_clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  ASSERT_EQ(list_directory(dir_.path()).size(), 2u) << "no temporary directory appeared";
  ASSERT_EQ(::kill(child, SIGINT), 0);
  const std::string messages = err.drain();
  EXPECT_EQ(wait_for(child), 130);
  EXPECT_HAS(messages, "interrupted");
  expect_nothing_left();
  EXPECT_EQ(contents(source()), before);
}

TEST_F(CliQuantize, FailedWriteExitsWith4AndLeavesNothing) {
  write_dense_model(source());
  // A limit on the size of files stands for a full disk; the tool sees EFBIG from write.
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small = {16 << 10, limit.rlim_max};
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);  // inherited
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const Outcome outcome = quantize({"--group-size", "64"});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(outcome.code, 4) << outcome.err;
  EXPECT_HAS(outcome.err, "cannot write");
  expect_nothing_left();
}

TEST_F(CliQuantize, ProgressNamesLayersAndTheirSnr) {
  write_dense_model(source());
  const Outcome outcome = quantize({"--group-size", "64", "--progress", "always"});
  ASSERT_EQ(outcome.code, 0);
  EXPECT_HAS(outcome.err, "layer 12/12 100%|");
  EXPECT_HAS(outcome.err, "layer/s] v_proj ");
  EXPECT_HAS(outcome.err, " dB");
}

}  // namespace
}  // namespace nibble::test
