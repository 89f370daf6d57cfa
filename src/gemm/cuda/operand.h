// What a plan asks of a quantizer: for those that make their rows themselves (fused_quantize.h).
#pragma once

#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

/// The arguments with which launch_quantize() makes the operand that `plan` multiplies.
QuantizeArgs quantize_args(const Plan& plan, const DeviceInput& input, const Operand& to);

/// The arguments with which run_gemm_quantized() launches `plan`'s kernel.
GemmArgs gemm_args(const Plan& plan, const Operand& operand, const DeviceWeights& weights, void* y,
                   int64_t y_stride);

}  // namespace nibble::cuda
