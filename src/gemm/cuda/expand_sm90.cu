// What w4a8_ss_sm90 starts from: the image of the weights (ss_image.h), int4 activations as e4m3,
// and scales per (token, group) group by group. One launch, at memory speed.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/ss_image.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 192;  // six warps: two of a tile's twelve runs of 16 columns each
constexpr int kCodesOfBlock = kThreads * 4 * 16;  // converted
constexpr int kScalesOfBlock = kThreads * 8;      // copied

constexpr int kImageRuns = kImageColumns / kSlabColumns;

struct ExpandParams {
  const uint8_t* slabs;
  int64_t tiles, slices;  // of the slabs
  int slab_bytes;
  bool bf16_scales;
  int blocks;  // of 128 k
  uint8_t* image;
  const uint4* codes;  // to e4m3: code_count times 16
  uint4* e4m3;
  int64_t code_count;
  const float* t;  // (m, groups) to (groups, rows)
  float* t_of_groups;
  int64_t m, groups, rows;
  int first_codes, first_scales;  // blocks of the grid: first those of the image
};

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
template <bool kE4m3>
struct ColumnExpander {
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

/// A lane's part of 16 columns x 128 k as they lie in a slab, and as they lie in the image.
struct Run {
  uint4 codes[2];
  uint32_t zeros, scales;
  bool exists;

  __device__ Run(const ExpandParams& p, int tile, int block, int run, int lane) {
    const int64_t slab_tile = int64_t{tile} * kImageRuns + run;
    exists = slab_tile < p.tiles;  // columns past N: zeros
    constexpr int kUnits = kSlabDepth / kBlockDepth;
    const uint8_t* slab =
        p.slabs + ((exists ? slab_tile : 0) * p.slices + block / kUnits) * p.slab_bytes;
    const int u = block % kUnits, r = lane >> 2;
    zeros = slab[kSlabCodeBytes + kUnits * 32 + r * kUnits + u];
    scales = *reinterpret_cast<const uint32_t*>(slab + kSlabCodeBytes + (r * kUnits + u) * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codes[half] = ptx::load16(slab + u * 1024 + half * 512 + lane * 16);
    }
  }

  /// image: of the block.
  template <bool kE4m3>
  __device__ void store(uint8_t* image, int run, int lane, bool bf16_scales,
                        const uint8_t* tables) const {
    const int r = lane >> 2, c = lane & 3;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const ColumnExpander<kE4m3> column(h == 0 ? zeros & 15 : zeros >> 4, tables);
      const int row = run * kSlabColumns + r + 8 * h;
      uint8_t* to = image + row * kBlockDepth + (c & 1) * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 w = codes[half];
        uint2 first = column.expand(h == 0 ? w.x : w.y);
        uint2 second = column.expand(h == 0 ? w.z : w.w);
        if (!exists) first = second = {0, 0};
#pragma unroll
        for (int nibble = 0; nibble < 2; ++nibble) {  // k 64 half + 32 nibble + 8 c, eight of them
          const int chunk = 4 * half + 2 * nibble + (c >> 1);
          *reinterpret_cast<uint2*>(to + ((chunk ^ (row & 7)) << 4)) =
              nibble == 0 ? make_uint2(first.x, second.x) : make_uint2(first.y, second.y);
        }
      }
    }
    if (c < 2) {
      const uint16_t bits = static_cast<uint16_t>(c == 0 ? scales : scales >> 16);
      const float scale = bf16_scales ? __uint_as_float(uint32_t{bits} << 16)
                                      : __half2float(__ushort_as_half(bits));
      reinterpret_cast<float*>(image + kImageScales)[run * kSlabColumns + r + 8 * c] =
          exists ? scale : 0.0f;
    }
  }
};

/// Block `index` of the image.
template <bool kE4m3>
__device__ void expand(const ExpandParams& p, int index) {
  // e4m3 of q - z: 16 bytes, q = 0 .. 15, for each z
  __shared__ __align__(16) uint8_t tables[kE4m3 ? 256 : 16];
  if (kE4m3) {
    for (int i = threadIdx.x; i < 256; i += kThreads) {
      tables[i] = static_cast<uint8_t>(e4m3_of(i % 16 - i / 16));
    }
    __syncthreads();
  }
  const int tile = index / p.blocks, block = index - tile * p.blocks;
  const int lane = threadIdx.x & 31;
  uint8_t* image = p.image + int64_t{index} * kImageBytes;
  for (int run = threadIdx.x >> 5; run < kImageRuns; run += kThreads / 32) {
    Run(p, tile, block, run, lane).store<kE4m3>(image, run, lane, p.bf16_scales, tables);
  }
}

