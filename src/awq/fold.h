// Where AWQ's scales go: the inputs of a slot are divided by s by changing what makes them, and its
// linears are multiplied by s, so that the block computes the same function in the same format.
//   qkv      input_layernorm        (not Gemma 3, see may_scale)
//   o        rows of v_proj; query heads that share a KV head share their scales
//   gate_up  the norm before the MLP
//   down     rows of up_proj
// Not here: which scales (awq/scale_search.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "awq/block.h"

namespace nibble::awq {

/// May the inputs of `slot` be rescaled? Only if every linear that would change is quantized.
bool may_scale(const ModelConfig& config, const Block& block, Slot slot);

/// For the input channels of `slot`, which of them must have equal scales: one number per class.
/// Empty: none.
std::vector<int64_t> scale_classes(const ModelConfig& config, Slot slot);

/// Divides the inputs of `slot` by `scales` (k) and multiplies its linears. Returns the scales as
/// they came out: a norm is stored in 16 bits, so the quotient of the old one and what is stored
/// differs a little from the scale that was asked for, and the weights take the former. A channel
/// whose norm cannot hold the scale keeps 1.
std::vector<float> fold_scales(const ModelConfig& config, Block& block, Slot slot,
                               std::span<const float> scales, int threads);

}  // namespace nibble::awq
