// M <= 16, any K whose activations fit in shared memory: all of them lie there, so a warp may own
// several slices of a column tile.
//
//   warp w of k_warps: slices w, w + k_warps, ... of tile 0; then of the next tile; ...
//
// Otherwise as w4a8_slab_registers_sm90.cu: rings of slabs, partials added one step later.
#include "gemm/cuda/slab_launch.h"

namespace nibble::cuda::slab {
namespace {

/// The slabs of a warp in order: its slices of a tile, then those of its next tile.
struct SlabWalk {
  const uint8_t* tile;
  int slice;

  __device__ SlabWalk(const Params& p, const Place& at, const Tiles& tiles)
      : tile(p.slabs + (tiles.first + at.tile_warp) * p.tile_bytes), slice(at.k_warp) {}
  __device__ const uint8_t* next(const Params& p, const Place& at) {
    const uint8_t* slab = tile + slice * p.slab_bytes;
    slice += p.k_warps;
    if (slice >= p.slices) {
      slice = at.k_warp;
      tile += p.tile_bytes << p.tile_warps_log2;
    }
    return slab;
  }
};

/// All rows of the activations; one thread.
__device__ __forceinline__ void request_rows(const Params& p, uint32_t to, uint32_t barrier) {
  ptx::mbarrier_expect(barrier, p.m * p.padded_k);
  for (int row = 0; row < p.m; ++row) {
    ptx::bulk_load(to + row * p.shared.row_pitch, p.codes + int64_t{row} * p.padded_k, p.padded_k,
                   barrier);
  }
}

template <class S>
__global__ void __launch_bounds__(32 * kSlabWarps, 1)
    w4a8_slab_shared(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place at(p);
  const Tiles tiles(p);
  const uint32_t shared = ptx::shared_address(memory);
  const int step_tiles = 1 << p.tile_warps_log2;
  const int slices = my_slices(p, at);
  const int slabs = slices * ((tiles.count - at.tile_warp + step_tiles - 1) >> p.tile_warps_log2);
  const uint32_t rows = shared + p.shared.activations, tables = shared + p.shared.tables;
  const uint32_t rows_barrier = shared + kActivationBarrier;
  const bool first_thread = at.warp == 0 && at.leader;
  SlabWalk walk(p, at, tiles);
  Ring ring(p, shared, at.warp);

  if (first_thread) {
    ptx::mbarrier_init(shared + kStepBarrier, blockDim.x / 32);
    ptx::mbarrier_init(rows_barrier, 1);
    ptx::fence_mbarrier_init();
    // Behind the slabs, they would wait until those have drained from the queue.
    if (p.activations_first) request_rows(p, rows, rows_barrier);
  }
  if (at.leader) {
    ring.open();
#pragma unroll 1
    for (int s = 0; s < min(p.stages, slabs); ++s) ring.request(s, walk.next(p, at));
  }
  ptx::grid_launch_dependents();
  __syncthreads();
  if (!p.activations_first) {
    ptx::grid_wait();
    if (first_thread) request_rows(p, rows, rows_barrier);
  }
  TokenScale<S> token_scale;
  token_scale.load(p);
  const auto activations = [&](int slice) {
    const uint32_t from = rows + slice * kSlabDepth;
    if constexpr (S::kFold) {
      HeldSlice<S> held;
      held.load(at, from, p.shared.row_pitch, p.m,
                [](uint32_t address) { return ptx::load8_shared(address); });
      return held;
    } else {
      return SharedSlice<S>{from, p.shared.row_pitch, p.m};
    }
  };
  ptx::mbarrier_wait(rows_barrier, 0);
#pragma unroll 1
  for (int slice = at.warp; slice < p.slices; slice += blockDim.x / 32) {
    const uint32_t table = tables + slice * p.shared.table_bytes;
    write_sums<S>(at, table, activations(slice));
    if constexpr (S::kGroupScales) {
      SliceScales<S> scales;
      scales.load(p, at, slice);
      scales.store(at, table);
    }
  }
  token_scale.store(shared);
  __syncthreads();

  int slab = 0;
#pragma unroll 1
  for (int step = 0;; ++step) {
    Accumulator<S> acc;
    if (slab < slabs) {
#pragma unroll 1
      for (int slice = at.k_warp; slice < p.slices; slice += p.k_warps, ++slab) {
        acc.add(at, ring.wait(), tables + slice * p.shared.table_bytes, p.bf16_scales,
                activations(slice));
        __syncwarp();  // all lanes have read the slab
        if (at.leader && slab + p.stages < slabs) ring.request(ring.stage, walk.next(p, at));
        ring.advance();
      }
    }
    if (!finish_step<S>(p, at, tiles, shared, step, acc)) break;
  }
}

template <class S>
struct Shared {
  static constexpr Function kFunction = w4a8_slab_shared<S>;
};

}  // namespace

cudaError_t launch_shared(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream) {
  return launch<Shared>(args, config, stream);
}

}  // namespace nibble::cuda::slab