/// Integers of magnitude up to 15 to e4m3: 16 at a time.
__device__ void convert(const ExpandParams& p, int block) {
  __shared__ uint8_t table[32];  // of value & 31
  if (threadIdx.x < 32) {
    const int value = static_cast<int>(threadIdx.x) - (threadIdx.x >= 16 ? 32 : 0);
    table[threadIdx.x] = static_cast<uint8_t>(e4m3_of(value));
  }
  __syncthreads();
  const auto word = [&](uint32_t w) {
    return table[w & 31] | table[w >> 8 & 31] << 8 | table[w >> 16 & 31] << 16 |
           static_cast<uint32_t>(table[w >> 24 & 31]) << 24;
  };
  const int64_t first = int64_t{block} * (kCodesOfBlock / 16);
#pragma unroll
  for (int j = 0; j < kCodesOfBlock / 16; j += kThreads) {
    const int64_t i = first + j + threadIdx.x;
    if (i >= p.code_count) return;
    const uint4 codes = p.codes[i];
    p.e4m3[i] = {word(codes.x), word(codes.y), word(codes.z), word(codes.w)};
  }
}

__device__ void transpose_scales(const ExpandParams& p, int block) {
  const int64_t first = int64_t{block} * kScalesOfBlock;
#pragma unroll
  for (int j = 0; j < kScalesOfBlock; j += kThreads) {
    const int64_t i = first + j + threadIdx.x;
    if (i >= p.groups * p.rows) return;
    const int64_t group = i / p.rows, row = i - group * p.rows;
    p.t_of_groups[i] = row < p.m ? p.t[row * p.groups + group] : 0.0f;
  }
}

template <bool kE4m3>
__global__ void __launch_bounds__(kThreads) prepare(const __grid_constant__ ExpandParams p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.first_codes) {
    expand<kE4m3>(p, block);
  } else if (block < p.first_scales) {
    convert(p, block - p.first_codes);
  } else {
    transpose_scales(p, block - p.first_scales);
  }
}

}  // namespace

cudaError_t launch_expand(const GemmArgs& args, const SsConfig& config, void* scratch,
                          cudaStream_t stream) {
  const PackedLayout& layout = args.layout;
  if (layout.promoted != kBlockDepth || args.group_scales != config.group_scales) {
    return cudaErrorInvalidValue;
  }
  const SsScratch at = ss_scratch(layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  ExpandParams p = {};
  p.slabs = args.slabs;
  p.tiles = layout.tiles;
  p.slices = layout.slices;
  p.slab_bytes = layout.slab_bytes;
  p.bf16_scales = args.bf16_scales;
  p.blocks = static_cast<int>(image_blocks(layout));
  p.image = bytes + at.image;
  p.first_codes = static_cast<int>(image_tiles(layout)) * p.blocks;
  p.first_scales = p.first_codes;
  if (config.e4m3 && !config.e4m3_codes) {
    p.codes = reinterpret_cast<const uint4*>(args.codes);
    p.e4m3 = reinterpret_cast<uint4*>(bytes + at.codes);
    p.code_count = args.m * layout.padded_k() / 16;
    p.first_scales += static_cast<int>((p.code_count * 16 + kCodesOfBlock - 1) / kCodesOfBlock);
  }
  int blocks = p.first_scales;
  if (config.group_scales) {
    p.t = args.scales;
    p.t_of_groups = reinterpret_cast<float*>(bytes + at.scales);
    p.m = args.m;
    p.groups = layout.k / layout.group_size;
    p.rows = ss_scale_rows(args.m);
    blocks += static_cast<int>((p.groups * p.rows + kScalesOfBlock - 1) / kScalesOfBlock);
  }
  return launch_kernel(config.e4m3 ? prepare<true> : prepare<false>,
                       {.grid = dim3(static_cast<unsigned>(blocks)),
                        .threads = kThreads,
                        .stream = stream,
                        .programmatic = config.programmatic},
                       p);
}

}  // namespace nibble::cuda
