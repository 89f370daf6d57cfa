// The commands that run a whole model: generate, perplexity, bench model. The models are the tiny
// ones of golden/models (whose logits test_model.cc checks) with a tokenizer made here.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "checkpoint_builder.h"
#include "model/plan_config.h"
#include "tool_runner.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Byte-level BPE with the 80 tokens that the tiny models have: letters, digits, some signs, the
/// two bytes of one character that is none by halves, and seven merges. <s> goes before a text.
json tiny_tokenizer() {
  std::vector<std::string> tokens = {"<pad>", "<s>", "</s>", "Ġ", "Ċ", "Ã", "©"};
  for (char c = 'a'; c <= 'z'; ++c) tokens.emplace_back(1, c);
  for (char c = 'A'; c <= 'Z'; ++c) tokens.emplace_back(1, c);
  for (char c = '0'; c <= '9'; ++c) tokens.emplace_back(1, c);
  for (const char* sign : {".", ",", "!", "?"}) tokens.emplace_back(sign);
  json merges = json::array();
  for (const auto& [left, right] : std::vector<std::pair<std::string, std::string>>{
           {"t", "h"}, {"th", "e"}, {"Ġ", "the"}, {"i", "n"}, {"e", "r"}, {"a", "n"}, {"r", "e"}}) {
    merges.push_back(left + " " + right);
    tokens.push_back(left + right);
  }
  json vocab = json::object(), added = json::array();
  for (size_t i = 0; i < tokens.size(); ++i) vocab[tokens[i]] = i;
  for (int id = 0; id < 3; ++id) {
    added.push_back({{"id", id},
                     {"content", tokens[static_cast<size_t>(id)]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const json begin = {{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}};
  const json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", {begin, text}},
            {"pair", {begin, text, text}},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}}},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocab},
            {"merges", merges}}}};
}

class CliModel : public testing::Test {
 protected:
  /// A complete directory: a golden model with the tokenizer.
  std::string assemble(const std::string& golden, const std::string& name = "model") {
    const fs::path from = fs::path(NIBBLE_GOLDEN_MODELS) / golden;
    const std::string to = dir_.file(name);
    fs::create_directory(to);
    for (const char* file : {"config.json", "model.safetensors"}) {
      fs::copy_file(from / file, fs::path(to) / file);
    }
    write_text(to + "/tokenizer.json", tiny_tokenizer().dump());
    write_text(to + "/tokenizer_config.json",
               json({{"bos_token", "<s>"}, {"eos_token", "</s>"}}).dump());
    return to;
  }

  void save_plan(const std::string& directory, const ModelPlan& plan) {
    json config = json::parse(read_text(directory + "/config.json"));
    config["quantization_config"]["nibble"] = plan_to_json(plan);
    write_text(directory + "/config.json", config.dump());
  }

  std::string text_file(const std::string& name, int sentences) {
    std::string text;
    for (int i = 0; i < sentences; ++i) text += "In there, the man ran to the inner rear. Then?\n";
    write_text(dir_.file(name), text);
    return dir_.file(name);
  }

  json generate_json(const std::string& directory, std::vector<std::string> options,
                     const std::string& kernel = "") {
    options.insert(options.begin(), {"generate", directory, "--json", "--ignore-eos"});
    const Outcome outcome = run_tool(options, {.kernel = kernel});
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return parse_output(outcome);
  }

  TempDir dir_;
};

/// "w4a8_scalar" is of mode "w4a8".
bool ran_in(const json& kernels, const std::string& mode) {
  bool found = false;
  for (const json& name : kernels) found |= name.get<std::string>().starts_with(mode + "_");
  return found;
}

// ---- generate ----------------------------------------------------------------------------------

