// Which slot of a model runs in which mode: the least cost whose quality passes the gates. Pure: no
// model and no files. The caller says what each choice costs and how much it is thought to hurt,
// and answers how good a whole plan is; the search is a few such questions.
//
//   Ladder     the choices for one slot of one layer, fastest first; all slots start at rung 0
//   Promotion  one step up a ladder
//   order      all promotions worth making, best reduction of loss per added cost first
//
// The answer is a prefix of the order: the shortest that passes on a quick sample, found by
// bisection, made longer until it also passes the thorough test.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/linear.h"

namespace nibble {

struct Rung {
  LinearSpec spec;
  double loss = 0;  // estimated harm to the model, on one scale for all slots
  double cost = 0;  // in any unit, the same for all slots
  double kept = 0;  // work (multiply-adds) that is still done in the mode that was asked for
};

struct Ladder {
  int64_t layer = 0;
  Slot slot = Slot::qkv;
  std::vector<Rung> rungs;  // at least one
};

struct Promotion {
  size_t ladder = 0;
  size_t from = 0, to = 0;  // rungs; those between, if any, were worth less
  double loss_saved = 0, cost_added = 0;
};

/// All promotions in the order in which they are best made: greedy by loss saved per added cost
/// among the next steps of all ladders. Steps that save no loss are left out. An added cost below
/// `tie` of the slot's own counts as that much: differences within the error of a timing do not
/// decide, and what is free does not beat what matters.
std::vector<Promotion> rank_promotions(std::span<const Ladder> ladders, double tie = 0.01);

/// Rung of every ladder after the first `count` promotions.
std::vector<size_t> rungs_after(std::span<const Ladder> ladders, std::span<const Promotion> order,
                                size_t count);

/// The plan in which every ladder stands on its rung. Slots without a ladder run as `base` says.
ModelPlan plan_of(std::span<const Ladder> ladders, std::span<const size_t> rungs, ModelPlan base);

struct Quality {
  double ppl_ratio = 1, kld = 0, same_top = 100;  // percent
};

struct Gates {
  double max_ppl_ratio = 0, max_kld = 0, min_same_top = 0;

  bool met_by(const Quality& quality) const;  // NaN meets nothing
  /// "KLD 0.1234 exceeds 0.1000; same top 80.1 % is below 88 %"; empty if met.
  std::string failures(const Quality& quality) const;
};

/// How good a plan is: `thorough` on the whole text, else on a sample. A failure ends the search.
using QualityOracle = std::function<Result<Quality>(const ModelPlan& plan, bool thorough)>;

struct SearchLimits {
  int max_evaluations = 40;  // at least 1: the last one is always thorough
  double min_kept = 0;       // work that must stay in the mode that was asked for
  double max_cost = 0;       // of the whole plan; 0: no limit
};

struct Evaluation {
  size_t promotions = 0;  // that many of the order
  bool thorough = false;
  Quality quality;
};

struct PlanSearch {
  bool met = false;
  size_t promotions = 0;    // the prefix that was chosen, or if none passed the longest allowed
  size_t most_allowed = 0;  // longest prefix within the limits
  std::vector<size_t> rungs;
  ModelPlan plan;
  Quality quality;  // of the plan, thorough
  std::vector<Evaluation> evaluations;
};

/// invalid_argument if a limit excludes even the start. Not meeting the gates is no error: `met`.
Result<PlanSearch> search_plan(std::span<const Ladder> ladders, std::span<const Promotion> order,
                               const ModelPlan& base, const Gates& gates,
                               const SearchLimits& limits, const QualityOracle& oracle);

}  // namespace nibble
