// Attention of one query row a sequence: bound by reading the cache. An item is 256 positions of
// one KV head; each warp of a block takes whole pages of it, all query heads of the KV head at
// once, and begins to load its next page, of this item or the next, as soon as one has been read.
// The warps' results are added in order in shared memory, those of a row's splits by the block that
// finishes last, also in order: one launch, and the same bits in any batch. That last step is for a
// warp of its own: a block that is late once would else be last, and merge, every time.
//
// Products: S^T (positions, heads) = K Q^T and O^T (channels, heads) += V^T P^T, m16n8k16: query
// heads are the narrow side.
#include <algorithm>

#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_device.h"
#include "model/cuda/check.h"
#include "model/cuda/decode_work.h"
#include "model/cuda/kv_device.h"

namespace nibble::cuda {
namespace {

template <int kDim>
struct Shape {
  static constexpr int kWarps = kDim <= 128 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;                      // of those warps
  static constexpr int kAllThreads = kThreads + 32;                 // and the one that merges
  static constexpr int kPageBytes = kDim / kKvSlice * kSliceBytes;  // of one head
  static constexpr int kResultStride = kDim + 4;  // floats of a head: all lanes in other banks
  static constexpr int kResultBytes = kWarps * kDecodeHeads * kResultStride * 4;
  static constexpr int kSharedBytes = 2 * kWarps * kPageBytes + kResultBytes;
  static constexpr int kBlocks = std::min(4, 227 * 1024 / (kSharedBytes + 10 * 1024));
};

/// Scratch: counters, then (max, sum) of every (unit, head), then its unscaled result.
struct Scratch {
  uint32_t* arrived;
  float2* states;
  float* results;
  int64_t heads;

  __host__ __device__ static int64_t counter_bytes(int64_t heads) {
    return int64_t{kDecodeRows} * heads * 4;
  }
  __device__ Scratch(const DecodeArgs& a, int64_t units) : heads(a.attention.heads) {
    auto* base = static_cast<char*>(a.scratch);
    arrived = reinterpret_cast<uint32_t*>(base);
    states = reinterpret_cast<float2*>(base + counter_bytes(heads));
    results = reinterpret_cast<float*>(states + (units * heads + 1) / 2 * 2);
  }
};

/// Pages of one warp, one of keys and one of values at a time. Loads come in the order keys,
/// values, keys, ... and are waited for in that order.
template <int kBytes>
struct PageLoads {
  uint32_t barrier;  // two mbarriers of this warp
  int lane;
  int parity = 0;

  __device__ void begin(int which, uint32_t to, const char* from) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0 && from != nullptr) {
      ptx::mbarrier_expect(barrier + which * 8, kBytes);
      ptx::bulk_load(to, from, kBytes, barrier + which * 8);
    }
#else
    if (from != nullptr) {
#pragma unroll 8
      for (int i = lane * 16; i < kBytes; i += 512) ptx::copy16_async(to + i, from + i);
    }
    ptx::copy_commit();
#endif
  }
  __device__ void wait(int which) {
#if __CUDA_ARCH__ >= 900
    ptx::mbarrier_wait(barrier + which * 8, parity >> which & 1);
    parity ^= 1 << which;
#else
    ptx::copy_wait<1>();
    __syncwarp();
#endif
  }
};

/// Where a warp is in its pages.
struct Cursor {
  int number = 0;  // of the item
  int turn = 0;    // of the warp's pages in it
  DecodeItem item = {};
  const char* keys = nullptr;  // null: no more pages
  const char* values = nullptr;
};

template <Element type, int kDim>
struct Warp {
  using S = Shape<kDim>;

  uint32_t q[kDim / 16][2];  // B operands: channels, heads
  float sums[kDim / 16][4];  // O^T
  float max[2], sum[2];      // of heads 2 c and 2 c + 1; sum of this lane's positions only

