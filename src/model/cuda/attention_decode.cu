// Attention of one query row a sequence: bound by reading the cache. An item is 256 positions of
// one KV head; each warp of a block takes whole pages of it, all query heads of the KV head at
// once, and begins to load its next page, of this item or the next, as soon as one has been read.
// Few items have a warp for each page, many have one for all of theirs, so that four blocks share a
// multiprocessor and none of its warps waits for another. Either way every page of an item has a
// result of its own (head_dim above 128: every other one). They are added in order in shared
// memory, those of a row's splits by the block that finishes last, also in order: one launch, and
// the same bits in any batch. That last step is for a warp of its own: a block that is late once
// would else be last, and merge, every time.
//
// Products: S^T (positions, heads) = K Q^T and O^T (channels, heads) += V^T P^T, m16n8k16: query
// heads are the narrow side.
#include <algorithm>

#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_device.h"
#include "model/cuda/check.h"
#include "model/cuda/decode_merge.h"
#include "model/cuda/decode_rope.h"
#include "model/cuda/decode_work.h"
#include "model/cuda/kv_device.h"

namespace nibble::cuda {
namespace {

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

template <Element type, int kDim, class S>
struct Warp {
  uint32_t q[kDim / 16][2];  // B operands: channels, heads
  float sums[kDim / 16][4];  // O^T
  float max[2], sum[2];      // of heads 2 c and 2 c + 1; sum of this lane's positions only

