// Products of few rows (one or two; the last kernel, 16) whose blocks make the activations
// themselves while their first weights are on the way: no kernel in front makes a row, quantizes it
// and stores it. The codes, and so all results, are those of the separate kernels bit for bit. Same
// rules as kernels.h; compute capability 9.0.
//
// config: slab_quantizing_config() of product.layout, with a scale per (token, K-group) if
// product.group_scales. Codes are symmetric; Scaling::tensor is refused. product.m, layout, slabs,
// bf16_scales, group_scales and out are read; codes and scales of both arguments are not.
#pragma once

#include "gemm/cuda/fused_quantize.h"

namespace nibble::cuda {

/// Largest |x| of parts of each row, any parts: bits of floats, a NaN above infinity. (m, count),
/// count a multiple of 4, at a multiple of 16 bytes.
struct RowRanges {
  uint32_t* largest = nullptr;
  int count = 0;
};
inline constexpr int kMostRowRanges = 512;
/// How many the product with a gate makes of a row.
constexpr int gated_ranges(const PackedLayout& layout, const SlabConfig& config) {
  const int64_t blocks = config.blocks < layout.tiles ? config.blocks : layout.tiles;
  return static_cast<int>((blocks * (config.tile_warps / 2) + 3) / 4 * 4);
}

/// w4a8_slab_norm_sm90.cu: launch_norm_quantize() and the product, form `registers`. norm.hidden is
/// left as it is, because every block reads it: hidden + d goes to `sum`.
struct NormProductArgs {
  NormArgs norm;         // k of product.layout, m up to kSlabFusedTokens; no gather
  float* sum = nullptr;  // (m, k), not norm.hidden; null with a delta of null
  QuantizeArgs to;       // of launch_norm_quantize()
  GemmArgs product;
  /// Instead of y: function(gate) * up of its halves, both rounded to product.out.type first, as
  /// float; (m, n / 2), rows gated_stride elements apart. n a multiple of 32. Null: y.
  float* gated = nullptr;
  int64_t gated_stride = 0;
  GateFunction function = GateFunction::silu;
  RowRanges ranges;  // written: of gated, count as gated_ranges() has it; or empty
};
cudaError_t launch_w4a8_slab_norm_sm90(const NormProductArgs& args, const SlabConfig& config,
                                       cudaStream_t stream);

/// w4a8_slab_rows_sm90.cu: launch_quantize() of x and the product. x of any type, rows 16-byte
/// aligned, k a multiple of 8. With `ranges` of float x, at most kMostRowRanges, blocks of the form
/// `streamed` need not look for them; others have no use for them.
cudaError_t launch_w4a8_slab_rows_sm90(const QuantizeArgs& x, const GemmArgs& product,
                                       const SlabConfig& config, cudaStream_t stream,
                                       const RowRanges& ranges = {});

/// w4a8_slab_handed_sm90.cu: the same for up to kSlabTokens rows of f16 or bf16 and any K: the
/// first blocks make a row each, and all wait for them. config: slab_handed_config(). codes and
/// scales, the same ones in both arguments, are written and read. scratch: kFlagBytes (see
/// workspace_layout()), zero before and after.
cudaError_t launch_w4a8_slab_handed_sm90(const QuantizeArgs& x, const GemmArgs& product,
                                         const SlabConfig& config, void* scratch,
                                         cudaStream_t stream);

}  // namespace nibble::cuda
