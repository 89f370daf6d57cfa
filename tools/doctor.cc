// `nibble doctor`: what this machine has, which kernels run on it, and which would be picked. The
// first thing to ask for when something is slow or refused. Not here: the speed of kernels (bench).
#include <fmt/format.h>
#include <omp.h>

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "base/cpu_features.h"
#include "cli.h"
#include "doctor_measure.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/gemm.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

constexpr int64_t kRows[] = {1, 8, 64, 512};  // from decoding to a long prompt
constexpr Mode kModes[] = {Mode::w4a16, Mode::w4a8, Mode::w4a4};

struct Options {
  bool as_json = false, measure = false;
  std::string explain;
};

struct Feature {
  const char* name;
  bool present;
  std::string reason;  // why not
};

std::vector<Feature> features() {
  const CpuFeatures& f = cpu_features();
  const auto reason = [](Isa isa) {
    for (const KernelInfo& kernel : kernel_table()) {
      if (kernel.isa == isa) return kernel.reason;
    }
    return std::string();  // a build without kernels for it
  };
  return {{"AVX2 with FMA and F16C", f.avx2, reason(Isa::avx2)},
          {"AVX-VNNI", f.avx_vnni, reason(Isa::avx_vnni)},
          {"AVX-512 F, BW, DQ, VL", f.avx512, reason(Isa::avx512)},
          {"AVX-512 VNNI", f.avx512_vnni, reason(Isa::avx512_vnni)},
          {"AMX-INT8", f.amx_int8, f.amx_note.empty() ? reason(Isa::amx_int8) : f.amx_note}};
}

/// The usual size of a layer; only M changes which kernel is picked.
Problem usual_problem(Mode mode, int64_t m) {
  Problem problem;
  problem.m = m;
  problem.n = problem.k = 4096;
  problem.group_size = 128;
  problem.mode = mode;
  return problem;
}

const char* forced_kernels() {
  const char* list = std::getenv("NIBBLE_KERNEL");
  return list == nullptr ? "" : list;
}

/// Why NIBBLE_KERNEL cannot be followed; the first reason of any mode.
Status check_forced_kernels() {
  for (const Mode mode : kModes) {
    const auto plan = plan_gemm(usual_problem(mode, 1));
    if (!plan.ok()) return plan.status();
  }
  return {};
}

std::string openmp_text() {
  // _OPENMP is the date of the specification; the versions people know.
  const char* version = _OPENMP >= 202111   ? "5.2"
                        : _OPENMP >= 202011 ? "5.1"
                        : _OPENMP >= 201811 ? "5.0"
                        : _OPENMP >= 201511 ? "4.5"
                                            : "older than 4.5";
  return fmt::format("{} ({}), up to {} threads", version, _OPENMP, omp_get_max_threads());
}

std::string cache_text(int64_t bytes) {
  return bytes > 0 ? bytes_text(static_cast<uint64_t>(bytes)) : "not reported";
}

/// One line for each GPU, or why there is none.
std::vector<std::string> cuda_devices() {
  const Result<int> count = cuda::device_count();
  if (!count.ok()) return {"no: " + count.status().message()};
  std::vector<std::string> lines;
  for (int i = 0; i < *count; ++i) {
    const Result<cuda::DeviceInfo> d = cuda::device_info(i);
    lines.push_back(d.ok() ? fmt::format("{}, compute capability {}.{}, {} multiprocessors, {}",
                                         d->name, d->capability / 10, d->capability % 10,
                                         d->multiprocessors,
                                         bytes_text(static_cast<uint64_t>(d->memory_bytes)))
                           : "no: " + d.status().message());
  }
  return lines;
}

/// Empty if `kernel` runs on the first GPU, else why not.
std::string cuda_refusal(const cuda::KernelRow& kernel) {
  const Result<cuda::DeviceInfo> device = cuda::device_info(0);
  if (!device.ok()) return device.status().message();
  Problem problem = usual_problem(kernel.mode, 1);
  problem.x_dtype = Dtype::bf16;
  const Result<cuda::Plan> plan = cuda::plan_gemm(problem, *device, kernel.name);
  return plan.ok() ? "" : plan.status().message();
}

