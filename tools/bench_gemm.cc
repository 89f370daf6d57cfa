// nibble bench gemm: kernels and baselines in turn over a grid of shapes, weights cold, results
// checked against the oracle before anything is timed.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>

#include "base/cpu_features.h"
#include "baseline.h"
#include "cli.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/ref.h"
#include "layer_check.h"
#include "oracle_check.h"
#include "synthetic.h"
#include "timing.h"

namespace nibble::cli {
namespace {

struct Options {
  std::vector<int64_t> m = {1, 8, 64, 512}, n = {4096}, k = {4096};
  int64_t group_size = 128;
  std::vector<std::string> modes = {"w4a16", "w4a8", "w4a4"}, kernels;
  std::string activations = "token", output = "md";
  int threads = 0;
  double seconds = 2.0;
  bool no_baseline = false, explain = false;
};

constexpr const char* kDequantizeAndMatmul = "dequant+matmul";

/// One line of the result.
struct Row {
  std::string kernel, mode;
  bool is_baseline = false;
  int64_t m = 0, n = 0, k = 0, group_size = 0;
  size_t bytes = 0;  // the least that must be read and written
  Samples samples;
  double read_gb_per_s = 0;  // measured in the same rounds
  double best_baseline_us = 0;

  double tops() const { return 2.0 * m * n * k / samples.median() * 1e-6; }
  double gb_per_s() const { return static_cast<double>(bytes) / samples.median() * 1e-3; }
  double roofline_share() const { return read_gb_per_s > 0 ? gb_per_s() / read_gb_per_s : 0; }
};

struct ModeRun {
  Plan plan;
  AlignedBuffer workspace;
  std::vector<float> y;
  GemmInput input;
  GemmTarget target;

