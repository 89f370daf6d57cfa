// The end of a slab kernel: partial sums of the warps along K to y.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/gate_device.h"
#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/slab_product.h"

namespace nibble::cuda::slab {

template <class S>
__device__ __forceinline__ float output_value(const Params& p, float acc, float token_scale,
                                              float bias) {
  if constexpr (S::kGroupScales) return p.out.bias != nullptr ? __fadd_rn(acc, bias) : acc;
  return p.out.bias != nullptr ? __fmaf_rn(acc, token_scale, bias) : __fmul_rn(acc, token_scale);
}

template <class S>
__device__ __forceinline__ void store_output(const Params& p, int token, int column, float acc,
                                             float token_scale, float bias) {
  const float value = output_value<S>(p, acc, token_scale, bias);
  const int64_t at = token * p.out.stride + column;
  switch (p.out.type) {
    case Element::f32: static_cast<float*>(p.out.y)[at] = value; break;
    case Element::f16: static_cast<__half*>(p.out.y)[at] = __float2half_rn(value); break;
    case Element::bf16:
      static_cast<__nv_bfloat16*>(p.out.y)[at] = __float2bfloat16_rn(value);
      break;
  }
}

/// The sum of an output's partials, from that of the first warp along K on.
template <class S>
__device__ __forceinline__ float sum_partials(const Params& p, uint32_t from) {
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
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class S>
__device__ __forceinline__ float scale_of_token(uint32_t shared, int token) {
  return S::kGroupScales ? 0.0f : ptx::load_float_shared(shared + kTokenScales + 4 * token);
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
    const float acc = sum_partials<S>(
        p, partials + tile * p.k_warps * S::kPartialBytes + partial_offset<S>(token, column));
    store_output<S>(p, token, n, acc, scale_of_token<S>(shared, token), bias);
  }
}

/// Rounded to p.out.type, as if it had been in memory.
__device__ __forceinline__ float through_16_bits(Element type, float x) {
  const uint32_t bits = rounded_pair(type, x, x) & 0xffffu;
  return type == Element::f16 ? float_of<Element::f16>(bits) : float_of<Element::bf16>(bits);
}

/// The same of pairs of tiles, gate and up: y (m, n / 2), float, becomes the function of the one
/// times the other, both rounded to p.out.type first. tiles is even.
template <class S, class Wait>
__device__ __forceinline__ void reduce_gated(const MadeParams& p, uint32_t shared,
                                             uint32_t partials, int first_tile, int tiles,
                                             uint32_t& largest, Wait&& ready) {
  ready();
  const int outputs = tiles / 2 * kSlabColumns * S::kColumns, width = p.n / 2;
#pragma unroll 1
  for (int o = threadIdx.x; o < outputs; o += blockDim.x) {
    const int column = o % kSlabColumns, token = o / kSlabColumns % S::kColumns;
    const int pair = o / (kSlabColumns * S::kColumns);
    const int n = (first_tile / 2 + pair) * kSlabColumns + column;
    if (token >= p.m) continue;
    const uint32_t tile_bytes = p.k_warps * S::kPartialBytes;
    const uint32_t from = partials + 2 * pair * tile_bytes + partial_offset<S>(token, column);
    const float t = scale_of_token<S>(shared, token);
    float value[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float bias = p.out.bias != nullptr ? __ldg(p.out.bias + n + i * width) : 0.0f;
      value[i] = through_16_bits(
          p.out.type, output_value<S>(p, sum_partials<S>(p, from + i * tile_bytes), t, bias));
    }
    const float gate = p.gelu_tanh ? gated<GateFunction::gelu_tanh>(value[0])
                                   : gated<GateFunction::silu>(value[0]);
    const float y = gate * value[1];
    static_cast<float*>(p.out.y)[token * p.out.stride + n] = y;
    largest = max(largest, __float_as_uint(fabsf(y)));
  }
}

/// After the last step: the block's part of RowRanges. A warp has reduced one pair of tiles of each
/// step, 16 columns of a token in each of its halves.
__device__ __forceinline__ void store_largest(const MadeParams& p, const Place& at,
                                              uint32_t largest) {
  static_assert(kSlabFusedTokens * kSlabColumns == 32);
  const int pairs = 1 << p.tile_warps_log2 >> 1, token = at.lane / kSlabColumns;
  if (p.largest == nullptr || at.warp >= pairs) return;
  largest = lanes_max(largest, kSlabColumns);
  uint32_t* to = p.largest + token * p.largest_count;
  if (token >= p.m) return;
  if (at.lane % kSlabColumns == 0) to[static_cast<int>(blockIdx.x) * pairs + at.warp] = largest;
  if (blockIdx.x + 1 < gridDim.x || at.warp != 0) return;
  const int rest = static_cast<int>(gridDim.x) * pairs + at.lane % kSlabColumns;
  if (rest < p.largest_count) to[rest] = 0;  // fewer than four
}

/// End of a step of all warps, each with a tile of its own: adds the partials of the step before,
/// then hands over this step's without waiting for the other warps. False after the last tile, in
/// the step that only adds.
template <class S, class Parameters>
__device__ __forceinline__ bool finish_step(const Parameters& p, const Place& at,
                                            const Tiles& tiles, uint32_t shared, int step,
                                            Accumulator<S>& acc, uint32_t& largest) {
  const uint32_t partials = shared + p.shared.partials, barrier = shared + kStepBarrier;
  if (step > 0) {
    const int before = step - 1, first = before << p.tile_warps_log2;
    if constexpr (S::kGated) {
      reduce_gated<S>(p, shared, partials + (before & 1) * p.shared.partials_bytes,
                      tiles.first + first, min(1 << p.tile_warps_log2, tiles.count - first),
                      largest, [&] { ptx::mbarrier_wait(barrier, before & 1); });
    } else {
      reduce<S>(p, shared, partials + (before & 1) * p.shared.partials_bytes, tiles.first + first,
                min(1 << p.tile_warps_log2, tiles.count - first),
                [&] { ptx::mbarrier_wait(barrier, before & 1); });
    }
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
