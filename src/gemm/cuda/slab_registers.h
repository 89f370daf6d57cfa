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
//
// Activations are a type: CodeSlice (slab_codes.h), HalfSlice (slab_halves.h), MadeSlice
// (slab_made.h) or HandedSlice (slab_handed.h).
//   Parameters, kMade          of the kernel; whether its blocks make the activations:
//   early_slabs(p, at)         then, slabs that a warp asks for in front of them
//   prepare(p)                 and what else can be before the kernel in front is complete
//   fetch(p, at)               asks for what they are made of
//   load(p, at, memory)        asks for the warp's slice of all tokens
//   store(at, shared, table)   what of it belongs into shared memory
//   multiply(at, slab, table, bf16_scales, acc)
#pragma once

#include "gemm/cuda/slab_output.h"

namespace nibble::cuda::slab {

template <class S, class Activations>
__global__ void __launch_bounds__(32 * S::kRegistersWarps, 1)
    slab_registers(const __grid_constant__ typename Activations::Parameters p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place at(p);
  Tiles tiles(p);
  if constexpr (S::kGated) tiles.count_both();
  const uint32_t shared = ptx::shared_address(memory);
  const bool has_slice = at.k_warp < p.slices;
  const auto has_slab = [&](int step) { return has_slice && tiles.has(p, at, step); };
  const uint8_t* next =
      p.slabs + (tiles.first + at.tile_warp) * p.tile_bytes + at.k_warp * p.slab_bytes;
  int64_t step_bytes = p.tile_bytes << p.tile_warps_log2;
  if constexpr (S::kGated) {  // even warps along the columns have tiles of gate, odd ones of up
    const int tile = (tiles.first + at.tile_warp) / 2 + at.tile_warp % 2 * p.up_tiles;
    next = p.slabs + tile * p.tile_bytes + at.k_warp * p.slab_bytes;
    step_bytes /= 2;
  }
  const uint32_t table = shared + p.shared.tables + at.warp * p.shared.table_bytes;
  Ring ring(p, shared, at.warp);

  Activations activations;
  [[maybe_unused]] uint32_t largest = 0;  // gated: of what this thread has stored
  [[maybe_unused]] int requested = 0;     // slabs, by the leader, of a block that makes its rows
  [[maybe_unused]] const auto request = [&](int stages) {
#pragma unroll 1
    for (; requested < stages && has_slab(requested); ++requested, next += step_bytes) {
      ring.request(requested, next);
    }
  };
  if constexpr (Activations::kMade) {
    activations.prepare(p);
    // Rows are asked for behind these slabs, the rest of the ring behind them.
    if (at.leader) {
      ring.open();
      request(Activations::early_slabs(p, at));
    }
  } else {
    // Behind the slabs, loads would wait until those have drained from the queue.
    if (p.activations_first) activations.load(p, at, memory);
    if (at.leader) {
      ring.open();
#pragma unroll 1
      for (int s = 0; s < p.stages && has_slab(s); ++s, next += step_bytes) ring.request(s, next);
    }
  }
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared + kStepBarrier, blockDim.x / 32 * kArrivals);
  }
  __syncthreads();
  if constexpr (Activations::kMade) {
    ptx::grid_wait();
    activations.fetch(p, at);
    if (at.leader) request(p.stages);
    activations.load(p, at, memory);
  } else if (!p.activations_first) {
    ptx::grid_wait();
    activations.load(p, at, memory);
  }
  activations.store(at, shared, table);
  __syncwarp();

#pragma unroll 1
  for (int step = 0;; ++step) {
    Accumulator<S> acc;
    if (has_slab(step)) {
      activations.multiply(at, ring.wait(), table, p.bf16_scales, acc);
      __syncwarp();  // all lanes have read the slab
      if (at.leader && has_slab(step + p.stages)) {
        ring.request(ring.stage, next);
        next += step_bytes;
      }
      ring.advance();
    }
    if (!finish_step<S>(p, at, tiles, shared, step, acc, largest)) break;
  }
  if constexpr (S::kGated) store_largest(p, at, largest);
}

}  // namespace nibble::cuda::slab
