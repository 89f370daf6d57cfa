// `bench gemm --peers` with workers that answer, refuse, die, hang and lie (fake_peer.py), and what
// the probes of the machine report. Nothing here depends on how long anything takes.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "checkpoint_builder.h"
#include "tool_runner.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// The fake worker with the fault that it reads from its name.
std::string worker(const TempDir& dir, const std::string& fault) {
  const std::string path = dir.file(fault);
  fs::create_symlink(NIBBLE_FAKE_PEER, path);
  return path;
}

Outcome bench(const std::vector<std::string>& peers, const std::string& m = "1,3") {
  std::vector<std::string> words = {"bench",  "gemm", "-m",        m,    "-n",
                                    "16",     "-k",   "256",       "-g", "128",
                                    "--mode", "w4a8", "--seconds", "0",  "--no-baseline"};
  words.insert(words.end(), {"--output", "json", "--threads", "1", "--peer-timeout", "20"});
  for (const std::string& peer : peers) words.insert(words.end(), {"--peers", peer});
  return run_tool(words);
}

TEST(CliPeers, AWorkerIsCheckedTimedAndCompared) {
  TempDir dir;
  const std::string file = dir.file("run.json");
  const Outcome outcome = run_tool({"bench", "gemm", "-m", "2", "-n", "16", "-k", "256", "--mode",
                                    "w4a8", "--seconds", "0", "--no-baseline", "--json-file", file,
                                    "--peers", "fake=exec:" + worker(dir, "works")});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.out, "peer fake: fake 7, none");
  EXPECT_HAS(outcome.out, "| fake f32/plain | fake | 2 | 16 | 256 | 128 | 123.0 | 123.0 | 123.0 |");
  const json document = json::parse(read_text(file), nullptr, false);
  ASSERT_FALSE(document.is_discarded());
  ASSERT_EQ(document["versus"].size(), 1u);
  const json& versus = document["versus"][0];
  EXPECT_EQ(versus["peer"], "fake");
  EXPECT_EQ(versus["peer_us"], 123.0);
  EXPECT_GT(versus["ratio_of_medians"], 0.0);
  EXPECT_GT(versus["median_of_ratios"], 0.0);
  for (const json& row : document["results"]) {
    if (!row.contains("peer")) continue;
    EXPECT_EQ(row["weight_error"], 0.0);
    EXPECT_LT(row["product_error"], 1e-5);
    EXPECT_GE(row["samples_us"].size(), 7u);
  }
}

TEST(CliPeers, OfAPeersTypesTheFastestAreTimedInFull) {
  TempDir dir;
  const Outcome outcome =
      run_tool({"bench", "gemm", "-m", "1", "-n", "16", "-k", "256", "--mode", "w4a8", "--seconds",
                "0", "--no-baseline", "--output", "json", "--peer-types", "1", "--peers",
                "fake=exec:" + worker(dir, "works")});
  const json document = parse_output(outcome);
  EXPECT_EQ(document["results"].size(), 2u);  // ours and one of theirs
  ASSERT_EQ(document["first_looks"].size(), 2u);
  EXPECT_NE(document["first_looks"][0]["in_rounds"], document["first_looks"][1]["in_rounds"]);
}

TEST(CliPeers, AFailedPeerIsNamedAndTheRunGoesOnWithoutIt) {
  const std::pair<const char*, const char*> faults[] = {
      {"dies-in-run", "peer bad, run f32/"},
      {"garbage-in-run", "which is no JSON object"},
      {"wrong", "is wrong: relative error"},
      {"refuses", "peer bad, dequantize f32/plain: not today"},
      {"other-protocol", "peer bad does not speak protocol 1"},
      {"leaves-its-group", "peer bad, hello: cannot be stopped"},
  };
  for (const auto& [fault, message] : faults) {
    TempDir dir;
    const Outcome outcome =
        bench({std::string("bad=exec:") + worker(dir, fault), "good=exec:" + worker(dir, "works")});
    EXPECT_EQ(outcome.code, 1) << fault;
    EXPECT_HAS(outcome.err, message);
    const json document = parse_output(outcome);
    EXPECT_FALSE(document["failures"].empty()) << fault;
    size_t ours = 0, good = 0;
    for (const json& row : document["results"]) {
      ours += row.contains("kernel");
      good += row.value("mode", "") == "good";
      EXPECT_NE(row.value("mode", ""), "bad") << fault;
    }
    EXPECT_EQ(ours, 2u) << fault;
    EXPECT_EQ(good, 4u) << fault;
  }
}

