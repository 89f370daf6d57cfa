// What `nibble plan` found, and how it is told: the table, the JSON document, and the block that
// goes into config.json. Not here: finding it (plan.cc).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli.h"
#include "logit_scores.h"
#include "model/planner.h"
#include "plan_measure.h"

namespace nibble::cli {

/// What ranks promotions by cost.
enum class CostBasis : int { measured, model };

struct PlanReport {
  std::string directory, mode;  // as asked for
  std::string device;           // what its times are of, and what ran the plans
  std::string started_as;       // "w4a8" or "w4a4": the first rung
  Gates gates;
  bool a4_is_faster = false;
  double us_a4 = 0, us_a8 = 0;  // of all slots, kDecodeSteps decoded after a prompt
  CostBasis basis = CostBasis::measured;
  double min_share = 0;  // percent

  std::string text_name, text_digest, model_digest;
  int64_t context = 0, held_out_chunks = 0, search_chunks = 0;
  std::optional<std::string> calibration_digest;
  uint64_t calibration_tokens = 0;
  std::vector<std::string> notes;

  std::vector<SlotMeasure> slots;  // with 4-bit weights; ladder i is of slot i
  std::vector<Ladder> ladders;
  std::vector<Promotion> order;
  PlanSearch search;
  EvalResult quality;  // of the plan on the whole held-out text
  int64_t layers = 0;
  double seconds = 0;

  /// The candidate slot i runs as.
  const Candidate& chosen(size_t slot) const;
  bool promoted(size_t slot) const { return search.rungs[slot] > 0; }
};

inline constexpr double kDecodeSteps = 64;  // after a prompt of kPrefillRows tokens
inline double request_us(const Candidate& candidate) {
  return candidate.us_prefill + kDecodeSteps * candidate.us_decode;
}

/// Part of the slot's multiply-adds that run with `bits`-bit activations, 0..1.
double share_of(const Candidate& candidate, int bits);

void print_plan(const PlanReport& report);
/// Why no plan is written: one paragraph.
std::string refusal_text(const PlanReport& report);
nlohmann::json report_json(const PlanReport& report);
/// The value of quantization_config.nibble.
nlohmann::json config_block(const PlanReport& report);

}  // namespace nibble::cli
