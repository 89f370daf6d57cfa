// Choosing the next token from logits: greedy, or temperature with top-k and top-p.
#pragma once

#include <cstdint>
#include <span>

#include "model/sampling.h"

namespace nibble {

struct SamplerOptions {
  float temperature = 0;  // 0: greedy
  int64_t top_k = 0;      // 0: all
  float top_p = 1;        // smallest set of most probable tokens whose sum reaches it
  uint64_t seed = 0;

  bool operator==(const SamplerOptions&) const = default;
};

sampling::Rule sampling_rule(const SamplerOptions& options);

/// Index of the largest value; the first one of several.
int32_t argmax(std::span<const float> logits);

/// The token that gets `position` (of its sequence, from 0). A function of its arguments: the same
/// on every device. Of tokens with equal logits those with lower ids are likelier to be in the top
/// k or p. Logits are finite, at least one, fewer than sampling::kMostTokens.
int32_t sample_token(std::span<const float> logits, const SamplerOptions& options,
                     int64_t position);
/// The same by the options' rule.
int32_t draw_token(std::span<const float> logits, const sampling::Rule& rule, int64_t position);

}  // namespace nibble
