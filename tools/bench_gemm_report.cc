// What `bench gemm` prints: tables for people, CSV, JSON.
#include <fmt/format.h>

#include <algorithm>

#include "bench_gemm_tables.h"
#include "cli.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

json or_null(double value) { return value > 0 ? json(value) : json(nullptr); }

json to_json(const GemmRow& row) {
  const bool ours = row.side == Side::ours;
  json result = {{"mode", row.mode},
                 {"device", device_summary()},
                 {"m", row.m},
                 {"n", row.n},
                 {"k", row.k},
                 {"group_size", row.group_size},
                 {"us_median", row.samples.median()},
                 {"us_min", row.samples.min()},
                 {"us_p10", row.samples.quantile(0.1)},
                 {"us_p90", row.samples.quantile(0.9)},
                 {"samples_us", row.samples.microseconds},
                 {"tops", row.tops()},
                 {"read_gb_per_s", row.read_gb_per_s},
                 {"speedup_vs_dequant_matmul",
                  row.best_baseline_us > 0 ? json(row.best_baseline_us / row.samples.median())
                                           : json(nullptr)},
                 {"checked", true}};
  result[ours ? "kernel" : "peer"] = row.kernel;
  // of the packed bytes, which others do not read
  result["gb_per_s"] = ours ? json(row.gb_per_s()) : json(nullptr);
  result["roofline_share"] = ours ? json(row.roofline_share()) : json(nullptr);
  result["peak_tops"] = ours ? or_null(row.peak_tops) : json(nullptr);
  result["peak_share"] = ours ? or_null(row.peak_share()) : json(nullptr);
  if (row.side == Side::peer) {
    result["bits_per_weight"] = row.bits_per_weight;
    result["weight_error"] = row.weight_error;
    result["product_error"] = row.product_error;
  }
  return result;
}

json spread_json(const Samples& samples) {
  return {
      {"median", samples.median()}, {"p10", samples.quantile(0.1)}, {"p90", samples.quantile(0.9)}};
}

json to_json(const GemmLimits& l) {
  json result = {{"m", l.m},
                 {"n", l.n},
                 {"k", l.k},
                 {"clock_ghz", or_null(l.clock_ghz)},
                 {"read_gb_per_s", spread_json(l.read_gb_per_s)},
                 {"peak_tops", json::object()}};
  for (const GemmLimits::Peak& peak : l.peaks) {
    result["peak_tops"][peak.loop] = spread_json(peak.tops);
  }
  return result;
}

std::string percent(double share) { return share > 0 ? fmt::format("{:.0f}", 100 * share) : "-"; }

void print_rows(const std::vector<GemmRow>& rows, bool csv) {
  print_head({"kernel", "mode", "M", "N", "K", "g", "us", "p10", "p90", "TOPS", "GB/s", "read %",
              "peak %", "vs dequantize + best matmul"},
             csv);
  for (const GemmRow& r : rows) {
    const double us = r.samples.median();
    const bool ours = r.side == Side::ours;
    print_line({printable_text(r.kernel), r.mode, std::to_string(r.m), std::to_string(r.n),
                std::to_string(r.k), std::to_string(r.group_size), fmt::format("{:.1f}", us),
                fmt::format("{:.1f}", r.samples.quantile(0.1)),
                fmt::format("{:.1f}", r.samples.quantile(0.9)), fmt::format("{:.3f}", r.tops()),
                ours ? fmt::format("{:.1f}", r.gb_per_s()) : "-",
                ours ? percent(r.roofline_share()) : "-", ours ? percent(r.peak_share()) : "-",
                r.best_baseline_us > 0 ? fmt::format("{:.2f}x", r.best_baseline_us / us) : "-"},
               csv);
  }
}

/// What the peers hold, and how right they are where they are least so.
void print_types(const std::vector<GemmRow>& rows) {
  std::vector<const GemmRow*> types;
  for (const GemmRow& row : rows) {
    if (row.side != Side::peer) continue;
    const auto known = std::find_if(types.begin(), types.end(), [&](const GemmRow* type) {
      return type->kernel == row.kernel;
    });
    if (known == types.end()) {
      types.push_back(&row);
    } else if (row.product_error > (*known)->product_error) {
      *known = &row;
    }
  }
  fmt::print(
      "\nError of the weight as a type holds it, and of y against fp64 on that weight; of "
      "the shape with\nthe largest error of y\n\n");
  print_head({"peer", "bits per weight", "error of W", "error of y", "tolerance"}, false);
  for (const GemmRow* type : types) {
    print_line({printable_text(type->kernel), fmt::format("{:.2f}", type->bits_per_weight),
                fmt::format("{:.2f} %", 100 * type->weight_error),
                fmt::format("{:.2f} %", 100 * type->product_error),
                fmt::format("{:.2f} %", 100 * peer_tolerance(type->k))},
               false);
  }
}

std::string limits_text(const GemmLimits& l) {
  std::string text = fmt::format("M={} N={} K={}:", l.m, l.n, l.k);
  if (l.clock_ghz > 0) text += fmt::format(" clock {:.2f} GHz,", l.clock_ghz);
  text += fmt::format(" read {:.1f} GB/s", l.read_gb_per_s.median());
  for (const GemmLimits::Peak& peak : l.peaks) {
    text += fmt::format(", {} {:.2f} TOPS", peak.loop, peak.tops.median());
  }
  return text;
}

void print_preamble(const GemmBench& bench) {
  const json header = report_header();
  fmt::print("{}\n", device_summary());
  fmt::print("nibble {}, commit {}: {}\n", header["version"].get<std::string>(),
             header["commit"].is_null() ? "unknown" : header["commit"].get<std::string>(),
             header["command"].get<std::string>());
  if (!header["clocks"]["cpu_mhz"].is_null()) {
    fmt::print("the system says {:.0f} MHz\n", header["clocks"]["cpu_mhz"].get<double>());
  }
  print_peers(bench.peers);
  fmt::print(
      "weights cold; us = median of interleaved rounds; measured in the same rounds, with "
      "the threads of the products:\n");
  for (const GemmLimits& limits : bench.limits) fmt::print("  {}\n", limits_text(limits));
  fmt::print("\n");
}

}  // namespace

json gemm_bench_json(const GemmBench& bench, const std::vector<std::string>& failures) {
  json document = report_header();
  document["results"] = json::array();
  for (const GemmRow& row : bench.rows) document["results"].push_back(to_json(row));
  document["limits"] = json::array();
  for (const GemmLimits& limits : bench.limits) document["limits"].push_back(to_json(limits));
  if (bench.peers.empty() && failures.empty()) return document;
  add_peers_json(document, bench.peers, bench.versus, bench.looks, failures);
  return document;
}

void print_gemm_bench(const GemmBenchOptions& options, const GemmBench& bench,
                      const std::vector<std::string>& failures) {
  if (options.output == "json") {
    fmt::print(
        "{}\n",
        gemm_bench_json(bench, failures).dump(1, ' ', false, json::error_handler_t::replace));
  } else if (options.output == "jsonl") {
    for (const GemmRow& row : bench.rows) {
      fmt::print("{}\n", to_json(row).dump(-1, ' ', false, json::error_handler_t::replace));
    }
  } else if (options.output == "csv") {
    print_rows(bench.rows, true);
  } else {
    print_preamble(bench);
    print_rows(bench.rows, false);
    if (!bench.versus.empty()) {
      print_versus(bench.versus, "Each peer's fastest type");
      print_types(bench.rows);
    }
    print_looks(bench.looks);
  }
}

}  // namespace nibble::cli
