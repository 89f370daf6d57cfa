// One point of `bench gemm`: the contestants at one shape and M are set up, checked, timed in turn
// together with the probes, and compared.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>

#include "base/cpu_features.h"
#include "baseline.h"
#include "bench_gemm.h"
#include "bench_gemm_kernels.h"
#include "cli.h"
#include "layer_check.h"
#include "oracle_check.h"
#include "probe_peak.h"
#include "synthetic.h"

namespace nibble::cli {
namespace {

constexpr const char* kDequantizeAndMatmul = "dequant+matmul";

/// Empty if the first row of the baseline's result is right, else what is wrong.
std::string check_baseline(const GemmShape& shape, Baseline& baseline,
                           const std::vector<float>& x) {
  baseline.dequantize();
  baseline.multiply();
  const std::vector<double> exact = ref::multiply_fp64(shape.reference, x.data(), 1, nullptr);
  const std::vector<float> y = baseline.result();
  const double snr = snr_db(exact, {y.begin(), y.begin() + static_cast<int64_t>(exact.size())});
  constexpr double kBf16Db = 35.0;  // x and W rounded to 8 bits, each 2^-9: about 48 dB
  if (snr >= kBf16Db) return "";
  return fmt::format("baseline {} is wrong: {} dB against fp64", baseline.name(), decibels(snr));
}

/// One M in the making: contestants and, in the same order, what is known of their rows.
class Contest {
 public:
  Contest(const GemmBenchOptions& o, const GemmShape& shape, int64_t m, PeerTeam& peers,
          ReadBandwidthProbe& probe)
      : o_(o),
        shape_(shape),
        m_(m),
        peers_(peers),
        probe_(probe),
        x_(make_input(InputKind::normal, m, shape.packed.k, 1)) {}

  Status add_kernels(std::string& mismatch);
  void add_baselines(std::string& mismatch);
  Status add_peers(GemmBench& bench);
  void add_probes();
  void time() {
    time_interleaved(contenders_,
                     {.threads = o_.used_threads(),
                      .min_rounds = 7,
                      .max_rounds = 2000,
                      .seconds = o_.seconds,
                      .rotate = true},
                     interrupted);
  }
  void conclude(GemmBench& bench) const;

 private:
  GemmRow& add(Side side, const std::string& name, const std::string& mode, Contender contender);
  GemmLimits limits() const;
  double peak_tops(const GemmLimits& limits, const GemmRow& row) const;
  void compare(const std::vector<GemmRow>& rows, GemmBench& bench) const;

  const GemmBenchOptions& o_;
  const GemmShape& shape_;
  int64_t m_;
  PeerTeam& peers_;
  ReadBandwidthProbe& probe_;
  std::vector<float> x_;
  std::vector<KernelRun> runs_;
  std::vector<std::unique_ptr<Baseline>> baselines_;
  std::vector<PeerEntry> entries_;
  std::string x_path_;
  std::vector<PeakProbe> peaks_;

