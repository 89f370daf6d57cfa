// Launches of int4 activations times packed weights on 4-bit tensor cores. Same rules as kernels.h.
#pragma once

#include "gemm/cuda/int4_operand.h"
#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

/// int4_operand.cu: args.codes to both parts of `scratch` (int4_scratch(), 256-byte aligned);
/// layout.promoted is 64 or 128. Asymmetric: the codes of a run do not span more than 15.
cudaError_t launch_int4_operand(const GemmArgs& args, bool symmetric, void* scratch,
                                cudaStream_t stream);

/// w4a4_mma_sm80.cu: any M, groups of at least 64. codes in natural order, of w4a4. scratch:
/// int4_scratch(). Two launches, this and the other.
cudaError_t launch_w4a4_mma_sm80(const GemmArgs& args, bool symmetric, void* scratch,
                                 cudaStream_t stream);

}  // namespace nibble::cuda
