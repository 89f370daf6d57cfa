// The few-row half of launch_w4a8_mma_sm80.
#pragma once

#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

/// Up to here two reads of the weights, one of them from L2, beat blocks of 128 columns, which are
/// too few for a GPU.
inline constexpr int64_t kSkinnyRows = 16;

cudaError_t launch_w4a8_mma_skinny_sm80(const GemmArgs& args, cudaStream_t stream);

}  // namespace nibble::cuda
