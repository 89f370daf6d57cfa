// M <= 16, deep K: k outside, column tiles inside. The activations come with the weights, one slice
// at a time, through a buffer of each warp's own, and meet up to held_tiles slabs while they are in
// registers.
//
//   warp w of k_warps:  slice w            slice w + k_warps    ...
//                       tiles 0 1 2 3      tiles 0 1 2 3             then the next held_tiles
//
// A block so reads the activations once for all the tiles that it holds, overlapped with the slabs.
// The sums of those tiles wait in shared memory. Each slice of a warp adds to them in turn; they
// are added up over the warps when K is through.
#include "gemm/cuda/slab_launch.h"

namespace nibble::cuda::slab {
namespace {

/// The rows of a slice to a warp's buffer; one thread.
__device__ __forceinline__ void request_rows(const Params& p, uint32_t to, uint32_t barrier,
                                             int slice) {
  ptx::mbarrier_expect(barrier, p.m * kSlabDepth);
  const int8_t* from = p.codes + slice * kSlabDepth;
#pragma unroll 1
  for (int row = 0; row < p.m; ++row, from += p.padded_k, to += p.shared.row_pitch) {
    ptx::bulk_load(to, from, kSlabDepth, barrier);
  }
}

template <class S>
__global__ void __launch_bounds__(32 * slab_streamed_warps(S::kColumns), 1)
    w4a8_slab_streamed(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place at(p);
  const Tiles tiles(p);
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t rows = shared + p.shared.activations + at.warp * p.m * p.shared.row_pitch;
  const uint32_t rows_barrier = shared + kWarpBarriers + 8 * at.warp;
  const uint32_t table = shared + p.shared.tables + at.warp * p.shared.table_bytes;
  const uint32_t partials = shared + p.shared.partials;
  Ring ring(p, shared, at.warp);
  Walk ahead(at);  // of what the ring asks for
  const auto request_slab = [&](int stage) {
    ring.request(stage, ahead.slab(p, tiles));
    ahead.next_slab(p, at, tiles);
  };
  SliceScales<S> scales;
  const auto request_slice = [&](int slice) {
    if (at.leader) request_rows(p, rows, rows_barrier, slice);
    if constexpr (S::kGroupScales) scales.load(p, at, slice);
  };

  if (at.leader) {
    ring.open();
    ptx::mbarrier_init(rows_barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  // Behind the slabs, they would wait until those have drained from the queue.
  if (p.activations_first) request_slice(at.k_warp);
  if (at.leader) {
#pragma unroll 1
    for (int s = 0; s < p.stages && !ahead.done(tiles); ++s) request_slab(s);
  }
  ptx::grid_launch_dependents();
  if (!p.activations_first) {
    ptx::grid_wait();
    request_slice(at.k_warp);
  }
  TokenScale<S> token_scale;
  token_scale.load(p);

  int parity = 0;
#pragma unroll 1
  for (Walk now(at); !now.done(tiles);) {
    const int batch = now.batch, held = now.held(p, tiles);
#pragma unroll 1
    while (now.batch == batch) {
      ptx::mbarrier_wait(rows_barrier, parity);
      parity ^= 1;
      HeldSlice<S> slice;
      slice.load(at, rows, p.shared.row_pitch, p.m,
                 [](uint32_t from) { return ptx::load8_shared(from); });
      write_sums<S>(at, table, slice);
      if constexpr (S::kGroupScales) scales.store(at, table);
      __syncwarp();  // the table is there, and all lanes have read the rows
      const bool first_slice = now.slice == at.k_warp;
      now.next_slice(p, at);
      if (!now.done(tiles)) request_slice(now.slice);
#pragma unroll 1
      for (int tile = 0; tile < held; ++tile) {
        Accumulator<S> acc;
        acc.add(at, ring.wait(), table, p.bf16_scales, slice);
        __syncwarp();  // all lanes have read the slab, and in the end the table
        if (at.leader && !ahead.done(tiles)) request_slab(ring.stage);
        ring.advance();
        acc.store(partials + (tile * p.k_warps + at.warp) * S::kPartialBytes, !first_slice);
      }
    }
    token_scale.store(shared);
    reduce<S>(p, shared, partials, tiles.first + batch, held, [] { __syncthreads(); });
    __syncthreads();  // the next batch writes where this one was read
  }
}

template <class S>
struct Streamed {
  static constexpr Function kFunction = w4a8_slab_streamed<S>;
};

}  // namespace

cudaError_t launch_streamed(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream) {
  return launch<Streamed>(args, config, stream);
}

}  // namespace nibble::cuda::slab