  __device__ void begin(const DecodeArgs& a, const DecodeItem& item, int lane) {
    const AttentionArgs& at = a.attention;
    const int groups = static_cast<int>(at.heads / at.kv.kv_heads);
    const int head = item.part * kDecodeHeads + lane / 4;
    const auto* from =
        static_cast<const uint32_t*>(at.q) +
        (item.row * at.q_stride + int64_t{item.kv_head * groups + head} * at.kv.head_dim) / 2 +
        lane % 4;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const bool inside = head < groups && i * 16 < at.kv.head_dim;
      q[i][0] = inside ? from[i * 8] : 0;
      q[i][1] = inside ? from[i * 8 + 4] : 0;
#pragma unroll
      for (float& v : sums[i]) v = 0;
    }
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  /// S^T of a page: blocks of 16 positions.
  __device__ void scores(float (&s)[4][4], uint32_t keys, int lane) const {
    const int t = lane % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (float& v : s[j]) v = 0;
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const uint32_t at = keys + piece_offset(t, 2 * i + lane / 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 k = ptx::load_matrices(at + j * 16 * kRowBytes);
        const uint32_t words[4] = {k.x, k.y, k.z, k.w};
        product<type>(s[j], words, q[i][0], q[i][1]);
      }
    }
  }

  /// Scores to weights, and the state and the sums so far to the new maximum. position: of the
  /// page's first score.
  __device__ void softmax(float (&s)[4][4], const DecodeItem& item, int position, float scale,
                          int lane) {
    const int t = position + lane / 4;
    if (position < item.first || position + kPagePositions - 1 > item.last) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int p = t + j * 16 + i / 2 * 8;
          if (p < item.first || p > item.last) s[j][i] = -INFINITY;
        }
      }
    }
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) top = ptx::max_or_nan(top, ptx::max_or_nan(s[j][h], s[j][h + 2]));
#pragma unroll
      for (int d = 4; d < 32; d *= 2) {
        top = ptx::max_or_nan(top, __shfl_xor_sync(kAllLanes, top, d));
      }
      const float now = ptx::max_or_nan(max[h], top * scale);  // a page has a position that is seen
      factor[h] = ptx::exp2_fast(max[h] - now);
      max[h] = now;
      float part = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = h; i < 4; i += 2) {
          s[j][i] = ptx::exp2_fast(__fmaf_rn(s[j][i], scale, -now));
          part = part + s[j][i];
        }
      }
      sum[h] = __fmaf_rn(sum[h], factor[h], part);
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = sums[i][e] * factor[e % 2];
    }
  }

  __device__ void add_values(const float (&s)[4][4], uint32_t values, int lane) {
    // lanes 0-7: positions 0-7, channels 0-7; 8-15: channels 8-15; 16-: positions 8-15
    const int t = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t p0 = ptx::transposed(rounded_pair<type>(s[j][0], s[j][1]));
      const uint32_t p1 = ptx::transposed(rounded_pair<type>(s[j][2], s[j][3]));
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        const uint32_t at = values + piece_offset(t, 2 * i + lane / 8 % 2) + j * 16 * kRowBytes;
        const uint4 v = ptx::load_matrices_transposed(at);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        product<type>(sums[i], words, p0, p1);
      }
    }
  }

  /// To shared memory: results (heads, channels), states (heads).
  __device__ void store(float* results, float2* states, int lane) {
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[h] = sum[h] + __shfl_xor_sync(kAllLanes, sum[h], d);
      if (r == 0) states[2 * c + h] = {max[h], sum[h]};
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        float* to = results + (2 * c + h) * S::kResultStride + i * 16 + r;
        to[0] = sums[i][h];
        to[8] = sums[i][h + 2];
      }
    }
  }
};

__device__ __forceinline__ uint32_t rounded_pair_of(Element type, float x, float y) {
  return type == Element::f16 ? rounded_pair<Element::f16>(x, y)
                              : rounded_pair<Element::bf16>(x, y);
}

/// Two results of `head`, from channel `channel` on.
__device__ __forceinline__ void store_result(const AttentionArgs& a, int row, int head, int channel,
                                             float x, float y) {
  if (channel >= a.kv.head_dim) return;
  auto* to = static_cast<char*>(a.out) +
             (row * a.out_stride + int64_t{head} * a.kv.head_dim + channel) * 2;
  *reinterpret_cast<uint32_t*>(to) = rounded_pair_of(a.type, x, y);
}

