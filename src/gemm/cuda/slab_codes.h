// A slice of int8 activations as the slab kernels take it: see slab_registers.h, slab_streamed.h.
#pragma once

#include "gemm/cuda/slab_output.h"

namespace nibble::cuda::slab {

template <class S>
struct CodeSlice {
  using Parameters = Params;
  static constexpr bool kMade = false;   // by the block itself
  static constexpr bool kStays = false;  // all of K is in shared memory
  HeldSlice<S> held;
  SliceScales<S> scales;
  TokenScale<S> token_scale;  // of the form `registers`, where one slice is all that a warp meets

  __device__ __forceinline__ void load(const Params& p, const Place& at, uint8_t*) {
    const int8_t* codes = p.codes + min(at.k_warp, p.slices - 1) * kSlabDepth;
    held.load(at, codes, p.padded_k, p.m, [](const int8_t* from) { return ptx::load8(from); });
    if constexpr (S::kGroupScales) scales.load(p, at, at.k_warp);
    token_scale.load(p);
  }
  __device__ __forceinline__ void store(const Place& at, uint32_t shared, uint32_t table) {
    write_sums<S>(at, table, held);
    if constexpr (S::kGroupScales) scales.store(at, table);
    token_scale.store(shared);
  }

  __device__ __forceinline__ void request(const Params& p, const Place& at, uint32_t to,
                                          uint32_t barrier, int slice) {
    if (at.leader) {
      ptx::mbarrier_expect(barrier, p.m * kSlabDepth);
      const int8_t* from = p.codes + slice * kSlabDepth;
#pragma unroll 1
      for (int row = 0; row < p.m; ++row, from += p.padded_k, to += p.shared.row_pitch) {
        ptx::bulk_load(to, from, kSlabDepth, barrier);
      }
    }
    if constexpr (S::kGroupScales) scales.load(p, at, slice);
  }
  __device__ __forceinline__ void take(const Params& p, const Place& at, uint32_t rows,
                                       uint32_t table, int) {
    held.load(at, rows, p.shared.row_pitch, p.m,
              [](uint32_t from) { return ptx::load8_shared(from); });
    write_sums<S>(at, table, held);
    if constexpr (S::kGroupScales) scales.store(at, table);
  }

  __device__ __forceinline__ void multiply(const Place& at, uint32_t slab, uint32_t table,
                                           bool bf16_scales, Accumulator<S>& acc) const {
    acc.add(at, slab, table, bf16_scales, held);
  }
};

}  // namespace nibble::cuda::slab
