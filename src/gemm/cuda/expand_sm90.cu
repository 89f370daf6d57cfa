// What w4a8_ss_sm90 and w4a16_ss_sm90 start from: the image of the weights (ss_image.h), int4
// activations as e4m3, and scales per (token, group) group by group. One launch, at memory speed.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "gemm/cuda/halves.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/ss_image.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 128;  // four warps: two or three of a tile's runs of 16 columns each
constexpr int kCodesOfBlock = kThreads * 4 * 16;  // converted
constexpr int kScalesOfBlock = kThreads * 8;      // copied

/// What weights are expanded to.
enum class Expanded { int8, e4m3, f16, bf16 };

constexpr bool is_half(Expanded to) { return to == Expanded::f16 || to == Expanded::bf16; }

struct ExpandParams {
  const uint8_t* slabs;
  int64_t tiles, slices;  // of the slabs
  int slab_bytes;
  bool bf16_scales;
  int blocks;  // of 128 k
  SsImage shape;
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
  __device__ Run(const ExpandParams& p, int64_t run, int block, int lane) {
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

  /// image: of the block; run: of its columns.
  template <Expanded to>
  __device__ void store(const ExpandParams& p, uint8_t* image, int run, int lane,
                        const uint8_t* tables) const {
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
          store_halves<to>(image + half * p.shape.part_bytes(), row, c, zero, eights);
        } else {
          store_bytes<to>(image, row, c, half, zero, eights, tables);
        }
      }
    }
    if (c < 2) {
      const uint16_t bits = static_cast<uint16_t>(c == 0 ? scales : scales >> 16);
      const float scale = p.bf16_scales ? __uint_as_float(uint32_t{bits} << 16)
                                        : __half2float(__ushort_as_half(bits));
      auto* of_block =
          reinterpret_cast<float*>(image + p.shape.weight_bytes * p.shape.part_bytes());
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

/// Block `index` of the image: all of a warp's runs are loaded before the first is stored.
template <Expanded to, int runs>
__device__ void expand_runs(const ExpandParams& p, int index, const uint8_t* tables) {
  constexpr int kWarps = kThreads / 32;
  const int tile = index / p.blocks, block = index - tile * p.blocks;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint8_t* image = p.image + int64_t{index} * p.shape.block_bytes();
  Run of[runs];
#pragma unroll
  for (int i = 0; i < runs; ++i) {
    of[i] = Run(p, int64_t{tile} * (runs * kWarps) + i * kWarps + warp, block, lane);
  }
#pragma unroll
  for (int i = 0; i < runs; ++i)
    of[i].template store<to>(p, image, i * kWarps + warp, lane, tables);
}

template <Expanded to>
__device__ void expand(const ExpandParams& p, int index) {
  constexpr bool kE4m3 = to == Expanded::e4m3;
  // e4m3 of q - z: 16 bytes, q = 0 .. 15, for each z
  __shared__ __align__(16) uint8_t tables[kE4m3 ? 256 : 16];
  if (kE4m3) {
    for (int i = threadIdx.x; i < 256; i += kThreads) {
      tables[i] = static_cast<uint8_t>(e4m3_of(i % 16 - i / 16));
    }
    __syncthreads();
  }
  constexpr int kRunsOfPass = kThreads / 32;
  if (p.shape.columns == 2 * kRunsOfPass * kSlabColumns) {
    expand_runs<to, 2>(p, index, tables);
  } else {
    expand_runs<to, 3>(p, index, tables);
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

template <Expanded to>
__global__ void __launch_bounds__(kThreads) prepare(const __grid_constant__ ExpandParams p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.first_codes) {
    expand<to>(p, block);
  } else if (block < p.first_scales) {
    convert(p, block - p.first_codes);
  } else {
    transpose_scales(p, block - p.first_scales);
  }
}

/// What makes the image, and nothing else.
ExpandParams image_params(const GemmArgs& args, const SsImage& shape, uint8_t* image) {
  ExpandParams p = {};
  p.slabs = args.slabs;
  p.tiles = args.layout.tiles;
  p.slices = args.layout.slices;
  p.slab_bytes = args.layout.slab_bytes;
  p.bf16_scales = args.bf16_scales;
  p.blocks = static_cast<int>(SsImage::blocks(args.layout));
  p.shape = shape;
  p.image = image;
  p.first_codes = static_cast<int>(shape.tiles(args.layout)) * p.blocks;
  p.first_scales = p.first_codes;
  return p;
}

cudaError_t launch_prepare(const ExpandParams& p, Expanded to, int blocks, bool programmatic,
                           cudaStream_t stream) {
  const auto kernel = to == Expanded::int8   ? prepare<Expanded::int8>
                      : to == Expanded::e4m3 ? prepare<Expanded::e4m3>
                      : to == Expanded::f16  ? prepare<Expanded::f16>
                                             : prepare<Expanded::bf16>;
  return launch_kernel(kernel,
                       {.grid = dim3(static_cast<unsigned>(blocks)),
                        .threads = kThreads,
                        .stream = stream,
                        .programmatic = programmatic},
                       p);
}

}  // namespace

cudaError_t launch_expand_weights(const GemmArgs& args, bool e4m3, uint8_t* image,
                                  cudaStream_t stream) {
  if (args.layout.promoted != kBlockDepth) return cudaErrorInvalidValue;
  const ExpandParams p = image_params(args, kKeptImage, image);
  return launch_prepare(p, e4m3 ? Expanded::e4m3 : Expanded::int8, p.first_codes, false, stream);
}

cudaError_t launch_expand(const GemmArgs& args, const SsConfig& config, void* scratch,
                          cudaStream_t stream) {
  const PackedLayout& layout = args.layout;
  if (layout.promoted != kBlockDepth || args.group_scales != config.group_scales) {
    return cudaErrorInvalidValue;
  }
  const SsImage shape = config.image();
  if (shape.columns != 128 && shape.columns != 192) return cudaErrorInvalidValue;
  const SsScratch at = ss_scratch(layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  ExpandParams p = {};
  if (!config.expanded) p = image_params(args, shape, bytes + at.image);
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
    p.rows = ss_scale_rows(args.m, config);
    blocks += static_cast<int>((p.groups * p.rows + kScalesOfBlock - 1) / kScalesOfBlock);
  }
  if (blocks == 0) return cudaSuccess;
  Expanded to = config.e4m3 ? Expanded::e4m3 : Expanded::int8;
  if (config.halves) to = args.x_type == Element::f16 ? Expanded::f16 : Expanded::bf16;
  return launch_prepare(p, to, blocks, config.programmatic, stream);
}

}  // namespace nibble::cuda
