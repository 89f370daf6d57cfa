#include "gemm/cuda/ss_plan.h"

#include <algorithm>

namespace nibble::cuda {
namespace {

/// Splitting costs a sum over parts; an almost full last wave is not worth it, nor is an only one
/// that is full by two thirds.
bool worth_splitting(const RsSchedule& schedule, int multiprocessors) {
  const int tiles = schedule.tiles();
  const int resident = std::max(1, multiprocessors / 2);  // clusters of two blocks
  const int waves = (tiles + resident - 1) / resident;
  const double full_enough = waves == 1 ? 0.67 : 0.95;
  return tiles < full_enough * waves * resident;
}

}  // namespace

void set_ss_tile(SsConfig& config, int64_t m) {
  config.token_tile = config.halves ? 128 : 192;
  config.math_groups = config.halves ? 3 : 2;
  const auto padded = [m](int64_t tile) { return (m + tile - 1) / tile * tile; };
  const bool narrow = config.e4m3 && !config.group_scales;  // there is such a kernel
  if (narrow && padded(176) < padded(192)) config.token_tile = 176;
}

int fewest_first_pairs(const SsConfig& config, const PackedLayout& layout, int64_t m) {
  // Measured on an H200 (docs/notes.md), nanoseconds: the products of 128 k, and a slab by one of
  // the two warps of a block that expand.
  const int64_t step = config.halves ? 1100 : 600, slab = config.e4m3 ? 7500 : 5000;
  constexpr int64_t kWarps = 2;
  const RsSchedule schedule = ss_schedule_of(layout, m, config);
  const int64_t pairs = schedule.weight_tiles, wave = int64_t{schedule.slices} * step;
  const int64_t slabs = 2 * (config.image().columns / kSlabColumns) * layout.slices;
  const int64_t warps = schedule.workers * 2 * kWarps;
  int64_t first = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    // tiles that are shared are begun all at once
    const int64_t tile = std::min<int64_t>(pair * schedule.raster, schedule.whole);
    const int64_t wanted = tile / schedule.workers * wave;
    const int64_t made = wanted * warps / (slabs * slab);  // pairs, until then
    first = std::max(first, pair + 1 - made);
  }
  return static_cast<int>(first);
}

void set_ss_work(SsConfig& config, const PackedLayout& layout, int64_t m) {
  set_ss_tile(config, m);
  config.split_tail = worth_splitting(ss_schedule_of(layout, m, config), config.multiprocessors);
  config.first_pairs = fewest_first_pairs(config, layout, m);
}

}  // namespace nibble::cuda
