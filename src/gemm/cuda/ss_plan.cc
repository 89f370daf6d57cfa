#include "gemm/cuda/ss_plan.h"

#include <algorithm>
#include <array>
#include <limits>

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

/// What 128 k of a tile take with all multiprocessors at work, nanoseconds: measured on an H200
/// (docs/notes.md).
int64_t step_of(const SsConfig& config) {
  return config.halves ? 1100 : 100 + config.token_tile * 5 / 2;
}

/// What products take, nanoseconds; fitted to the times of docs/notes.md, 384 rows to 2048.
int64_t cost(const RsSchedule& schedule, const SsConfig& config) {
  constexpr int64_t kSum = 6000;
  const int64_t steps = int64_t{schedule.slices} * step_of(config), tiles = schedule.tiles();
  const int64_t clusters = std::max(1, config.multiprocessors / 2);
  if (schedule.whole == tiles) return (tiles + clusters - 1) / clusters * steps;
  return tiles * steps / clusters * 21 / 20 + kSum;  // a twentieth slower than alone
}

void set_cheapest_tile(SsConfig& config, const PackedLayout& layout, int64_t m) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const int tile : ss_token_tiles(config)) {
    for (const bool split : {false, true}) {
      SsConfig other = config;
      other.token_tile = tile;
      other.split_tail = split;
      const int64_t found = cost(ss_schedule_of(layout, m, other), other);
      if (found >= least) continue;
      least = found;
      config = other;
    }
  }
}

}  // namespace

std::span<const int> ss_token_tiles(const SsConfig& config) {
  static constexpr std::array<int, 3> kE4m3 = {192, 176, 128};
  static constexpr std::array<int, 1> kHalves = {128}, kOthers = {192};
  if (config.halves) return kHalves;
  if (config.e4m3 && !config.group_scales) return kE4m3;
  return kOthers;
}

int fewest_first_pairs(const SsConfig& config, const PackedLayout& layout, int64_t m) {
  // nanoseconds, measured as the steps: a slab by one of the two warps of a block that expand
  const int64_t step = step_of(config), slab = config.e4m3 ? 7500 : 5000;
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
  config.math_groups = config.halves ? 3 : 2;
  const std::span<const int> tiles = ss_token_tiles(config);
  config.token_tile = tiles.front();
  config.split_tail = worth_splitting(ss_schedule_of(layout, m, config), config.multiprocessors);
  if (tiles.size() > 1) set_cheapest_tile(config, layout, m);
  config.first_pairs = fewest_first_pairs(config, layout, m);
}

}  // namespace nibble::cuda
