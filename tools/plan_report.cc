#include "plan_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "model/plan_config.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

/// "a4", "a4 +3/9", "a8 token", "a8 group", "a16": short, for a table.
std::string short_name(const Candidate& candidate) {
  switch (candidate.choice) {
    case Choice::a16: return "a16";
    case Choice::a8_token: return "a8 token";
    case Choice::a8_group: return "a8 group";
    default: break;
  }
  const auto& groups = candidate.spec.wide_groups;
  if (groups.empty()) return "a4";
  return fmt::format("a4 +{}/{}", std::count(groups.begin(), groups.end(), 1), groups.size());
}

/// Lowest output SNR that is comfortable, by what the slot runs as; below it the table has a mark.
double comfortable_db(const Candidate& candidate) {
  switch (candidate.choice) {
    case Choice::a16: return -HUGE_VAL;
    case Choice::a8_token: return 24;
    case Choice::a8_group: return 30;
    default: return 12;
  }
}

double total_work(const PlanReport& report) {
  double work = 0;
  for (const SlotMeasure& slot : report.slots) work += slot.work();
  return work;
}

/// Percent of all multiply-adds that run with `bits`-bit activations.
double percent_at(const PlanReport& report, int bits) {
  double work = 0;
  for (size_t i = 0; i < report.slots.size(); ++i) {
    work += report.slots[i].work() * share_of(report.chosen(i), bits);
  }
  return 100 * work / std::max(1.0, total_work(report));
}

/// Microseconds of all products with the candidates that `pick` gives.
template <class Pick>
std::pair<double, double> product_times(const PlanReport& report, Pick&& pick) {
  double decode = 0, prefill = 0;
  for (size_t i = 0; i < report.slots.size(); ++i) {
    const Candidate& candidate = pick(i);
    decode += candidate.us_decode;
    prefill += candidate.us_prefill;
  }
  return {decode, prefill};
}

std::map<std::string, int> choices_after(const PlanReport& report) {
  std::map<std::string, int> counts;
  for (size_t i = 0; i < report.slots.size(); ++i) {
    const Candidate& candidate = report.chosen(i);
    const bool mixed = !candidate.spec.wide_groups.empty();
    ++counts[mixed ? "a4 with some groups int8" : short_name(candidate)];
  }
  return counts;
}

size_t promoted_slots(const PlanReport& report) {
  size_t count = 0;
  for (size_t i = 0; i < report.slots.size(); ++i) count += report.promoted(i);
  return count;
}

size_t promoted_layers(const PlanReport& report) {
  std::set<int64_t> layers;
  for (size_t i = 0; i < report.slots.size(); ++i) {
    if (report.promoted(i)) layers.insert(report.slots[i].layer);
  }
  return layers.size();
}

// ---- the table ---------------------------------------------------------------------------------

/// One row a layer; neighbours that are alike share one.
void print_layers(const PlanReport& report) {
  std::vector<std::vector<std::string>> rows(static_cast<size_t>(report.layers),
                                             std::vector<std::string>(kSlots, "16-bit"));
  for (size_t i = 0; i < report.slots.size(); ++i) {
    const SlotMeasure& slot = report.slots[i];
    const Candidate& candidate = report.chosen(i);
    const bool low = snr_db(slot, candidate) < comfortable_db(candidate);
    rows[static_cast<size_t>(slot.layer)][static_cast<size_t>(slot.slot)] =
        short_name(candidate) + (low ? " !" : "");
  }
  Table table("<<<<<");
  std::vector<std::string> head = {"layer"};
  for (int s = 0; s < kSlots; ++s) head.push_back(slot_name(static_cast<Slot>(s)));
  table.add(head);
  for (size_t first = 0; first < rows.size();) {
    size_t last = first;
    while (last + 1 < rows.size() && rows[last + 1] == rows[first]) ++last;
    std::vector<std::string> row = {last == first ? fmt::format("{}", first)
                                                  : fmt::format("{}-{}", first, last)};
    row.insert(row.end(), rows[first].begin(), rows[first].end());
    table.add(row);
    first = last + 1;
  }
  table.print(stdout);
}