json cuda_json() {
  const Result<int> count = cuda::device_count();
  json result = {{"devices", json::array()}, {"kernels", json::array()}};
  if (!count.ok()) result["reason"] = count.status().message();
  for (int i = 0; count.ok() && i < *count; ++i) {
    const Result<cuda::DeviceInfo> device = cuda::device_info(i);
    if (!device.ok()) continue;
    result["devices"].push_back({{"name", device->name},
                                 {"capability", device->capability},
                                 {"multiprocessors", device->multiprocessors},
                                 {"memory_bytes", device->memory_bytes},
                                 {"l2_bytes", device->l2_bytes}});
  }
  for (const cuda::KernelRow& kernel : cuda::kernel_table()) {
    const std::string reason = cuda_refusal(kernel);
    json row = {{"name", kernel.name},
                {"mode", mode_name(kernel.mode)},
                {"least_capability", kernel.capability},
                {"runs_here", reason.empty()}};
    if (!reason.empty()) row["reason"] = reason;
    result["kernels"].push_back(row);
  }
  return result;
}

void print_machine() {
  const CpuFeatures& f = cpu_features();
  const char* commit = NIBBLE_COMMIT;
  Table table("<<");
  table.add({"nibble",
             fmt::format("{} (commit {})", NIBBLE_VERSION, *commit == '\0' ? "unknown" : commit)});
  table.add({"CPU", fmt::format("{} ({})", f.brand.empty() ? "unknown" : f.brand,
                                f.vendor.empty() ? "unknown vendor" : f.vendor)});
  table.add({"CPUs", fmt::format("{} available to this process", available_cpus())});
  table.add({"caches", fmt::format("L1d {}, L2 {}, L3 {}", cache_text(f.l1d_bytes),
                                   cache_text(f.l2_bytes), cache_text(f.l3_bytes))});
  for (const Feature& feature : features()) {
    table.add({feature.name, feature.present          ? "yes"
                             : feature.reason.empty() ? "no"
                                                      : "no: " + feature.reason});
  }
  table.add({"OpenMP", openmp_text()});
  for (const std::string& text : cuda_devices()) table.add({"CUDA", text});
  table.add({"NIBBLE_KERNEL", *forced_kernels() == '\0' ? "not set" : printable(forced_kernels())});
  table.print(stdout);
}

void print_kernels() {
  Table kernels("<<<<");
  kernels.add({"kernel", "mode", "isa", "runs here"});
  for (const KernelInfo& kernel : kernel_table()) {
    kernels.add({kernel.name, mode_name(kernel.mode), isa_name(kernel.isa),
                 kernel.runs_here ? "yes" : "no: " + kernel.reason});
  }
  for (const cuda::KernelRow& kernel : cuda::kernel_table()) {
    const std::string reason = cuda_refusal(kernel);
    kernels.add({kernel.name, mode_name(kernel.mode),
                 fmt::format("sm_{}{}", kernel.capability, kernel.capability == 90 ? "a" : ""),
                 reason.empty() ? "yes" : "no: " + reason});
  }
  fmt::print("\n");
  kernels.print(stdout);
}

std::string picked_kernel(Mode mode, int64_t m) {
  const auto plan = plan_gemm(usual_problem(mode, m));
  return plan.ok() ? plan->kernel_name() : "";
}

void print_picks() {
  Table picks("<");
  std::vector<std::string> head = {"picked for"};
  for (const int64_t m : kRows) head.push_back(fmt::format("M={}", m));
  picks.add(head);
  for (const Mode mode : kModes) {
    std::vector<std::string> row = {mode_name(mode)};
    for (const int64_t m : kRows) {
      const std::string name = picked_kernel(mode, m);
      row.push_back(name.empty() ? "none" : name);
    }
    picks.add(row);
  }
  fmt::print("\n");
  picks.print(stdout);
}

