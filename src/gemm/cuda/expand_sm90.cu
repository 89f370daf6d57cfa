// Slabs to the image of ss_image.h, and int4 activations to e4m3. Both at memory speed.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ss_image.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 192;  // six warps: two of a tile's twelve runs of 16 columns each

/// The e4m3 number of an integer of magnitude up to 16, exactly.
__device__ __forceinline__ uint32_t e4m3_of(int value) {
  if (value == 0) return 0;
  const uint32_t magnitude = static_cast<uint32_t>(abs(value));
  const uint32_t exponent = 31 - __clz(static_cast<int>(magnitude));
  const uint32_t mantissa = (magnitude << 3 >> exponent) & 7;
  return (value < 0 ? 0x80u : 0u) | (exponent + 7) << 3 | mantissa;
}

/// Four bytes of codes (0..15) looked up in a table of 16 bytes.
__device__ __forceinline__ uint32_t look_up(uint32_t codes, const uint4& table) {
  // the four codes as the four selectors of a byte permutation
  const uint32_t pairs = codes | codes >> 4;
  const uint32_t selectors = (pairs & 0xff) | (pairs >> 8 & 0xff00);
  const uint32_t low = __byte_perm(table.x, table.y, selectors & 0x7777);
  const uint32_t high = __byte_perm(table.z, table.w, selectors & 0x7777);
  const uint32_t is_high = (codes >> 3 & 0x01010101u) * 0xffu;
  return (low & ~is_high) | (high & is_high);
}

struct Column {
  uint4 table;
  uint32_t lift;

  template <bool kE4m3>
  __device__ uint32_t expand(uint32_t codes) const {
    return kE4m3 ? look_up(codes, table) : (codes + lift) ^ 0x80808080u;
  }
};

struct ExpandParams {
  const uint8_t* slabs;
  int64_t tiles, slices;  // of the slabs
  int slab_bytes;
  bool bf16_scales;
  int blocks;  // of 128 k
  uint8_t* image;
};

/// A block of the image a step: grid (tile pairs * 2 * blocks).
template <bool kE4m3>
__global__ void __launch_bounds__(kThreads) expand(const __grid_constant__ ExpandParams p) {
  // e4m3 of q - z: 16 bytes, q = 0 .. 15, for each z
  __shared__ __align__(16) uint8_t tables[kE4m3 ? 256 : 16];
  if (kE4m3) {
    for (int i = threadIdx.x; i < 256; i += kThreads) {
      tables[i] = static_cast<uint8_t>(e4m3_of(i % 16 - i / 16));
    }
    __syncthreads();
  }
  const int tile = blockIdx.x / p.blocks, block = blockIdx.x - tile * p.blocks;
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  uint8_t* image = p.image + int64_t{blockIdx.x} * kImageBytes;
  for (int run = threadIdx.x >> 5; run < kImageColumns / kSlabColumns; run += kThreads / 32) {
    const int64_t slab_tile = int64_t{tile} * (kImageColumns / kSlabColumns) + run;
    const bool exists = slab_tile < p.tiles;  // columns past N: zeros
    const uint8_t* slab =
        p.slabs + ((exists ? slab_tile : 0) * p.slices + block / 4) * p.slab_bytes;
    const int u = block % 4;
    const uint32_t zeros =
        slab[kSlabCodeBytes + kSlabDepth / kBlockDepth * 32 + r * (kSlabDepth / kBlockDepth) + u];
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(
        slab + kSlabCodeBytes + (r * (kSlabDepth / kBlockDepth) + u) * 4);
    Column column[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t zero = h == 0 ? zeros & 15 : zeros >> 4;
      if (kE4m3) column[h].table = reinterpret_cast<const uint4*>(tables)[zero];
      column[h].lift = 0x80808080u - zero * 0x01010101u;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w =
          *reinterpret_cast<const uint4*>(slab + u * 1024 + half * 512 + lane * 16);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t first = h == 0 ? w.x : w.y, second = h == 0 ? w.z : w.w;
        const int row = run * kSlabColumns + r + 8 * h;
#pragma unroll
        for (int nibble = 0; nibble < 2; ++nibble) {  // k 64 half + 32 nibble + 8 c, eight of them
          uint2 out = {
              column[h].template expand<kE4m3>(first >> (4 * nibble) & 0x0f0f0f0fu),
              column[h].template expand<kE4m3>(second >> (4 * nibble) & 0x0f0f0f0fu)};
          if (!exists) out = {0, 0};
          const int chunk = 4 * half + 2 * nibble + (c >> 1);
          *reinterpret_cast<uint2*>(image + row * kBlockDepth + ((chunk ^ (row & 7)) << 4) +
                                    (c & 1) * 8) = out;
        }
      }
    }
    if (c < 2) {
      const uint16_t bits = static_cast<uint16_t>(c == 0 ? pair : pair >> 16);
      const float scale = p.bf16_scales ? __uint_as_float(uint32_t{bits} << 16)
                                        : __half2float(__ushort_as_half(bits));
      reinterpret_cast<float*>(image + kImageScales)[run * kSlabColumns + r + 8 * c] =
          exists ? scale : 0.0f;
    }
  }
}

/// Integers of magnitude up to 15 to e4m3: 16 a thread.
__global__ void __launch_bounds__(256) codes_to_e4m3(const uint4* from, uint4* to, int64_t count) {
  __shared__ uint8_t table[32];  // of value & 31
  if (threadIdx.x < 32) {
    const int value = static_cast<int>(threadIdx.x) - (threadIdx.x >= 16 ? 32 : 0);
    table[threadIdx.x] = static_cast<uint8_t>(e4m3_of(value));
  }
  __syncthreads();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint4 codes = from[i];
  const auto word = [&](uint32_t w) {
    return table[w & 31] | table[w >> 8 & 31] << 8 | table[w >> 16 & 31] << 16 |
           static_cast<uint32_t>(table[w >> 24 & 31]) << 24;
  };
  to[i] = {word(codes.x), word(codes.y), word(codes.z), word(codes.w)};
}

}  // namespace

cudaError_t launch_expand(const GemmArgs& args, bool e4m3, uint8_t* image, cudaStream_t stream) {
  if (args.layout.promoted != kBlockDepth) return cudaErrorInvalidValue;
  ExpandParams p = {args.slabs,       args.layout.tiles, args.layout.slices,
                    args.layout.slab_bytes, args.bf16_scales,
                    static_cast<int>(image_blocks(args.layout)), image};
  const dim3 grid(static_cast<unsigned>(image_tiles(args.layout) * p.blocks));
  return launch_kernel(e4m3 ? expand<true> : expand<false>,
                       {.grid = grid, .threads = kThreads, .stream = stream}, p);
}

cudaError_t launch_codes_to_e4m3(const int8_t* codes, uint8_t* e4m3, int64_t bytes,
                                 cudaStream_t stream) {
  const uint4* from = reinterpret_cast<const uint4*>(codes);
  uint4* to = reinterpret_cast<uint4*>(e4m3);
  const int64_t count = bytes / 16;
  const dim3 grid(static_cast<unsigned>((count + 255) / 256));
  return launch_kernel(codes_to_e4m3, {.grid = grid, .threads = 256, .stream = stream}, from, to,
                       count);
}

}  // namespace nibble::cuda
