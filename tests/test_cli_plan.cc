// nibble calibrate and nibble plan as their users meet them, on the tiny models of golden/models
// with a tokenizer made here: what is written, what is refused, and that nothing is left behind.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/sha256.h"
#include "checkpoint_builder.h"
#include "model/calibration.h"
#include "model/plan_config.h"
#include "tool_runner.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// One token a letter, and a space; the tiny models have 80 tokens.
json letter_tokenizer() {
  json vocab = json::object();
  vocab["Ġ"] = 0;
  for (int i = 0; i < 52; ++i) {
    vocab[std::string(1, static_cast<char>(i < 26 ? 'a' + i : 'A' + i - 26))] = i + 1;
  }
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
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
            {"merges", json::array()}}}};
}

class CliPlanning : public testing::Test {
 protected:
  std::string assemble(const std::string& golden) {
    const fs::path from = fs::path(NIBBLE_GOLDEN_MODELS) / golden;
    const std::string to = dir_.file(golden);
    fs::create_directory(to);
    for (const char* file : {"config.json", "model.safetensors"}) {
      fs::copy_file(from / file, fs::path(to) / file);
    }
    write_text(to + "/tokenizer.json", letter_tokenizer().dump());
    return to;
  }

  /// `words` words of letters, other ones for another seed.
  std::string text_file(const std::string& name, int words, uint32_t seed) {
    std::string text;
    for (int i = 0; i < words; ++i) {
      for (int letter = 0; letter < 5; ++letter) {
        seed = seed * 1664525 + 1013904223;
        text += static_cast<char>('a' + (seed >> 24) % 26);
      }
      text += ' ';
    }
    write_text(dir_.file(name), text);
    return dir_.file(name);
  }

  Outcome calibrate(const std::string& model, const std::string& out,
                    std::vector<std::string> options) {
    std::vector<std::string> words = {"calibrate", model, "-o", out, "--context", "32"};
    words.insert(words.end(), options.begin(), options.end());
    return run_tool(words);
  }

  /// Gates that a tiny random model passes unless `options` say otherwise.
  Outcome plan(const std::string& model, const std::string& text,
               std::vector<std::string> options) {
    std::vector<std::string> words = {
        "plan", model, "-f", text, "--context", "32", "--chunks", "4", "--search-chunks", "2"};
    words.insert(words.end(), options.begin(), options.end());
    return run_tool(words);
  }

  TempDir dir_;
};

const std::vector<std::string> kLooseGates = {"--max-ppl-ratio", "100", "--max-kld", "100",
                                              "--min-same-top",  "0"};

std::vector<std::string> with(std::vector<std::string> options,
                              const std::vector<std::string>& more) {
  options.insert(options.end(), more.begin(), more.end());
  return options;
}

// ---- calibrate ---------------------------------------------------------------------------------

TEST_F(CliPlanning, MergedRunsAreTheFileOfOneRun) {
  const std::string model = assemble("llama_awq");
  const std::string a = text_file("a.txt", 40, 1), b = text_file("b.txt", 60, 2);
  ASSERT_EQ(calibrate(model, dir_.file("both"), {"-f", a, "-f", b}).code, 0);
  ASSERT_EQ(calibrate(model, dir_.file("a"), {"-f", a}).code, 0);
  ASSERT_EQ(calibrate(model, dir_.file("b"), {"-f", b}).code, 0);
  for (const auto& [first, second] : {std::pair{"a", "b"}, std::pair{"b", "a"}}) {
    const std::string out = dir_.file(std::string(first) + second);
    const Outcome merge = run_tool(
        {"calibrate", model, "-o", out, "--merge", dir_.file(first), "--merge", dir_.file(second)});
    ASSERT_EQ(merge.code, 0) << merge.err;
    EXPECT_EQ(read_text(out), read_text(dir_.file("both")));
  }
  const Outcome twice =
      run_tool({"calibrate", model, "-o", dir_.file("ab"), "--merge", dir_.file("a")});
  EXPECT_EQ(twice.code, 2);
  EXPECT_HAS(twice.err, "in both");
}

