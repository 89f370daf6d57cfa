// How the rs kernel shares out its work: pure arithmetic, the same on host and device, so that
// every role of a kernel and every test walks the same list.
//
// The product is cut into tiles of (weight tile, token tile); a worker is a cluster of two blocks.
// The first `whole` tiles are dealt out round robin. The rest are cut into units of one slice of
// 512 k, and every worker takes the same number of consecutive units (stream-K, Osama et al. 2023).
// Who sums a tile that several workers share, always in order of k: tile_output.h.
//
// Or, parts > 1: every tile is cut into as many parts along k, one a worker, and the workers of a
// tile are one cluster, which sums its parts in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/host_device.h"
#include "gemm/cuda/packed.h"
#include "gemm/cuda/ss_image.h"

namespace nibble::cuda {

/// Division by what is known when a kernel is launched: a GPU takes several times as long for the
/// ordinary one, and nothing is loaded before a worker knows its work.
struct Divisor {
  Divisor() = default;
  explicit Divisor(int by) : magic(~uint64_t{0} / static_cast<unsigned>(by) + 1) {}
  /// Exact for any n: magic exceeds 2^64 / by by less than 1, and n * by is below 2^64.
  NIBBLE_HOST_DEVICE int quotient(unsigned n) const {
    if (magic == 0) return static_cast<int>(n);  // by 1
    return static_cast<int>(multiply_high(magic, n));
  }
  uint64_t magic = 0;
};

/// Slices [slice0, slice1) of one tile.
struct RsWork {
  int weight_tile = 0, token_tile = 0;
  int slice0 = 0, slice1 = 0;
  int index = 0;  // of the tile, 0 .. weight_tiles * token_tiles
};

/// Consecutive workers [first, first + count) that have a part of a tile.
struct RsSharers {
  int first = 0, count = 1;
};

struct RsSchedule {
  int workers = 0;
  int weight_tiles = 0, token_tiles = 0, slices = 0;
  int raster = 1;  // token tiles that are walked together before the next weight tile
  int whole = 0;   // tiles that are not split
  int parts = 1;   // of every tile, along k, by the workers of a cluster: then one item a worker
  // by workers, slices, units(), tiles of a band of `raster`, raster, width of the last band, parts
  Divisor by_workers, by_slices, by_units, by_band, by_raster, by_last_width, by_parts;

  NIBBLE_HOST_DEVICE int tiles() const { return weight_tiles * token_tiles; }
  /// Less than two tiles a worker: times workers, below 2^32 for K up to 2^22 (plans see to it).
  NIBBLE_HOST_DEVICE unsigned units() const {
    return static_cast<unsigned>((tiles() - whole) * slices);
  }
  /// First unit of a worker, counted from tile `whole` on.
  NIBBLE_HOST_DEVICE int first_unit(int worker) const {
    return by_workers.quotient(units() * static_cast<unsigned>(worker));
  }

  /// Number of items of `worker`.
  NIBBLE_HOST_DEVICE int items(int worker) const {
    return parts > 1 ? 1 : items_of_whole_k(worker);
  }
  /// Item number `item` < items(worker) of `worker`.
  NIBBLE_HOST_DEVICE RsWork work(int worker, int item) const {
    return parts > 1 ? part(worker) : work_of_whole_k(worker, item);
  }

  /// The only item of a worker, parts > 1.
  NIBBLE_HOST_DEVICE RsWork part(int worker) const {
    RsWork out;
    const int tile = by_parts.quotient(worker), of = worker - tile * parts;
    place(tile, out);
    out.slice0 = by_parts.quotient(of * slices);
    out.slice1 = by_parts.quotient((of + 1) * slices);
    return out;
  }
  /// items() and work() of kernels that know that parts == 1.
  NIBBLE_HOST_DEVICE int items_of_whole_k(int worker) const {
    const int begin = first_unit(worker), end = first_unit(worker + 1);
    if (begin == end) return whole_of(worker);
    return whole_of(worker) + tile_of(end - 1) - tile_of(begin) + 1;
  }

  NIBBLE_HOST_DEVICE RsWork work_of_whole_k(int worker, int item) const {
    RsWork out;
    const int split = item - whole_of(worker);
    if (split < 0) {
      place(worker + item * workers, out);
      out.slice1 = slices;
      return out;
    }
    const int begin = first_unit(worker), end = first_unit(worker + 1);
    const int tile = tile_of(begin) + split;
    place(whole + tile, out);
    out.slice0 = begin > tile * slices ? begin - tile * slices : 0;
    out.slice1 = end < (tile + 1) * slices ? end - tile * slices : slices;
    return out;
  }

