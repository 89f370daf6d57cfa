// Rows that are made and quantized in one go, never written as floats: what stands before a product
// in a decoder layer. The same rows in 16 bits, for products that take those. Same rules as
// kernels.h. Rows are 16-byte aligned and of a length that 8 divides; Scaling::tensor is refused,
// because its scale is known only after all rows have been made.
#pragma once

#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

/// A residual add and an RMSNorm, in float:
///
///   d = delta                                     or, with post_norm (Gemma),
///   d = delta / sqrt(mean(delta^2) + eps) * post_norm
///   h = hidden + d                                stored to hidden
///   v = h / sqrt(mean(h^2) + eps) * norm          the row
///
/// Squares are summed in an order that depends on k alone: the 8 of a chunk one after the other by
/// fused multiply-adds; the 32 chunks of 256 elements pairwise (lanes 16 apart first, then 8, 4, 2,
/// 1); blocks i, i + 32, ... of 256 one after the other; those 32 sums pairwise again.
struct NormArgs {
  int64_t m = 0, k = 0;              // k <= 16384, a multiple of 8
  float* hidden = nullptr;           // (rows, k), contiguous
  const void* delta = nullptr;       // (rows, k) of `type`, contiguous, or null: d = 0
  Element type = Element::bf16;      // 16 bits
  const float* post_norm = nullptr;  // (k) or null
  const float* norm = nullptr;       // (k); 1 + w where the file's weight is w
  float eps = 0;
  /// (m) or null: row r is made from rows gather[r] of hidden and delta, which must not repeat, and
  /// hidden is left as it is.
  const int32_t* gather = nullptr;
  bool programmatic = false;
};
/// Of `to`: everything about the codes; not x, m, k, type and programmatic. Scales per
/// token, static per tensor, or per group of 32, 64 or 128.
cudaError_t launch_norm_quantize(const NormArgs& args, const QuantizeArgs& to, cudaStream_t stream);
/// out (m, k) of args.type, rows out_stride elements apart; null: only the residual add.
cudaError_t launch_norm(const NormArgs& args, void* out, int64_t out_stride, cudaStream_t stream);

/// silu: g / (1 + e^-g); gelu_tanh: g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3).
enum class GateFunction : int { silu, gelu_tanh };

/// function(gate) * up; the gate is to.x. If both are halves of one (m, 2 k) matrix, up is k
/// elements behind gate, and both strides are that matrix's. Any k and any scaling but tensor.
struct GateQuantizeArgs {
  QuantizeArgs to;
  const void* up = nullptr;  // (m, k) of to.type
  int64_t up_stride = 0;     // elements
  GateFunction function = GateFunction::silu;
  bool clusters = false;  // the device has clusters of blocks (9.0 and later): few rows are faster
};
cudaError_t launch_gate_quantize(const GateQuantizeArgs& args, cudaStream_t stream);
/// The same rounded to to.type: out (m, k), rows out_stride elements apart. Of args.to: x,
/// x_stride, type, m, k and programmatic.
cudaError_t launch_gate(const GateQuantizeArgs& args, void* out, int64_t out_stride,
                        cudaStream_t stream);

}  // namespace nibble::cuda
