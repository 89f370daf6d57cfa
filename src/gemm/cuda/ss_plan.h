// Policy of the ss kernels: pure host arithmetic, tested without a GPU.
#pragma once

#include "gemm/cuda/rs_schedule.h"

namespace nibble::cuda {

/// The tile of the ss kernel for m rows and what else is set in the configuration: one that there
/// is a kernel for, with the fewest rows of padding.
void set_ss_tile(SsConfig& config, int64_t m);

/// That tile, whether the last ones are shared, and which weights are expanded beforehand.
void set_ss_work(SsConfig& config, const PackedLayout& layout, int64_t m);

}  // namespace nibble::cuda