  /// Who works on the split tile `index`.
  NIBBLE_HOST_DEVICE RsSharers sharers(int index) const {
    const int first = worker_of((index - whole) * slices);
    return {first, worker_of((index - whole + 1) * slices - 1) - first + 1};
  }
  /// Tiles may have more than two sharers; then a worker may have the end of one such tile and the
  /// beginning of another. Otherwise everyone has at least as many units as a tile.
  NIBBLE_HOST_DEVICE bool shares_widely() const {
    return whole < tiles() && tiles() - whole < workers;
  }
  /// Number of tiles that `worker` has for itself, before the split ones.
  NIBBLE_HOST_DEVICE int whole_of(int worker) const {
    return whole > worker ? by_workers.quotient(whole - worker + workers - 1) : 0;
  }

 private:
  /// Who has that unit: the last worker whose first unit is not behind it.
  NIBBLE_HOST_DEVICE int worker_of(int unit) const {
    return by_units.quotient(static_cast<unsigned>(unit + 1) * static_cast<unsigned>(workers) - 1);
  }
  NIBBLE_HOST_DEVICE int tile_of(int unit) const { return by_slices.quotient(unit); }
  NIBBLE_HOST_DEVICE void place(int index, RsWork& out) const {
    const int band = by_band.quotient(index), rest = index - band * raster * weight_tiles;
    const int left = token_tiles - band * raster, width = left < raster ? left : raster;
    out.index = index;
    out.weight_tile = (left < raster ? by_last_width : by_raster).quotient(rest);
    out.token_tile = band * raster + rest - out.weight_tile * width;
  }
};

/// resident: clusters that run at once; no more workers than that, and none without work.
/// split_tail = false: no tile is split. raster: token tiles that are walked together.
/// parts > 1, at most slices: as many parts of every tile, whatever else is asked for.
inline RsSchedule rs_schedule(int64_t weight_tiles, int64_t token_tiles, int64_t slices,
                              int resident, bool split_tail, int raster = 8, int parts = 1) {
  RsSchedule s;
  const int64_t most = weight_tiles * token_tiles * (split_tail ? slices : 1);
  s.workers = static_cast<int>(most < resident ? most : resident);
  if (parts > 1) {
    s.parts = parts;
    s.by_parts = Divisor(parts);
    s.workers = static_cast<int>(weight_tiles * token_tiles * parts);
  }
  s.weight_tiles = static_cast<int>(weight_tiles);
  s.token_tiles = static_cast<int>(token_tiles);
  s.slices = static_cast<int>(slices);
  s.raster = s.token_tiles < raster ? s.token_tiles : raster;
  const int tiles = s.tiles(), waves = tiles / s.workers;
  if (parts > 1 || !split_tail || tiles % s.workers == 0) {
    s.whole = tiles;
  } else {
    // One full wave joins the rest, so that each worker has between one and two tiles to split.
    s.whole = waves >= 2 ? (waves - 1) * s.workers : 0;
  }
  s.by_workers = Divisor(s.workers);
  s.by_slices = Divisor(s.slices);
  if (s.whole < tiles) s.by_units = Divisor(static_cast<int>(s.units()));
  s.by_band = Divisor(s.raster * s.weight_tiles);
  s.by_raster = Divisor(s.raster);
  if (s.token_tiles % s.raster != 0) s.by_last_width = Divisor(s.token_tiles % s.raster);
  return s;
}

inline constexpr size_t kFlagBytes = 4096;  // at the start of the scratch

/// How w4a8_rs_sm90 is launched.
struct RsConfig {
  int token_tile = 64;  // rows of x; with math_groups one of rs_tiles()
  int math_groups = 3;  // warpgroups of a block that multiply, 64 columns each
  bool split_tail = false;
  int multiprocessors = 132;
  int blocks = 1;             // of a multiprocessor at once
  int parts = 1;              // of a tile along k, by a cluster: 1 to 4, at most the slices
  bool programmatic = false;  // launched with programmatic stream serialization
};

inline RsSchedule rs_schedule_of(const PackedLayout& layout, int64_t m, const RsConfig& config) {
  const int columns = 2 * 64 * config.math_groups;  // of a cluster of two blocks
  return rs_schedule((layout.n + columns - 1) / columns,
                     (m + config.token_tile - 1) / config.token_tile, layout.slices,
                     config.multiprocessors * config.blocks / 2, config.split_tail, 8,
                     config.parts);
}

/// Of a launch; zeroed once before its first use and left so.
inline size_t rs_scratch_bytes(const PackedLayout& layout, int64_t m, const RsConfig& config) {
  const RsSchedule schedule = rs_schedule_of(layout, m, config);
  if (schedule.whole == schedule.tiles()) return kFlagBytes;
  const auto parts = static_cast<size_t>(schedule.workers) * 2 * (schedule.shares_widely() ? 2 : 1);
  return kFlagBytes + parts * static_cast<size_t>(config.math_groups) * 128 * sizeof(float) *
                          static_cast<size_t>(config.token_tile / 2);
}

/// How w4a8_ss_sm90 and w4a16_ss_sm90 are launched.
struct SsConfig {
  int token_tile = 192;       // rows of x; with math_groups as set_ss_work() sets it
  int math_groups = 2;        // warpgroups of a block that multiply, 64 columns each
  bool halves = false;        // w4a16: weights as floats of x's type; then none of the next three
  bool e4m3 = false;          // products in fp8, activations as e4m3 bytes
  bool group_scales = false;  // of the activations
  bool expanded = false;      // the weights come with their image: none in the scratch
  // Pairs of the image's tiles that are made before the products, the others beside them (most of
  // all weights, where tokens are many); at least as many as there are: none beside.
  int first_pairs = std::numeric_limits<int>::max();
  bool split_tail = true;
  int multiprocessors = 132;
  bool programmatic = false;  // both launches, with programmatic stream serialization