TEST_F(CliPlanning, ContinuedRunIsTheFileOfOneRun) {
  const std::string model = assemble("qwen2_awq"), text = text_file("a.txt", 60, 1);
  ASSERT_EQ(calibrate(model, dir_.file("whole"), {"-f", text}).code, 0);
  for (const char* chunks : {"1", "4"}) {
    ASSERT_EQ(calibrate(model, dir_.file("parts"), {"-f", text, "--chunks", chunks}).code, 0);
  }
  EXPECT_NE(read_text(dir_.file("parts")), read_text(dir_.file("whole")));
  const Outcome rest = calibrate(model, dir_.file("parts"), {"-f", text});
  ASSERT_EQ(rest.code, 0) << rest.err;
  EXPECT_EQ(read_text(dir_.file("parts")), read_text(dir_.file("whole")));
  // In other chunks the same text would count twice.
  const Outcome other =
      run_tool({"calibrate", model, "-o", dir_.file("parts"), "-f", text, "--context", "16"});
  EXPECT_EQ(other.code, 2);
  EXPECT_HAS(other.err, "--context 32");
}

TEST_F(CliPlanning, InterruptKeepsWhatIsDoneAndTheSameCommandContinues) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 20000, 1);
  const std::string out = dir_.file("stats"), log = dir_.file("log");
  const std::vector<std::string> words = {"calibrate", model,       "-f", text,           "-o",
                                          out,         "--context", "32", "--save-every", "0"};
  const int to = open_or_die(log, O_RDWR | O_CREAT);
  const pid_t child = start_tool(words, to, to);
  for (int i = 0; i < 600 && !fs::exists(out); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  ::kill(child, SIGINT);
  EXPECT_EQ(wait_for(child), 130);
  ::close(to);
  EXPECT_HAS(read_text(log), "the same command continues");
  const auto part = Calibration::load(out);
  ASSERT_TRUE(part.ok());
  const int64_t done = part->texts().front().chunks_done;
  EXPECT_GT(done, 0);
  ASSERT_EQ(calibrate(model, out, {"-f", text, "--chunks", std::to_string(done + 2)}).code, 0);
  const std::string whole = dir_.file("whole");
  ASSERT_EQ(calibrate(model, whole, {"-f", text, "--chunks", std::to_string(done + 2)}).code, 0);
  EXPECT_EQ(read_text(out), read_text(whole));
}

TEST_F(CliPlanning, CalibrateReportsEverySlot) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 40, 1);
  const json report = parse_output(calibrate(model, dir_.file("stats"), {"-f", text, "--json"}));
  EXPECT_EQ(report["slots"].size(), 2u * kSlots);
  EXPECT_EQ(report["tokens"].get<int>() % 32, 0);
  EXPECT_EQ(report["texts"][0]["sha256"], sha256_hex(read_text(text)));
  for (const json& slot : report["slots"]) {
    EXPECT_GT(slot["amax"].get<double>(), 0);
    EXPECT_EQ(slot["group_amax"].size(),
              slot["k"].get<size_t>() / slot["group_size"].get<size_t>());
  }
  // Without a text it shows what is there.
  const Outcome shown = run_tool({"calibrate", model, "-o", dir_.file("stats")});
  EXPECT_EQ(shown.code, 0);
  EXPECT_HAS(shown.out, "gate_up");
}