  std::vector<Contender> contenders_;  // rows_, then the read probe, then peaks_
  std::vector<GemmRow> rows_;
};

GemmRow& Contest::add(Side side, const std::string& name, const std::string& mode,
                      Contender contender) {
  contender.name = name;
  contenders_.push_back(std::move(contender));
  GemmRow row;
  row.kernel = name;
  row.mode = mode;
  row.side = side;
  row.m = m_;
  row.n = shape_.packed.n;
  row.k = shape_.packed.k;
  row.group_size = shape_.packed.group_size;
  row.bytes = static_cast<size_t>(shape_.packed.bytes() + 4 * m_ * (row.k + row.n));
  rows_.push_back(std::move(row));
  return rows_.back();
}

Status Contest::add_kernels(std::string& mismatch) {
  Result<std::vector<KernelRun>> runs = our_kernels(o_, shape_, x_, m_);
  if (!runs.ok()) return runs.status();
  runs_ = std::move(*runs);
  for (KernelRun& run : runs_) {
    if (o_.explain) fmt::print(stderr, "{}\n", run.plan.describe());
    NIBBLE_TRY(run());
    mismatch = first_difference({run.plan.problem, run.input, run.y.data(), nullptr},
                                shape_.reference, nullptr, kOracleRows);
    if (!mismatch.empty()) {
      mismatch = fmt::format("{}, M={}: {}", run.plan.kernel_name(), m_, mismatch);
      return {};
    }
    add(Side::ours, run.plan.kernel_name(), mode_name(run.plan.problem.mode),
        {"",
         [this] { flush_from_caches(shape_.packed.storage.data(), shape_.packed.storage.bytes()); },
         [&run] { (void)run(); },
         {}});
  }
  return {};
}

void Contest::add_baselines(std::string& mismatch) {
  baselines_ = make_baselines(shape_.tensors, x_.data(), m_, o_.used_threads());
  for (const auto& baseline : baselines_) {
    mismatch = check_baseline(shape_, *baseline, x_);
    if (!mismatch.empty()) return;
    add(Side::baseline, baseline->name(), kDequantizeAndMatmul,
        {"",
         [&baseline] { baseline->flush_weight(); },
         [&baseline] { baseline->dequantize(), baseline->multiply(); },
         {}});
    // with four to eight times the memory of the weight kept dequantized
    add(Side::baseline, baseline->name(), "matmul only",
        {"", [&baseline] { baseline->flush_matrix(); }, [&baseline] { baseline->multiply(); }, {}});
  }
}

Status Contest::add_peers(GemmBench& bench) {
  if (peers_.offered().empty()) return {};
  Result<std::vector<PeerEntry>> entries = peers_.enter(x_, m_, o_.peer_types);
  if (!entries.ok()) return entries.status();
  Result<std::string> path = peers_.input_path(x_, m_);
  if (!path.ok()) return path.status();
  x_path_ = *path;
  entries_ = std::move(*entries);
  for (const PeerEntry& entry : entries_) {
    bench.looks.push_back({entry.peer->label(), entry.type->name, m_, shape_.packed.n,
                           shape_.packed.k, entry.first_look_us, entry.after});
    if (entry.after != AfterLook::in_rounds) continue;
    const std::string name = fmt::format("{} {}", entry.peer->label(), entry.type->name);
    Contender contender;
    contender.run_and_time = [this, &entry] { return peers_.run(entry, m_, x_path_); };
    GemmRow& row = add(Side::peer, name, entry.peer->label(), std::move(contender));
    row.bits_per_weight = entry.type->bits_per_weight;
    row.weight_error = entry.type->weight_error;
    row.product_error = entry.type->product_error;
  }
  return {};
}

void Contest::add_probes() {
  if (probe_.ok()) {
    // one slice untimed: the baselines leave caches full of dirty lines that must be written first
    const auto read = [this] { probe_.read_slice(); };
    contenders_.push_back({"read", read, read, {}});
  }
  for (const PeakLoop* loop : peak_loops_here()) {
    const bool used = std::any_of(runs_.begin(), runs_.end(), [&](const KernelRun& run) {
      return run.isa == loop->isa && loop->floats == run.floats();
    });
    if (used) peaks_.emplace_back(*loop, o_.used_threads());
  }
  for (const PeakProbe& peak : peaks_) {
    contenders_.push_back({peak.loop().name, {}, [&peak] { peak.run(); }, {}});
  }
}

GemmLimits Contest::limits() const {
  GemmLimits limits;
  limits.m = m_, limits.n = shape_.packed.n, limits.k = shape_.packed.k;
  limits.clock_ghz = measure_clock_ghz().value_or(0);
  const auto rates = [](const Contender& contender, double amount) {
    Samples result;
    for (const double us : contender.samples.microseconds) {
      result.microseconds.push_back(amount / us);
    }
    return result;
  };
  size_t next = rows_.size();
  if (probe_.ok()) {
    limits.read_gb_per_s =
        rates(contenders_[next++], static_cast<double>(probe_.slice_bytes()) * 1e-3);
  }
  for (const PeakProbe& peak : peaks_) {
    limits.peaks.push_back({peak.loop().name, rates(contenders_[next++], peak.ops() * 1e-6)});
  }
  return limits;
}

/// The fastest loop of the instruction set that the row's kernel uses.
double Contest::peak_tops(const GemmLimits& limits, const GemmRow& row) const {
  double best = 0;
  for (const KernelRun& run : runs_) {
    if (row.kernel != run.plan.kernel_name()) continue;
    for (size_t i = 0; i < peaks_.size(); ++i) {
      const PeakLoop& loop = peaks_[i].loop();
      const bool same = loop.isa == run.isa && loop.floats == run.floats();
      if (same) best = std::max(best, limits.peaks[i].tops.median());
    }
  }
  return best;
}

/// Each of our kernels against the best type of each peer.
void Contest::compare(const std::vector<GemmRow>& rows, GemmBench& bench) const {
  std::map<std::string, const GemmRow*> best;
  for (const GemmRow& row : rows) {
    if (row.side != Side::peer) continue;
    const GemmRow*& fastest = best[row.mode];  // a peer's label
    if (fastest == nullptr || row.samples.median() < fastest->samples.median()) fastest = &row;
  }
  for (const GemmRow& ours : rows) {
    if (ours.side != Side::ours) continue;
    for (const auto& [label, peer] : best) {
      GemmVersus versus;
      versus.kernel = ours.kernel;
      versus.mode = ours.mode;
      versus.peer = label;
      versus.type = peer->kernel.substr(label.size() + 1);
      versus.m = ours.m, versus.n = ours.n, versus.k = ours.k;
      versus.our_us = ours.samples.median();
      versus.peer_us = peer->samples.median();
      versus.ratios = ratios_by_round(peer->samples, ours.samples);
      bench.versus.push_back(std::move(versus));
    }
  }
}

void Contest::conclude(GemmBench& bench) const {
  const GemmLimits limits = this->limits();
  double best_baseline = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const double us = contenders_[i].samples.median();
    if (rows_[i].mode == kDequantizeAndMatmul && (best_baseline == 0 || us < best_baseline)) {
      best_baseline = us;
    }
  }
  std::vector<GemmRow> finished;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (contenders_[i].failed || contenders_[i].samples.microseconds.empty()) continue;
    GemmRow row = rows_[i];
    row.samples = contenders_[i].samples;
    row.read_gb_per_s = limits.read_gb_per_s.median();
    row.peak_tops = peak_tops(limits, row);
    row.best_baseline_us = best_baseline;
    finished.push_back(std::move(row));
  }
  compare(finished, bench);
  bench.rows.insert(bench.rows.end(), finished.begin(), finished.end());
  bench.limits.push_back(limits);
}

}  // namespace

int GemmBenchOptions::used_threads() const { return threads > 0 ? threads : available_cpus(); }

Status measure_gemm(const GemmBenchOptions& options, const GemmShape& shape, int64_t m,
                    PeerTeam& peers, ReadBandwidthProbe& probe, GemmBench& bench,
                    std::string& mismatch) {
  Contest contest(options, shape, m, peers, probe);
  NIBBLE_TRY(contest.add_kernels(mismatch));
  if (!mismatch.empty()) return {};
  if (!options.no_baseline) contest.add_baselines(mismatch);
  if (!mismatch.empty()) return {};
  NIBBLE_TRY(contest.add_peers(bench));
  contest.add_probes();
  contest.time();
  contest.conclude(bench);
  return {};
}

}  // namespace nibble::cli
