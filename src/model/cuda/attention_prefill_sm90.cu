// Attention of many query rows: 128 rows of one head a block, two warpgroups of 64, against two
// pages of the cache at a time (one where heads are wide). A warp of its own
// copies them to shared memory, where wgmma takes them as they lie in the cache.
//
// While a warpgroup turns scores into weights, the tensor cores work on its last values and on the
// other warpgroup. Steps lie at fixed positions and a step that a row does not see changes nothing
// of it, so its bits do not depend on the rows it came with.
#include <algorithm>

#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/register_budget.h"
#include "gemm/cuda/wgmma.h"
#include "gemm/cuda/wgmma16.h"
#include "model/cuda/attention_prefill.h"
#include "model/cuda/check.h"
#include "model/cuda/kv_device.h"

namespace nibble::cuda {
namespace {

constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kMathWarps = 8;
constexpr int kMathThreads = 32 * kMathWarps;
constexpr int kThreads = kMathThreads + 128;  // registers are dealt to whole warpgroups
constexpr int kMathRegisters = 240, kLoadRegisters = 24;
static_assert(registers_suffice(1, kMathThreads, kMathRegisters, 128, kLoadRegisters));
constexpr int kMathBarrier = 1;

template <int kDim>
struct Shape {
  static constexpr int kSlices = kDim / kKvSlice;
  static constexpr int kPages = kDim <= 128 ? 2 : 1;  // of a step
  static constexpr int kKeys = kPages * kPagePositions;
  static constexpr int kStepSlice = kKeys * kRowBytes;     // bytes of a slice in a stage
  static constexpr int kStepBytes = kSlices * kStepSlice;  // of keys, as of values
  static constexpr int kQuerySlice = kPrefillRows * kRowBytes;
  static constexpr int kQueryBytes = kSlices * kQuerySlice;
  static constexpr int kStages = std::min(4, (225 * 1024 - kQueryBytes) / (2 * kStepBytes));
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kStepBytes + 1024;
  static_assert(kStages >= 2, "loads must overlap products");
};

/// Steps of kKeys positions: those of the block, counted from `first`, and where they lie.
template <int kDim>
struct Stages {
  using S = Shape<kDim>;
  uint32_t base, barriers;  // of a stage: keys full, values full, empty

  __device__ uint32_t keys(int stage) const { return base + stage * 2 * S::kStepBytes; }
  __device__ uint32_t values(int stage) const { return keys(stage) + S::kStepBytes; }
  __device__ uint32_t keys_full(int stage) const { return barriers + stage * 24; }
  __device__ uint32_t values_full(int stage) const { return barriers + stage * 24 + 8; }
  __device__ uint32_t empty(int stage) const { return barriers + stage * 24 + 16; }
};

/// The place of a step in the ring.
template <int kStages>
struct Turn {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// One thread. A page past the end is the last one again: its scores are not looked at, but its
/// values must be numbers.
template <int kDim>
__device__ void load_pages(const PrefillArgs& a, const PrefillTile& tile, int kv_head, int first,
                           int last, const Stages<kDim>& stages) {
  using S = Shape<kDim>;
  const KvPages& kv = a.attention.kv;
  const int last_page = (tile.position + tile.count - 1) / kPagePositions;
  Turn<S::kStages> turn;
  for (int step = first; step <= last; ++step, turn.advance()) {
    int64_t offsets[S::kPages];
#pragma unroll
    for (int i = 0; i < S::kPages; ++i) {
      const int page = min(step * S::kPages + i, last_page);
      offsets[i] = page_head_offset(kv, tile.sequence, page, kv_head);
    }
    if (step - first >= S::kStages) ptx::mbarrier_wait(stages.empty(turn.stage), turn.parity ^ 1);
    const auto load = [&](uint32_t barrier, uint32_t to, const void* from) {
      ptx::mbarrier_expect(barrier, S::kStepBytes);
#pragma unroll
      for (int i = 0; i < S::kPages; ++i) {
#pragma unroll
        for (int s = 0; s < S::kSlices; ++s) {
          ptx::bulk_load(to + s * S::kStepSlice + i * kSliceBytes,
                         static_cast<const char*>(from) + offsets[i] + s * kSliceBytes, kSliceBytes,
                         barrier);
        }
      }
    };
    load(stages.keys_full(turn.stage), stages.keys(turn.stage), kv.keys);
    load(stages.values_full(turn.stage), stages.values(turn.stage), kv.values);
  }
}

/// 64 query rows: rows 16 w + r and 16 w + r + 8 are this thread's.
template <Element type, int kDim>
struct Rows {
  using S = Shape<kDim>;
  static constexpr bool kBf16 = type == Element::bf16;
  static constexpr int kScores = S::kKeys / 2;

  float sums[kDim / 2];
  float scores[kScores];
  uint32_t weights[S::kKeys / 16][4];
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // sum: of this thread's positions only
  float factor[2];
  int position[2];  // of the two rows
  int from[2];      // the first position that they see
  float scale;

