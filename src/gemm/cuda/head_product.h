// Products with 16-bit weights and float activations, for lm_head: y = x * w^T, x (m, k) float,
// w (n, k) as a checkpoint has it, y (m, n) float. Same rules as kernels.h.
//
// A float x is split in two 16-bit parts, x = high + low (1 + 2^-9) for bf16, 2^-12 for f16; both
// are multiplied exactly by tensor cores and summed in float. Reading w, which is what such a
// product costs for few rows, is done once for both. A row's bits do not depend on m.
#pragma once

#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

/// Rows whose parts are multiplied together; more are taken in turns, and w is read again.
inline constexpr int kHeadRows = 64;

/// What multiplies: parts (rows, k) of `type`.
struct SplitRows {
  Element type = Element::bf16;  // 16 bits: that of w
  void* high = nullptr;
  void* low = nullptr;
};

/// The parts of x (rows, k) float, contiguous; k a multiple of 8.
cudaError_t launch_split(const float* x, int64_t rows, int64_t k, const SplitRows& to,
                         cudaStream_t stream);

/// The norm before the head, of rows gather[r] (null: r) of h = hidden + d, as NormArgs of
/// fused_quantize.h has it: to out (rows, k) float and to its parts.
struct HeadNormArgs {
  const float* hidden = nullptr;  // (., k)
  const void* delta = nullptr;    // (., k) of delta_type, or null
  Element delta_type = Element::bf16;
  const float* post_norm = nullptr;  // (k) or null
  const float* norm = nullptr;       // (k)
  float eps = 0;
  int64_t rows = 0, k = 0;           // k a multiple of 8
  const int32_t* gather = nullptr;
  float* out = nullptr;
  SplitRows parts;
  bool programmatic = false;
};
cudaError_t launch_head_norm(const HeadNormArgs& args, cudaStream_t stream);

struct HeadArgs {
  SplitRows x;             // (rows, k)
  const void* w = nullptr; // (n, k) of x.type
  int64_t rows = 0, n = 0, k = 0;  // k a multiple of 8
  float* y = nullptr;
  int64_t y_stride = 0;
  bool programmatic = false;
};
/// w16_head_mma_sm80.cu
cudaError_t launch_w16_head_mma_sm80(const HeadArgs& args, cudaStream_t stream);

/// y += bias, for 16-bit products that were made elsewhere: y (rows, n) of `type`, rows y_stride
/// elements apart; bias (n) float.
cudaError_t launch_add_bias(Element type, void* y, int64_t y_stride, int64_t rows, int64_t n,
                            const float* bias, cudaStream_t stream);

}  // namespace nibble::cuda
