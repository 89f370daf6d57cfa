#include "gemm/cpu/plan.h"

#include <algorithm>

namespace nibble {
namespace {

// Below this many rows the AMX kernel loses to VPDPBUSD: a tile multiply costs the same for 1 and
// for 16 rows. Measured: docs/notes.md.
constexpr int64_t kAmxMinRows = 6;

bool worth_it(const CpuKernel& kernel, const Problem& problem) {
  return kernel.isa != Isa::amx_int8 || problem.m >= kAmxMinRows;
}

}  // namespace

const CpuKernel* preferred_kernel(const Problem& problem, bool (*runs)(Isa)) {
  for (const CpuKernel& kernel : cpu_kernels()) {
    if (kernel.mode == problem.kernel_mode() && runs(kernel.isa) && worth_it(kernel, problem)) {
      return &kernel;
    }
  }
  return nullptr;
}

WorkspaceLayout workspace_layout(const Problem& problem, ActivationLayout layout,
                                 int64_t block_rows) {
  WorkspaceLayout w;
  const int64_t groups = problem.k / problem.group_size;
  switch (layout) {
    case ActivationLayout::rows:
      w.codes_bytes = block_rows * groups * quads_of(problem.group_size) * 4;
      break;
    case ActivationLayout::tiles:
      w.codes_bytes =
          round_up(block_rows, kTileRows) * groups * steps_of(problem.group_size) * kTileDepth;
      break;
    case ActivationLayout::floats:
      w.floats_bytes = block_rows * problem.k * static_cast<int64_t>(sizeof(float));
      break;
  }
  const int64_t per_row = scales_per_group(problem.granularity) ? groups : 1;
  const bool quantized = layout != ActivationLayout::floats;
  w.scales_offset = round_up(w.codes_bytes + w.floats_bytes, kLineBytes);
  w.sums_offset =
      w.scales_offset + (quantized ? round_up(block_rows * per_row * 4, kLineBytes) : 0);
  w.total_bytes = w.sums_offset + (quantized ? round_up(block_rows * groups * 4, kLineBytes) : 0);
  return w;
}

void size_plan(Plan& plan, const CacheSizes& caches) {
  const Problem& p = plan.problem;
  const bool floats = plan.kernel->layout == ActivationLayout::floats;
  // Half of L2 for the activation block: the rest holds a weight block and the outputs. AMX keeps a
  // float accumulator per row and column in L1, where 256 rows would leave no room for the tiles.
  const int64_t row_bytes = std::max<int64_t>(1, p.k * (floats ? 4 : 1));
  const int64_t limit = plan.kernel->isa == Isa::amx_int8 ? 128 : kMaxBlockRows;
  const int64_t most = std::clamp<int64_t>(caches.l2_bytes / 2 / row_bytes, 32, limit);
  plan.block_rows = std::max<int64_t>(1, std::min<int64_t>(p.m, most / 32 * 32));
  // Decode is bound by memory: several blocks at once are several streams for the prefetcher. With
  // many rows one block at a time is enough, but a task should not be too short either.
  const int64_t blocks = (p.n + kBlockColumns - 1) / kBlockColumns;
  const int64_t fair = std::max<int64_t>(1, blocks / (4 * std::max(1, plan.threads)));
  plan.blocks_per_task = std::clamp<int64_t>(fair, 1, 4);
  plan.workspace_bytes =
      static_cast<size_t>(workspace_layout(p, plan.kernel->layout, plan.block_rows).total_bytes);
}

}  // namespace nibble
