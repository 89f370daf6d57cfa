// Policy of the ss kernels: pure host arithmetic, tested without a GPU.
#pragma once

#include <span>

#include "gemm/cuda/rs_schedule.h"

namespace nibble::cuda {

/// Rows of the tiles that there are kernels for, largest first, whatever `config` multiplies.
std::span<const int> ss_token_tiles(const SsConfig& config);

/// The fewest pairs of tiles that have to be expanded beforehand, so that those expanded beside are
/// there when the first product wants them: walked as the workers walk them, in waves. The tile and
/// whether the last ones are shared are set.
int fewest_first_pairs(const SsConfig& config, const PackedLayout& layout, int64_t m);

/// For m rows, more than none, of what `config` multiplies: the tile, whether the last ones are
/// shared, and which weights are expanded beforehand.
void set_ss_work(SsConfig& config, const PackedLayout& layout, int64_t m);

}  // namespace nibble::cuda
