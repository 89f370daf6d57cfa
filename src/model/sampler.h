// Choosing the next token from logits: greedy, or temperature with top-k and top-p.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace nibble {

struct SamplerOptions {
  float temperature = 0;  // 0: greedy
  int64_t top_k = 0;      // 0: all
  float top_p = 1;        // smallest set of most probable tokens whose sum reaches it
  uint64_t seed = 0;
};

/// Deterministic for its seed. Ties go to the lower token id.
class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  int32_t sample(std::span<const float> logits);

 private:
  SamplerOptions options_;
  std::mt19937_64 random_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

/// Index of the largest value; the first one of several.
int32_t argmax(std::span<const float> logits);

}  // namespace nibble
