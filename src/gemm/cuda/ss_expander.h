// How weights are expanded for the ss kernels, from slabs (packed.h) to their image (ss_image.h):
// by launches of their own (expand_sm90.cu) and beside the products (ss_product.h). Device code
// only.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "gemm/cuda/byte_columns.h"
#include "gemm/cuda/halves.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/packed.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/ss_image.h"

namespace nibble::cuda {

/// What weights are expanded to.
enum class Expanded { int8, e4m3, f16, bf16 };

constexpr bool is_half(Expanded to) { return to == Expanded::f16 || to == Expanded::bf16; }

struct ExpandSource {
  const uint8_t* slabs;
  int64_t tiles, slices;  // of the slabs
  int slab_bytes;
  bool bf16_scales;
  int blocks;  // of 128 k
  uint8_t* image;
};

inline ExpandSource expand_source(const GemmArgs& args, uint8_t* image) {
  return {args.slabs,
          args.layout.tiles,
          args.layout.slices,
          args.layout.slab_bytes,
          args.bf16_scales,
          static_cast<int>(SsImage::blocks(args.layout)),
          image};
}

/// What 8-bit operands are made by.
template <Expanded to>
using ByteColumn = std::conditional_t<to == Expanded::e4m3, E4m3Column, Int8Column>;

/// What an image's scales are of the weights'.
constexpr float unit_of(Expanded to) { return to == Expanded::e4m3 ? E4m3Column::kUnit : 1.0f; }

/// A weight column's codes to 16 bits.
template <Element type>
struct HalfColumnExpander {
  HalfExpander<type> expander;

  __device__ explicit HalfColumnExpander(uint32_t zero) : expander(zero) {}
  /// The four low nibbles of a word, or the four high ones, in order of k.
  template <bool high>
  __device__ uint2 expand(uint32_t w) const {
    const uint32_t even = high ? expander.high_pair(w) : expander.low_pair(w);
    const uint32_t odd = high ? expander.high_pair(w >> 8) : expander.low_pair(w >> 8);
    return {__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632)};
  }
};

/// A lane's part of 16 columns x 128 k as they lie in a slab, and as they lie in the image.
struct Run {
  uint4 codes[2];
  uint32_t zeros, scales;

  Run() = default;
  /// run: of the 16 columns of a slab, counted through all tiles of the image.
  __device__ Run(const ExpandSource& p, int64_t run, int block, int lane) {
    const bool exists = run < p.tiles;
    constexpr int kUnits = kSlabDepth / kBlockDepth;
    const uint8_t* slab = p.slabs + ((exists ? run : 0) * p.slices + block / kUnits) * p.slab_bytes;
    const int u = block % kUnits, r = lane >> 2;
    zeros = slab[kSlabCodeBytes + kUnits * 32 + r * kUnits + u];
    scales = *reinterpret_cast<const uint32_t*>(slab + kSlabCodeBytes + (r * kUnits + u) * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codes[half] = ptx::load16(slab + u * 1024 + half * 512 + lane * 16);
    }
    if (exists) return;  // columns past N: zeros
    codes[0] = codes[1] = {0, 0, 0, 0};
    zeros = scales = 0;
  }

  /// image: of the block; run: of its columns.
  template <Expanded to>
  __device__ void store(const ExpandSource& p, const SsImage& shape, uint8_t* image, int run,
                        int lane) const {
    const int r = lane >> 2, c = lane & 3;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t zero = h == 0 ? zeros & 15 : zeros >> 4;
      const int row = run * kSlabColumns + r + 8 * h;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 w = codes[half];
        const uint2 eights = h == 0 ? make_uint2(w.x, w.z) : make_uint2(w.y, w.w);
        if constexpr (is_half(to)) {
          store_halves<to>(image + half * shape.part_bytes(), row, c, zero, eights);
        } else {
          store_bytes<to>(image, row, c, half, zero, eights);
        }
      }
    }
    if (c < 2) {
      const uint16_t bits = static_cast<uint16_t>(c == 0 ? scales : scales >> 16);
      const float scale = p.bf16_scales ? __uint_as_float(uint32_t{bits} << 16)
                                        : __half2float(__ushort_as_half(bits));
      auto* of_block = reinterpret_cast<float*>(image + shape.weight_bytes * shape.part_bytes());
      of_block[run * kSlabColumns + r + 8 * c] = scale * unit_of(to);
    }
  }

 private:
  /// Of a column: k 64 half + 8 c and the seven that follow (low nibbles), and the same 32 further.
  template <Expanded to>
  __device__ void store_bytes(uint8_t* image, int row, int c, int half, uint32_t zero,
                              uint2 eights) const {
    const ByteColumn<to> column(zero);
    const uint2 low = {column(low_nibbles(eights.x)), column(low_nibbles(eights.y))};
    const uint2 high = {column(high_nibbles(eights.x)), column(high_nibbles(eights.y))};
    uint8_t* at = image + row * 128 + (c & 1) * 8;
#pragma unroll
    for (int nibble = 0; nibble < 2; ++nibble) {
      const int chunk = 4 * half + 2 * nibble + (c >> 1);
      *reinterpret_cast<uint2*>(at + ((chunk ^ (row & 7)) << 4)) = nibble == 0 ? low : high;
    }
  }
  template <Expanded to>
  __device__ void store_halves(uint8_t* part, int row, int c, uint32_t zero, uint2 eights) const {
    constexpr Element kType = to == Expanded::f16 ? Element::f16 : Element::bf16;
    const HalfColumnExpander<kType> column(zero);
    const uint2 low[2] = {column.template expand<false>(eights.x),
                          column.template expand<false>(eights.y)};
    const uint2 high[2] = {column.template expand<true>(eights.x),
                           column.template expand<true>(eights.y)};
    const uint4 first = {low[0].x, low[0].y, low[1].x, low[1].y};
    const uint4 second = {high[0].x, high[0].y, high[1].x, high[1].y};
    auto* at = reinterpret_cast<uint4*>(part + row * 128);
    at[c ^ (row & 7)] = first;
    at[(4 + c) ^ (row & 7)] = second;
  }
};

}  // namespace nibble::cuda
