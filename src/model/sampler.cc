#include "model/sampler.h"

#include <algorithm>
#include <cmath>

namespace nibble {

int32_t argmax(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {}

int32_t Sampler::sample(std::span<const float> logits) {
  if (options_.temperature <= 0) return argmax(logits);
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
  }
  const auto better = [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  if (options_.top_k > 0 && options_.top_k < static_cast<int64_t>(candidates_.size())) {
    std::partial_sort(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(),
                      better);
    candidates_.resize(static_cast<size_t>(options_.top_k));
  } else {
    std::sort(candidates_.begin(), candidates_.end(), better);
  }
  const double top = candidates_.front().first;
  double total = 0;
  for (auto& [value, token] : candidates_) {
    value = static_cast<float>(std::exp((value - top) / options_.temperature));
    total += value;
  }
  double kept = total;
  size_t count = candidates_.size();
  if (options_.top_p < 1) {
    kept = 0;
    count = 0;
    while (count < candidates_.size()) {
      kept += candidates_[count++].first;
      if (kept >= static_cast<double>(options_.top_p) * total) break;
    }
  }
  // 53 random bits: std::uniform_real_distribution is not the same on every standard library.
  const double draw = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
  double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    sum += candidates_[i].first;
    if (draw < sum) return candidates_[i].second;
  }
  return candidates_[count - 1].second;
}

}  // namespace nibble