  Status operator()() { return run_gemm(plan, input, {&target, 1}, workspace.data()); }
};

/// One weight and its forms.
struct Shape {
  AwqTensors tensors;
  ref::Weights reference;
  PackedWeights packed;
};

Result<std::unique_ptr<Shape>> make_shape(const Options& o, int64_t n, int64_t k) {
  auto shape = std::make_unique<Shape>();
  shape->tensors =
      make_synthetic_weight({.name = "bench", .k = k, .n = n, .group_size = o.group_size}, 1);
  shape->reference = ref::unpack(shape->tensors.view());
  Result<PackedWeights> packed = pack_weights(shape->tensors.view());
  if (!packed.ok()) return packed.status();
  shape->packed = std::move(*packed);
  return shape;
}

/// Empty if the first row of the baseline's result is right, else what is wrong.
std::string check_baseline(const Shape& shape, Baseline& baseline, const std::vector<float>& x) {
  baseline.dequantize();
  baseline.multiply();
  const std::vector<double> exact = ref::multiply_fp64(shape.reference, x.data(), 1, nullptr);
  const std::vector<float> y = baseline.result();
  const double snr = snr_db(exact, {y.begin(), y.begin() + static_cast<int64_t>(exact.size())});
  constexpr double kBf16Db = 35.0;  // x and W rounded to 8 bits, each 2^-9: about 48 dB
  if (snr >= kBf16Db) return "";
  return fmt::format("baseline {} is wrong: {} dB against fp64", baseline.name(), decibels(snr));
}

Status prepare(const Options& o, const Shape& shape, Mode mode, const char* kernel,
               const std::vector<float>& x, int64_t m, ModeRun& run) {
  Problem p{.m = m,
            .n = shape.packed.n,
            .k = shape.packed.k,
            .group_size = shape.packed.group_size,
            .mode = mode,
            .granularity = granularities_by_name().at(o.activations),
            .symmetric = mode != Mode::w4a4};
  Result<Plan> plan = plan_gemm(p, kernel, o.threads);
  if (!plan.ok()) return plan.status();
  run.plan = *plan;
  Result<AlignedBuffer> workspace = AlignedBuffer::zeroed(plan->workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  run.workspace = std::move(*workspace);
  run.y.resize(static_cast<size_t>(m * p.n));
  run.input.x = x.data();
  run.input.x_stride = p.k;
  run.target = {&shape.packed, run.y.data(), p.n, nullptr};
  return {};
}

/// The (mode, kernel) pairs to run: forced kernels, or the preferred one of each mode.
Result<std::vector<std::pair<Mode, const char*>>> contenders_of(const Options& o) {
  std::vector<std::pair<Mode, const char*>> pairs;
  for (const std::string& name : o.kernels) {
    const size_t before = pairs.size();
    for (const KernelInfo& info : kernel_table()) {
      if (name == info.name) pairs.emplace_back(info.mode, info.name);
    }
    if (pairs.size() == before) {
      return Status(Code::invalid_argument,
                    fmt::format("no kernel is named '{}' (see nibble doctor)", name));
    }
  }
  if (o.kernels.empty()) {
    for (const std::string& mode : o.modes) pairs.emplace_back(modes_by_name().at(mode), nullptr);
  }
  return pairs;
}

/// Adds the rows of one M. A result that is not the oracle's goes to `mismatch` and nothing is
/// timed.
Status bench_point(const Options& o, const Shape& shape, int64_t m, ReadBandwidthProbe& probe,
                   std::vector<Row>& rows, std::string& mismatch) {
  const int threads = o.threads > 0 ? o.threads : available_cpus();
  const std::vector<float> x = make_input(InputKind::normal, m, shape.packed.k, 1);
  Result<std::vector<std::pair<Mode, const char*>>> pairs = contenders_of(o);
  if (!pairs.ok()) return pairs.status();
  std::vector<ModeRun> runs(pairs->size());
  std::vector<Contender> contenders;
  std::vector<std::string> modes;  // of the contenders
  for (size_t i = 0; i < runs.size(); ++i) {
    NIBBLE_TRY(prepare(o, shape, (*pairs)[i].first, (*pairs)[i].second, x, m, runs[i]));
    if (o.explain) fmt::print(stderr, "{}\n", runs[i].plan.describe());
    NIBBLE_TRY(runs[i]());
    mismatch = first_difference({runs[i].plan.problem, runs[i].input, runs[i].y.data(), nullptr},
                                shape.reference, nullptr, kOracleRows);
    if (!mismatch.empty()) {
      mismatch = fmt::format("{}, M={}: {}", runs[i].plan.kernel_name(), m, mismatch);
      return {};
    }
    modes.push_back(mode_name(runs[i].plan.problem.mode));
    contenders.push_back(
        {runs[i].plan.kernel_name(),
         [&] { flush_from_caches(shape.packed.storage.data(), shape.packed.storage.bytes()); },
         [&runs, i] { (void)runs[i](); },
         {}});
  }
  std::vector<std::unique_ptr<Baseline>> baselines;
  if (!o.no_baseline) baselines = make_baselines(shape.tensors, x.data(), m, threads);
  for (const auto& baseline : baselines) {
    mismatch = check_baseline(shape, *baseline, x);
    if (!mismatch.empty()) return {};
    modes.push_back(kDequantizeAndMatmul);
    contenders.push_back({baseline->name(),
                          [&baseline] { baseline->flush_weight(); },
                          [&baseline] { baseline->dequantize(), baseline->multiply(); },
                          {}});
    // with four to eight times the memory of the weight kept dequantized
    modes.push_back("matmul only");
    contenders.push_back({baseline->name(),
                          [&baseline] { baseline->flush_matrix(); },
                          [&baseline] { baseline->multiply(); },
                          {}});
  }
  if (probe.ok()) {
    // one slice untimed: the baselines leave caches full of dirty lines that must be written first
    const auto read = [&probe] { probe.read_slice(); };
    contenders.push_back({"read", read, read, {}});
  }
  time_interleaved(contenders,
                   {.threads = threads, .min_rounds = 7, .max_rounds = 2000, .seconds = o.seconds},
                   interrupted);

  double read_gb_per_s = 0, best_baseline = 0;
  if (probe.ok()) {
    const double us = contenders.back().samples.median();
    if (us > 0) read_gb_per_s = static_cast<double>(probe.slice_bytes()) / us * 1e-3;
  }
  for (size_t i = 0; i < modes.size(); ++i) {
    const double us = contenders[i].samples.median();
    if (modes[i] == kDequantizeAndMatmul && (best_baseline == 0 || us < best_baseline)) {
      best_baseline = us;
    }
  }
  for (size_t i = 0; i < modes.size(); ++i) {
    Row row;
    row.is_baseline = i >= runs.size();
    row.kernel = contenders[i].name;
    row.mode = modes[i];
    row.m = m;
    row.n = shape.packed.n;
    row.k = shape.packed.k;
    row.group_size = shape.packed.group_size;
    row.bytes = static_cast<size_t>(shape.packed.bytes() + 4 * m * (row.k + row.n));
    row.samples = contenders[i].samples;
    row.read_gb_per_s = read_gb_per_s;
    row.best_baseline_us = best_baseline;
    rows.push_back(std::move(row));
  }
  return {};
}

nlohmann::json to_json(const Row& row) {
  nlohmann::json json = {
      {"mode", row.mode},
      {"device", device_summary()},
      {"m", row.m},
      {"n", row.n},
      {"k", row.k},
      {"group_size", row.group_size},
      {"us_median", row.samples.median()},
      {"us_min", row.samples.min()},
      {"samples_us", row.samples.microseconds},
      {"tops", row.tops()},
      {"read_gb_per_s", row.read_gb_per_s},
      {"speedup_vs_dequant_matmul",
       row.best_baseline_us > 0 ? nlohmann::json(row.best_baseline_us / row.samples.median())
                                : nlohmann::json(nullptr)},
      {"checked", true}};
  json[row.is_baseline ? "peer" : "kernel"] = row.kernel;
  json["gb_per_s"] = json["roofline_share"] = nullptr;
  if (!row.is_baseline) {  // of the packed bytes, which a baseline does not read
    json["gb_per_s"] = row.gb_per_s();
    json["roofline_share"] = row.roofline_share();
  }
  return json;
}

void print_rows(const std::vector<Row>& rows, bool csv) {
  const std::vector<std::string> head = {"kernel",
                                         "mode",
                                         "M",
                                         "N",
                                         "K",
                                         "g",
                                         "us",
                                         "min",
                                         "max",
                                         "TOPS",
                                         "GB/s",
                                         "read %",
                                         "vs dequantize + best matmul"};
  const auto line = [csv](const std::vector<std::string>& cells) {
    if (csv) {
      fmt::print("{}\n", fmt::join(cells, ","));
    } else {
      fmt::print("| {} |\n", fmt::join(cells, " | "));
    }
  };
  line(head);
  if (!csv) {
    const std::vector<std::string> rule(head.size(), "---");
    fmt::print("|{}|\n", fmt::join(rule, "|"));
  }
  for (const Row& r : rows) {
    const double us = r.samples.median();
    line({r.kernel, r.mode, std::to_string(r.m), std::to_string(r.n), std::to_string(r.k),
          std::to_string(r.group_size), fmt::format("{:.1f}", us),
          fmt::format("{:.1f}", r.samples.min()), fmt::format("{:.1f}", r.samples.max()),
          fmt::format("{:.3f}", r.tops()),
          r.is_baseline ? "-" : fmt::format("{:.1f}", r.gb_per_s()),
          r.is_baseline ? "-" : fmt::format("{:.0f}", 100 * r.roofline_share()),
          r.best_baseline_us > 0 ? fmt::format("{:.2f}x", r.best_baseline_us / us) : "-"});
  }
}

int run_bench(const Options& o) {
  ReadBandwidthProbe probe(o.threads > 0 ? o.threads : available_cpus());
  std::vector<Row> rows;
  for (const int64_t n : o.n) {
    for (const int64_t k : o.k) {
      if (o.group_size != -1 && (o.group_size <= 0 || k % o.group_size != 0)) {
        return fail(Status(Code::invalid_argument,
                           fmt::format("group size {} does not divide K = {}", o.group_size, k)));
      }
      if (n <= 0 || n % 8 != 0) {
        return fail(
            Status(Code::invalid_argument, fmt::format("N = {} is not a multiple of 8", n)));
      }
      Result<std::unique_ptr<Shape>> shape = make_shape(o, n, k);
      if (!shape.ok()) return fail(shape.status());
      for (const int64_t m : o.m) {
        std::string mismatch;
        const Status status = bench_point(o, **shape, m, probe, rows, mismatch);
        if (!status.ok()) return fail(status);
        if (!mismatch.empty()) {
          fmt::print(stderr, "nibble: check failed: {}\n", mismatch);
          return kExitFailed;
        }
        if (interrupted()) return kExitInterrupted;
      }
    }
  }
  if (o.output == "json") {
    nlohmann::json json = report_header();
    for (const Row& row : rows) json["results"].push_back(to_json(row));
    fmt::print("{}\n", json.dump(1));
  } else if (o.output == "jsonl") {
    for (const Row& row : rows) fmt::print("{}\n", to_json(row).dump());
  } else {
    if (o.output == "md") {
      fmt::print(
          "{}\nmeasured read bandwidth {:.1f} GB/s; weights cold; us = median of interleaved "
          "rounds\n\n",
          device_summary(), rows.empty() ? 0.0 : rows.back().read_gb_per_s);
    }
    print_rows(rows, o.output == "csv");
  }
  return kExitOk;
}

}  // namespace

void add_bench_command(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<Options>();
  CLI::App* bench = app.add_subcommand("bench", "Measure speed");
  bench->require_subcommand(1);
  CLI::App* command = bench->add_subcommand(
      "gemm", "Kernels against dequantize + matmul, interleaved, cold weights, checked first");
  command->add_option("-m,--m", o->m, "Rows of x")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("-n,--n", o->n, "Output channels")->delimiter(',')->capture_default_str();
  command->add_option("-k,--k", o->k, "Input channels")->delimiter(',')->capture_default_str();
  command->add_option("-g,--group-size", o->group_size, "Group size; -1: K")->capture_default_str();
  command->add_option("--mode", o->modes, "Modes, each with its preferred kernel")
      ->delimiter(',')
      ->check(CLI::IsMember({"w4a16", "w4a8", "w4a4"}))
      ->capture_default_str();
  command->add_option("--kernel", o->kernels, "Kernels by name instead (nibble doctor lists them)")
      ->delimiter(',');
  command->add_option("--act", o->activations, "Activation scales")
      ->check(CLI::IsMember({"token", "group", "tensor"}))
      ->capture_default_str();
  command->add_option("--threads", o->threads, "Threads; 0: all CPUs")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str();
  command->add_option("--seconds", o->seconds, "Time per shape and M, over all contenders")
      ->capture_default_str();
  command->add_flag("--no-baseline", o->no_baseline, "Skip dequantize + matmul");
  command->add_flag("--explain", o->explain, "Print each plan to stderr");
  command->add_option("--output", o->output, "Format")
      ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}))
      ->capture_default_str();
  command->footer("Example: nibble bench gemm -m 1,8,64,512 -n 4096 -k 4096 --mode w4a8");
  command->callback([o, &exit_code] { exit_code = run_bench(*o); });
  add_bench_model_command(*bench, exit_code);
}

}  // namespace nibble::cli