  __device__ void begin_scores(uint32_t query, uint32_t keys) {
    wgmma_settle(scores);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      wgmma16<kBf16>(scores, wgmma16_along_k(query + i / 4 * S::kQuerySlice + i % 4 * 32),
                     wgmma16_along_k(keys + i / 4 * S::kStepSlice + i % 4 * 32), i > 0);
    }
    wgmma_commit();
  }
  __device__ void begin_values(uint32_t values) {
    wgmma_settle(sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < S::kKeys / 16; ++i) {
      wgmma16<kBf16>(sums, weights[i], wgmma16_across_k(values + i * 16 * kRowBytes, S::kStepSlice),
                     true);
    }
    wgmma_commit();
  }

  /// Scores to weights, still as floats. first: position of the step; masked: not all of it is seen
  /// by all rows.
  template <bool masked>
  __device__ void softmax(int first, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores[4 * j + 2 * h + i];
          if constexpr (masked) {
            const int p = first + 8 * j + lane % 4 * 2 + i;
            if (p > position[h] || p < from[h]) s = -INFINITY;
          }
          top = ptx::max_or_nan(top, s);
        }
      }
      top = ptx::max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = ptx::max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float now = ptx::max_or_nan(max[h], top * scale);
      const float base = masked && now == -INFINITY ? 0.0f : now;  // nothing seen so far
      factor[h] = ptx::exp2_fast(max[h] - base);
      max[h] = now;
      float part = 0;
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores[4 * j + 2 * h + i];
          s = ptx::exp2_fast(__fmaf_rn(s, scale, -base));
          part = part + s;
        }
      }
      sum[h] = __fmaf_rn(sum[h], factor[h], part);
    }
  }
  __device__ void round_weights() {
#pragma unroll
    for (int i = 0; i < S::kKeys / 16; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        weights[i][w] = rounded_pair<type>(scores[8 * i + 2 * w], scores[8 * i + 2 * w + 1]);
      }
    }
  }
  __device__ void rescale() {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) sums[i] = sums[i] * factor[i / 2 % 2];
  }

  /// To rows of 16 bits in shared memory, slices and pieces as those of the queries, whose place
  /// they take. query: of this warp's 16 rows.
  template <Element out>
  __device__ void store_shared(uint32_t query, int lane) {
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float all = sum[h] + __shfl_xor_sync(kAllLanes, sum[h], 1);
      all = all + __shfl_xor_sync(kAllLanes, all, 2);
      const float inverse = 1.0f / all;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const uint32_t pair =
            rounded_pair<out>(sums[4 * j + 2 * h] * inverse, sums[4 * j + 2 * h + 1] * inverse);
        ptx::store4_shared(query + piece_offset<kPrefillRows>(r + 8 * h, j) + c * 4, pair);
      }
    }
  }
};

/// Rows of q to shared memory; zeros where there is none.
template <int kDim>
__device__ void load_queries(const AttentionArgs& a, const PrefillTile& tile, int head,
                             uint32_t query) {
  constexpr int kPieces = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kPrefillRows * kPieces; i += kMathThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    uint4 v = {0, 0, 0, 0};
    if (row < tile.count && piece * 8 < a.kv.head_dim) {
      const auto* from = static_cast<const char*>(a.q) +
                         (int64_t{tile.row + row} * a.q_stride + head * a.kv.head_dim) * 2;
      v = reinterpret_cast<const uint4*>(from)[piece];
    }
    ptx::store16_shared(query + piece_offset<kPrefillRows>(row, piece), v);
  }
}

