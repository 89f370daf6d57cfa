// Products with 16-bit (or float) weights: lm_head, layers a plan keeps at 16 bits, and whole
// unquantized models. Float arithmetic, but as fixed as the integer kernels: every output is one
// chain of fused multiply-adds in order of k, so the bits do not depend on M, threads, blocking or
// instruction set (gemm/float_ops.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/status.h"
#include "gemm/float_ops.h"

namespace nibble {

/// Weights of y = x W^T (+ bias), packed as panels.
struct DenseWeights {
  int64_t k = 0, n = 0;
  Dtype dtype = Dtype::bf16;
  AlignedBuffer storage;    // ceil(n / 64) panels of (k, 64); missing columns are 0
  std::vector<float> bias;  // empty, or ceil(n / 64) * 64

  const std::byte* panel(int64_t index) const {
    return storage.data() + index * k * kPanelColumns * dtype_bytes(dtype);
  }
  int64_t panels() const { return (n + kPanelColumns - 1) / kPanelColumns; }
};

/// weight (n, k) row-major of `dtype`, any alignment; bias (n) of bias_dtype or null.
/// threads <= 0: all.
Result<DenseWeights> pack_dense(int64_t n, int64_t k, const void* weight, Dtype dtype,
                                const void* bias, Dtype bias_dtype, int threads);

/// y (m, n) = x (m, k) W^T + bias, rows x_stride and y_stride elements apart.
void run_dense(const DenseWeights& weights, int64_t m, const float* x, int64_t x_stride, float* y,
               int64_t y_stride, int threads);

/// "dense_avx512", ...: for receipts.
std::string dense_kernel_name();

}  // namespace nibble