void print_gates(const PlanReport& report) {
  const EvalResult& q = report.quality;
  const auto verdict = [](bool met) { return met ? "met" : "FAILED"; };
  Table table("<>><><");
  table.add({"gate", "limit", "found", "", "", ""});
  table.add({"PPL ratio to w4a16", fmt::format("<= {:.4f}", report.gates.max_ppl_ratio),
             fmt::format("{:.4f}", q.ppl_ratio), "+-", fmt::format("{:.4f}", q.ppl_ratio_err),
             verdict(q.ppl_ratio <= report.gates.max_ppl_ratio)});
  table.add({"mean KL divergence", fmt::format("<= {:.4f}", report.gates.max_kld),
             fmt::format("{:.5f}", q.kld_mean), "+-", fmt::format("{:.5f}", q.kld_err),
             verdict(q.kld_mean <= report.gates.max_kld)});
  table.add({"same top token", fmt::format(">= {:.2f} %", report.gates.min_same_top),
             fmt::format("{:.2f} %", q.same_top), "+-", fmt::format("{:.2f}", q.same_top_err),
             verdict(q.same_top >= report.gates.min_same_top)});
  table.print(stdout);
  fmt::print("{} tokens of {}, scored in {} chunks of {} that were not used for ranking\n",
             q.tokens, printable(report.text_name), report.held_out_chunks, report.context);
}

void print_times(const PlanReport& report) {
  Table table("<>>");
  table.add({"4-bit products", "decode, a token", "prompt of 512"});
  const auto row = [&](const std::string& name, const std::pair<double, double>& us) {
    table.add(
        {name, fmt::format("{:.0f} us", us.first), fmt::format("{:.1f} ms", us.second / 1e3)});
  };
  const auto all = [&](Choice choice) {
    return product_times(report, [&](size_t i) -> const Candidate& {
      const Candidate* found = report.slots[i].find(choice);
      return found != nullptr ? *found : report.slots[i].candidates.back();
    });
  };
  row("all a4", all(Choice::a4));
  row("all a8 token", all(Choice::a8_token));
  row("all a8 group", all(Choice::a8_group));
  row("all a16", all(Choice::a16));
  row("this plan",
      product_times(report, [&](size_t i) -> const Candidate& { return report.chosen(i); }));
  table.print(stdout);
}

std::string speed_note(const PlanReport& report) {
  return fmt::format(
      "on this machine a4 takes {:.2f} times as long as a8 (all slots, {} tokens of prompt and {} "
      "decoded){}",
      report.us_a4 / std::max(1e-9, report.us_a8), kPrefillRows, kDecodeSteps,
      report.a4_is_faster ? ""
                          : ": w4a4 is not faster than w4a8 here, no CPU kernel multiplies 4-bit "
                            "activations");
}

json quality_json(const Quality& quality) {
  return {
      {"ppl_ratio", quality.ppl_ratio}, {"kld_mean", quality.kld}, {"same_top", quality.same_top}};
}

json gates_json(const PlanReport& report) {
  const EvalResult& q = report.quality;
  const auto gate = [](const char* bound, double limit, double value, double error) {
    return json{{bound, limit}, {"value", value}, {"error", error}};
  };
  return {{"ppl_ratio", gate("max", report.gates.max_ppl_ratio, q.ppl_ratio, q.ppl_ratio_err)},
          {"kld_mean", gate("max", report.gates.max_kld, q.kld_mean, q.kld_err)},
          {"same_top", gate("min", report.gates.min_same_top, q.same_top, q.same_top_err)}};
}

json text_json(const PlanReport& report) {
  return {{"name", std::filesystem::path(report.text_name).filename().string()},
          {"sha256", report.text_digest},
          {"context", report.context},
          {"chunks", report.held_out_chunks},
          {"tokens_scored", report.quality.tokens}};
}

json calibration_json(const PlanReport& report) {
  if (!report.calibration_digest) return nullptr;
  return {{"sha256", *report.calibration_digest}, {"tokens", report.calibration_tokens}};
}

json promoted_json(const PlanReport& report) {
  return {{"slots", promoted_slots(report)},
          {"of_slots", report.slots.size()},
          {"layers", promoted_layers(report)},
          {"percent_of_work_at_a4", percent_at(report, 4)},
          {"percent_of_work_at_a8", percent_at(report, 8)},
          {"percent_of_work_at_a16", percent_at(report, 16)}};
}

json decibels_json(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }

}  // namespace

const Candidate& PlanReport::chosen(size_t slot) const {
  // A ladder is the end of the slot's candidates.
  const size_t skipped = slots[slot].candidates.size() - ladders[slot].rungs.size();
  return slots[slot].candidates[skipped + search.rungs[slot]];
}

double share_of(const Candidate& candidate, int bits) {
  const auto& groups = candidate.spec.wide_groups;
  const double wide = groups.empty()
                          ? 0
                          : static_cast<double>(std::count(groups.begin(), groups.end(), 1)) /
                                static_cast<double>(groups.size());
  switch (candidate.spec.mode) {
    case Mode::w4a16: return bits == 16 ? 1 : 0;
    case Mode::w4a8:
    case Mode::w4a8_fp8: return bits == 8 ? 1 : 0;
    case Mode::w4a4: return bits == 4 ? 1 - wide : bits == 8 ? wide : 0;
  }
  return 0;
}