TEST_F(CliPlanning, CalibrateRefusesBeforeItWrites) {
  const std::string model = assemble("llama_awq"), dense = assemble("qwen2");
  const std::string text = text_file("a.txt", 40, 1), out = dir_.file("stats");
  const auto refusal = [&](const std::string& directory, std::vector<std::string> options, int code,
                           const std::string& part) {
    const Outcome outcome = calibrate(directory, out, options);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_HAS(outcome.err, part);
    EXPECT_FALSE(fs::exists(out));
  };
  refusal(dense, {"-f", text}, 3, "no 4-bit linears");
  refusal(model, {}, 2, "nothing to do");
  refusal(model, {"-f", dir_.file("absent")}, 4, "absent");
  refusal(model, {"-f", text_file("short.txt", 2, 1)}, 2, "less than one chunk");
  refusal(model, {"-f", text, "-f", text}, 2, "same text");
  refusal(model, {"--merge", text}, 4, "a.txt");
  const Outcome inside = run_tool({"calibrate", model, "-f", text, "-o", model + "/s.safetensors"});
  EXPECT_EQ(inside.code, 2);
  EXPECT_HAS(inside.err, "as weights");
  refusal(model, {"--merge", model + "/model.safetensors"}, 2, "nibble calibrate");

  const std::string other = dir_.file("other");
  ASSERT_EQ(calibrate(assemble("qwen2_awq"), other, {"-f", text}).code, 0);
  refusal(model, {"--merge", other}, 2, "another model");
  const std::string bytes = read_text(other);
  write_text(other, bytes.substr(0, bytes.size() / 2));
  refusal(model, {"--merge", other}, 4, "other");
}

// ---- plan --------------------------------------------------------------------------------------

TEST_F(CliPlanning, CudaWithoutAGpuExitsWith3AndChangesNothing) {
  if (fs::exists("/dev/nvidiactl")) GTEST_SKIP() << "there is a GPU";
  const std::string model = assemble("llama_awq");
  const std::string before = read_text(model + "/config.json");
  const Outcome outcome =
      plan(model, text_file("a.txt", 60, 1), with({"--device", "cuda"}, kLooseGates));
  EXPECT_EQ(outcome.code, 3);
  EXPECT_HAS(outcome.err, "CUDA");
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(read_text(model + "/config.json"), before);
}

TEST_F(CliPlanning, PlanIsForTheGpu) {
  if (!fs::exists("/dev/nvidiactl")) GTEST_SKIP() << "there is no GPU";
  const std::string model = assemble("llama_awq");
  const Outcome outcome = plan(model, text_file("a.txt", 60, 1),
                               with({"--device", "cuda", "--mode", "w4a4"}, kLooseGates));
  if (outcome.code == 3) GTEST_SKIP() << outcome.err;  // a build without CUDA
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.out, "on NVIDIA");
  const json config = json::parse(read_text(model + "/config.json"));
  EXPECT_EQ(config["quantization_config"]["nibble"]["schema_version"], 1);
}

TEST_F(CliPlanning, PlanIsWrittenBesideEverythingElseAndRuns) {
  for (const char* golden : {"llama_awq", "qwen2_awq", "gemma3_awq"}) {
    const std::string model = assemble(golden), text = text_file("a.txt", 60, 1);
    json before = json::parse(read_text(model + "/config.json"));
    const auto files = list_directory(model);
    const Outcome outcome = plan(model, text, with({"--mode", "w4a8"}, kLooseGates));
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_HAS(outcome.out, "mean KL divergence");
    EXPECT_EQ(list_directory(model), files);
    json after = json::parse(read_text(model + "/config.json"));
    const json block = after["quantization_config"]["nibble"];
    after["quantization_config"].erase("nibble");
    EXPECT_EQ(after, before);
    EXPECT_EQ(block["schema_version"], 1);
    EXPECT_EQ(block["reference"], "w4a16");
    EXPECT_EQ(block["text"]["sha256"], sha256_hex(read_text(text)));
    EXPECT_EQ(block["calibration"], nullptr);
    for (const char* gate : {"ppl_ratio", "kld_mean", "same_top"}) {
      EXPECT_TRUE(block["gates"][gate]["value"].is_number()) << gate;
    }
    const Outcome run = run_tool(
        {"perplexity", model, "-f", text, "--mode", "auto", "--context", "32", "--chunks", "2"});
    EXPECT_EQ(run.code, 0) << run.err;
  }
}