TEST(CliPeers, ADeathIsToldOnceAndIsNotSlowness) {
  TempDir dir;
  const json in_run = parse_output(bench({"bad=exec:" + worker(dir, "dies-in-run")}));
  EXPECT_EQ(in_run["failures"].size(), 1u) << in_run["failures"];
  const json in_hold = parse_output(bench({"bad=exec:" + worker(dir, "dies-in-hold")}));
  EXPECT_EQ(in_hold["failures"].size(), 1u) << in_hold["failures"];
  ASSERT_EQ(in_hold["first_looks"].size(), 2u);
  for (const json& look : in_hold["first_looks"]) {
    EXPECT_EQ(look["failed"], true);
    EXPECT_EQ(look["in_rounds"], false);
  }
}

TEST(CliPeers, WhatAWorkerSaysIsEscaped) {
  TempDir dir;
  const Outcome outcome = bench({"bad=exec:" + worker(dir, "refuses-in-colour")}, "1");
  EXPECT_EQ(outcome.code, 1);
  EXPECT_HAS(outcome.err, "dequantize f32/plain: \"\\x1b[31mno\"");
}

TEST(CliPeers, AHungWorkerIsKilledAfterItsTime) {
  TempDir dir;
  const Outcome outcome =
      run_tool({"bench", "gemm", "-m", "1", "-n", "16", "-k", "256", "--mode", "w4a8", "--seconds",
                "0", "--no-baseline", "--output", "json", "--peer-timeout", "2", "--peers",
                "bad=exec:" + worker(dir, "hangs-in-run")});
  EXPECT_EQ(outcome.code, 1);
  EXPECT_HAS(outcome.err, "did not answer in time");
  EXPECT_EQ(parse_output(outcome)["results"].size(), 1u);
}

TEST(CliPeers, WhatCannotStartOrIsNoPeerIsAnError) {
  TempDir dir;
  const Outcome missing = bench({"gone=exec:" + dir.file("nothing")}, "1");
  EXPECT_EQ(missing.code, 1);
  EXPECT_HAS(missing.err, "cannot start");
  const Outcome unknown = bench({"mlx=somewhere"}, "1");
  EXPECT_EQ(unknown.code, 2);
  EXPECT_HAS(unknown.err, "no peer is named 'mlx'");
  const Outcome bare = bench({"ggml"}, "1");
  EXPECT_EQ(bare.code, 2);
  EXPECT_HAS(bare.err, "expected NAME=WHAT");
  const Outcome empty = bench({"ggml=" + dir.file("")}, "1");
  EXPECT_EQ(empty.code, 1);
  EXPECT_HAS(empty.err, "no libggml-base.so in");
}

TEST(CliPeers, NoWorkerOutlivesTheTool) {
  TempDir dir;
  const std::string path = worker(dir, "works");
  (void)bench({"fake=exec:" + path}, "1");
  for (const auto& entry : fs::directory_iterator("/proc")) {
    // no process, or one that has just ended: nothing can be read
    std::ifstream file(entry.path() / "cmdline", std::ios::binary);
    const std::string words{std::istreambuf_iterator<char>(file), {}};
    EXPECT_EQ(words.find(path), std::string::npos) << entry.path();
  }
}

TEST(CliProbes, BenchAndDoctorReportTheMachinesLimits) {
  const json limits = parse_output(bench({}))["limits"];
  ASSERT_EQ(limits.size(), 2u);
  EXPECT_GT(limits[0]["read_gb_per_s"]["median"], 0.0);
  const json measured = parse_output(run_tool({"doctor", "--measure", "--json"}))["measured"];
  for (const char* threads : {"one_thread", "all_threads"}) {
    EXPECT_GT(measured["read_gb_per_s"][threads], 0.0);
    for (const json& peak : measured["peaks"]) EXPECT_GT(peak["tops"][threads], 0.0) << peak;
  }
  for (const json& limit : limits) {
    for (const json& peak : limit["peak_tops"]) EXPECT_GT(peak["median"], 0.0);
  }
  const json doctor = parse_output(run_tool({"doctor", "--json"}));
  for (const json& kernel : doctor["kernels"]) {
    if (kernel["isa"] == "scalar" || !kernel["runs_here"]) continue;
    EXPECT_TRUE(std::any_of(measured["peaks"].begin(), measured["peaks"].end(),
                            [&](const json& peak) { return peak["isa"] == kernel["isa"]; }))
        << kernel;
  }
}

