#include "model/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

namespace nibble {
namespace {

using sampling::Cut;
using sampling::Rule;

/// One row of logits; what all steps of a choice read.
struct Row {
  std::span<const float> logits;
  float largest = 0, factor = 0;

  uint64_t weight(float logit) const { return sampling::weight_of(logit, largest, factor); }
};

struct Below {
  uint32_t key = 0;
  uint64_t above = 0;  // the sum over larger keys
};

/// The largest key such that the sum of `value` over it and all larger ones reaches `needed`, of
/// tokens within `cut`: eight bits of it at a time.
template <class Value>
Below reach(const Row& row, const Cut& cut, uint64_t excess, uint64_t needed, const Value& value) {
  Below found;
  for (int shift = 24; shift >= 0; shift -= 8) {
    std::array<uint64_t, 256> sums = {};
    const uint64_t prefix = uint64_t{found.key} >> (shift + 8);
    const auto same = [&](uint32_t key) { return uint64_t{key} >> (shift + 8) == prefix; };
    for (const float logit : row.logits) {
      const uint32_t key = sampling::key_of(logit);
      if (key >= cut.key && same(key)) sums[key >> shift & 255] += value(logit);
    }
    // Ties that are not within the cut have been added too.
    if (same(cut.key)) sums[cut.key >> shift & 255] -= excess;
    uint32_t digit = 255;
    for (; digit > 0 && found.above + sums[digit] < needed; --digit) found.above += sums[digit];
    found.key |= digit << shift;
  }
  return found;
}

uint64_t count_of(const Row& row, uint32_t key) {
  return static_cast<uint64_t>(std::count_if(row.logits.begin(), row.logits.end(),
                                             [&](float v) { return sampling::key_of(v) == key; }));
}

}  // namespace

sampling::Rule sampling_rule(const SamplerOptions& options) {
  Rule rule;
  if (!(options.temperature > 0)) return rule;
  // Finite, so that the largest logit has a weight.
  rule.factor = std::min(std::numbers::log2e_v<float> / options.temperature, 0x1p100f);
  rule.top_k = static_cast<int32_t>(std::clamp<int64_t>(options.top_k, 0, INT32_MAX));
  if (options.top_p < 1) {
    rule.top_p = static_cast<uint64_t>(std::max(options.top_p, 0.0f) * 0x1p64f);
  }
  rule.seed = options.seed;
  return rule;
}

int32_t argmax(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

int32_t sample_token(std::span<const float> logits, const SamplerOptions& options,
                     int64_t position) {
  return draw_token(logits, sampling_rule(options), position);
}

int32_t draw_token(std::span<const float> logits, const Rule& rule, int64_t position) {
  const int32_t best = argmax(logits);
  if (rule.factor == 0) return best;
  const Row row{logits, logits[static_cast<size_t>(best)], rule.factor};
  Cut cut{0, static_cast<uint32_t>(logits.size())};
  uint64_t left_out = 0;  // tokens with the cut's key that are not within it
  if (rule.top_k > 0 && static_cast<size_t>(rule.top_k) < logits.size()) {
    const auto needed = static_cast<uint64_t>(rule.top_k);
    const Below below = reach(row, cut, 0, needed, [](float) { return uint64_t{1}; });
    cut = {below.key, static_cast<uint32_t>(needed - below.above)};
    left_out = count_of(row, cut.key) - cut.ties;
  }
  const uint64_t excess = left_out == 0 ? 0 : left_out * row.weight(sampling::logit_of(cut.key));
  uint64_t kept = 0;
  for (const float logit : logits) {
    if (sampling::key_of(logit) >= cut.key) kept += row.weight(logit);
  }
  kept -= excess;
  if (rule.top_p != ~uint64_t{0}) {
    const uint64_t needed = sampling::needed_of(kept, rule.top_p);
    const Below below =
        reach(row, cut, excess, needed, [&](float logit) { return row.weight(logit); });
    const uint64_t tie = row.weight(sampling::logit_of(below.key));
    cut = {below.key, static_cast<uint32_t>((needed - below.above + tie - 1) / tie)};
    kept = below.above + cut.ties * tie;
  }
  const uint64_t draw = sampling::draw_below(kept, rule.seed, position);
  uint64_t sum = 0;
  int32_t last = best;
  for (size_t i = 0; i < logits.size(); ++i) {
    const uint32_t key = sampling::key_of(logits[i]);
    if (key < cut.key || (key == cut.key && cut.ties == 0)) continue;
    if (key == cut.key) --cut.ties;
    sum += row.weight(logits[i]);
    last = static_cast<int32_t>(i);
    if (draw < sum) break;
  }
  return last;
}

}  // namespace nibble