  __device__ void load_queries(const DecodeArgs& a, const DecodeItem& item, int lane) {
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
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
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

  /// To shared memory: result `index` of results (kResults, heads, channels), states (kResults,
  /// heads).
  __device__ void store(float* results, float2* states, int index, int lane) {
    const int r = lane / 4, c = lane % 4;
    results += index * kDecodeHeads * S::kResultStride;
    states += index * kDecodeHeads;
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

constexpr int kWarpsDone = 1, kReadyToMerge = 2, kStored = 3;  // barriers

template <Element type, int kDim, int warps, bool with_rope>
__global__ void __launch_bounds__(DecodeShape<kDim, warps>::kAllThreads,
                                  DecodeShape<kDim, warps>::kBlocks)
    attention_decode(const __grid_constant__ DecodeArgs a) {
  using S = DecodeShape<kDim, warps>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ float2 states[S::kResults * kDecodeHeads];
  __shared__ alignas(8) uint64_t barriers[2 * S::kWarps];
  __shared__ NewRows<kDim> new_rows[with_rope ? S::kWarps : 1];
  ptx::grid_launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const AttentionArgs& at = a.attention;
  const int parts = decode_parts(at.heads / at.kv.kv_heads);
  auto* results = reinterpret_cast<float*>(shared + 2 * S::kWarps * S::kPageBytes);
  const uint32_t keys = ptx::shared_address(shared) + warp * 2 * S::kPageBytes;
  const uint32_t values = keys + S::kPageBytes;
  DecodeWork work(shared + S::kSharedBytes, a.rows);
  PageLoads<S::kPageBytes> loads{ptx::shared_address(&barriers[2 * warp]), lane};
#if __CUDA_ARCH__ >= 900
  if (warp < S::kWarps && lane == 0) {
    ptx::mbarrier_init(loads.barrier, 1);
    ptx::mbarrier_init(loads.barrier + 8, 1);
    ptx::fence_mbarrier_init();
  }
#endif
  // With rope, pages are asked for before qkv is there: their new rows come from this kernel, over
  // what is in them (patch_page), and all else is older than the kernel in front.
  if constexpr (!with_rope) ptx::grid_wait();
  if (warp == 0) work.fill(a, lane);
  __syncthreads();
  const int units = work.before[a.rows];
  const int items = units * static_cast<int>(at.kv.kv_heads) * parts;
  const DecodeScratch scratch(a, units);
  if (warp == S::kWarps) {
    if constexpr (with_rope) ptx::grid_wait();
    if (kDim == kCodesHeadDim && a.codes.codes != nullptr) {
      for (int row = static_cast<int>(blockIdx.x); row < static_cast<int>(a.rows);
           row += static_cast<int>(gridDim.x)) {
        if (work.position[row] < 0) store_no_scales(a, row, lane);
      }
    }
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
  int number = static_cast<int>(blockIdx.x);
  if constexpr (with_rope) ptx::grid_wait();
  if (number >= items) return;
  DecodeItem item = work.item(a, number, parts);
  Warp<type, kDim, S> w;
  const auto begin_item = [&] {
    if (next.keys == nullptr || next.number != number) return;  // no page of it is this warp's
    if constexpr (with_rope) {
      const int page = item.last / kPagePositions, turn = page % kSplitPages;
      const bool has_new = page / kSplitPages == item.split && turn % S::kWarps == warp;
      NewRowLoads<type, kDim> rows;
      if (has_new) rows.load(a, item, lane);
      const int groups = static_cast<int>(at.heads / at.kv.kv_heads);
      load_rotated_queries<type, kDim>(w.q, a, item, item.part * kDecodeHeads + lane / 4, groups,
                                       lane);
      if (has_new) rows.store(a, item, new_rows[warp], lane);
    } else {
      w.load_queries(a, item, lane);
    }
  };
  begin_item();
  while (true) {
    float2* own = states + warp * kDecodeHeads;  // and kWarps results further on the next
    if (lane < kDecodeHeads) {
#pragma unroll
      for (int i = 0; i < S::kWarpResults; ++i) {
        own[i * S::kWarps * kDecodeHeads + lane] = {-INFINITY, 0};
      }
    }
    __syncwarp();
    w.clear();
    bool seen = false;
    while (next.keys != nullptr && next.number == number) {
      const int turn = next.turn;
      const int page = item.split * kSplitPages + turn * S::kWarps + warp;
      ++next.turn;
      seen = true;
      seek(next);
      float s[4][4];
      loads.wait(0);
      if constexpr (with_rope) patch_page<kDim>(keys, new_rows[warp], 0, item, page, lane);
      w.scores(s, keys, lane);
      __syncwarp();
      loads.begin(0, keys, next.keys);
      w.softmax(s, item, page * kPagePositions, scale, lane);
      loads.wait(1);
      if constexpr (with_rope) patch_page<kDim>(values, new_rows[warp], 1, item, page, lane);
      w.add_values(s, values, lane);
      __syncwarp();
      loads.begin(1, values, next.values);
      if constexpr (S::kWarpResults > 1) {
        w.store(results, states, turn * S::kWarps + warp, lane);
        w.clear();
      }
    }
    if (S::kWarpResults == 1 && seen) w.store(results, states, warp, lane);
    const DecodeItem done = item;
    number += static_cast<int>(gridDim.x);
    if (number < items) {  // while the warps wait for each other
      item = work.item(a, number, parts);
      begin_item();
    }
    ptx::barrier_sync(kWarpsDone, S::kThreads);
    add_results<kDim, warps>(a, done, results, states, scratch);
    ptx::barrier_sync(kReadyToMerge, S::kAllThreads);  // also: the results are free again
    ptx::barrier_arrive(kStored, S::kAllThreads);
    if (number >= items) return;
  }
}

template <Element type, int kDim, int warps>
cudaError_t launch(const DecodeArgs& a, int64_t items, cudaStream_t stream) {
  using S = DecodeShape<kDim, warps>;
  Launch how;
  how.grid = dim3(
      static_cast<unsigned>(std::min<int64_t>(items, int64_t{a.multiprocessors} * S::kBlocks)));
  how.threads = S::kAllThreads;
  how.shared_bytes = S::kSharedBytes + DecodeWork::bytes(a.rows);
  how.stream = stream;
  how.programmatic = a.attention.programmatic;
  return a.rope.qkv != nullptr ? launch_kernel(attention_decode<type, kDim, warps, true>, how, a)
                               : launch_kernel(attention_decode<type, kDim, warps, false>, how, a);
}

/// Few items: a warp for each of their results. More than multiprocessors: one for all of them, so
/// that four times as many blocks are there at once, in as much memory.
template <Element type, int kDim>
cudaError_t launch(const DecodeArgs& a, cudaStream_t stream) {
  const int64_t splits = (a.max_context + kDecodeSplit - 1) / kDecodeSplit;
  const int64_t groups = a.attention.heads / a.attention.kv.kv_heads;
  const int64_t least = a.rows * a.attention.kv.kv_heads * decode_parts(groups);
  const int64_t items = least * splits;
  if constexpr (kDecodeResults<kDim> == kSplitPages) {
    if (least > a.multiprocessors) return launch<type, kDim, 1>(a, items, stream);
  }
  return launch<type, kDim, kDecodeResults<kDim>>(a, items, stream);
}

}  // namespace

int64_t decode_scratch_bytes(int64_t rows, int64_t heads, int64_t head_dim, int64_t max_context) {
  const int64_t splits = rows * ((max_context + kDecodeSplit - 1) / kDecodeSplit);
  return DecodeScratch::counter_bytes(heads) + (splits * heads + 1) * 8 +
         splits * heads * padded_head_dim(head_dim) * 4;
}

cudaError_t launch_attention_decode(const DecodeArgs& args, cudaStream_t stream) {
  if (!attention_is_valid(args.attention) || args.rows < 1 || args.rows > kDecodeRows ||
      args.max_context < 1 || args.max_context > args.attention.kv.max_pages * kPagePositions ||
      args.multiprocessors < 1 || args.scratch == nullptr) {
    return cudaErrorInvalidValue;
  }
  const RopeArgs& rope = args.rope;
  if (rope.qkv != nullptr &&
      (!decode_takes(rope) || !is_rows(rope.qkv, rope.qkv_stride) ||
       rope.heads != args.attention.heads || rope.type != args.attention.kv.type ||
       rope.kv.head_dim != args.attention.kv.head_dim || rope.cosine == nullptr ||
       rope.sine == nullptr || rope.faults == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (args.codes.codes != nullptr && !decode_quantizes(args.attention, args.codes)) {
    return cudaErrorInvalidValue;
  }
  return launch_for_pages(args.attention.kv, [&]<Element type, int kDim>() {
    return launch<type, kDim>(args, stream);
  });
}

}  // namespace nibble::cuda