TEST_F(CliModel, GeneratePrintsTheTextAlone) {
  const std::string model = assemble("llama_awq");
  const Outcome outcome =
      run_tool({"generate", model, "-p", "Then the man", "-n", "40", "--ignore-eos"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  for (const char* part : {"weights", "head", "KV cache", "workspace", "available", "load",
                           "prompt", "tok/s", "first token", "decode", "kernels", "peak memory"}) {
    EXPECT_HAS(outcome.err, part);
  }
  EXPECT_EQ(outcome.err.find("chat template"), std::string::npos);
  const json document = generate_json(model, {"-p", "Then the man", "-n", "40"});
  const json& result = document["results"][0];
  EXPECT_EQ(outcome.out, result["text"].get<std::string>() + "\n");
  EXPECT_EQ(result["prompt"], "Then the man");
  EXPECT_EQ(result["prompt_tokens"][0], 1);  // <s>
  EXPECT_EQ(result["tokens"].size(), 40u);
  EXPECT_EQ(result["finish"], "length");
  EXPECT_EQ(document["mode"], "w4a8");
  EXPECT_TRUE(ran_in(document["kernels"], "w4a8"));
  EXPECT_FALSE(ran_in(document["kernels"], "w4a16"));
  for (const char* key :
       {"schema_version", "commit", "device", "memory", "timings", "peak_mem_bytes"}) {
    EXPECT_TRUE(document.contains(key)) << key;
  }
  for (const char* key : {"load_s", "prompt_ts", "first_token_s", "decode_ts", "decode_tokens"}) {
    EXPECT_TRUE(document["timings"].contains(key)) << key;
  }
}

TEST_F(CliModel, GenerateStopsAtTheEndOfTextToken) {
  const std::string model = assemble("llama_awq");
  const json document = generate_json(model, {"-p", "the", "-n", "3"});
  const json token = document["results"][0]["tokens"][1];
  write_text(model + "/generation_config.json", json({{"eos_token_id", {2, token}}}).dump());
  const json stopped =
      parse_output(run_tool({"generate", model, "-p", "the", "-n", "3", "--json"}))["results"][0];
  EXPECT_EQ(stopped["finish"], "eos");
  EXPECT_LE(stopped["tokens"].size(), 2u);  // the first token may be the same one
  EXPECT_EQ(stopped["tokens"].back(), token);
}

TEST_F(CliModel, GenerateGivesTheSameWithAnyThreadsAndSeeds) {
  const std::string model = assemble("gemma3_awq");
  const std::vector<std::string> sampled = {"-p", "the man", "-n", "30"};
  const auto tokens = [&](const std::vector<std::string>& more) {
    std::vector<std::string> options = sampled;
    options.insert(options.end(), more.begin(), more.end());
    return generate_json(model, options)["results"][0]["tokens"];
  };
  const json first = tokens({"--temp", "1.5", "--seed", "5", "--threads", "1"});
  EXPECT_EQ(first, tokens({"--temp", "1.5", "--seed", "5", "--threads", "2"}));
  EXPECT_NE(first, tokens({"--temp", "1.5", "--seed", "6"}));
  EXPECT_EQ(tokens({"--temp", "1.5", "--top-k", "1"}), tokens({"--temp", "0"}));
}

TEST_F(CliModel, PromptsTogetherGiveWhatEachGivesAlone) {
  const std::string model = assemble("llama_awq");
  write_text(dir_.file("prompt.txt"), "A man in the rear");
  const json together = generate_json(model, {"-p", "the", "-p", "In there, then. Or there?", "-f",
                                              dir_.file("prompt.txt"), "-n", "12"});
  ASSERT_EQ(together["results"].size(), 3u);
  std::string expected;
  for (const json& result : together["results"]) {
    const json alone = generate_json(model, {"-p", result["prompt"], "-n", "12"});
    EXPECT_EQ(alone["results"][0]["tokens"], result["tokens"]);
    expected += (expected.empty() ? "" : "\n--------\n") + result["text"].get<std::string>();
  }
  const Outcome text = run_tool({"generate", model, "-p", "the", "-p", "In there, then. Or there?",
                                 "-f", dir_.file("prompt.txt"), "-n", "12", "--ignore-eos"});
  EXPECT_EQ(text.out, expected + "\n");
}

TEST_F(CliModel, PromptsThatWaitGiveTheSame) {
  const std::string model = assemble("llama_awq");
  const auto run = [&](const char* batch) {
    return run_tool({"generate", model, "-p", "the", "-p", "in", "-p", "her", "-p", "a", "-n", "6",
                     "-b", batch});
  };
  const Outcome all = run("0");
  EXPECT_EQ(all.code, 0) << all.err;
  for (const char* batch : {"1", "2", "3"}) EXPECT_EQ(run(batch).out, all.out) << batch;
}

TEST_F(CliModel, CudaWithoutAGpuExitsWith3) {
  if (fs::exists("/dev/nvidiactl")) GTEST_SKIP() << "there is a GPU";
  const Outcome outcome =
      run_tool({"generate", assemble("llama_awq"), "-p", "the", "--device", "cuda"});
  EXPECT_EQ(outcome.code, 3);
  EXPECT_HAS(outcome.err, "CUDA");
  EXPECT_EQ(outcome.out, "");
}

TEST_F(CliModel, SeveralGpusAreVllms) {
  const Outcome outcome =
      run_tool({"generate", assemble("llama_awq"), "-p", "the", "--device", "cuda:0,1"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_HAS(outcome.err, "vLLM");
  EXPECT_EQ(outcome.out, "");
}

TEST_F(CliModel, GenerateReadsStandardInput) {
  const std::string model = assemble("llama_awq");
  write_text(dir_.file("prompt.txt"), "the inner man");
  const std::vector<std::string> arguments = {"generate", model, "-n", "9", "--ignore-eos", "-f"};
  std::vector<std::string> from_stdin = arguments, from_file = arguments;
  from_stdin.push_back("-");
  from_file.push_back(dir_.file("prompt.txt"));
  const Outcome outcome = run_tool(from_stdin, {.stdin_path = dir_.file("prompt.txt")});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, run_tool(from_file).out);
}

TEST_F(CliModel, GenerateNamesTheChatTemplateItDoesNotApply) {
  const std::string model = assemble("llama_awq");
  write_text(model + "/tokenizer_config.json",
             json({{"bos_token", "<s>"}, {"chat_template", "{{ messages }}"}}).dump());
  const Outcome outcome = run_tool({"generate", model, "-p", "the", "-p", "a", "-n", "1"});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_HAS(outcome.err, "scripts/render_chat.py");
  EXPECT_EQ(outcome.err.find("chat template"), outcome.err.rfind("chat template"));
}

TEST_F(CliModel, GenerateDoesNotDoubleTheBeginningOfText) {
  const std::string model = assemble("llama_awq");
  const Outcome outcome = run_tool({"generate", model, "-p", "<s>the", "-n", "1", "--json"});
  EXPECT_HAS(outcome.err, "a second one is not added");
  const json document = parse_output(outcome);
  EXPECT_EQ(document["results"][0]["prompt_tokens"].size(), 2u);
}

TEST_F(CliModel, ModesFollowTheCheckpoint) {
  const std::string quantized = assemble("llama_awq", "q"), dense = assemble("qwen3", "d");
  EXPECT_EQ(generate_json(dense, {"-p", "a", "-n", "2"})["mode"], "16bit");
  const json forced = generate_json(quantized, {"-p", "the man", "-n", "3", "--mode", "w4a4"},
                                    "w4a4_scalar,w4a8_scalar,w4a16_scalar");
  EXPECT_TRUE(ran_in(forced["kernels"], "w4a4"));
  for (const json& name : forced["kernels"]) {
    const auto text = name.get<std::string>();
    EXPECT_TRUE(text == "w4a4_scalar" || !text.starts_with("w4")) << text;
  }
  const auto code = [&](const std::string& model, const std::string& mode) {
    const Outcome outcome = run_tool({"generate", model, "-p", "a", "-n", "1", "--mode", mode});
    EXPECT_EQ(outcome.out, "");
    EXPECT_HAS(outcome.err, mode);
    return outcome.code;
  };
  EXPECT_EQ(code(dense, "w4a8"), 3);
  EXPECT_EQ(code(quantized, "16bit"), 3);
  EXPECT_EQ(code(quantized, "w4a8-fp8"), 3);  // runs on GPUs only
  EXPECT_EQ(code(quantized, "auto"), 2);  // no plan is saved
}

TEST_F(CliModel, ASavedPlanIsTheDefault) {
  const std::string model = assemble("llama_awq");
  ModelPlan plan = uniform_plan(2, Mode::w4a8);
  plan.at(1, Slot::down).mode = Mode::w4a16;
  save_plan(model, plan);
  const json document = generate_json(model, {"-p", "the man", "-n", "4"});
  EXPECT_EQ(document["mode"], "auto");
  EXPECT_TRUE(ran_in(document["kernels"], "w4a8"));
  EXPECT_TRUE(ran_in(document["kernels"], "w4a16"));
  EXPECT_EQ(generate_json(model, {"-p", "the man", "-n", "4", "--mode", "w4a8"})["mode"], "w4a8");
}

TEST_F(CliModel, CompareFindsTheFirstTokenThatDiffers) {
  const std::string model = assemble("llama_awq");
  const std::vector<std::string> options = {"-p", "Then the man", "-n", "100"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), options.begin(), options.end());
    return generate_json(model, more);
  };
  const json one = with({"--mode", "w4a4", "--compare", "w4a16"})["results"][0];
  const json other = with({"--mode", "w4a16"})["results"][0];
  size_t index = 0;
  while (index < 100 && one["tokens"][index] == other["tokens"][index]) ++index;
  if (index == 100) {
    EXPECT_TRUE(one["divergence"].is_null());
  } else {
    const json& found = one["divergence"];
    ASSERT_FALSE(found.is_null());
    EXPECT_EQ(found["index"], index);
    EXPECT_EQ(found["token"], one["tokens"][index]);
    EXPECT_EQ(found["other_token"], other["tokens"][index]);
    EXPECT_GE(found["margin"], 0);
    EXPECT_GE(found["other_margin"], 0);
  }
  EXPECT_TRUE(with({"--mode", "w4a8", "--compare", "w4a8"})["results"][0]["divergence"].is_null());

  const Outcome text = run_tool({"generate", model, "-p", "Then the man", "-n", "100",
                                 "--ignore-eos", "--mode", "w4a4", "--compare", "w4a16"});
  EXPECT_EQ(text.out, one["text"].get<std::string>() + "\n");
  EXPECT_HAS(text.err, index == 100 ? "chooses the same" : "first differs at token");
}

TEST_F(CliModel, GenerateKeepsToTheContext) {
  const std::string model = assemble("llama_awq");  // made for 256 positions
  const Outcome outcome =
      run_tool({"generate", model, "-p", "the man", "-n", "1000", "--ignore-eos", "--json"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.err, "context of 256");
  const json result = parse_output(outcome)["results"][0];
  EXPECT_EQ(result["tokens"].size() + result["prompt_tokens"].size(), 257u);
  const Outcome small =
      run_tool({"generate", model, "-p", "the man ran and ran", "--context", "4"});
  EXPECT_EQ(small.code, 2);
  EXPECT_HAS(small.err, "context of 4");
}

TEST_F(CliModel, GenerateRefusesWrongUsage) {
  const std::string model = assemble("llama_awq");
  const std::vector<std::vector<std::string>> wrong = {
      {"generate"},
      {"generate", model},
      {"generate", model, "-p"},
      {"generate", model, "-p", "a", "--mode", "w3"},
      {"generate", model, "-p", "a", "--top-p", "2"},
      {"generate", model, "-p", "a", "--kv", "int4"},
      {"generate", model, "-p", "a", "-n", "-1"}};
  for (const auto& arguments : wrong) {
    const Outcome outcome = run_tool(arguments);
    EXPECT_EQ(outcome.code, 2) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_HAS(outcome.err, "--help");
  }
  EXPECT_EQ(run_tool({"generate", "/nowhere", "-p", "a"}).code, 4);
  EXPECT_EQ(run_tool({"generate", model, "-f", "/nowhere"}).code, 4);
  fs::remove(model + "/tokenizer.json");
  EXPECT_EQ(run_tool({"generate", model, "-p", "a"}).code, 4);
}

TEST_F(CliModel, InterruptKeepsWhatWasPrinted) {
  const std::string model = assemble("llama_awq");
  const int err = open_or_die(dir_.file("err"), O_RDWR | O_CREAT);
  FullPipe out;  // takes nothing: the tool waits at its first token, however fast it is
  const pid_t child =
      start_tool({"generate", model, "-p", "the", "-n", "200", "--ignore-eos"}, out.input(), err);
  ::close(err);
  using namespace std::chrono;
  const auto deadline = steady_clock::now() + seconds(60);
  while (read_text(dir_.file("err")).find("available") == std::string::npos &&
         steady_clock::now() < deadline) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  ASSERT_EQ(::kill(child, SIGINT), 0);
  const std::string text = out.drain();
  EXPECT_EQ(wait_for(child), 130);
  EXPECT_LT(text.size(), 100u);
  EXPECT_HAS(read_text(dir_.file("err")), "peak memory");
}

// ---- perplexity --------------------------------------------------------------------------------

TEST_F(CliModel, PerplexityOfAModeAgainstAnother) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 12);
  const std::vector<std::string> arguments = {
      "perplexity", model, "-f", text, "-c", "64", "--mode", "w4a16,w4a8", "--reference", "w4a16"};
  const Outcome plain = run_tool(arguments);
  ASSERT_EQ(plain.code, 0) << plain.err;
  size_t at = 0;
  for (const char* part : {"====== Perplexity statistics ======",
                           "Mean PPL(Q)                   : ",
                           "Mean PPL(base)                : ",
                           "Cor(ln(PPL(Q)), ln(PPL(base))): ",
                           "Mean ln(PPL(Q)/PPL(base))     : ",
                           "Mean PPL(Q)/PPL(base)         : ",
                           "Mean PPL(Q)-PPL(base)         : ",
                           "====== KL divergence statistics ======",
                           "Mean    KLD: ",
                           "Maximum KLD: ",
                           "99.9%   KLD: ",
                           "99.0%   KLD: ",
                           "95.0%   KLD: ",
                           "90.0%   KLD: ",
                           "Median  KLD: ",
                           "10.0%   KLD: ",
                           " 5.0%   KLD: ",
                           " 1.0%   KLD: ",
                           " 0.1%   KLD: ",
                           "Minimum KLD: ",
                           "====== Token probability statistics ======",
                           "Mean    Δp: ",
                           "Maximum Δp: ",
                           "99.9%   Δp: ",
                           "75.0%   Δp: ",
                           "Median  Δp: ",
                           "25.0%   Δp: ",
                           "Minimum Δp: ",
                           "RMS Δp    : ",
                           "Same top p: "}) {
    at = plain.out.find(part, at);
    ASSERT_NE(at, std::string::npos) << part << "\n" << plain.out;
  }

  std::vector<std::string> as_json = arguments;
  as_json.push_back("--json");
  const json document = parse_output(run_tool(as_json));
  for (const char* key :
       {"mode", "reference", "tokens", "ppl", "ppl_err", "ppl_ratio", "ppl_ratio_err", "kld_mean",
        "kld_median", "kld_p99", "same_top", "rms_dp", "schema_version"}) {
    EXPECT_TRUE(document.contains(key)) << key;
  }
  ASSERT_EQ(document["results"].size(), 2u);
  const json& same = document["results"][0];
  EXPECT_EQ(same["mode"], "w4a16");
  EXPECT_EQ(same["ppl_ratio"], 1.0);
  EXPECT_EQ(same["kld_max"], 0.0);
  EXPECT_EQ(same["same_top"], 100.0);
  const json& other = document["results"][1];
  EXPECT_EQ(other["mode"], "w4a8");
  EXPECT_GT(other["kld_mean"], 0.0);
  EXPECT_EQ(other["reference_ppl"], same["ppl"]);
  EXPECT_TRUE(ran_in(other["kernels"], "w4a8"));
  EXPECT_FALSE(ran_in(other["kernels"], "w4a16"));
  EXPECT_EQ(document["pooled"].size(), 2u);
}

