// How the rs kernel shares out its work: pure arithmetic, the same on host and device, so that every
// role of a kernel and every test walks the same list.
//
// The product is cut into tiles of (weight tile, token tile); a worker is a cluster of two blocks.
// The first `whole` tiles are dealt out round robin. The rest are cut into units of one slice of
// 512 k, and every worker takes the same number of consecutive units (stream-K, Osama et al. 2023):
// a tile that several workers share is summed by the one that has its first unit, in order of k.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/cuda/packed.h"

#if defined(__CUDACC__)
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif

namespace nibble::cuda {

/// Slices [slice0, slice1) of one tile.
struct RsWork {
  int weight_tile = 0, token_tile = 0;
  int slice0 = 0, slice1 = 0;
  int index = 0;  // of the tile, 0 .. weight_tiles * token_tiles
};

struct RsSchedule {
  int workers = 0;
  int weight_tiles = 0, token_tiles = 0, slices = 0;
  int raster = 1;  // token tiles that are walked together before the next weight tile
  int whole = 0;   // tiles that are not split

  NIBBLE_HOST_DEVICE int tiles() const { return weight_tiles * token_tiles; }
  NIBBLE_HOST_DEVICE int64_t units() const { return int64_t{tiles() - whole} * slices; }
  /// First unit of a worker, counted from tile `whole` on.
  NIBBLE_HOST_DEVICE int first_unit(int worker) const {
    return static_cast<int>(units() * worker / workers);
  }

  /// Number of items of `worker`.
  NIBBLE_HOST_DEVICE int items(int worker) const {
    const int begin = first_unit(worker), end = first_unit(worker + 1);
    return whole_of(worker) + (begin == end ? 0 : (end - 1) / slices - begin / slices + 1);
  }

  /// Item number `item` < items(worker) of `worker`.
  NIBBLE_HOST_DEVICE RsWork work(int worker, int item) const {
    RsWork out;
    const int split = item - whole_of(worker);
    if (split < 0) {
      place(worker + item * workers, out);
      out.slice1 = slices;
      return out;
    }
    const int begin = first_unit(worker), end = first_unit(worker + 1);
    const int tile = begin / slices + split;
    place(whole + tile, out);
    out.slice0 = begin > tile * slices ? begin - tile * slices : 0;
    out.slice1 = end < (tile + 1) * slices ? end - tile * slices : slices;
    return out;
  }

  /// The worker after `worker` has a part of the split tile `index` as well.
  NIBBLE_HOST_DEVICE bool shared_with_next(int worker, int index) const {
    return first_unit(worker + 1) < (index - whole + 1) * slices;
  }

 private:
  NIBBLE_HOST_DEVICE int whole_of(int worker) const {
    return whole > worker ? (whole - worker + workers - 1) / workers : 0;
  }
  NIBBLE_HOST_DEVICE void place(int index, RsWork& out) const {
    const int band = index / (raster * weight_tiles), rest = index - band * raster * weight_tiles;
    const int left = token_tiles - band * raster, width = left < raster ? left : raster;
    out.index = index;
    out.weight_tile = rest / width;
    out.token_tile = band * raster + rest % width;
  }
};

/// resident: clusters that run at once; no more workers than that, and none without work.
/// split_tail = false: no tile is split.
inline RsSchedule rs_schedule(int64_t weight_tiles, int64_t token_tiles, int64_t slices,
                              int resident, bool split_tail) {
  RsSchedule s;
  const int64_t most = weight_tiles * token_tiles * (split_tail ? slices : 1);
  s.workers = static_cast<int>(most < resident ? most : resident);
  s.weight_tiles = static_cast<int>(weight_tiles);
  s.token_tiles = static_cast<int>(token_tiles);
  s.slices = static_cast<int>(slices);
  s.raster = s.token_tiles < 8 ? s.token_tiles : 8;
  const int tiles = s.tiles(), waves = tiles / s.workers;
  if (!split_tail || tiles % s.workers == 0) {
    s.whole = tiles;
  } else {
    // One full wave joins the rest, so that each worker has between one and two tiles to split.
    s.whole = waves >= 2 ? (waves - 1) * s.workers : 0;
  }
  return s;
}

inline constexpr int kRsMaxMathGroups = 4;
inline constexpr size_t kRsFlagBytes = 4096;  // at the start of the scratch

/// How w4a8_rs_sm90 is launched.
struct RsConfig {
  int token_tile = 112;  // rows of x: 32 or 64 (with 4 math groups), 96 or 112 (with 3)
  int math_groups = 3;   // warpgroups of a block that multiply, 64 columns each
  bool split_tail = false;
  int multiprocessors = 132;
  bool programmatic = false;  // launched with programmatic stream serialization
};

inline RsSchedule rs_schedule_of(const PackedLayout& layout, int64_t m, const RsConfig& config) {
  const int columns = 2 * 64 * config.math_groups;  // of a cluster of two blocks
  return rs_schedule((layout.n + columns - 1) / columns,
                     (m + config.token_tile - 1) / config.token_tile, layout.slices,
                     config.multiprocessors / 2, config.split_tail);
}

/// Of a launch; zeroed once before its first use and left so.
inline size_t rs_scratch_bytes(const PackedLayout& layout, int64_t m, const RsConfig& config) {
  const RsSchedule schedule = rs_schedule_of(layout, m, config);
  if (schedule.whole == schedule.tiles()) return kRsFlagBytes;
  const auto blocks = static_cast<size_t>(schedule.workers) * 2;
  return kRsFlagBytes + blocks * static_cast<size_t>(config.math_groups) * 128 *
                            sizeof(float) * static_cast<size_t>(config.token_tile / 2);
}

}  // namespace nibble::cuda
