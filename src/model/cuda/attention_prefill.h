// The kernels behind launch_attention_prefill(), which has checked their arguments.
#pragma once

#include "model/cuda/kernels.h"

namespace nibble::cuda {

/// attention_prefill_sm90.cu: wgmma.
cudaError_t launch_attention_prefill_sm90(const PrefillArgs& args, cudaStream_t stream);
/// attention_prefill_sm80.cu: mma.sync.
cudaError_t launch_attention_prefill_sm80(const PrefillArgs& args, cudaStream_t stream);

}  // namespace nibble::cuda
