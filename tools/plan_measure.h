// What the planner needs to know about a model, measured on it: for every slot the ways it can be
// run, how much noise each leaves in the slot's output on real rows, how long the real product
// takes, and how much the model as a whole minds.
// Not here: choosing (model/planner.h), the command (plan.cc).
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli.h"
#include "model/calibration.h"
#include "model/model.h"
#include "model/planner.h"
#include "model/runner.h"
#include "text_eval.h"

namespace nibble::cli {

/// The choices for a slot, in the order of its ladder.
enum class Choice : int {
  a4,
  a4_wide_eighth,
  a4_wide_quarter,
  a4_wide_half,
  a8_token,
  a8_group,
  a16
};
inline constexpr int kChoices = 7;

/// One way to run a slot, with what was measured.
struct Candidate {
  Choice choice = Choice::a16;
  LinearSpec spec;
  double noise = 0;                      // energy of the output error on the sampled rows
  double us_decode = 0, us_prefill = 0;  // of one product with 1 and with kPrefillRows rows
};
inline constexpr int64_t kPrefillRows = 512;

struct SlotMeasure {
  int64_t layer = 0;
  Slot slot = Slot::qkv;
  int64_t k = 0, n = 0;               // n: of the 4-bit linears together
  int64_t group_size = 0;             // 0: the linears differ
  std::vector<int64_t> columns;       // of each 4-bit linear
  double signal = 0;                  // energy of the W4A16 output on the sampled rows
  std::vector<Candidate> candidates;  // in the order of Choice; the last is a16
  double kld = 0;  // mean KLD of the model with only this slot in its first choice

  double work() const { return static_cast<double>(k) * static_cast<double>(n); }
  const Candidate* find(Choice choice) const;  // null if the slot has no such choice
};

/// 10 log10(signal / noise).
double snr_db(const SlotMeasure& slot, const Candidate& candidate);

struct MeasureOptions {
  int threads = 0;
  int64_t rows = 64;                        // of each slot, spread over the chunk
  const Calibration* statistics = nullptr;  // clip ratios; null: from the chunk itself
  bool wide_groups = true;                  // the device runs w4a4 with some groups in 8 bits
};

/// Candidates and their noise on one chunk, for every slot that has 4-bit weights.
Result<std::vector<SlotMeasure>> measure_noise(Model& model, std::span<const int32_t> chunk,
                                               const MeasureOptions& options,
                                               const std::function<void()>& progress);

/// Median microseconds of the product of every candidate of a slot with `rows` rows: interleaved,
/// weights cold.
using SlotTimer = std::function<Result<std::vector<double>>(const SlotMeasure& slot, int64_t rows)>;
SlotTimer cpu_slot_timer(const Model& model, int threads);  // model outlives it

/// Times the candidates of every distinct shape and fills in us_*.
Status measure_costs(const SlotTimer& timer, std::vector<SlotMeasure>& slots,
                     const std::function<void()>& progress);
size_t distinct_shapes(const std::vector<SlotMeasure>& slots);

/// Fills in kld: one run of the chunk per slot, all others in W4A16.
Status measure_sensitivity(Runner& runner, const EvalText& text, Choice first, int threads,
                           std::vector<SlotMeasure>& slots, const std::function<void()>& progress);

}  // namespace nibble::cli