TEST(CliPeers, OptionsOfTheOtherDeviceAreRefused) {
  const auto refused = [](const std::string& device, const std::vector<std::string>& option) {
    std::vector<std::string> words = {"bench", "gemm", "--device", device};
    words.insert(words.end(), option.begin(), option.end());
    const Outcome outcome = run_tool(words);
    EXPECT_EQ(outcome.code, 2) << option[0];
    EXPECT_HAS(outcome.err, option[0] + " is for --device " + (device == "cpu" ? "cuda" : "cpu"));
  };
  refused("cuda", {"--isa", "avx2"});
  refused("cuda", {"--threads", "2"});
  refused("cpu", {"--plans"});
  refused("cpu", {"--cublas", "libcublas.so"});
  const Outcome both = run_tool({"bench", "gemm", "--device", "cuda", "--plans", "--peers", "a=b"});
  EXPECT_EQ(both.code, 2);
  EXPECT_HAS(both.err, "without --peers");
  for (const std::vector<std::string>& option :
       {std::vector<std::string>{"--kernel", "w4a8_rs_sm90"},
        {"--explain"},
        {"--no-baseline"},
        {"--cublas", "libcublas.so"}}) {
    std::vector<std::string> words = {"bench", "gemm", "--device", "cuda", "--plans"};
    words.insert(words.end(), option.begin(), option.end());
    const Outcome outcome = run_tool(words);
    EXPECT_EQ(outcome.code, 2) << option[0];
    EXPECT_HAS(outcome.err, "without " + option[0]);
  }
}

TEST(CliPeers, AWorkerOfAGpuIsNoPeerOnTheCpu) {
  TempDir dir;
  const Outcome outcome = bench({"fake=exec:" + worker(dir, "works-on-cuda")}, "1");
  EXPECT_EQ(outcome.code, 1);
  EXPECT_HAS(outcome.err, "peer fake is for device cuda, this run for cpu");
}

// Where there is no GPU, the run says so and starts nobody.
TEST(CliPeers, OnAGpuNeedAGpu) {
  TempDir dir;
  const Outcome outcome =
      run_tool({"bench", "gemm", "--device", "cuda", "-m", "1", "-n", "16", "-k", "256", "--mode",
                "w4a8", "--seconds", "0", "--peers", "fake=exec:" + worker(dir, "works")});
  if (outcome.code == 1) {  // there is one, and that worker is not for it
    EXPECT_HAS(outcome.err, "peer fake is for device cpu, this run for cuda");
    return;
  }
  EXPECT_EQ(outcome.code, 3);
  EXPECT_EQ(outcome.err.find("peer fake"), std::string::npos) << outcome.err;
}

TEST(CliProbes, IsaHoldsOurSideToIt) {
  const Outcome outcome =
      run_tool({"bench", "gemm", "-m", "16", "-n", "16", "-k", "256", "--mode", "w4a8,w4a16",
                "--seconds", "0", "--no-baseline", "--output", "json", "--isa", "avx2"});
  if (outcome.code == 3) GTEST_SKIP() << "SKIPPED KERNEL w4a8_avx2: " << outcome.err;
  const json document = parse_output(outcome);
  ASSERT_EQ(document["results"].size(), 2u);
  EXPECT_EQ(document["results"][0]["kernel"], "w4a8_avx2");
  EXPECT_EQ(document["results"][1]["kernel"], "w4a16_avx2");
}

TEST(CliProbes, Avx512IsNotAvxVnni) {
  const Outcome outcome =
      run_tool({"bench", "gemm", "-m", "1", "-n", "16", "-k", "256", "--mode", "w4a8", "--seconds",
                "0", "--no-baseline", "--output", "json", "--isa", "avx512"});
  if (outcome.code == 3) GTEST_SKIP() << "SKIPPED KERNEL w4a8_avx2: " << outcome.err;
  EXPECT_NE(parse_output(outcome)["results"][0]["kernel"], "w4a8_avxvnni");
}

}  // namespace
}  // namespace nibble::test
