// See bench_gemm_tables.h.
#include "bench_gemm_tables.h"

#include <fmt/format.h>

#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

json to_json(const GemmVersus& v) {
  return {{"kernel", v.kernel},
          {"mode", v.mode},
          {"peer", v.peer},
          {"type", v.type},
          {"candidate", v.candidate.empty() ? json(nullptr) : json(v.candidate)},
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

/// What a peer says of itself may be anything.
std::string said(const json& about, const char* key) {
  const auto value = about.find(key);
  return value != about.end() && value->is_string() ? printable_text(value->get<std::string>())
                                                    : "?";
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

}  // namespace

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

void print_versus(const std::vector<GemmVersus>& versus, const std::string& which) {
  fmt::print("\n{}; a ratio is its time over ours, over all rounds\n\n", which);
  print_head({"kernel", "mode", "M", "N", "K", "us", "peer", "its type", "us", "ratio of medians",
              "median of ratios", "p10..p90"},
             false);
  for (const GemmVersus& v : versus) {
    print_line(
        {v.kernel, v.mode, std::to_string(v.m), std::to_string(v.n), std::to_string(v.k),
         fmt::format("{:.1f}", v.our_us), v.peer,
         printable_text(v.candidate.empty() ? v.type : fmt::format("{}: {}", v.type, v.candidate)),
         fmt::format("{:.1f}", v.peer_us), fmt::format("{:.2f}x", v.ratio_of_medians()),
         fmt::format("{:.2f}x", v.ratios.median()),
         fmt::format("{:.2f}..{:.2f}", v.ratios.quantile(0.1), v.ratios.quantile(0.9))},
        false);
  }
}

void print_peers(const json& peers) {
  for (const json& peer : peers) {
    const json& about = peer["about"];
    fmt::print("peer {}: {} {}, {}", peer["label"].get<std::string>(), said(about, "name"),
               said(about, "version"), said(about, "library"));
    if (about.contains("features")) {
      fmt::print(", built for {}", about["features"].dump(-1, ' ', true));
    }
    fmt::print("\n");
  }
}

void print_looks(const std::vector<GemmLook>& looks) {
  print_looks(looks, AfterLook::slower, "Slower at a first look");
  print_looks(looks, AfterLook::failed, "Failed after a first look");
}

void add_peers_json(json& document, const json& peers, const std::vector<GemmVersus>& versus,
                    const std::vector<GemmLook>& looks, const std::vector<std::string>& failures) {
  document["peers"] = peers;
  document["versus"] = json::array();
  for (const GemmVersus& v : versus) document["versus"].push_back(to_json(v));
  document["first_looks"] = json::array();
  for (const GemmLook& look : looks) document["first_looks"].push_back(to_json(look));
  document["failures"] = failures;
}

}  // namespace nibble::cli
