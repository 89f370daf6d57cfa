// How weights are expanded for the ss kernels, from slabs (packed.h) to their image (ss_image.h):
// by launches of their own (expand_sm90.cu) and beside the products (ss_product.h). Device code
// only.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

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

/// The e4m3 number of an integer of magnitude up to 16, exactly.
__device__ __forceinline__ uint32_t e4m3_of(int value) {
  if (value == 0) return 0;
  const uint32_t magnitude = static_cast<uint32_t>(abs(value));
  const uint32_t exponent = 31 - __clz(static_cast<int>(magnitude));
  const uint32_t mantissa = (magnitude << 3 >> exponent) & 7;
  return (value < 0 ? 0x80u : 0u) | (exponent + 7) << 3 | mantissa;
}

/// Four codes, the low 16 bits of `codes`, looked up in a table of 16 bytes.
__device__ __forceinline__ uint32_t look_up(uint32_t codes, const uint4& table) {
  const uint32_t seven = codes & 0x7777u;
  const uint32_t is_high = __byte_perm(0x0000ff00u, 0, codes >> 3 & 0x1111u);
  const uint32_t low = __byte_perm(table.x, table.y, seven);
  const uint32_t high = __byte_perm(table.z, table.w, seven);
  return (low & ~is_high) | (high & is_high);
}

/// A weight column's codes to 8 bits.
template <Expanded to>
struct ColumnExpander {
  static constexpr bool kE4m3 = to == Expanded::e4m3;
  uint4 table;
  uint32_t lift;

  __device__ ColumnExpander(uint32_t zero, const uint8_t* tables) {
    if constexpr (kE4m3) table = reinterpret_cast<const uint4*>(tables)[zero];
    lift = 0x80808080u - zero * 0x01010101u;
  }
  /// Eight codes of a word: those of the low nibbles, those of the high ones.
  __device__ uint2 expand(uint32_t w) const {
    if constexpr (kE4m3) {
      const uint32_t a = look_up(w, table), b = look_up(w >> 16, table);
      return {__byte_perm(a, b, 0x6420), __byte_perm(a, b, 0x7531)};
    } else {
      return {((w & 0x0f0f0f0fu) + lift) ^ 0x80808080u,
              ((w >> 4 & 0x0f0f0f0fu) + lift) ^ 0x80808080u};
    }
  }
};

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
  bool exists;

  Run() = default;
  /// run: of the 16 columns of a slab, counted through all tiles of the image.
  __device__ Run(const ExpandSource& p, int64_t run, int block, int lane) {
    exists = run < p.tiles;  // columns past N: zeros
    constexpr int kUnits = kSlabDepth / kBlockDepth;
    const uint8_t* slab = p.slabs + ((exists ? run : 0) * p.slices + block / kUnits) * p.slab_bytes;
    const int u = block % kUnits, r = lane >> 2;
    zeros = slab[kSlabCodeBytes + kUnits * 32 + r * kUnits + u];
    scales = *reinterpret_cast<const uint32_t*>(slab + kSlabCodeBytes + (r * kUnits + u) * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codes[half] = ptx::load16(slab + u * 1024 + half * 512 + lane * 16);
    }
  }

  /// image: of the block; run: of its columns. tables: of make_e4m3_tables().
  template <Expanded to>
  __device__ void store(const ExpandSource& p, const SsImage& shape, uint8_t* image, int run,
                        int lane, const uint8_t* tables) const {
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
          store_bytes<to>(image, row, c, half, zero, eights, tables);
        }
      }
    }
    if (c < 2) {
      const uint16_t bits = static_cast<uint16_t>(c == 0 ? scales : scales >> 16);
      const float scale = p.bf16_scales ? __uint_as_float(uint32_t{bits} << 16)
                                        : __half2float(__ushort_as_half(bits));
      auto* of_block = reinterpret_cast<float*>(image + shape.weight_bytes * shape.part_bytes());
      of_block[run * kSlabColumns + r + 8 * c] = exists ? scale : 0.0f;
    }
  }

 private:
  /// Of a column: k 64 half + 8 c and the seven that follow (low nibbles), and the same 32 further.
  template <Expanded to>
  __device__ void store_bytes(uint8_t* image, int row, int c, int half, uint32_t zero, uint2 eights,
                              const uint8_t* tables) const {
    const ColumnExpander<to> column(zero, tables);
    uint2 first = column.expand(eights.x), second = column.expand(eights.y);
    if (!exists) first = second = {0, 0};
    uint8_t* at = image + row * 128 + (c & 1) * 8;
#pragma unroll
    for (int nibble = 0; nibble < 2; ++nibble) {
      const int chunk = 4 * half + 2 * nibble + (c >> 1);
      *reinterpret_cast<uint2*>(at + ((chunk ^ (row & 7)) << 4)) =
          nibble == 0 ? make_uint2(first.x, second.x) : make_uint2(first.y, second.y);
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
    uint4 first = {low[0].x, low[0].y, low[1].x, low[1].y};
    uint4 second = {high[0].x, high[0].y, high[1].x, high[1].y};
    if (!exists) first = second = {0, 0, 0, 0};
    auto* at = reinterpret_cast<uint4*>(part + row * 128);
    at[c ^ (row & 7)] = first;
    at[(4 + c) ^ (row & 7)] = second;
  }
};

/// Bytes of make_e4m3_tables(); of other types there are none.
constexpr int table_bytes(Expanded to) { return to == Expanded::e4m3 ? 256 : 0; }

/// e4m3 of q - z, 16 bytes, q = 0 .. 15, for each z: what each of `threads` threads does for it.
__device__ inline void make_e4m3_tables(uint8_t* tables, int thread, int threads) {
  for (int i = thread; i < table_bytes(Expanded::e4m3); i += threads) {
    tables[i] = static_cast<uint8_t>(e4m3_of(i % 16 - i / 16));
  }
}

}  // namespace nibble::cuda
