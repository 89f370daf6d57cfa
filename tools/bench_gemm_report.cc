// What `bench gemm` prints: tables for people, CSV, JSON.
#include <fmt/format.h>

#include <algorithm>

#include "bench_gemm.h"
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

json to_json(const GemmVersus& v) {
  return {{"kernel", v.kernel},
          {"mode", v.mode},
          {"peer", v.peer},
          {"type", v.type},
          {"m", v.m},
          {"n", v.n},
          {"k", v.k},
          {"us", v.our_us},
          {"peer_us", v.peer_us},
          {"ratio_of_medians", v.ratio_of_medians()},
          {"median_of_ratios", v.ratios.median()},
          {"ratio_p10", v.ratios.quantile(0.1)},
          {"ratio_p90", v.ratios.quantile(0.9)}};
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

json to_json(const GemmLook& look) {
  return {{"peer", look.peer},
          {"type", look.type},
          {"m", look.m},
          {"n", look.n},
          {"k", look.k},
          {"us", look.us},
          {"in_rounds", look.after == AfterLook::in_rounds},
          {"failed", look.after == AfterLook::failed}};
}

using Cells = std::vector<std::string>;

void print_line(const Cells& cells, bool csv) {
  if (csv) {
    fmt::print("{}\n", fmt::join(cells, ","));
  } else {
    fmt::print("| {} |\n", fmt::join(cells, " | "));
  }
}

void print_head(const Cells& head, bool csv) {
  print_line(head, csv);
  if (!csv) fmt::print("|{}|\n", fmt::join(Cells(head.size(), "---"), "|"));
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

void print_versus(const std::vector<GemmVersus>& versus) {
  fmt::print("\nEach peer's fastest type; a ratio is its time over ours, over all rounds\n\n");
  print_head({"kernel", "mode", "M", "N", "K", "us", "peer", "its fastest type", "us",
              "ratio of medians", "median of ratios", "p10..p90"},
             false);
  for (const GemmVersus& v : versus) {
    print_line({v.kernel, v.mode, std::to_string(v.m), std::to_string(v.n), std::to_string(v.k),
                fmt::format("{:.1f}", v.our_us), v.peer, printable_text(v.type),
                fmt::format("{:.1f}", v.peer_us), fmt::format("{:.2f}x", v.ratio_of_medians()),
                fmt::format("{:.2f}x", v.ratios.median()),
                fmt::format("{:.2f}..{:.2f}", v.ratios.quantile(0.1), v.ratios.quantile(0.9))},
               false);
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

void print_looks(const std::vector<GemmLook>& looks, AfterLook after, const char* heading) {
  Cells left_out;
  for (const GemmLook& look : looks) {
    if (look.after != after) continue;
    left_out.push_back(fmt::format("{} {} M={} N={} K={}: {:.0f} us", look.peer,
                                   printable_text(look.type), look.m, look.n, look.k, look.us));
  }
  if (left_out.empty()) return;
  fmt::print("\n{}, not timed further: {}\n", heading, fmt::join(left_out, "; "));
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

/// What a peer says of itself may be anything.
std::string said(const json& about, const char* key) {
  const auto value = about.find(key);
  return value != about.end() && value->is_string() ? printable_text(value->get<std::string>())
                                                    : "?";
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
  for (const json& peer : bench.peers) {
    const json& about = peer["about"];
    fmt::print("peer {}: {} {}, {}", peer["label"].get<std::string>(), said(about, "name"),
               said(about, "version"), said(about, "library"));
    if (about.contains("features")) {
      fmt::print(", built for {}", about["features"].dump(-1, ' ', true));
    }
    fmt::print("\n");
  }
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
  document["peers"] = bench.peers;
  document["versus"] = json::array();
  for (const GemmVersus& versus : bench.versus) document["versus"].push_back(to_json(versus));
  document["first_looks"] = json::array();
  for (const GemmLook& look : bench.looks) document["first_looks"].push_back(to_json(look));
  document["failures"] = failures;
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
      print_versus(bench.versus);
      print_types(bench.rows);
    }
    print_looks(bench.looks, AfterLook::slower, "Slower at a first look");
    print_looks(bench.looks, AfterLook::failed, "Failed after a first look");
  }
}

}  // namespace nibble::cli