/// Adds what the warps of a block have of an item: to out, or to scratch if there are other splits.
template <int kDim>
__device__ __forceinline__ void add_warps(const DecodeArgs& a, const DecodeItem& item,
                                          const float* results, const float2* states,
                                          const Scratch& scratch) {
  using S = Shape<kDim>;
  const int groups = static_cast<int>(a.attention.heads / a.attention.kv.kv_heads);
  const int first_head = item.kv_head * groups + item.part * kDecodeHeads;
  const int heads = min(kDecodeHeads, groups - item.part * kDecodeHeads);
  for (int i = static_cast<int>(threadIdx.x); i < heads * (kDim / 4); i += S::kThreads) {
    const int head = i / (kDim / 4), channel = i % (kDim / 4) * 4;
    float max = -INFINITY, sum = 0;
    float4 all = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {
      max = ptx::max_or_nan(max, states[w * kDecodeHeads + head].x);
    }
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) {  // a warp that saw nothing has zeros and the factor 0
      const float2 s = states[w * kDecodeHeads + head];
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
      store_result(at, item.row, first_head + head, channel, all.x * factor, all.y * factor);
      store_result(at, item.row, first_head + head, channel + 2, all.z * factor, all.w * factor);
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
                                        const Scratch& scratch, int lane) {
  uint32_t last = 0;
  if (lane == 0) {
    const int kv_heads = static_cast<int>(a.attention.kv.kv_heads);
    uint32_t* arrived = scratch.arrived + (item.row * kv_heads + item.kv_head) * parts + item.part;
    __threadfence();
    last = atomicAdd(arrived, 1) + 1 == static_cast<uint32_t>(item.count);
    if (last != 0) *arrived = 0;
    __threadfence();
  }
  return __shfl_sync(kAllLanes, last, 0) != 0;
}

/// Adds the splits of an item's row and heads, in order, by one warp.
template <int kDim>
__device__ __forceinline__ void merge_splits(const DecodeArgs& a, const DecodeItem& item,
                                             const Scratch& scratch, int lane) {
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
      float2 v[kAtOnce][kPairs];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          v[j][i] = {0, 0};
          if (j < count) {
            v[j][i] = __ldcg(reinterpret_cast<const float2*>(scratch.results + place(j) * kDim) +
                             i * 32 + lane);
          }
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
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      store_result(a.attention, item.row, first_head + head, i * 64 + 2 * lane, all[i].x * factor,
                   all[i].y * factor);
    }
  }
}

constexpr int kWarpsDone = 1, kReadyToMerge = 2, kStored = 3;  // barriers

