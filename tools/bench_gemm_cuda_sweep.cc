// See bench_gemm_cuda_sweep.h. Two looks: all candidates in a few short rounds; then the chosen one
// and those that came near the fastest in as many rounds as a figure takes, because the least of
// many noisy figures is less than it should be.
#include "bench_gemm_cuda_sweep.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "bench_gemm_cuda_rows.h"
#include "bench_gemm_tables.h"
#include "cli.h"
#include "cuda_kernel_run.h"
#include "cuda_weights.h"
#include "gemm/cuda/plan_candidates.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

constexpr double kClose = 1.05;       // what counts as good as the fastest
constexpr double kWorthRounds = 1.1;  // over the fastest of the first look
constexpr DeviceBudget kFirstLook = {
    .seconds = 0, .least_rounds = 3, .most_rounds = 3, .graph_us = 400};

struct SweepPoint {
  cuda::Plan chosen, best;
  double chosen_us = 0, best_us = 0;
  struct Timed {
    std::string plan;
    double us;
  };
  std::vector<Timed> candidates;  // the slow ones by the first look

  double ratio() const { return chosen_us / best_us; }
};

/// What a plan is but for the problem.
std::string configuration(const cuda::Plan& plan) {
  const std::string text = plan.describe();
  const size_t from = text.find("device="), space = text.find(' ', from);
  const size_t to = text.find(" workspace=");
  return fmt::format("{} {}", plan.kernel_name(), text.substr(space + 1, to - space - 1));
}

class Sweep {
 public:
  Sweep(const GemmBenchOptions& o, const cuda::DeviceInfo& device) : o_(o), device_(device) {}

  /// All M and modes of one shape.
  Status measure_shape(int64_t n, int64_t k, std::string& mismatch);
  const std::vector<SweepPoint>& points() const { return points_; }

 private:
  using Runs = std::vector<std::unique_ptr<CudaKernelRun>>;
  Status measure(const Problem& problem, const ColdWeights& weights, const SampledColumns& sample,
                 std::string& mismatch);
  /// Medians of those of `runs` that `in` says; 0 of the others.
  std::vector<double> time(const Runs& runs, const std::vector<bool>& in,
                           const ColdWeights& weights, const DeviceBudget& budget) const;

  const GemmBenchOptions& o_;
  const cuda::DeviceInfo& device_;
  std::vector<SweepPoint> points_;
};

std::vector<double> Sweep::time(const Runs& runs, const std::vector<bool>& in,
                                const ColdWeights& weights, const DeviceBudget& budget) const {
  const auto copies = static_cast<int64_t>(weights.copies.size());
  std::vector<DeviceContender> contenders;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!in[i]) continue;
    DeviceContender contender;
    contender.name = runs[i]->plan.kernel_name();
    contender.copies = copies;
    const CudaKernelRun& run = *runs[i];
    const bool quantizes = run.plan.problem.mode != Mode::w4a16;
    contender.launch = [&run, &weights, copies, quantizes](int64_t at, cudaStream_t stream) {
      const cuda::DeviceWeights& copy = weights.copies[at % copies];
      check_status(quantizes ? run.product(copy, stream) : run.whole(copy, stream));
    };
    contenders.push_back(std::move(contender));
  }
  time_on_device(contenders, budget, [] {});
  std::vector<double> medians(runs.size(), 0.0);
  size_t next = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (in[i]) medians[i] = contenders[next++].samples.median();
  }
  return medians;
}

Status Sweep::measure(const Problem& problem, const ColdWeights& weights,
                      const SampledColumns& sample, std::string& mismatch) {
  Runs runs;
  for (const cuda::Plan& plan : cuda::plan_candidates(problem, device_)) {
    runs.push_back(std::make_unique<CudaKernelRun>(plan));
    const Result<std::string> checked = runs.back()->check(weights.copies[0], sample);
    if (!checked.ok()) {
      return Status(checked.status().code(),
                    fmt::format("{}: {}", plan.describe(), checked.status().message()));
    }
    mismatch = *checked;
    if (!mismatch.empty()) return {};
  }
  if (runs.empty()) return cuda::plan_gemm(problem, device_).status();
  std::vector<bool> in(runs.size(), true);
  const std::vector<double> look = time(runs, in, weights, kFirstLook);
  const double least = *std::min_element(look.begin(), look.end());
  for (size_t i = 1; i < runs.size(); ++i) in[i] = look[i] < kWorthRounds * least;
  const std::vector<double> us =
      time(runs, in, weights,
           {.seconds = o_.seconds, .least_rounds = 7, .most_rounds = 25, .graph_us = 1500});
  if (interrupted()) return Status(Code::interrupted, "interrupted");
  size_t best = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (in[i] && us[i] < us[best]) best = i;
  }
  std::vector<SweepPoint::Timed> timed;
  for (size_t i = 0; i < runs.size(); ++i) {
    timed.push_back({configuration(runs[i]->plan), in[i] ? us[i] : look[i]});
  }
  points_.push_back({runs[0]->plan, runs[best]->plan, us[0], us[best], std::move(timed)});
  return {};
}

