// The weights of one decoder block as floats, while they are being rescaled and before they are
// rounded to 4 bits: seven linears and the two norms whose outputs they take.
// Not here: running the block (model/layer.h), what may be rescaled (awq/fold.h).
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "format/checkpoint.h"
#include "model/layer.h"

namespace nibble::awq {

enum class Part : int { q = 0, k, v, o, gate, up, down };
inline constexpr int kParts = 7;

struct BlockLinear {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  int64_t k = 0, n = 0;
  std::vector<float> weight;      // (n, k) row-major
  std::vector<float> bias;        // (n) or empty
  Dtype bias_dtype = Dtype::f32;  // as it is stored
  bool quantized = false;         // to be rounded; otherwise it must stay as it is
};

struct BlockNorm {
  std::string tensor;         // "model.layers.0.input_layernorm.weight"
  std::vector<float> weight;  // (hidden), as stored
  Dtype dtype = Dtype::f32;
  float offset = 0;  // added when it is applied: 1 for Gemma
};

struct Block {
  std::array<BlockLinear, kParts> linears;
  BlockNorm input_norm, mlp_norm;

  BlockLinear& at(Part part) { return linears[static_cast<size_t>(part)]; }
  const BlockLinear& at(Part part) const { return linears[static_cast<size_t>(part)]; }
};

/// The linears that take the input of `slot`, in the order of LayerWeights.
std::vector<Part> parts_of(Slot slot);

/// Tensor-name prefixes of the linears of layer `index`, in the order of Part.
std::array<std::string, kParts> linear_names(const ModelNames& names, int64_t index);

/// Loads block `index`. corrupt_file if a tensor is missing or of another shape than `config` says.
Result<Block> load_block(const Checkpoint& checkpoint, const ModelNames& names,
                         const ModelConfig& config, int64_t index,
                         const std::function<bool(const std::string& name)>& is_quantized,
                         int threads);

/// Bytes that the block takes as floats.
uint64_t block_bytes(const ModelConfig& config);

}  // namespace nibble::awq
