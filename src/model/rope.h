// Rotary position embedding (Su et al., "RoFormer", 2021) with the scalings of Llama 3.1 and
// "linear": the cosines and sines of one position.
#pragma once

#include <vector>

#include "model/config.h"

namespace nibble {

/// Angle per position of each pair of channels: head_dim / 2 values, in float as the reference
/// implementations have them.
std::vector<float> rope_frequencies(const RopeConfig& rope, int64_t head_dim);

/// cosine and sine (half each) of `position`.
void rope_angles(const std::vector<float>& frequencies, int64_t position, float* cosine,
                 float* sine);

}  // namespace nibble
