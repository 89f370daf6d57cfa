// M <= 16, K of at most 16 slices of 512: each warp keeps the activations of one slice in registers
// for good and streams slabs down the column tiles.
//
//        k:    slice 0   slice 1  ...  slice k_warps - 1
//   step 0     warp 0    warp 1        ...                   tile 0 (and 1.. with more tile_warps)
//   step 1     warp 0    warp 1        ...                   the next
//
// After a step each warp hands its partial sums over in shared memory and goes on; the partials of
// a step are added one step later (one split barrier), in order of the slices. Slabs come by bulk
// copies into a ring of each warp's own: the loop has no barrier of the block.
#include "gemm/cuda/slab_launch.h"

namespace nibble::cuda::slab {
namespace {

template <class S>
__global__ void __launch_bounds__(32 * kSlabWarps, 1)
    w4a8_slab_registers(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place at(p);
  const Tiles tiles(p);
  const uint32_t shared = ptx::shared_address(memory);
  const bool has_slice = at.k_warp < p.slices;
  const auto has_slab = [&](int step) { return has_slice && tiles.has(p, at, step); };
  const uint8_t* next =
      p.slabs + (tiles.first + at.tile_warp) * p.tile_bytes + at.k_warp * p.slab_bytes;
  const int64_t step_bytes = p.tile_bytes << p.tile_warps_log2;
  const uint32_t table = shared + p.shared.tables + at.warp * p.shared.table_bytes;
  Ring ring(p, shared, at.warp);

  HeldSlice<S> slice;
  SliceScales<S> scales;
  TokenScale<S> token_scale;
  const auto load_activations = [&] {
    const int8_t* codes = p.codes + min(at.k_warp, p.slices - 1) * kSlabDepth;
    slice.load(at, codes, p.padded_k, p.m, [](const int8_t* from) { return ptx::load8(from); });
    if constexpr (S::kGroupScales) scales.load(p, at, at.k_warp);
    token_scale.load(p);
  };
  // Behind the slabs, loads would wait until those have drained from the queue.
  if (p.activations_first) load_activations();
  if (at.leader) {
    ring.open();
#pragma unroll 1
    for (int s = 0; s < p.stages && has_slab(s); ++s, next += step_bytes) ring.request(s, next);
  }
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) ptx::mbarrier_init(shared + kStepBarrier, blockDim.x / 32);
  __syncthreads();
  if (!p.activations_first) {
    ptx::grid_wait();
    load_activations();
  }
  write_sums<S>(at, table, slice);
  if constexpr (S::kGroupScales) scales.store(at, table);
  token_scale.store(shared);
  __syncwarp();

#pragma unroll 1
  for (int step = 0;; ++step) {
    Accumulator<S> acc;
    if (has_slab(step)) {
      acc.add(at, ring.wait(), table, p.bf16_scales, slice);
      __syncwarp();  // all lanes have read the slab
      if (at.leader && has_slab(step + p.stages)) {
        ring.request(ring.stage, next);
        next += step_bytes;
      }
      ring.advance();
    }
    if (!finish_step<S>(p, at, tiles, shared, step, acc)) break;
  }
}

template <class S>
struct Registers {
  static constexpr Function kFunction = w4a8_slab_registers<S>;
};

}  // namespace

cudaError_t launch_registers(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream) {
  return launch<Registers>(args, config, stream);
}

}  // namespace nibble::cuda::slab
