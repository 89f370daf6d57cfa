#include "doctor_measure.h"

#include <fmt/format.h>

#include <list>

#include "base/cpu_features.h"
#include "cli.h"
#include "probe_memory.h"
#include "probe_peak.h"
#include "text.h"
#include "timing.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

constexpr int kRounds = 15;
constexpr size_t kReadBufferBytes = size_t{512} << 20, kReadSliceBytes = size_t{32} << 20;

/// One quantity on one thread and on all: two contenders, and what a run of each is worth.
struct Measured {
  size_t contender[2];
  double amount[2] = {0, 0};  // GB or T operations, times 1e6
};

json rates(const Measured& measured, const std::vector<Contender>& contenders) {
  json result;
  for (const int all : {0, 1}) {
    const double us = contenders[measured.contender[all]].samples.median();
    result[all ? "all_threads" : "one_thread"] =
        us > 0 ? json(measured.amount[all] / us) : json(nullptr);
  }
  return result;
}

}  // namespace

json measure_machine() {
  const int threads[2] = {1, available_cpus()};
  std::list<ReadBandwidthProbe> reads;  // lists, for contenders keep references
  std::list<PeakProbe> probes;
  std::vector<Contender> contenders;
  Measured read{};
  for (const int all : {0, 1}) {
    auto& probe = reads.emplace_back(threads[all], kReadBufferBytes, kReadSliceBytes);
    read.contender[all] = contenders.size();
    read.amount[all] = static_cast<double>(kReadSliceBytes) * 1e-3;
    contenders.push_back({"read",
                          {},
                          [&probe] {
                            if (probe.ok()) probe.read_slice();
                          },
                          {}});
  }
  std::vector<std::pair<const PeakLoop*, Measured>> peaks;
  for (const PeakLoop* loop : peak_loops_here()) {
    Measured peak{};
    for (const int all : {0, 1}) {
      const PeakProbe& probe = probes.emplace_back(*loop, threads[all]);
      peak.contender[all] = contenders.size();
      peak.amount[all] = probe.ops() * 1e-6;
      contenders.push_back({loop->name, {}, [&probe] { probe.run(); }, {}});
    }
    peaks.emplace_back(loop, peak);
  }
  time_interleaved(contenders,
                   {.threads = threads[1], .min_rounds = kRounds, .max_rounds = kRounds},
                   interrupted);
  json measured = {{"clock_ghz", nullptr}, {"peaks", json::array()}};
  if (const auto ghz = measure_clock_ghz()) measured["clock_ghz"] = *ghz;
  measured["read_gb_per_s"] =
      reads.back().ok() && reads.front().ok() ? rates(read, contenders) : json(nullptr);
  for (const auto& [loop, peak] : peaks) {
    measured["peaks"].push_back({{"loop", loop->name},
                                 {"isa", isa_name(loop->isa)},
                                 {"type", loop->floats ? "fp32" : "int8"},
                                 {"tops", rates(peak, contenders)}});
  }
  return measured;
}

void print_measured(const json& measured) {
  const auto cell = [](const json& value) {
    return value.is_number() ? fmt::format("{:.2f}", value.get<double>()) : std::string("-");
  };
  Table table("<<>>");
  table.add({"measured now", "", "1 thread", "all threads"});
  table.add({"clock, GHz", "", cell(measured["clock_ghz"]), ""});
  const json& read = measured["read_gb_per_s"];
  if (read.is_object()) {
    table.add({"memory read, GB/s", "", cell(read["one_thread"]), cell(read["all_threads"])});
  }
  for (const json& peak : measured["peaks"]) {
    const bool floats = peak["type"] == "fp32";
    table.add({peak["loop"].get<std::string>(), floats ? "fp32 TFLOPS" : "int8 TOPS",
               cell(peak["tops"]["one_thread"]), cell(peak["tops"]["all_threads"])});
  }
  fmt::print("\n");
  table.print(stdout);
}

}  // namespace nibble::cli
