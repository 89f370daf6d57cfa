// The function of a gate: what silu_quantize.cu and the product that gates its own columns do
// alike. Device code only.
#pragma once

#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/ptx_math.h"

namespace nibble::cuda {

/// x / (1 + e^-t). Where e^-t overflows the quotient is -0, as it should be. The divisor is at
/// least 1.
__device__ __forceinline__ float over_one_plus_exp(float x, float minus_t) {
  return x * ptx::reciprocal(1.0f + expf(minus_t));
}

template <GateFunction function>
__device__ __forceinline__ float gated(float g) {
  if constexpr (function == GateFunction::silu) return over_one_plus_exp(g, -g);
  const float u = 0.7978845608f * __fmaf_rn(0.044715f, g * g * g, g);
  return over_one_plus_exp(g, -2.0f * u);
}

}  // namespace nibble::cuda
