// Which kernels of a decoding step are one with the product behind them: policy alone, pure, tested
// without a GPU. The mechanism is gemm/cuda/fused_product.h.
//
//   apart: norm qkv attention quantize o norm gate_up gate down    nine launches a layer, or eight:
//                                                                  attention may make o's codes
//   fused: qkv attention o gate_up down                            five
#pragma once

#include <optional>

#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda {

/// What a product's blocks do besides.
enum class Fusion {
  norm,           // residual add, norm and codes of its input
  norm_and_gate,  // and the gate of its output
  rows,           // codes of its input
};

/// The configuration with which they do; nothing: kernels of their own do it, because there is none
/// for such a product, or because it is slower. The bits are the same. `plan` is of the product.
std::optional<SlabConfig> fused_config(const Plan& plan, Fusion fusion, const DeviceInfo& device);

}  // namespace nibble::cuda
