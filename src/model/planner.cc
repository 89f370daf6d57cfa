#include "model/planner.h"

#include <fmt/format.h>

#include <algorithm>
#include <queue>

namespace nibble {
namespace {

/// The best step up from rung `from`: most loss saved per added cost, then most loss saved.
/// `to` == `from` if none saves any.
struct Step {
  size_t to = 0;
  double saved = 0, added = 0, worth = 0;
};

Step best_step(const Ladder& ladder, size_t from, double tie) {
  Step best{.to = from};
  const Rung& now = ladder.rungs[from];
  for (size_t to = from + 1; to < ladder.rungs.size(); ++to) {
    const double saved = now.loss - ladder.rungs[to].loss;
    if (!(saved > 0)) continue;
    const double added = ladder.rungs[to].cost - now.cost;
    const double smallest = std::max(tie * ladder.rungs[0].cost, 1e-300);
    const double worth = saved / std::max(added, smallest);
    if (best.to == from || worth > best.worth || (worth == best.worth && saved > best.saved)) {
      best = {to, saved, added, worth};
    }
  }
  return best;
}

double total(std::span<const Ladder> ladders, std::span<const size_t> rungs, double Rung::*field) {
  double sum = 0;
  for (size_t i = 0; i < ladders.size(); ++i) sum += ladders[i].rungs[rungs[i]].*field;
  return sum;
}

/// The longest prefix all of whose prefixes are within the limits; nothing if the start is not.
std::optional<size_t> longest_allowed(std::span<const Ladder> ladders,
                                      std::span<const Promotion> order,
                                      const SearchLimits& limits) {
  std::vector<size_t> rungs(ladders.size(), 0);
  double kept = total(ladders, rungs, &Rung::kept), cost = total(ladders, rungs, &Rung::cost);
  // Sums of many terms, updated step by step: what is equal on paper may differ in the last bits.
  const double kept_slack = 1e-9 * kept, cost_slack = 1e-9 * limits.max_cost;
  const auto within = [&] {
    return kept >= limits.min_kept - kept_slack &&
           (limits.max_cost <= 0 || cost <= limits.max_cost + cost_slack);
  };
  if (!within()) return std::nullopt;
  for (size_t i = 0; i < order.size(); ++i) {
    const Ladder& ladder = ladders[order[i].ladder];
    const Rung &from = ladder.rungs[order[i].from], &to = ladder.rungs[order[i].to];
    kept += to.kept - from.kept;
    cost += to.cost - from.cost;
    if (!within()) return i;
  }
  return order.size();
}

}  // namespace

std::vector<Promotion> rank_promotions(std::span<const Ladder> ladders, double tie) {
  struct Next {
    size_t ladder = 0, from = 0;
    Step step;
    bool operator<(const Next& other) const {  // the queue's top is the greatest
      if (step.worth != other.step.worth) return step.worth < other.step.worth;
      return ladder > other.ladder;
    }
  };
  std::priority_queue<Next> queue;
  const auto push = [&](size_t ladder, size_t from) {
    const Step step = best_step(ladders[ladder], from, tie);
    if (step.to != from) queue.push({ladder, from, step});
  };
  for (size_t i = 0; i < ladders.size(); ++i) push(i, 0);
  std::vector<Promotion> order;
  while (!queue.empty()) {
    const Next next = queue.top();
    queue.pop();
    order.push_back({next.ladder, next.from, next.step.to, next.step.saved, next.step.added});
    push(next.ladder, next.step.to);
  }
  return order;
}

std::vector<size_t> rungs_after(std::span<const Ladder> ladders, std::span<const Promotion> order,
                                size_t count) {
  std::vector<size_t> rungs(ladders.size(), 0);
  for (const Promotion& promotion : order.first(count)) rungs[promotion.ladder] = promotion.to;
  return rungs;
}

ModelPlan plan_of(std::span<const Ladder> ladders, std::span<const size_t> rungs, ModelPlan base) {
  for (size_t i = 0; i < ladders.size(); ++i) {
    base.at(ladders[i].layer, ladders[i].slot) = ladders[i].rungs[rungs[i]].spec;
  }
  return base;
}

bool Gates::met_by(const Quality& quality) const {
  return quality.ppl_ratio <= max_ppl_ratio && quality.kld <= max_kld &&
         quality.same_top >= min_same_top;
}

std::string Gates::failures(const Quality& quality) const {
  std::string text;
  const auto add = [&](bool met, const std::string& failure) {
    if (!met) text += (text.empty() ? "" : "; ") + failure;
  };
  add(quality.ppl_ratio <= max_ppl_ratio,
      fmt::format("PPL ratio {:.4f} exceeds {:.4f}", quality.ppl_ratio, max_ppl_ratio));
  add(quality.kld <= max_kld, fmt::format("mean KLD {:.4f} exceeds {:.4f}", quality.kld, max_kld));
  add(quality.same_top >= min_same_top,
      fmt::format("same top token {:.2f} % is below {:.2f} %", quality.same_top, min_same_top));
  return text;
}

Result<PlanSearch> search_plan(std::span<const Ladder> ladders, std::span<const Promotion> order,
                               const ModelPlan& base, const Gates& gates,
                               const SearchLimits& limits, const QualityOracle& oracle) {
  const std::optional<size_t> allowed = longest_allowed(ladders, order, limits);
  if (!allowed) {
    return Status(Code::invalid_argument,
                  "the limits on cost and on what stays in the mode exclude even the plan in which "
                  "nothing is promoted");
  }
  PlanSearch search;
  search.most_allowed = *allowed;
  const auto plan_at = [&](size_t count) {
    return plan_of(ladders, rungs_after(ladders, order, count), base);
  };
  const auto used = [&] { return static_cast<int>(search.evaluations.size()); };
  /// Whether the prefix passes; the quality is kept if the answer is thorough.
  const auto passes = [&](size_t count, bool thorough) -> Result<bool> {
    const Result<Quality> quality = oracle(plan_at(count), thorough);
    if (!quality.ok()) return quality.status();
    search.evaluations.push_back({count, thorough, *quality});
    if (thorough) search.quality = *quality;
    return gates.met_by(*quality);
  };

  // Shortest prefix that passes on the sample. The longest one is taken to pass: the thorough test
  // has the last word anyway. One evaluation is always left for that.
  size_t below = 0, count = 0;  // `below`: longest that is known to fail
  if (*allowed > 0 && used() + 1 < limits.max_evaluations) {
    const Result<bool> first = passes(0, false);
    if (!first.ok()) return first.status();
    if (!*first) count = *allowed;
  } else {
    count = *allowed;
  }
  while (count > below + 1 && used() + 1 < limits.max_evaluations) {
    const size_t middle = below + (count - below) / 2;
    const Result<bool> passed = passes(middle, false);
    if (!passed.ok()) return passed.status();
    (*passed ? count : below) = middle;
  }
  // Longer by growing steps until it passes on everything. The last evaluation tries all that is
  // allowed.
  for (size_t step = std::max<size_t>(1, *allowed / 32);; step *= 2) {
    if (used() + 1 >= limits.max_evaluations) count = *allowed;
    const Result<bool> passed = passes(count, true);
    if (!passed.ok()) return passed.status();
    search.met = *passed;
    if (*passed || count == *allowed) break;
    count = std::min(*allowed, count + step);
  }
  search.promotions = count;
  search.rungs = rungs_after(ladders, order, count);
  search.plan = plan_at(count);
  return search;
}

}  // namespace nibble