TEST_F(CliModel, PerplexityPoolsTexts) {
  const std::string model = assemble("llama_awq");
  const std::string a = text_file("a.txt", 6), b = text_file("b.txt", 20);
  const auto run = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"perplexity", model, "-c", "32", "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return parse_output(run_tool(arguments));
  };
  const json both = run({"-f", a, "-f", b, "--threads", "1"});
  ASSERT_EQ(both["results"].size(), 2u);
  ASSERT_EQ(both["pooled"].size(), 1u);
  const double na = both["results"][0]["tokens"], nb = both["results"][1]["tokens"];
  EXPECT_EQ(both["pooled"][0]["tokens"], na + nb);
  EXPECT_GT(nb, na);
  const double pooled = (na * std::log(both["results"][0]["ppl"].get<double>()) +
                         nb * std::log(both["results"][1]["ppl"].get<double>())) /
                        (na + nb);
  EXPECT_NEAR(both["pooled"][0]["ppl"], std::exp(pooled), 1e-6);
  EXPECT_EQ(both["ppl"], both["pooled"][0]["ppl"]);
  EXPECT_TRUE(both["ppl_ratio"].is_null());
  // Bits do not depend on the threads, nor on which texts go together.
  EXPECT_EQ(run({"-f", b, "--threads", "2"})["results"][0]["ppl"], both["results"][1]["ppl"]);
  EXPECT_EQ(run({"-f", b, "--chunks", "2"})["tokens"], 2 * 15);
}