json machine_json() {
  const CpuFeatures& f = cpu_features();
  const auto cache = [](int64_t bytes) { return bytes > 0 ? json(bytes) : json(nullptr); };
  json document = report_header();
  document["cpu"] = {{"vendor", f.vendor},
                     {"brand", f.brand},
                     {"available", available_cpus()},
                     {"l1d_bytes", cache(f.l1d_bytes)},
                     {"l2_bytes", cache(f.l2_bytes)},
                     {"l3_bytes", cache(f.l3_bytes)}};
  document["features"] = json::array();
  for (const Feature& feature : features()) {
    json row = {{"name", feature.name}, {"present", feature.present}};
    if (!feature.present) row["reason"] = feature.reason;
    document["features"].push_back(row);
  }
  document["openmp"] = {{"date", _OPENMP}, {"max_threads", omp_get_max_threads()}};
  document["cuda"] = cuda_json();
  const std::string forced = forced_kernels();
  document["nibble_kernel"] = forced.empty() ? json(nullptr) : json(forced);
  document["kernels"] = json::array();
  for (const KernelInfo& kernel : kernel_table()) {
    json row = {{"name", kernel.name},
                {"mode", mode_name(kernel.mode)},
                {"isa", isa_name(kernel.isa)},
                {"runs_here", kernel.runs_here}};
    if (!kernel.runs_here) row["reason"] = kernel.reason;
    document["kernels"].push_back(row);
  }
  document["picked"] = json::array();
  for (const Mode mode : kModes) {
    for (const int64_t m : kRows) {
      const std::string name = picked_kernel(mode, m);
      document["picked"].push_back({{"mode", mode_name(mode)},
                                    {"m", m},
                                    {"kernel", name.empty() ? json(nullptr) : json(name)}});
    }
  }
  return document;
}

/// "w4a8,16,4096,4096,128"; throws CLI11's error if it reads otherwise.
Problem parse_explain(const std::string& text) {
  const auto parts = CLI::detail::split(text, ',');
  const auto bad = [&](const std::string& reason) {
    return CLI::ValidationError("--explain", fmt::format("{}: {}", text, reason));
  };
  if (parts.size() != 5) throw bad("expected MODE,M,N,K,G");
  Problem problem;
  bool known = false;
  for (const Mode mode : kModes) {
    if (parts[0] != mode_name(mode)) continue;
    problem.mode = mode;
    known = true;
  }
  if (!known) throw bad("the mode is w4a16, w4a8 or w4a4");
  const auto number = [&](const std::string& part) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    if (error != std::errc() || end != part.data() + part.size()) {
      throw bad(fmt::format("'{}' is not an integer", part));
    }
    return value;
  };
  problem.m = number(parts[1]);
  problem.n = number(parts[2]);
  problem.k = number(parts[3]);
  const int64_t group_size = number(parts[4]);
  problem.group_size = group_size == -1 ? problem.k : group_size;
  return problem;
}

int run_explain(const std::string& text) {
  const Problem problem = parse_explain(text);
  fmt::print("{}: M={} N={} K={} group size {}\n{}", mode_name(problem.mode), problem.m, problem.n,
             problem.k, problem.group_size, explain_plan(problem));
  const auto plan = plan_gemm(problem);
  return plan.ok() ? kExitOk : fail(plan.status());
}

int run_doctor(const Options& options) {
  if (!options.explain.empty()) return run_explain(options.explain);
  const Status forced = check_forced_kernels();
  if (options.as_json) {
    json document = machine_json();
    if (!forced.ok()) document["problem"] = forced.message();
    if (options.measure) document["measured"] = measure_machine();
    // An environment variable may hold any byte.
    fmt::print("{}\n", document.dump(2, ' ', false, json::error_handler_t::replace));
  } else {
    print_machine();
    print_kernels();
    print_picks();
    if (options.measure) print_measured(measure_machine());
  }
  return forced.ok() ? kExitOk : fail(forced);
}

}  // namespace

void add_doctor_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "doctor", "Show this machine's CPU features, the kernels, and which would be picked");
  CLI::Option* as_json =
      command->add_flag("--json", options->as_json, "print one JSON document")->group("Output");
  CLI::Option* measure =
      command
          ->add_flag("--measure", options->measure,
                     "also measure the clock, the memory's read bandwidth and the peak of every "
                     "instruction set (2 seconds)")
          ->group("Output");
  command
      ->add_option("--explain", options->explain,
                   "say what every kernel of a mode makes of one product; G = -1 is one group")
      ->type_name("MODE,M,N,K,G")
      ->excludes(as_json)
      ->excludes(measure)
      ->group("Output");
  command->footer(
      "Exit codes: 0 ok, 2 NIBBLE_KERNEL names no kernel, 3 its kernel cannot run here.\n"
      "\nExample:\n  nibble doctor --explain w4a8,16,4096,4096,128");
  command->callback([options, &exit_code] { exit_code = run_doctor(*options); });
}

}  // namespace nibble::cli
