// M <= 2, one launch: x in 16 bits is quantized by each block for itself, then multiplied as in
// w4a8_slab_streamed_sm90.cu. The warps of a block have all of K between them, so x is read once
// for its range; a warp that has one slice keeps it in registers until the scale is known, one that
// has more reads its slices again, from L1 or L2, each while the slabs of the one before are
// multiplied. Codes and scales are those of quantize.cu bit for bit.
#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/slab_launch.h"

namespace nibble::cuda::slab {
namespace {

constexpr int kAhead = 2;  // slices under way while ranges are taken

struct FusedParams {
  Params slab;
  QuantizeArgs x;
};

/// What a lane multiplies in a slice, before it is quantized: chunks of token r / 4, block r % 4.
template <Element type>
struct RawSlice {
  Raw<type> step[4];

  __device__ __forceinline__ void load(const FusedParams& p, const Place& at, int slice) {
    const int token = at.r >> 2;
    const void* row = static_cast<const char*>(p.x.x) + token * p.x.x_stride * element_bytes(type);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int chunk = (slice * kSlabDepth + (at.r & 3) * kBlockDepth + 32 * j) / kChunk + at.c;
      const bool inside = token < p.slab.m && slice < p.slab.slices && chunk * kChunk < p.x.k;
      step[j] = load_raw<type>(row, chunk, inside);
    }
  }
};

/// Largest |x| of this lane's token over the block. One barrier.
__device__ __forceinline__ Range token_range(const Place& at, Range mine, uint32_t shared) {
  const int token = at.r >> 2;
  const uint32_t ranges = shared + kWarpRanges;
#pragma unroll
  for (int t = 0; t < kSlabFusedTokens; ++t) {
    const uint32_t amax = __reduce_max_sync(kAllLanes, token == t ? mine.amax : 0);
    if (at.leader) ptx::store4_shared(ranges + (at.warp * kSlabFusedTokens + t) * 4, amax);
  }
  __syncthreads();
  const bool one_of_them = at.lane < static_cast<int>(blockDim.x / 32);
  const uint32_t from = ranges + at.lane * kSlabFusedTokens * 4;
  Range all;
#pragma unroll
  for (int t = 0; t < kSlabFusedTokens; ++t) {
    const uint32_t amax =
        __reduce_max_sync(kAllLanes, one_of_them ? ptx::load4_shared(from + 4 * t) : 0);
    if (token == t) all.amax = amax;
  }
  return all;
}

template <class S, Element type>
__global__ void __launch_bounds__(32 * kSlabWarps, 1)
    w4a8_slab_fused(const __grid_constant__ FusedParams fused) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Params& p = fused.slab;
  const Place at(p);
  const Tiles tiles(p);
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t table = shared + p.shared.tables + at.warp * p.shared.table_bytes;
  const uint32_t partials = shared + p.shared.partials;
  SlabQueue queue(p, at, tiles, shared);

  RawSlice<type> x[kAhead];
  const auto load_first = [&] {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) x[i].load(fused, at, at.k_warp + i * p.k_warps);
  };
  // Behind the slabs, loads would wait until those have drained from the queue.
  if (p.activations_first) load_first();
  if (at.leader) {
    queue.ring.open();
    queue.request_first();
  }
  __syncwarp();
  ptx::grid_launch_dependents();
  if (!p.activations_first) {
    ptx::grid_wait();
    load_first();
  }

  Range range;
#pragma unroll 1
  for (int first = at.k_warp;;) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) range = widen(range, values_of<type>(x[i].step[j]), true);
    }
    first += kAhead * p.k_warps;
    if (first >= p.slices) break;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) x[i].load(fused, at, first + i * p.k_warps);
  }
  const Encoding encoding = choose_encoding(token_range(at, range, shared), fused.x, 0);
  if (at.warp == 0 && at.lane % 16 == 0) {  // read after a barrier of the block
    ptx::store_float_shared(shared + kTokenScales + at.lane / 16 * 4, encoding.scale);
  }
  RawSlice<type> next = x[0];
  const bool again = p.slices > p.k_warps;
  if (again) next.load(fused, at, at.k_warp);

#pragma unroll 1
  for (Walk now(at); !now.done(tiles);) {
    const int batch = now.batch, held = now.held(p, tiles);
#pragma unroll 1
    while (now.batch == batch) {
      HeldSlice<S> slice;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint2 codes = encode(values_of<type>(next.step[j]), encoding);
        slice.held[0].word[0][2 * j] = codes.x;
        slice.held[0].word[0][2 * j + 1] = codes.y;
      }
      const bool first_slice = now.slice == at.k_warp;
      now.next_slice(p, at);
      if (again && !now.done(tiles)) next.load(fused, at, now.slice);
      write_sums<S>(at, table, slice);
      __syncwarp();
      queue.template multiply_tiles<S, Accumulator<S>>(
          held, partials, first_slice, [&](uint32_t slab, Accumulator<S>& acc) {
            acc.add(at, slab, table, p.bf16_scales, slice);
          });
    }
    reduce<S>(p, shared, partials, tiles.first + batch, held, [] { __syncthreads(); });
    __syncthreads();  // the next batch writes where this one was read
  }
}

struct FusedKernel {
  Element type;
  int promoted;
  void (*function)(FusedParams);
};

template <Element type, int promoted>
constexpr FusedKernel fused_kernel() {
  return {type, promoted, w4a8_slab_fused<Shape<2, promoted, false>, type>};
}

constexpr FusedKernel kFusedKernels[] = {
    fused_kernel<Element::f16, 128>(), fused_kernel<Element::f16, 64>(),
    fused_kernel<Element::f16, 32>(),  fused_kernel<Element::bf16, 128>(),
    fused_kernel<Element::bf16, 64>(), fused_kernel<Element::bf16, 32>(),
};

bool taken(const QuantizeArgs& x, const GemmArgs& args) {
  return args.m <= kSlabFusedTokens && !args.group_scales && x.symmetric &&
         (x.scaling == Scaling::token || x.scaling == Scaling::static_tensor) &&
         x.k % kChunk == 0 && x.x_stride % kChunk == 0 &&
         reinterpret_cast<uintptr_t>(x.x) % 16 == 0;
}

}  // namespace
}  // namespace nibble::cuda::slab

namespace nibble::cuda {

cudaError_t launch_w4a8_slab_fused_sm90(const QuantizeArgs& x, const GemmArgs& args,
                                        const SlabConfig& config, cudaStream_t stream) {
  static std::atomic<uint64_t> devices[std::size(slab::kFusedKernels)] = {};
  if (!slab::taken(x, args)) return cudaErrorInvalidValue;
  for (size_t i = 0; i < std::size(slab::kFusedKernels); ++i) {
    const slab::FusedKernel& kernel = slab::kFusedKernels[i];
    if (kernel.type != x.type || kernel.promoted != args.layout.promoted) continue;
    const cudaError_t allowed = slab::allow_shared_memory(kernel.function, devices[i]);
    if (allowed != cudaSuccess) return allowed;
    const slab::FusedParams params{slab::make_params(args, config), x};
    return slab::launch_blocks(kernel.function, args, config, params.slab.shared.total, stream,
                               params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