TEST_F(CliModel, PerplexityAloneIsOneLine) {
  const std::string model = assemble("qwen3");
  const Outcome outcome = run_tool({"perplexity", model, "-f", text_file("a.txt", 6), "-c", "32"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.out, "Final estimate: PPL = ");
  EXPECT_HAS(outcome.out, " +/- ");
  EXPECT_EQ(outcome.out.find("KL"), std::string::npos);
}

TEST_F(CliModel, PerplexityAgainstAnotherDirectory) {
  const std::string model = assemble("llama_awq", "q"), dense = assemble("qwen3", "d");
  const Outcome outcome = run_tool({"perplexity", model, "-f", text_file("a.txt", 6), "-c", "32",
                                    "--reference", dense, "--json"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  const json document = parse_output(outcome);
  EXPECT_HAS(document["reference"].get<std::string>(), dense);
  EXPECT_HAS(document["reference"].get<std::string>(), "16bit");
  EXPECT_GT(document["kld_mean"], 0.0);
  json other = tiny_tokenizer();
  other["model"]["merges"] = json::array();
  write_text(dense + "/tokenizer.json", other.dump());
  const Outcome refused =
      run_tool({"perplexity", model, "-f", dir_.file("a.txt"), "-c", "32", "--reference", dense});
  EXPECT_EQ(refused.code, 3);
  EXPECT_HAS(refused.err, "another tokenizer");
  EXPECT_EQ(
      run_tool({"perplexity", model, "-f", dir_.file("a.txt"), "--reference", "/nowhere"}).code, 4);
}

TEST_F(CliModel, PerplexityGatesNameTheFigure) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 12);
  const auto run = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"perplexity", model,    "-f",   text,          "-c",
                                          "64",         "--mode", "w4a4", "--reference", "w4a16"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_tool(arguments);
  };
  EXPECT_EQ(run({"--max-kld", "1000", "--max-ppl-ratio", "1000"}).code, 0);
  const Outcome kld = run({"--max-kld", "1e-12", "--max-ppl-ratio", "1000"});
  EXPECT_EQ(kld.code, 1);
  EXPECT_HAS(kld.err, "gate failed: --max-kld: w4a4 on " + text);
  EXPECT_EQ(kld.err.find("--max-ppl-ratio"), std::string::npos);
  EXPECT_HAS(kld.out, "Mean    KLD");  // the figures are there all the same
  const Outcome ratio = run({"--max-ppl-ratio", "0.01", "--json"});
  EXPECT_EQ(ratio.code, 1);
  EXPECT_HAS(ratio.err, "gate failed: --max-ppl-ratio");
  EXPECT_EQ(parse_output(ratio)["failed_gates"].size(), 1u);
}

