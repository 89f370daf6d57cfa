// What won on an H200 with cold weights (docs/notes.md), put as rules:
//   - One slice a warp, its activations in registers, while there are warps for it (K <= 8192). One
//     slab in flight per warp is enough: 16 warps of a multiprocessor have 64 KiB on the way.
//   - Blocks as small as K allows, several on a multiprocessor: one then multiplies while another
//     begins or ends.
//   - Deeper K: activations slice by slice beside the weights, as many warps as there may be.
//   - One or two tokens and many tiles: two tiles at once, or one block would wait for its own end
//     while the next, launched programmatically, takes its room. Two slabs in flight, which a model
//     asks for while the kernel in front, of one block, still runs.
#include "gemm/cuda/slab_plan.h"

#include <algorithm>
#include <initializer_list>

#include <fmt/format.h>

namespace nibble::cuda {
namespace {

constexpr int64_t align(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* form_name(SlabForm form) {
  switch (form) {
    case SlabForm::registers: return "registers";
    case SlabForm::streamed: return "streamed";
  }
  return "";
}

SlabConfig registers_config(const PackedLayout& layout, int64_t m, int multiprocessors) {
  SlabConfig config;
  config.form = SlabForm::registers;
  config.k_warps = static_cast<int>(layout.slices);
  const int warps = m <= 2 && layout.tiles >= 8 * multiprocessors ? kSlabWarps : kSlabWarps / 2;
  while (config.tile_warps < 4 && config.warps() * 2 <= warps) config.tile_warps *= 2;
  config.blocks = multiprocessors * (kSlabWarps / config.warps());
  if (config.tile_warps == 2 && warps == kSlabWarps) config.stages = 2;
  return config;
}

/// The one of `counts` warps along K that leaves the fewest idle in the last round of slices; the
/// first of equals.
int best_k_warps(int64_t slices, std::initializer_list<int> counts) {
  const auto rounded = [&](int warps) { return ceil_div(slices, warps) * warps; };
  return *std::min_element(counts.begin(), counts.end(),
                           [&](int a, int b) { return rounded(a) < rounded(b); });
}

SlabConfig streamed_config(const PackedLayout& layout, int64_t m, int multiprocessors) {
  SlabConfig config;
  config.form = SlabForm::streamed;
  config.k_warps = m > 8 ? best_k_warps(layout.slices, {8, 7, 10, 9}) : kSlabWarps;
  config.stages = 2;
  config.held_tiles =
      static_cast<int>(std::clamp<int64_t>(ceil_div(layout.tiles, multiprocessors), 1, 4));
  config.blocks = multiprocessors;
  return config;
}

}  // namespace

// Two slabs in flight a warp, because it works on each for longer; at 16 tokens, eight warps hold
// all that the registers of a multiprocessor can. Where shared memory is short, a warp less costs
// less than a tile less that meets the activations while they are there.
SlabConfig slab_halves_config(const PackedLayout& layout, int64_t m, int multiprocessors,
                              int64_t shared_bytes) {
  const int most = slab_halves_warps(slab_token_columns(m, true), SlabForm::registers);
  SlabConfig config;
  config.halves = true;
  config.stages = 2;
  if (layout.slices <= most) {
    config.form = SlabForm::registers;
    config.k_warps = static_cast<int>(layout.slices);
    while (config.tile_warps < 4 && config.warps() * 2 <= kSlabWarps / 2) config.tile_warps *= 2;
    config.blocks = multiprocessors * std::max(1, most / config.warps());
    return config;
  }
  config.form = SlabForm::streamed;
  config.k_warps = slab_halves_warps(slab_token_columns(m, true), SlabForm::streamed);
  config.blocks = multiprocessors;
  config.held_tiles =
      static_cast<int>(std::clamp<int64_t>(ceil_div(layout.tiles, multiprocessors), 1, 4));
  const auto fits = [&] { return slab_shared_bytes(layout, m, false, config) <= shared_bytes; };
  if (!fits() && config.k_warps > 7) config.k_warps = m > 8 ? 7 : 11;
  while (!fits() && config.held_tiles > 1) --config.held_tiles;
  while (!fits() && config.k_warps > 1) --config.k_warps;
  return config;
}

std::string SlabConfig::describe() const {
  return fmt::format("{}, {}x{} warps, ring of {}, {} held, {} blocks{}{}{}{}", form_name(form),
                     k_warps, tile_warps, stages, held_tiles, blocks, halves ? ", halves" : "",
                     quantizes ? ", quantizing" : "", handed ? ", the first quantizing" : "",
                     programmatic ? ", programmatic" : "");
}

SlabRows slab_rows(const PackedLayout& layout, int64_t m, bool group_scales,
                   const SlabShared& shared) {
  const int64_t groups = group_scales ? layout.k / layout.group_size : 0;
  SlabRows r;
  r.scales = static_cast<int>(shared.activations + m * shared.row_pitch);
  r.scratch = static_cast<int>(r.scales + align(m * groups * int64_t{sizeof(float)}, 16));
  r.end = static_cast<int>(r.scratch + m * 2 * kSlabRowSums * int64_t{sizeof(float)});
  return r;
}

SlabShared slab_shared(const PackedLayout& layout, int64_t m, bool group_scales,
                       const SlabConfig& config) {
  const int64_t columns = slab_token_columns(m, config.halves), warps = config.warps();
  const bool streamed = config.form == SlabForm::streamed;
  SlabShared s;
  int64_t at = kSlabHeaderBytes;
  s.partials = static_cast<int>(at);
  s.partials_bytes = static_cast<int>(warps * (streamed ? config.held_tiles : 1) *
                                      slab_partial_bytes(static_cast<int>(columns)));
  at += (streamed ? 1 : 2) * int64_t{s.partials_bytes};
  s.tables = static_cast<int>(at);
  if (!config.halves) {
    s.table_bytes = static_cast<int>(layout.slab_groups * columns * (group_scales ? 8 : 4));
  }
  at = align(at + warps * s.table_bytes, 128);
  s.activations = static_cast<int>(at);
  if (config.quantizes) {
    s.row_pitch = static_cast<int>(layout.padded_k());
    at = slab_rows(layout, m, group_scales, s).end;
  } else if (streamed) {
    s.row_pitch = config.halves ? 2 * kSlabDepth + kHalvesRowPadding : kSlabDepth + kRowPadding;
    at += warps * m * s.row_pitch;
  }
  s.ring = static_cast<int>(align(at, 128));
  s.total = s.ring + warps * config.stages * layout.slab_bytes;
  return s;
}

int64_t slab_shared_bytes(const PackedLayout& layout, int64_t m, bool group_scales,
                          const SlabConfig& config) {
  return slab_shared(layout, m, group_scales, config).total;
}

SlabConfig slab_config(const PackedLayout& layout, int64_t m, bool group_scales,
                       int multiprocessors, int64_t shared_bytes) {
  const auto fits = [&](const SlabConfig& config) {
    return slab_shared_bytes(layout, m, group_scales, config) <= shared_bytes;
  };
  const bool registers = layout.slices <= kSlabWarps;
  SlabConfig config = registers ? registers_config(layout, m, multiprocessors)
                                : streamed_config(layout, m, multiprocessors);
  while (!fits(config) && config.stages > 1) --config.stages;
  if (registers) return config;
  while (!fits(config) && config.held_tiles > 1) --config.held_tiles;
  while (!fits(config) && config.k_warps > 1) --config.k_warps;
  return config;
}

std::optional<SlabConfig> slab_quantizing_config(const PackedLayout& layout, int64_t m,
                                                 bool group_scales, bool gated, int multiprocessors,
                                                 int64_t shared_bytes) {
  if (m < 1 || m > kSlabFusedTokens) return std::nullopt;
  // One scale a promoted group, so that neighbouring lanes have all of it.
  if (group_scales && layout.group_size != layout.promoted) return std::nullopt;
  SlabConfig config = slab_config(layout, m, group_scales, multiprocessors, shared_bytes);
  const int order = config.k_warps;
  config.quantizes = true;
  config.early_warps = config.warps();
  if (gated && config.tile_warps == 1) {
    if (config.form != SlabForm::registers || 2 * config.warps() > kSlabWarps) return std::nullopt;
    config.tile_warps = 2;
    config.blocks = multiprocessors;
    config.stages = 2;
  }
  while (slab_shared_bytes(layout, m, group_scales, config) > shared_bytes) {
    if (--config.stages < 1) return std::nullopt;
  }
  const int64_t most = int64_t{32} * config.warps() * slab_row_chunks(config) * 8;
  if (config.k_warps != order || layout.padded_k() > most) return std::nullopt;
  return config;
}

SlabConfig slab_handed_config(const PackedLayout& layout, int64_t m, bool group_scales,
                              int multiprocessors, int64_t shared_bytes) {
  SlabConfig config = slab_config(layout, m, group_scales, multiprocessors, shared_bytes);
  config.handed = true;
  return config;
}

}  // namespace nibble::cuda
