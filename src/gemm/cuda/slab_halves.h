// A slice of x in 16 bits as the slab kernels take it, and its product with a slab (w4a16): see
// slab_registers.h, slab_streamed.h, halves.h.
#pragma once

#include "gemm/cuda/halves.h"
#include "gemm/cuda/slab_output.h"

namespace nibble::cuda::slab {

template <class S>
struct HalfSlice {
  using Parameters = Params;
  static constexpr bool kMade = false, kStays = false;
  uint4 held[S::kHalves][4][4];  // block, step: eight k of token r (and r + 8), in pairs
  TokenScale<S> token_scale;     // of the form `registers`

  /// load(address) of 16 bytes: row 0 of the slice is at `rows`. k past K is 0, absent tokens are
  /// the last one: nobody reads their sums.
  template <class Address, class Load>
  __device__ __forceinline__ void hold(const Params& p, const Place& at, Address rows,
                                       int64_t row_bytes, int slice, Load&& load) {
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) {
      const int token = min(at.r + 8 * h, p.m - 1);
      const Address from = rows + token * row_bytes + at.c * 16;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const bool inside = slice * kSlabDepth + i * 32 + at.c * 8 < p.x_columns;
        const uint4 x = inside ? load(from + i * 64) : make_uint4(0, 0, 0, 0);
        held[h][i / 4][i % 4] = pair_activations(x);
      }
    }
  }

  __device__ __forceinline__ void load(const Params& p, const Place& at, uint8_t*) {
    hold(p, at, p.x + int64_t{at.k_warp} * kSlabDepth * 2, p.x_row_bytes, at.k_warp,
         [](const uint8_t* from) { return ptx::load16(from); });
    token_scale.load(p);
  }
  __device__ __forceinline__ void store(const Place&, uint32_t shared, uint32_t) const {
    token_scale.store(shared);
  }

  __device__ __forceinline__ void request(const Params& p, const Place& at, uint32_t to,
                                          uint32_t barrier, int slice) const {
    if (!at.leader) return;
    const int bytes = 2 * min(kSlabDepth, p.x_columns - slice * kSlabDepth);
    ptx::mbarrier_expect(barrier, p.m * bytes);
    const uint8_t* from = p.x + int64_t{slice} * kSlabDepth * 2;
#pragma unroll 1
    for (int row = 0; row < p.m; ++row, from += p.x_row_bytes, to += p.shared.row_pitch) {
      ptx::bulk_load(to, from, bytes, barrier);
    }
  }
  __device__ __forceinline__ void take(const Params& p, const Place& at, uint32_t rows, uint32_t,
                                       int slice) {
    hold(p, at, rows, p.shared.row_pitch, slice,
         [](uint32_t from) { return ptx::load16_shared(from); });
  }

  /// Each group's float sum, then acc = fma(sum, s, acc).
  __device__ __forceinline__ void multiply(const Place& at, uint32_t slab, uint32_t,
                                           bool bf16_scales, Accumulator<S>& acc) const {
    constexpr int kGroups = S::kBlockGroups, kGroupSteps = 4 / kGroups;
    const uint32_t words = slab + kSlabCodeBytes + at.r * S::kSlabGroups * 4;
    const uint32_t bytes = slab + kSlabCodeBytes + S::kSlabGroups * 32 + at.r * S::kSlabGroups;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Codes codes(slab, at, u);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float2 scale =
            scales_of(ptx::load4_shared(words + 4 * (u * kGroups + g)), bf16_scales);
        const uint32_t zeros = ptx::load1_shared(bytes + u * kGroups + g);
        const HalfExpander<S::kType> r(zeros & 15), r8(zeros >> 4);
        float sum[S::kHalves][4] = {};
#pragma unroll
        for (int i = 0; i < kGroupSteps; ++i) {
          const int step = g * kGroupSteps + i;
          uint32_t a[2][4];
          if (step % 2 == 0) {
            expand_step<false>(codes.half[step / 2], r, r8, a);
          } else {
            expand_step<true>(codes.half[step / 2], r, r8, a);
          }
#pragma unroll
          for (int h = 0; h < S::kHalves; ++h) {
            const uint4& b = held[h][u][step];
            mma_halves<S::kType>(sum[h], a[0], b.x, b.y);
            mma_halves<S::kType>(sum[h], a[1], b.z, b.w);
          }
        }
#pragma unroll
        for (int h = 0; h < S::kHalves; ++h) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc.plain[h][e] = __fmaf_rn(sum[h][e], e < 2 ? scale.x : scale.y, acc.plain[h][e]);
          }
        }
      }
    }
  }
};

}  // namespace nibble::cuda::slab