TEST_F(CliModel, PerplexityRefusesWrongUsage) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 12);
  EXPECT_EQ(run_tool({"perplexity", model}).code, 2);
  EXPECT_EQ(run_tool({"perplexity", model, "-f", text, "--max-kld", "1"}).code, 2);
  EXPECT_EQ(run_tool({"perplexity", model, "-f", text, "--mode", "w9"}).code, 2);
  const Outcome small = run_tool({"perplexity", model, "-f", text_file("b.txt", 1), "-c", "200"});
  EXPECT_EQ(small.code, 2);
  EXPECT_HAS(small.err, "less than one chunk of 200");
  EXPECT_EQ(run_tool({"perplexity", model, "-f", "/nowhere"}).code, 4);
  EXPECT_EQ(run_tool({"perplexity", model, "-f", text, "--mode", "16bit"}).code, 3);
}

// ---- bench model -------------------------------------------------------------------------------

TEST_F(CliModel, BenchModelHasLlamaBenchsNames) {
  const std::string model = assemble("llama_awq");
  const std::vector<std::string> arguments = {"bench", "model",  model,       "-p",  "16",
                                              "-n",    "4",      "-b",        "1,2", "-r",
                                              "3",     "--mode", "w4a16,w4a8"};
  const auto run = [&](const std::string& output, std::vector<std::string> words) {
    words.insert(words.end(), {"--output", output});
    const Outcome outcome = run_tool(words);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_HAS(outcome.err, "KV cache");
    return outcome;
  };
  const std::string lines = run("jsonl", arguments).out;
  std::set<std::string> seen;
  for (size_t at = 0; at < lines.size(); at = lines.find('\n', at) + 1) {
    const json row = json::parse(lines.substr(at, lines.find('\n', at) - at));
    for (const char* key :
         {"test", "n_prompt", "n_gen", "batch", "avg_ts", "stddev_ts", "median_ts", "samples_ns",
          "mode", "kernels", "peak_mem_bytes", "threads"}) {
      EXPECT_TRUE(row.contains(key)) << key;
    }
    const auto mode = row["mode"].get<std::string>();
    EXPECT_EQ(row["samples_ns"].size(), 3u);
    EXPECT_GT(row["avg_ts"], 0);
    EXPECT_TRUE(ran_in(row["kernels"], mode));
    EXPECT_FALSE(ran_in(row["kernels"], mode == "w4a8" ? "w4a16" : "w4a8"));
    EXPECT_EQ(row["byte_limit_share"].is_null(), row["n_gen"] == 0);
    seen.insert(row["test"].get<std::string>() + " " + mode);
  }
  EXPECT_EQ(seen, (std::set<std::string>{"pp16 w4a16", "pp16 w4a8", "tg4 w4a16", "tg4 w4a8",
                                         "tg4@b2 w4a16", "tg4@b2 w4a8"}));
  const std::vector<std::string> prompts = {"bench", "model", model, "-p", "16,8",
                                            "-n",    "0",     "-r",  "1"};
  EXPECT_EQ(parse_output(run("json", prompts))["results"].size(), 2u);
  EXPECT_HAS(run("md", prompts).out, "| test | t/s |");
  EXPECT_HAS(run("csv", prompts).out, "model,model_size,");
}

TEST_F(CliModel, BenchModelRefusesWrongUsage) {
  const std::string dense = assemble("qwen3");
  EXPECT_EQ(run_tool({"bench", "model", dense, "-p", "0", "-n", "0"}).code, 2);
  EXPECT_EQ(run_tool({"bench", "model"}).code, 2);
  EXPECT_EQ(run_tool({"bench", "model", dense, "--mode", "16bit,w4a8"}).code, 3);
  EXPECT_EQ(run_tool({"bench", "model", "/nowhere"}).code, 4);
}

}  // namespace
}  // namespace nibble::test