Status Sweep::measure_shape(int64_t n, int64_t k, std::string& mismatch) {
  NIBBLE_TRY(check_bench_shape(n, k, o_.group_size));
  const int64_t group_size = o_.group_size == -1 ? k : o_.group_size;
  const Result<ColdWeights> weights = make_cold_weights(device_, n, k, group_size);
  if (!weights.ok()) return weights.status();
  const SampledColumns sample = sample_columns(weights->tensors);
  for (const std::string& mode : o_.modes) {
    for (const int64_t m : o_.m) {
      if (interrupted()) return Status(Code::interrupted, "interrupted");
      const Problem problem = bench_problem(o_, modes_by_name().at(mode), m, weights->tensors);
      NIBBLE_TRY(measure(problem, *weights, sample, mismatch));
      if (!mismatch.empty()) return {};
    }
  }
  return {};
}

json to_json(const SweepPoint& point) {
  const Problem& p = point.chosen.problem;
  json candidates = json::array();
  for (const SweepPoint::Timed& timed : point.candidates) {
    candidates.push_back({{"plan", timed.plan}, {"us", timed.us}});
  }
  return {{"mode", mode_name(p.mode)},
          {"m", p.m},
          {"n", p.n},
          {"k", p.k},
          {"group_size", p.group_size},
          {"candidates", std::move(candidates)},
          {"chosen", configuration(point.chosen)},
          {"chosen_us", point.chosen_us},
          {"best", configuration(point.best)},
          {"best_us", point.best_us},
          {"ratio", point.ratio()}};
}

void print_points(const std::vector<SweepPoint>& points, bool csv) {
  print_head({"mode", "M", "N", "K", "chosen", "us", "fastest", "us", "chosen / fastest", "of"},
             csv);
  const auto cell = [csv](const std::string& text) {  // plans have commas in them
    return csv ? fmt::format("\"{}\"", text) : text;
  };
  for (const SweepPoint& point : points) {
    const Problem& p = point.chosen.problem;
    const bool same = point.chosen.describe() == point.best.describe();
    print_line(
        {mode_name(p.mode), std::to_string(p.m), std::to_string(p.n), std::to_string(p.k),
         cell(configuration(point.chosen)), fmt::format("{:.2f}", point.chosen_us),
         same ? "the same" : cell(configuration(point.best)), fmt::format("{:.2f}", point.best_us),
         fmt::format("{:.3f}", point.ratio()), std::to_string(point.candidates.size())},
        csv);
  }
}

}  // namespace

int run_cuda_plan_sweep(const GemmBenchOptions& o, const cuda::DeviceInfo& device,
                        const DeviceMonitor& monitor) {
  Sweep sweep(o, device);
  for (const int64_t n : o.n) {
    for (const int64_t k : o.k) {
      std::string mismatch;
      const Status status = sweep.measure_shape(n, k, mismatch);
      if (!status.ok()) return fail(status);
      if (mismatch.empty()) continue;
      fmt::print(stderr, "nibble: check failed: {}\n", mismatch);
      return kExitFailed;
    }
  }
  const std::vector<SweepPoint>& points = sweep.points();
  const auto close = std::count_if(points.begin(), points.end(),
                                   [](const SweepPoint& point) { return point.ratio() <= kClose; });
  const double share = static_cast<double>(close) / static_cast<double>(points.size());
  json document = cuda_header_json(device, monitor);
  document["points"] = json::array();
  for (const SweepPoint& point : points) document["points"].push_back(to_json(point));
  document["share_within_5_percent"] = share;
  if (o.output == "json") {
    fmt::print("{}\n", document.dump(1));
  } else if (o.output == "jsonl") {
    for (const json& point : document["points"]) fmt::print("{}\n", point.dump());
  } else {
    if (o.output == "md") {
      fmt::print(
          "{}weights cold, products alone, results checked; us = median of interleaved rounds\n\n",
          cuda_header_text(device, monitor));
    }
    print_points(points, o.output == "csv");
    if (o.output == "md") {
      fmt::print("\n{} of {} within 5 % of the fastest plan: {:.0f} %\n", close, points.size(),
                 100 * share);
    }
  }
  const Status written = o.json_file.empty() ? Status{} : write_bench_json(o.json_file, document);
  return written.ok() ? kExitOk : fail(written);
}

}  // namespace nibble::cli
