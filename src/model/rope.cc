#include "model/rope.h"

#include <cmath>
#include <numbers>

namespace nibble {
namespace {

/// Llama 3.1: long wavelengths are slowed down by `factor`, short ones stay, those between are
/// blended.
double llama3_frequency(const RopeConfig& rope, double frequency) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength > rope.original_context / rope.low_freq_factor) return frequency / rope.factor;
  if (wavelength < rope.original_context / rope.high_freq_factor) return frequency;
  const double blend = (rope.original_context / wavelength - rope.low_freq_factor) /
                       (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - blend) * frequency / rope.factor + blend * frequency;
}

}  // namespace

std::vector<float> rope_frequencies(const RopeConfig& rope, int64_t head_dim) {
  std::vector<float> frequencies(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double frequency =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (rope.llama3) frequency = llama3_frequency(rope, frequency);
    frequencies[i] = static_cast<float>(frequency / rope.linear_factor);
  }
  return frequencies;
}

void rope_angles(const std::vector<float>& frequencies, int64_t position, float* cosine,
                 float* sine) {
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float angle = static_cast<float>(position) * frequencies[i];
    cosine[i] = std::cos(angle);
    sine[i] = std::sin(angle);
  }
}

}  // namespace nibble
