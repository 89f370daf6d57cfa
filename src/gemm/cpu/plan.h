// Policy of the CPU path, as pure functions: which kernel, how many rows per block, how many weight
// blocks per task. No intrinsics, no threads, no allocation.
#pragma once

#include "gemm/cpu/kernel.h"

namespace nibble {

/// Cache sizes that bound the blocking; from CpuFeatures, or chosen by a test.
struct CacheSizes {
  int64_t l2_bytes = 1 << 20;
};

/// Preferred kernel for the problem among those whose instruction set `runs` accepts; the table is
/// never empty for any mode, because the scalar kernels run everywhere.
const CpuKernel* preferred_kernel(const Problem& problem, bool (*runs)(Isa));

/// Fills block_rows, blocks_per_task and workspace_bytes of a plan whose problem, kernel and
/// threads are set.
void size_plan(Plan& plan, const CacheSizes& caches);

/// Byte offsets of one plan's workspace. The driver and size_plan share this one definition.
struct WorkspaceLayout {
  int64_t codes_bytes = 0;  // of one block of rows
  int64_t floats_bytes = 0;
  int64_t scales_offset = 0, sums_offset = 0;
  int64_t total_bytes = 0;
};
WorkspaceLayout workspace_layout(const Problem& problem, ActivationLayout layout,
                                 int64_t block_rows);

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace nibble
