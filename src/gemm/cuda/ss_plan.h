// Policy of the ss kernels: pure host arithmetic, tested without a GPU.
#pragma once

#include "gemm/cuda/rs_schedule.h"

namespace nibble::cuda {

/// The tile of the ss kernel for m rows and what else is set in the configuration: one that there
/// is a kernel for, with the fewest rows of padding.
void set_ss_tile(SsConfig& config, int64_t m);

/// The fewest pairs of tiles that have to be expanded beforehand, so that those expanded beside are
/// there when the first product wants them: walked as the workers walk them, in waves. The tile and
/// whether the last ones are shared are set.
int fewest_first_pairs(const SsConfig& config, const PackedLayout& layout, int64_t m);

/// That tile, whether the last ones are shared, and which weights are expanded beforehand.
void set_ss_work(SsConfig& config, const PackedLayout& layout, int64_t m);

}  // namespace nibble::cuda
