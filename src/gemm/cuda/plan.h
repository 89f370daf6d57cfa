// What a plan means to the driver: the parts of its workspace; and the policy of the rs kernel.
// Pure host arithmetic, tested without a GPU.
#pragma once

#include <span>
#include <vector>

#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda {

inline constexpr size_t kWorkspaceAlignment = 256;

/// Error of the float sum of a promoted group by tensor cores (w4a16), relative to the sum of its
/// magnitudes, in units of 2^-24. Derived in docs/cuda.md.
inline constexpr int kHalfSumRoundings = 288;

/// Whether the product's activations have 16 bits: x itself, or e4m3 numbers as f16.
bool multiplies_halves(const Plan& plan);

/// Whether activations have a scale per (token, group); w4a16 has none at all.
bool has_group_scales(const Problem& problem);

/// Byte offsets of a plan's workspace, each a multiple of kWorkspaceAlignment.
struct WorkspaceLayout {
  size_t scratch = 0;  // of the kernel; its first kFlagBytes are zeroed once and left so
  size_t codes = 0;    // (m, padded_k) int8; of w4a16, reordered x, 16 bits
  size_t scales = 0;   // (m) or (m, groups) float
  size_t range = 0;    // 4 words
  size_t total = 0;
};
WorkspaceLayout workspace_layout(const Plan& plan);

/// The kernel's scratch inside a plan's workspace.
void* workspace_scratch(const Plan& plan, void* workspace);

/// A shape of tile of the rs kernel: rows of x, warpgroups of 64 columns each, and how many blocks
/// of that shape work on a multiprocessor at once. step: what 128 k of a tile take, measured on an
/// H200 (docs/notes.md), nanoseconds. most_parts: of RsConfig::parts.
struct RsTile {
  int tokens = 0, math_groups = 0, blocks = 1;
  int step = 0;
  int most_parts = 1;
};
/// What the rs kernels take as activations.
enum class RsActivations { codes, codes_with_group_scales, e4m3, halves };
RsActivations rs_activations(const Plan& plan);

/// Tiles that there is a kernel for; empty if none is for such groups.
std::span<const RsTile> rs_tiles(const PackedLayout& layout, RsActivations activations);

/// Every way to multiply by a tile: whole tiles, the last ones shared, or as many parts of each as
/// the kernel and K allow.
std::vector<RsConfig> rs_configs(const PackedLayout& layout, const RsTile& tile,
                                 int multiprocessors);

/// The configuration of the rs kernel for m rows; rs_tiles() is not empty.
RsConfig rs_config(const PackedLayout& layout, int64_t m, RsActivations activations,
                   int multiprocessors);

}  // namespace nibble::cuda