  constexpr SsImage image() const {
    return {.columns = 64 * math_groups, .weight_bytes = halves ? 2 : 1};
  }
};

/// 16 token tiles at a time: what a wave of 66 clusters reads is least when its tokens have about
/// as many bytes as its weights. Of few rows, all: each weight is read in one stretch of time.
inline RsSchedule ss_schedule_of(const PackedLayout& layout, int64_t m, const SsConfig& config) {
  return rs_schedule(config.image().tiles(layout) / 2,
                     (m + config.token_tile - 1) / config.token_tile, SsImage::blocks(layout),
                     config.multiprocessors / 2, config.split_tail, 16);
}

/// SsConfig::first_pairs, of those that there are.
inline int64_t ss_first_pairs(const PackedLayout& layout, const SsConfig& config) {
  const int64_t pairs = config.image().tiles(layout) / 2;
  return config.expanded || config.first_pairs > pairs ? pairs : config.first_pairs;
}

/// Words of the scratch for what is expanded beside the products: a counter of slabs that have been
/// taken, then how many slabs there are of each piece, a tile's 512 k, in order of tile and k.
inline int64_t ss_piece_words(const PackedLayout& layout, const SsConfig& config) {
  const int64_t tiles = config.image().tiles(layout);
  return 2 * ss_first_pairs(layout, config) == tiles ? 0 : 1 + tiles * layout.slices;
}

/// Rows of the activations' scales, with padding: (groups, ss_scale_rows()) of float.
inline int64_t ss_scale_rows(int64_t m, const SsConfig& config) {
  return (m + config.token_tile - 1) / config.token_tile * config.token_tile;
}

/// Where things lie in the scratch of a launch. Its first kFlagBytes are zeroed once before the
/// first use, and left so.
struct SsScratch {
  size_t parts = 0;   // of split tiles
  size_t image = 0;   // unless the weights come with theirs
  size_t pieces = 0;  // ss_piece_words(), zeroed by the first launch
  size_t scales = 0;  // (groups, ss_scale_rows) float, if there are group scales
  size_t bytes = 0;
};
inline SsScratch ss_scratch(const PackedLayout& layout, int64_t m, const SsConfig& config) {
  const auto aligned = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  const RsSchedule schedule = ss_schedule_of(layout, m, config);
  const bool split = schedule.whole != schedule.tiles();
  const auto part =
      static_cast<size_t>(config.math_groups * 128 * (config.token_tile / 2)) * sizeof(float);
  const auto groups = static_cast<size_t>(config.group_scales ? layout.k / layout.group_size : 0);
  SsScratch at;
  at.parts = kFlagBytes;
  at.image = aligned(at.parts + (split ? static_cast<size_t>(schedule.workers) * 2 * part : 0));
  at.pieces = aligned(at.image + (config.expanded ? 0 : config.image().bytes(layout)));
  at.scales = aligned(at.pieces + static_cast<size_t>(ss_piece_words(layout, config)) * 4);
  at.bytes = at.scales + groups * static_cast<size_t>(ss_scale_rows(m, config)) * sizeof(float);
  return at;
}

}  // namespace nibble::cuda
