// Quantizers with what comes before them in a decoder layer: the row is made, quantized and never
// written as floats. Same rules as kernels.h. What is normalized or gated is f16 or bf16, in rows
// that are 16-byte aligned and of a length that 8 divides; Scaling::tensor is refused, because its
// scale is known only after all rows have been made.
#pragma once

#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

/// RMSNorm of x, or of h = x + residual: v = h / sqrt(mean(h^2) + eps) * weight, in float. Of
/// k <= 32768; scales per token, static per tensor, or per group of 32, 64 or 128.
///
/// Squares are summed in an order that depends on k alone: the 8 of a chunk one after the other by
/// fused multiply-adds; the 32 chunks of 256 elements pairwise (lanes 16 apart first, then 8, 4, 2,
/// 1); blocks i, i + 32, ... of 256 one after the other; those 32 sums pairwise again.
struct NormQuantizeArgs {
  QuantizeArgs to;                 // x, type and everything about the codes
  const void* residual = nullptr;  // (m, k) of to.type, rows residual_stride apart; or null
  void* sum = nullptr;             // h rounded to to.type, which is what is normalized; may be
                                   // residual itself
  int64_t residual_stride = 0;     // of both, elements
  const void* weight = nullptr;    // (k) of to.type
  bool one_plus = false;           // the factor is 1 + weight (Gemma)
  float eps = 0;
};
cudaError_t launch_norm_quantize(const NormQuantizeArgs& args, cudaStream_t stream);

/// silu: g / (1 + e^-g); gelu_tanh: g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3).
enum class GateFunction : int { silu, gelu_tanh };

/// function(gate) * up; the gate is to.x. If both are halves of one (m, 2 k) matrix, up is k
/// elements behind gate, and both strides are that matrix's. Any k and any scaling but tensor.
struct GateQuantizeArgs {
  QuantizeArgs to;
  const void* up = nullptr;  // (m, k) of to.type
  int64_t up_stride = 0;     // elements
  GateFunction function = GateFunction::silu;
};
cudaError_t launch_gate_quantize(const GateQuantizeArgs& args, cudaStream_t stream);

}  // namespace nibble::cuda
