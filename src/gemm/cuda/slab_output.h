// The end of a slab kernel: partial sums of the warps along K to y.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/slab_product.h"

namespace nibble::cuda::slab {

template <class S>
__device__ __forceinline__ void store_output(const Params& p, int token, int column, float acc,
                                             float token_scale, float bias) {
  float value = acc;
  if constexpr (S::kGroupScales) {
    if (p.out.bias != nullptr) value = __fadd_rn(acc, bias);
  } else {
    value = p.out.bias != nullptr ? __fmaf_rn(acc, token_scale, bias) : __fmul_rn(acc, token_scale);
  }
  const int64_t at = token * p.out.stride + column;
  switch (p.out.type) {
    case Element::f32: static_cast<float*>(p.out.y)[at] = value; break;
    case Element::f16: static_cast<__half*>(p.out.y)[at] = __float2half_rn(value); break;
    case Element::bf16:
      static_cast<__nv_bfloat16*>(p.out.y)[at] = __float2bfloat16_rn(value);
      break;
  }
}

/// Adds the partials of `tiles` column tiles in order of the warps along K, four chains side by
/// side, and writes y. The partial of (tile, k_warp) is the (tile * k_warps + k_warp)-th. ready():
/// waits for them.
template <class S, class Wait>
__device__ __forceinline__ void reduce(const Params& p, uint32_t shared, uint32_t partials,
                                       int first_tile, int tiles, Wait&& ready) {
  const int outputs = tiles * kSlabColumns * S::kColumns;
  const auto column_of = [&](int o) {
    return (first_tile + o / (kSlabColumns * S::kColumns)) * kSlabColumns + o % kSlabColumns;
  };
  const auto wanted = [&](int o) {
    return o < outputs && o / kSlabColumns % S::kColumns < p.m && column_of(o) < p.n;
  };
  const auto bias_of = [&](int o) {
    return wanted(o) && p.out.bias != nullptr ? __ldg(p.out.bias + column_of(o)) : 0.0f;
  };
  int o = threadIdx.x;
  float bias = bias_of(o);  // asked for before waiting: it comes from memory
  ready();
#pragma unroll 1
  for (; o < outputs; o += blockDim.x, bias = bias_of(o)) {
    if (!wanted(o)) continue;
    const int column = o % kSlabColumns, token = o / kSlabColumns % S::kColumns;
    const int tile = o / (kSlabColumns * S::kColumns), n = column_of(o);
    uint32_t from =
        partials + tile * p.k_warps * S::kPartialBytes + partial_offset<S>(token, column);
    float sum[4] = {};
    int w = 0;
#pragma unroll 1
    for (; w + 4 <= p.k_warps; w += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += ptx::load_float_shared(from + i * S::kPartialBytes);
      }
      from += 4 * S::kPartialBytes;
    }
#pragma unroll 1
    for (; w < p.k_warps; ++w, from += S::kPartialBytes) sum[0] += ptx::load_float_shared(from);
    const float acc = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const float t =
        S::kGroupScales ? 0.0f : ptx::load_float_shared(shared + kTokenScales + 4 * token);
    store_output<S>(p, token, n, acc, t, bias);
  }
}

/// End of a step of all warps, each with a tile of its own: adds the partials of the step before,
/// then hands over this step's without waiting for the other warps. False after the last tile, in
/// the step that only adds.
template <class S>
__device__ __forceinline__ bool finish_step(const Params& p, const Place& at, const Tiles& tiles,
                                            uint32_t shared, int step, Accumulator<S>& acc) {
  const uint32_t partials = shared + p.shared.partials, barrier = shared + kStepBarrier;
  if (step > 0) {
    const int before = step - 1, first = before << p.tile_warps_log2;
    reduce<S>(p, shared, partials + (before & 1) * p.shared.partials_bytes, tiles.first + first,
              min(1 << p.tile_warps_log2, tiles.count - first),
              [&] { ptx::mbarrier_wait(barrier, before & 1); });
  }
  if (step << p.tile_warps_log2 >= tiles.count) return false;
  acc.store(partials + (step & 1) * p.shared.partials_bytes + at.warp * S::kPartialBytes);
  // One arrival carries the stores of the whole warp: lane -> __syncwarp -> arrive -> wait.
  __syncwarp();
  if (at.leader || kArrivals > 1) ptx::mbarrier_arrive(barrier);
  return true;
}

/// The scale of one token, on its way to the header; threads 0..m-1 have one. store() in time for
/// the first reduce(), not at once: it waits for the load.
template <class S>
struct TokenScale {
  float value = 0.0f;

  __device__ void load(const Params& p) {
    if (S::kGroupScales || threadIdx.x >= p.m) return;
    value = p.scales == nullptr ? 1.0f : ptx::load_float(p.scales + threadIdx.x);
  }
  __device__ void store(uint32_t shared) const {
    if (!S::kGroupScales && threadIdx.x < kSlabTokens) {
      ptx::store_float_shared(shared + kTokenScales + 4 * threadIdx.x, value);
    }
  }
};

}  // namespace nibble::cuda::slab