template <Element type, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_prefill(const __grid_constant__ PrefillArgs a) {
  using S = Shape<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ alignas(8) uint64_t barriers[3 * S::kStages];
  ptx::grid_launch_dependents();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t query = (ptx::shared_address(shared) + 1023) / 1024 * 1024;
  const Stages<kDim> stages{query + S::kQueryBytes, ptx::shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(stages.keys_full(i), 1);
      ptx::mbarrier_init(stages.values_full(i), 1);
      ptx::mbarrier_init(stages.empty(i), kMathWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::grid_wait();
  const AttentionArgs& at = a.attention;
  const PrefillTile tile = a.tiles[blockIdx.y];
  const int head = static_cast<int>(blockIdx.x);
  const int last_position = tile.position + tile.count - 1;
  const int first = first_position(tile.position, at.window) / S::kKeys;
  const int last = last_position / S::kKeys;
  if (warp >= kMathWarps) {
    ptx::register_decrease<kLoadRegisters>();
    if (warp == kMathWarps && ptx::elect_one()) {
      const int groups = static_cast<int>(at.heads / at.kv.kv_heads);
      load_pages<kDim>(a, tile, head / groups, first, last, stages);
    }
    return;
  }
  ptx::register_increase<kMathRegisters>();
  load_queries<kDim>(at, tile, head, query);
  ptx::fence_async_shared();
  ptx::barrier_sync(kMathBarrier, kMathThreads);

  const int group = warp / 4, group_row = group * kGroupRows;
  const int low = tile.position + group_row;  // of the warpgroup's rows
  const int high = min(low + kGroupRows - 1, last_position);
  const bool any = group_row < tile.count;
  const int mine_first = first_position(low, at.window) / S::kKeys;
  const int mine_last = any ? high / S::kKeys : first - 1;
  const int highest_from = first_position(low + kGroupRows - 1, at.window);
  const auto needs_mask = [&](int step) {
    return (step + 1) * S::kKeys - 1 > low || step * S::kKeys < highest_from;
  };
  const uint32_t my_query = query + group_row * kRowBytes;
  Rows<type, kDim> rows;
  rows.scale = at.scale * kLog2E;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows.position[h] = low + warp % 4 * 16 + lane / 4 + 8 * h;
    rows.from[h] = first_position(rows.position[h], at.window);
  }
#pragma unroll
  for (float& v : rows.sums) v = 0;

  Turn<S::kStages> turn;
  // A step that none of these rows sees is waited for all the same: its stage must not be taken
  // for free a turn too early.
  const auto pass = [&] {
    ptx::mbarrier_wait(stages.keys_full(turn.stage), turn.parity);
    ptx::mbarrier_wait(stages.values_full(turn.stage), turn.parity);
    if (lane == 0) ptx::mbarrier_arrive(stages.empty(turn.stage));
    turn.advance();
  };
  int step = first;
  for (; any && step < mine_first; ++step) pass();
  if (any) {
    ptx::mbarrier_wait(stages.keys_full(turn.stage), turn.parity);
    rows.begin_scores(my_query, stages.keys(turn.stage));
    wgmma_wait<0>();
    wgmma_settle(rows.scores);
    rows.template softmax<true>(step * S::kKeys, lane);
    rows.round_weights();
  }
  // The scores of the next step and the values of this one.
  const auto advance = [&]<bool masked>() {
    Turn<S::kStages> next = turn;
    next.advance();
    ptx::mbarrier_wait(stages.keys_full(next.stage), next.parity);
    ptx::mbarrier_wait(stages.values_full(turn.stage), turn.parity);
    rows.begin_scores(my_query, stages.keys(next.stage));
    rows.begin_values(stages.values(turn.stage));
    wgmma_wait<1>();
    wgmma_settle(rows.scores);
    rows.template softmax<masked>((step + 1) * S::kKeys, lane);
    wgmma_wait<0>();
    wgmma_settle(rows.sums);
    if (lane == 0) ptx::mbarrier_arrive(stages.empty(turn.stage));
    rows.round_weights();
    rows.rescale();
    turn = next;
  };
  for (; step < mine_last; ++step) {
    if (needs_mask(step + 1)) {
      advance.template operator()<true>();
    } else {
      advance.template operator()<false>();
    }
  }
  if (any) {
    ptx::mbarrier_wait(stages.values_full(turn.stage), turn.parity);
    rows.begin_values(stages.values(turn.stage));
    wgmma_wait<0>();
    wgmma_settle(rows.sums);
    if (lane == 0) ptx::mbarrier_arrive(stages.empty(turn.stage));
    turn.advance();
    ++step;
  }
  for (; step <= last; ++step) pass();
  if (!any) return;

  const uint32_t warp_query = my_query + warp % 4 * 16 * kRowBytes;
  if (at.type == Element::f16) {
    rows.template store_shared<Element::f16>(warp_query, lane);
  } else {
    rows.template store_shared<Element::bf16>(warp_query, lane);
  }
  __syncwarp();
  constexpr int kPieces = kDim / 8;
#pragma unroll 4
  for (int i = lane; i < 16 * kPieces; i += 32) {
    const int row = i / kPieces, piece = i % kPieces, tile_row = group_row + warp % 4 * 16 + row;
    if (tile_row >= tile.count || piece * 8 >= at.kv.head_dim) continue;
    auto* to = static_cast<char*>(at.out) +
               (int64_t{tile.row + tile_row} * at.out_stride + head * at.kv.head_dim) * 2;
    reinterpret_cast<uint4*>(to)[piece] =
        ptx::load16_shared(warp_query + piece_offset<kPrefillRows>(row, piece));
  }
}

template <Element type, int kDim>
cudaError_t launch(const PrefillArgs& a, cudaStream_t stream) {
  Launch how;
  how.grid = dim3(static_cast<unsigned>(a.attention.heads), static_cast<unsigned>(a.num_tiles));
  how.threads = kThreads;
  how.shared_bytes = Shape<kDim>::kSharedBytes;
  how.stream = stream;
  how.programmatic = a.attention.programmatic;
  return launch_kernel(attention_prefill<type, kDim>, how, a);
}

}  // namespace

cudaError_t launch_attention_prefill_sm90(const PrefillArgs& args, cudaStream_t stream) {
  return launch_for_pages(args.attention.kv, [&]<Element type, int kDim>() {
    return launch<type, kDim>(args, stream);
  });
}

}  // namespace nibble::cuda
