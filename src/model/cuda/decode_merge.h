// How the results of attention_decode.cu are added: those of a block's warps, then those of a row's
// splits. A result is a maximum, a sum of exp2(score - maximum), and as yet unscaled channels.
// Device code but for sizes.
#pragma once

#include <algorithm>

#include "gemm/cuda/quantize_device.h"
#include "model/cuda/decode_codes.h"
#include "model/cuda/decode_work.h"
#include "model/cuda/kv_device.h"

namespace nibble::cuda {

/// Results that a block adds: page i of an item is part of result i % kDecodeResults, whatever the
/// number of warps.
template <int kDim>
inline constexpr int kDecodeResults = kDim <= 128 ? 4 : 2;

/// A block of `warps` warps, a power of 2 up to kDecodeResults, for heads of kDim channels.
template <int kDim, int warps>
struct DecodeShape {
  static constexpr int kWarps = warps;
  static constexpr int kResults = kDecodeResults<kDim>;
  static constexpr int kWarpResults = kResults / kWarps;            // of one warp
  static constexpr int kThreads = 32 * kWarps;                      // of those warps
  static constexpr int kAllThreads = kThreads + 32;                 // and the one that merges
  static constexpr int kPageBytes = kDim / kKvSlice * kSliceBytes;  // of one head
  static constexpr int kResultStride = kDim + 4;  // floats of a head: all lanes in other banks
  static constexpr int kResultBytes = kResults * kDecodeHeads * kResultStride * 4;
  static constexpr int kSharedBytes = 2 * kWarps * kPageBytes + kResultBytes;  // and DecodeWork
  static constexpr int kBlocks = std::min(4, 227 * 1024 / (kSharedBytes + 4 * 1024));
  static_assert(kWarpResults == 1 || kResults == kSplitPages, "a page a result, or a warp one");
};

/// Scratch memory: counters, then (max, sum) of every (unit, head), then its unscaled result.
struct DecodeScratch {
  uint32_t* arrived;
  float2* states;
  float* results;
  int64_t heads;

  __host__ __device__ static int64_t counter_bytes(int64_t heads) {
    return int64_t{kDecodeRows} * heads * 4;
  }
  __device__ DecodeScratch(const DecodeArgs& a, int64_t units) : heads(a.attention.heads) {
    auto* base = static_cast<char*>(a.scratch);
    arrived = reinterpret_cast<uint32_t*>(base);
    states = reinterpret_cast<float2*>(base + counter_bytes(heads));
    results = reinterpret_cast<float*>(states + (units * heads + 1) / 2 * 2);
  }
};

/// Two results of `head`, from channel `channel` on.
__device__ __forceinline__ void store_result(const AttentionArgs& a, int row, int head, int channel,
                                             float x, float y) {
  if (channel >= a.kv.head_dim) return;
  auto* to = static_cast<char*>(a.out) +
             (row * a.out_stride + int64_t{head} * a.kv.head_dim + channel) * 2;
  *reinterpret_cast<uint32_t*>(to) = rounded_pair(a.type, x, y);
}

/// Adds the results of a block for an item: to out, or to scratch if there are other splits.
template <int kDim, int warps>
__device__ __forceinline__ void add_results(const DecodeArgs& a, const DecodeItem& item,
                                            const float* results, const float2* states,
                                            const DecodeScratch& scratch) {
  using S = DecodeShape<kDim, warps>;
  const int groups = static_cast<int>(a.attention.heads / a.attention.kv.kv_heads);
  const int first_head = item.kv_head * groups + item.part * kDecodeHeads;
  const int heads = min(kDecodeHeads, groups - item.part * kDecodeHeads);
  for (int i = static_cast<int>(threadIdx.x); i < heads * (kDim / 4); i += S::kThreads) {
    const int head = i / (kDim / 4), channel = i % (kDim / 4) * 4;
    float max = -INFINITY, sum = 0;
    float4 all = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < S::kResults; ++w) {
      max = ptx::max_or_nan(max, states[w * kDecodeHeads + head].x);
    }
#pragma unroll
    for (int w = 0; w < S::kResults; ++w) {
      const float2 s = states[w * kDecodeHeads + head];
      if (s.y == 0) continue;  // of no page
      const float factor = ptx::exp2_fast(s.x - max);
      const float4 v = *reinterpret_cast<const float4*>(
          results + (w * kDecodeHeads + head) * S::kResultStride + channel);
      all.x = __fmaf_rn(v.x, factor, all.x);
      all.y = __fmaf_rn(v.y, factor, all.y);
      all.z = __fmaf_rn(v.z, factor, all.z);
      all.w = __fmaf_rn(v.w, factor, all.w);
      sum = __fmaf_rn(s.y, factor, sum);
    }
    if (item.count == 1) {
      const float factor = 1.0f / sum;
      const AttentionArgs& at = a.attention;
      const float v[4] = {all.x * factor, all.y * factor, all.z * factor, all.w * factor};
      if constexpr (kDim == kCodesHeadDim) {
        if (a.codes.codes != nullptr) {  // a warp has a head
          store_head_codes<4>(a, item.row, first_head + head, v, i % 32);
          continue;
        }
      }
      store_result(at, item.row, first_head + head, channel, v[0], v[1]);
      store_result(at, item.row, first_head + head, channel + 2, v[2], v[3]);
    } else {
      const int64_t place = int64_t{item.unit} * scratch.heads + first_head + head;
      *reinterpret_cast<float4*>(scratch.results + place * kDim + channel) = all;
      if (channel == 0) scratch.states[place] = {max, sum};
    }
  }
}