void print_plan(const PlanReport& report) {
  fmt::print("{}, mode {}, started as {}\non {}\n{}\n", printable(report.directory), report.mode,
             report.started_as, report.device, speed_note(report));
  if (report.basis == CostBasis::model) {
    fmt::print(
        "promotions are ranked by multiply-adds times bits (a4 1, a8 2, a16 4), not by time\n");
  }
  for (const std::string& note : report.notes) fmt::print("note: {}\n", note);
  fmt::print("\n");
  print_layers(report);
  bool low = false;
  for (size_t i = 0; i < report.slots.size(); ++i) {
    low |= snr_db(report.slots[i], report.chosen(i)) < comfortable_db(report.chosen(i));
  }
  if (low) {
    fmt::print("! output SNR below {} dB (a4), {} dB (a8 token) or {} dB (a8 group)\n", 12, 24, 30);
  }
  std::string kinds;
  for (const auto& [name, count] : choices_after(report)) {
    kinds += fmt::format("{}{} {}", kinds.empty() ? "" : ", ", count, name);
  }
  fmt::print("\npromoted {} of {} in {} of {}: {}\n", promoted_slots(report),
             plural(report.slots.size(), "slot"), promoted_layers(report),
             plural(static_cast<size_t>(report.layers), "layer"), kinds);
  fmt::print("multiply-adds: {:.1f} % a4, {:.1f} % a8, {:.1f} % a16\n\n", percent_at(report, 4),
             percent_at(report, 8), percent_at(report, 16));
  print_gates(report);
  fmt::print("\n");
  print_times(report);
}

std::string refusal_text(const PlanReport& report) {
  std::string why = fmt::format(
      "no plan: with all {} that are allowed, {}", plural(report.search.most_allowed, "promotion"),
      report.gates.failures(
          {report.quality.ppl_ratio, report.quality.kld_mean, report.quality.same_top}));
  if (report.search.most_allowed < report.order.size()) {
    why += fmt::format(
        ". {} more would leave less than {:.0f} % of the multiply-adds in {} (--min-share); "
        "--mode w4a8 or auto asks for less",
        plural(report.order.size() - report.search.most_allowed, "promotion"), report.min_share,
        report.started_as);
  }
  return why + ". Nothing was written";
}

json report_json(const PlanReport& report) {
  json document = report_header();
  document["device"] = report.device;
  document["model"] = report.directory;
  document["mode"] = report.mode;
  document["started_as"] = report.started_as;
  document["met"] = report.search.met;
  document["a4_is_faster_than_a8"] = report.a4_is_faster;
  document["cost_basis"] = report.basis == CostBasis::measured ? "measured" : "model";
  document["gates"] = gates_json(report);
  document["text"] = text_json(report);
  document["reference"] = "w4a16";
  document["calibration"] = calibration_json(report);
  document["model_digest"] = report.model_digest;
  document["promoted"] = promoted_json(report);
  document["notes"] = report.notes;
  document["seconds"] = report.seconds;
  document["evaluations"] = json::array();
  for (const Evaluation& evaluation : report.search.evaluations) {
    json entry = quality_json(evaluation.quality);
    entry["promotions"] = evaluation.promotions;
    entry["whole_text"] = evaluation.thorough;
    document["evaluations"].push_back(std::move(entry));
  }
  document["slots"] = json::array();
  for (size_t i = 0; i < report.slots.size(); ++i) {
    const SlotMeasure& slot = report.slots[i];
    json choices = json::array();
    for (const Candidate& candidate : slot.candidates) {
      choices.push_back({{"name", candidate.spec.describe()},
                         {"snr_db", decibels_json(snr_db(slot, candidate))},
                         {"us_decode", candidate.us_decode},
                         {"us_prefill", candidate.us_prefill}});
    }
    document["slots"].push_back({{"layer", slot.layer},
                                 {"slot", slot_name(slot.slot)},
                                 {"k", slot.k},
                                 {"n", slot.n},
                                 {"chosen", report.chosen(i).spec.describe()},
                                 {"promoted", report.promoted(i)},
                                 {"kld_alone", slot.kld},
                                 {"choices", std::move(choices)}});
  }
  return document;
}

json config_block(const PlanReport& report) {
  const json header = report_header();
  json block = plan_to_json(report.search.plan);
  block["mode"] = report.mode;
  block["gates"] = gates_json(report);
  block["reference"] = "w4a16";
  block["text"] = text_json(report);
  block["calibration"] = calibration_json(report);
  block["model_digest"] = report.model_digest;
  block["promoted"] = promoted_json(report);
  block["tool"] = {
      {"name", "nibble"}, {"version", header["version"]}, {"commit", header["commit"]}};
  return block;
}

}  // namespace nibble::cli