TEST_F(CliPlanning, LooseGatesPromoteNothingAndStrictOnesEverything) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 60, 1);
  const auto report = [&](std::vector<std::string> options) {
    const Outcome outcome =
        plan(model, text, with({"--mode", "w4a4", "--dry-run", "--json"}, options));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return parse_output(outcome);
  };
  const json loose = report(kLooseGates);
  EXPECT_EQ(loose["promoted"]["slots"], 0);
  EXPECT_EQ(loose["promoted"]["percent_of_work_at_a4"], 100);
  // Nothing but W4A16 is as good as W4A16.
  const json strict = report(
      {"--max-ppl-ratio", "1", "--max-kld", "1e-9", "--min-share", "0", "--min-same-top", "100"});
  EXPECT_EQ(strict["promoted"]["slots"], 2 * kSlots);
  EXPECT_EQ(strict["promoted"]["percent_of_work_at_a16"], 100);
  EXPECT_TRUE(strict["met"]);
  EXPECT_EQ(strict["slots"].size(), 2u * kSlots);
}

TEST_F(CliPlanning, UnreachableGatesExitWith1AndLeaveTheConfig) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 60, 1);
  const std::string before = read_text(model + "/config.json");
  for (const char* mode : {"w4a4", "w4a8"}) {
    const Outcome outcome = plan(model, text, {"--mode", mode, "--max-kld", "0"});
    EXPECT_EQ(outcome.code, 1) << outcome.err;
    EXPECT_HAS(outcome.err, "mean KLD");
    EXPECT_HAS(outcome.err, "--min-share");
    EXPECT_EQ(read_text(model + "/config.json"), before);
  }
}

TEST_F(CliPlanning, DryRunWritesNothing) {
  const std::string model = assemble("llama_awq"), text = text_file("a.txt", 60, 1);
  const std::string before = read_text(model + "/config.json");
  for (const char* rank : {"kld", "snr"}) {
    const Outcome outcome = plan(model, text, with({"--dry-run", "--rank", rank}, kLooseGates));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_HAS(outcome.out, "nothing was written");
    EXPECT_EQ(read_text(model + "/config.json"), before);
  }
}

TEST_F(CliPlanning, PlanUsesACalibrationOfThisModelOnly) {
  const std::string model = assemble("llama_awq"), other = assemble("qwen2_awq");
  const std::string text = text_file("a.txt", 60, 1), stats = dir_.file("stats");
  ASSERT_EQ(calibrate(model, stats, {"-f", text_file("b.txt", 40, 2)}).code, 0);
  const std::vector<std::string> options = with({"--calibration", stats, "--json"}, kLooseGates);
  const json report = parse_output(plan(model, text, options));
  EXPECT_EQ(report["calibration"]["sha256"], sha256_hex(read_text(stats)));
  const json config = json::parse(read_text(model + "/config.json"));
  EXPECT_EQ(config["quantization_config"]["nibble"]["calibration"]["sha256"],
            report["calibration"]["sha256"]);
  const Outcome wrong = plan(other, text, options);
  EXPECT_EQ(wrong.code, 2);
  EXPECT_HAS(wrong.err, "another model");
}

TEST_F(CliPlanning, PlanRefusals) {
  const std::string model = assemble("llama_awq"), dense = assemble("qwen2");
  const std::string text = text_file("a.txt", 60, 1);
  const auto refusal = [&](const std::string& directory, const std::string& file,
                           std::vector<std::string> options, int code, const std::string& part) {
    const Outcome outcome = plan(directory, file, options);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_HAS(outcome.err, part);
  };
  refusal(dense, text, {}, 3, "no 4-bit linears");
  refusal(model, text_file("short.txt", 7, 1), {}, 2, "at least 2 chunks");
  refusal(model, text, {"--mode", "w4a16"}, 2, "--mode");
  refusal(model, text, {"--max-kld", "-1"}, 2, "--max-kld");
  refusal(dir_.file("absent"), text, {}, 4, "absent");
  // An older directory, with its quantization config in a file of its own.
  json config = json::parse(read_text(model + "/config.json"));
  write_text(model + "/quant_config.json", config["quantization_config"].dump());
  config.erase("quantization_config");
  write_text(model + "/config.json", config.dump());
  refusal(model, text, {}, 3, "no quantization_config");
  EXPECT_EQ(plan(model, text, with({"--dry-run"}, kLooseGates)).code, 0);
}

}  // namespace
}  // namespace nibble::test