template <Element type, int kDim>
__global__ void __launch_bounds__(Shape<kDim>::kAllThreads, Shape<kDim>::kBlocks)
    attention_decode(const __grid_constant__ DecodeArgs a) {
  using S = Shape<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ DecodeWork work;
  __shared__ float2 states[S::kWarps * kDecodeHeads];
  __shared__ alignas(8) uint64_t barriers[2 * S::kWarps];
  ptx::grid_launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const AttentionArgs& at = a.attention;
  const int parts = decode_parts(at.heads / at.kv.kv_heads);
  auto* results = reinterpret_cast<float*>(shared + 2 * S::kWarps * S::kPageBytes);
  const uint32_t keys = ptx::shared_address(shared) + warp * 2 * S::kPageBytes;
  const uint32_t values = keys + S::kPageBytes;
  PageLoads<S::kPageBytes> loads{ptx::shared_address(&barriers[2 * warp]), lane};
#if __CUDA_ARCH__ >= 900
  if (warp < S::kWarps && lane == 0) {
    ptx::mbarrier_init(loads.barrier, 1);
    ptx::mbarrier_init(loads.barrier + 8, 1);
    ptx::fence_mbarrier_init();
  }
#endif
  ptx::grid_wait();
  if (warp == 0) work.fill(a, lane);
  __syncthreads();
  const int units = work.before[a.rows];
  const int items = units * static_cast<int>(at.kv.kv_heads) * parts;
  const Scratch scratch(a, units);
  if (warp == S::kWarps) {
    for (int number = static_cast<int>(blockIdx.x); number < items;
         number += static_cast<int>(gridDim.x)) {
      const DecodeItem item = work.item(a, number, parts);
      ptx::barrier_arrive(kReadyToMerge, S::kAllThreads);
      ptx::barrier_sync(kStored, S::kAllThreads);
      if (item.count > 1 && is_last(a, item, parts, scratch, lane)) {
        merge_splits<kDim>(a, item, scratch, lane);
      }
    }
    return;
  }
  const float scale = at.scale * kLog2E;

  // The next page of this warp from (number, turn) on.
  const auto seek = [&](Cursor& c) {
    c.keys = nullptr;
    for (; c.number < items; c.number += static_cast<int>(gridDim.x), c.turn = 0) {
      c.item = work.item(a, c.number, parts);
      for (; c.turn < kSplitPages / S::kWarps; ++c.turn) {
        const int page = c.item.split * kSplitPages + c.turn * S::kWarps + warp;
        if (page < c.item.first / kPagePositions || page > c.item.last / kPagePositions) continue;
        const int64_t offset =
            page_head_offset(at.kv, a.sequence[c.item.row], page, c.item.kv_head);
        c.keys = static_cast<const char*>(at.kv.keys) + offset;
        c.values = static_cast<const char*>(at.kv.values) + offset;
        return;
      }
    }
  };
  Cursor next;
  next.number = static_cast<int>(blockIdx.x);
  seek(next);
  loads.begin(0, keys, next.keys);
  loads.begin(1, values, next.values);
  for (int number = static_cast<int>(blockIdx.x); number < items;
       number += static_cast<int>(gridDim.x)) {
    const DecodeItem item = work.item(a, number, parts);
    Warp<type, kDim> w;
    w.begin(a, item, lane);
    while (next.keys != nullptr && next.number == number) {
      const int page = item.split * kSplitPages + next.turn * S::kWarps + warp;
      ++next.turn;
      seek(next);
      float s[4][4];
      loads.wait(0);
      w.scores(s, keys, lane);
      __syncwarp();
      loads.begin(0, keys, next.keys);
      w.softmax(s, item, page * kPagePositions, scale, lane);
      loads.wait(1);
      w.add_values(s, values, lane);
      __syncwarp();
      loads.begin(1, values, next.values);
    }
    w.store(results + warp * kDecodeHeads * S::kResultStride, states + warp * kDecodeHeads, lane);
    ptx::barrier_sync(kWarpsDone, S::kThreads);
    add_warps<kDim>(a, item, results, states, scratch);
    ptx::barrier_sync(kReadyToMerge, S::kAllThreads);  // also: the results are free again
    ptx::barrier_arrive(kStored, S::kAllThreads);
  }
}

template <Element type, int kDim>
cudaError_t launch(const DecodeArgs& a, cudaStream_t stream) {
  using S = Shape<kDim>;
  const int64_t splits = (a.max_context + kDecodeSplit - 1) / kDecodeSplit;
  const int64_t groups = a.attention.heads / a.attention.kv.kv_heads;
  const int64_t items = a.rows * splits * a.attention.kv.kv_heads * decode_parts(groups);
  Launch how;
  how.grid = dim3(
      static_cast<unsigned>(std::min<int64_t>(items, int64_t{a.multiprocessors} * S::kBlocks)));
  how.threads = S::kAllThreads;
  how.shared_bytes = S::kSharedBytes;
  how.stream = stream;
  how.programmatic = a.attention.programmatic;
  return launch_kernel(attention_decode<type, kDim>, how, a);
}

template <Element type>
cudaError_t launch(const DecodeArgs& a, cudaStream_t stream) {
  switch (padded_head_dim(a.attention.kv.head_dim)) {
    case 64: return launch<type, 64>(a, stream);
    case 128: return launch<type, 128>(a, stream);
    case 192: return launch<type, 192>(a, stream);
    case 256: return launch<type, 256>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t decode_scratch_bytes(int64_t rows, int64_t heads, int64_t head_dim, int64_t max_context) {
  const int64_t splits = rows * ((max_context + kDecodeSplit - 1) / kDecodeSplit);
  return Scratch::counter_bytes(heads) + (splits * heads + 1) * 8 +
         splits * heads * padded_head_dim(head_dim) * 4;
}

cudaError_t launch_attention_decode(const DecodeArgs& args, cudaStream_t stream) {
  if (!attention_is_valid(args.attention) || args.rows < 1 || args.rows > kDecodeRows ||
      args.max_context < 1 || args.max_context > args.attention.kv.max_pages * kPagePositions ||
      args.multiprocessors < 1 || args.scratch == nullptr) {
    return cudaErrorInvalidValue;
  }
  return args.attention.kv.type == Element::f16 ? launch<Element::f16>(args, stream)
                                                : launch<Element::bf16>(args, stream);
}

}  // namespace nibble::cuda