/// Whether the block is the last one with an item of these, by one warp. The counter is then ready
/// for the next launch.
__device__ __forceinline__ bool is_last(const DecodeArgs& a, const DecodeItem& item, int parts,
                                        const DecodeScratch& scratch, int lane) {
  uint32_t last = 0;
  if (lane == 0) {
    const int kv_heads = static_cast<int>(a.attention.kv.kv_heads);
    uint32_t* arrived = scratch.arrived + (item.row * kv_heads + item.kv_head) * parts + item.part;
    last = ptx::add_acquire_release(arrived, 1) + 1 == static_cast<uint32_t>(item.count);
    if (last != 0) *arrived = 0;
  }
  return __shfl_sync(kAllLanes, last, 0) != 0;
}

/// Adds the splits of an item's row and heads, in order, by one warp.
template <int kDim>
__device__ __forceinline__ void merge_splits(const DecodeArgs& a, const DecodeItem& item,
                                             const DecodeScratch& scratch, int lane) {
  constexpr int kPairs = kDim / 64;              // of a lane: channels 64 i + 2 lane and the next
  constexpr int kAtOnce = kDim <= 128 ? 16 : 8;  // splits whose loads are under way together
  const int groups = static_cast<int>(a.attention.heads / a.attention.kv.kv_heads);
  const int first_head = item.kv_head * groups + item.part * kDecodeHeads;
  const int heads = min(kDecodeHeads, groups - item.part * kDecodeHeads);
  const int64_t first = int64_t{item.unit - item.index} * scratch.heads + first_head;
  for (int head = 0; head < heads; ++head) {
    float max = -INFINITY, sum = 0;
    float2 all[kPairs] = {};
    for (int base = 0; base < item.count; base += kAtOnce) {
      const int count = min(kAtOnce, item.count - base);
      const auto place = [&](int j) { return first + int64_t{base + j} * scratch.heads + head; };
      const float2 mine =
          lane < count ? __ldcg(scratch.states + place(lane)) : float2{-INFINITY, 0};
      // 32-bit steps from one address, or ptxas keeps an address for every split.
      const auto* from = reinterpret_cast<const float2*>(scratch.results + place(0) * kDim) + lane;
      const int step = static_cast<int>(scratch.heads) * (kDim / 2);
      float2 v[kAtOnce][kPairs];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          v[j][i] = {0, 0};
          if (j < count) v[j][i] = __ldcg(from + (j * step + i * 32));
        }
      }
      float now = mine.x;
#pragma unroll
      for (int d = 16; d > 0; d /= 2) {
        now = ptx::max_or_nan(now, __shfl_xor_sync(kAllLanes, now, d));
      }
      now = ptx::max_or_nan(now, max);
      const float before = ptx::exp2_fast(max - now), own = ptx::exp2_fast(mine.x - now);
      max = now;
      sum = sum * before;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) all[i] = {all[i].x * before, all[i].y * before};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {  // from `count` on: zeros and the factor 0
        const float factor = __shfl_sync(kAllLanes, own, j);
        sum = __fmaf_rn(__shfl_sync(kAllLanes, mine.y, j), factor, sum);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          all[i].x = __fmaf_rn(v[j][i].x, factor, all[i].x);
          all[i].y = __fmaf_rn(v[j][i].y, factor, all[i].y);
        }
      }
    }
    const float factor = 1.0f / sum;
    if constexpr (kDim == kCodesHeadDim) {
      if (a.codes.codes != nullptr) {
        const float v[4] = {all[0].x * factor, all[0].y * factor, all[1].x * factor,
                            all[1].y * factor};
        store_head_codes<2>(a, item.row, first_head + head, v, lane);
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      store_result(a.attention, item.row, first_head + head, i * 64 + 2 * lane, all[i].x * factor,
                   all[i].y * factor);
    }
  }
}

}  // namespace nibble::cuda
