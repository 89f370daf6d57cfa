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
//
// Activations are a type, as in slab_registers.h:
//   request(p, at, to, barrier, slice)   the leader asks for the rows of a slice; all lanes for
//                                        whatever does not come by bulk copies
//   take(p, at, rows, table, slice)      the rows are there: to registers
//   multiply(at, slab, table, bf16_scales, acc)
// With Activations::kMade the blocks make all rows, once:
//   early_slabs(p, at), fetch(p, at)     as in slab_registers.h
//   make(p, at, memory)                  ends with a barrier of all that read what it made
// and with kStays they are then in the block's shared memory, where nothing needs to be requested.
#pragma once

#include "gemm/cuda/slab_output.h"

namespace nibble::cuda::slab {

template <class S, class Activations>
__global__ void __launch_bounds__(32 * S::kStreamedWarps, 1)
    slab_streamed(const __grid_constant__ typename Activations::Parameters p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place at(p);
  const Tiles tiles(p);
  const uint32_t shared = ptx::shared_address(memory);
  constexpr bool kMade = Activations::kMade, kStays = Activations::kStays;
  const uint32_t rows =
      shared + p.shared.activations + (kStays ? 0 : at.warp * p.m * p.shared.row_pitch);
  const uint32_t rows_barrier = shared + kWarpBarriers + 8 * at.warp;
  const uint32_t table = shared + p.shared.tables + at.warp * p.shared.table_bytes;
  const uint32_t partials = shared + p.shared.partials;
  SlabQueue queue(p, at, tiles, shared);
  Activations activations;

  if (at.leader) {
    queue.ring.open();
    ptx::mbarrier_init(rows_barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  if constexpr (kMade) {
    // Rows are asked for behind these slabs, the rest of the ring behind them.
    const int before = Activations::early_slabs(p, at);
    if (at.leader) queue.request_part(0, before);
    ptx::grid_launch_dependents();
    ptx::grid_wait();
    activations.fetch(p, at);
    if (at.leader) queue.request_part(before, p.stages);
    activations.make(p, at, memory);
    if constexpr (!kStays) activations.request(p, at, rows, rows_barrier, at.k_warp);
  } else {
    // Behind the slabs, they would wait until those have drained from the queue.
    if (p.activations_first) activations.request(p, at, rows, rows_barrier, at.k_warp);
    if (at.leader) queue.request_first();
    ptx::grid_launch_dependents();
    if (!p.activations_first) {
      ptx::grid_wait();
      activations.request(p, at, rows, rows_barrier, at.k_warp);
    }
  }
  TokenScale<S> token_scale;
  if constexpr (!kStays) token_scale.load(p);

  int parity = 0;
#pragma unroll 1
  for (Walk now(at); !now.done(tiles);) {
    const int batch = now.batch, held = now.held(p, tiles);
#pragma unroll 1
    while (now.batch == batch) {
      if constexpr (!kStays) {
        ptx::mbarrier_wait(rows_barrier, parity);
        parity ^= 1;
      }
      activations.take(p, at, rows, table, now.slice);
      __syncwarp();  // the table is there, and all lanes have read the rows
      const bool first_slice = now.slice == at.k_warp;
      now.next_slice(p, at);
      if constexpr (!kStays) {
        if (!now.done(tiles)) activations.request(p, at, rows, rows_barrier, now.slice);
      }
      queue.template multiply_tiles<S, Accumulator<S>>(
          held, partials, first_slice, [&](uint32_t slab, Accumulator<S>& acc) {
            activations.multiply(at, slab, table, p.bf16_scales, acc);
          });
    }
    if constexpr (!kStays) token_scale.store(shared);
    reduce<S>(p, shared, partials, tiles.first + batch, held, [] { __syncthreads(); });
    __syncthreads();  // the next batch writes where this one was read
  }
}

}  // namespace nibble::cuda::slab
