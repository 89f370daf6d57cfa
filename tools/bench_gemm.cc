// nibble bench gemm: kernels, baselines and other libraries in turn over a grid of shapes, weights
// cold, results checked before anything is timed.
#include "bench_gemm.h"

#include <fmt/format.h>

#include <memory>

#include "bench_gemm_cuda.h"
#include "cli.h"
#include "format/output_file.h"
#include "synthetic.h"

namespace nibble::cli {
namespace {

Result<std::unique_ptr<GemmShape>> make_shape(int64_t n, int64_t k, int64_t group_size) {
  auto shape = std::make_unique<GemmShape>();
  shape->tensors =
      make_synthetic_weight({.name = "bench", .k = k, .n = n, .group_size = group_size}, 1);
  shape->reference = ref::unpack(shape->tensors.view());
  Result<PackedWeights> packed = pack_weights(shape->tensors.view());
  if (!packed.ok()) return packed.status();
  shape->packed = std::move(*packed);
  return shape;
}

/// All of the grid; `mismatch` says what was wrong of ours or of a baseline.
Status measure_grid(const GemmBenchOptions& o, PeerTeam& peers, GemmBench& bench,
                    std::string& mismatch) {
  ReadBandwidthProbe probe(o.used_threads());
  for (const int64_t n : o.n) {
    for (const int64_t k : o.k) {
      if (interrupted()) return Status(Code::interrupted, "interrupted");
      NIBBLE_TRY(check_bench_shape(n, k, o.group_size));
      Result<std::unique_ptr<GemmShape>> shape = make_shape(n, k, o.group_size);
      if (!shape.ok()) return shape.status();
      NIBBLE_TRY(peers.prepare((*shape)->reference));
      for (const int64_t m : o.m) {
        NIBBLE_TRY(measure_gemm(o, **shape, m, peers, probe, bench, mismatch));
        if (!mismatch.empty()) return {};
        if (interrupted()) return Status(Code::interrupted, "interrupted");
      }
    }
  }
  return {};
}

int run_bench(const GemmBenchOptions& o) {
  Result<std::vector<PeerSpec>> specs = parse_peers(o.peers);
  if (!specs.ok()) return fail(specs.status());
  PeerTeam peers(*specs, o.device, o.used_threads(), o.peer_timeout);
  GemmBench bench;
  for (const auto& peer : peers.peers()) {
    bench.peers.push_back({{"label", peer->label()}, {"about", peer->about()}});
  }
  std::string mismatch;
  const Status status = measure_grid(o, peers, bench, mismatch);
  if (status.code() == Code::interrupted) return kExitInterrupted;
  if (!status.ok()) return fail(status);
  if (!mismatch.empty()) {
    fmt::print(stderr, "nibble: check failed: {}\n", mismatch);
    return kExitFailed;
  }
  print_gemm_bench(o, bench, peers.failures());
  if (!o.json_file.empty()) {
    const Status written = write_bench_json(o.json_file, gemm_bench_json(bench, peers.failures()));
    if (!written.ok()) return fail(written);
  }
  std::fflush(stdout);
  for (const std::string& failure : peers.failures()) {
    fmt::print(stderr, "nibble: error: {}\n", failure);
  }
  return peers.failures().empty() ? kExitOk : kExitFailed;
}

void add_peer_options(CLI::App& command, GemmBenchOptions& o) {
  command
      .add_option("--peers", o.peers,
                  "Another library in a process of its own, any number of times:\n" + peer_kinds())
      ->type_name("NAME=WHAT")
      ->allow_extra_args(false)
      ->group("Peers");
  command
      .add_option("--peer-types", o.peer_types,
                  "Types of a peer that are timed in full at an M, its fastest; 0: all")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str()
      ->group("Peers");
  command
      .add_option("--peer-timeout", o.peer_timeout,
                  "Seconds; a peer that takes longer for one answer counts as hung")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group("Peers");
}

void add_kernel_options(CLI::App& command, GemmBenchOptions& o) {
  command.add_option("--mode", o.modes, "Modes, each with its preferred kernel")
      ->delimiter(',')
      ->check(CLI::IsMember({"w4a16", "w4a8", "w4a8-fp8", "w4a4"}))
      ->capture_default_str();
  CLI::Option* kernel =
      command
          .add_option("--kernel", o.kernels, "Kernels by name instead (nibble doctor lists them)")
          ->delimiter(',');
  command
      .add_option("--isa", o.isa, "Use no wider instruction set than this (for a peer so built)")
      ->check(CLI::IsMember({"avx2", "avxvnni", "avx512", "avx512vnni", "amx"}))
      ->excludes(kernel);
  command.add_option("--act", o.activations, "Activation scales")
      ->check(CLI::IsMember({"token", "group", "tensor"}))
      ->capture_default_str();
  command.add_flag("--symmetric", o.symmetric, "w4a4: int4 activations without zero points");
}

/// Options that mean nothing to a device are refused there: a run must not look as if they counted.
int run_on_device(const CLI::App& command, const GemmBenchOptions& o) {
  const bool cpu = o.device == "cpu";
  const std::vector<const char*> others =
      cpu ? std::vector{"--plans", "--cublas"} : std::vector{"--isa", "--threads"};
  for (const char* option : others) {
    if (command.count(option) == 0) continue;
    return fail(Status(
        Code::invalid_argument,
        fmt::format("{} is for --device {}, not for {}", option, cpu ? "cuda" : "cpu", o.device)));
  }
  if (o.plans && !o.peers.empty()) {
    return fail(Status(Code::invalid_argument, "--plans compares our plans only: without --peers"));
  }
  for (const char* option : {"--kernel", "--explain", "--no-baseline", "--cublas"}) {
    if (!o.plans || command.count(option) == 0) continue;
    return fail(Status(Code::invalid_argument,
                       fmt::format("--plans times every plan of ours: without {}", option)));
  }
  return cpu ? run_bench(o) : run_cuda_gemm_bench(o);
}

}  // namespace

Status check_bench_shape(int64_t n, int64_t k, int64_t group_size) {
  const auto invalid = [](std::string text) { return Status(Code::invalid_argument, text); };
  if (k <= 0) return invalid(fmt::format("K = {}: expected more than 0", k));
  if (group_size != -1 && (group_size <= 0 || k % group_size != 0)) {
    return invalid(fmt::format("group size {} does not divide K = {}", group_size, k));
  }
  if (n <= 0 || n % 8 != 0) return invalid(fmt::format("N = {} is not a multiple of 8", n));
  return {};
}

Status write_bench_json(const std::string& path, const nlohmann::json& document) {
  const std::string text =
      document.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  return replace_file(path, [&](OutputFile& file) { return file.write(text.data(), text.size()); });
}

void add_bench_command(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<GemmBenchOptions>();
  CLI::App* bench = app.add_subcommand("bench", "Measure speed");
  bench->require_subcommand(1);
  CLI::App* command = bench->add_subcommand("gemm",
                                            "Kernels against dequantize + matmul and other "
                                            "libraries: interleaved, weights cold, results\n"
                                            "checked first");
  command->add_option("-m,--m", o->m, "Rows of x")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("-n,--n", o->n, "Output channels")->delimiter(',')->capture_default_str();
  command->add_option("-k,--k", o->k, "Input channels")->delimiter(',')->capture_default_str();
  command->add_option("-g,--group-size", o->group_size, "Group size; -1: K")->capture_default_str();
  add_kernel_options(*command, *o);
  command->add_option("--threads", o->threads, "Threads; 0: all CPUs")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str();
  command->add_option("--seconds", o->seconds, "Time per shape and M, over all contenders")
      ->capture_default_str();
  command->add_flag("--no-baseline", o->no_baseline, "Skip dequantize + matmul");
  command->add_flag("--explain", o->explain, "Print each plan to stderr");
  command->add_option("--device", o->device, "Where; cuda: GPU 0, beside cuBLAS and a pure read")
      ->check(one_device())
      ->capture_default_str();
  command->add_flag("--plans", o->plans,
                    "--device cuda: time every plan that there is for a shape against the one\n"
                    "that is chosen");
  command->add_option("--cublas", o->cublas, "Path of libcublas, for --device cuda");
  add_peer_options(*command, *o);
  command->add_option("--output", o->output, "Format")
      ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}))
      ->capture_default_str();
  command->add_option("--json-file", o->json_file, "Also write the JSON document to this file")
      ->type_name("FILE");
  command->footer(
      "Exit codes: 0 ok, 1 a result is wrong or a peer failed (the run goes on without it).\n"
      "\nExamples:\n"
      "  nibble bench gemm -m 1,8,64,512 -n 4096 -k 4096 --mode w4a8\n"
      "  nibble bench gemm --mode w4a8 --isa avx2 --peers ggml=/path/to/ggml/lib --no-baseline\n"
      "  nibble bench gemm --device cuda --mode w4a8 -m 1,64,4096 --peers humming=python3");
  command->callback([o, command, &exit_code] { exit_code = run_on_device(*command, *o); });
  add_bench_model_command(*bench, exit_code);
}

}  // namespace nibble::cli
