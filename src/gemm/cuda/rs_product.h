// The products of w4a8_rs_sm90, w4a8_fp8_rs_sm90 and w4a16_rs_sm90, by wgmma: weights expanded to
// q - z in registers (operand A, rs_operands.h), tokens in shared memory (operand B, the N side),
// promotion to float every group of at most 128 k, in group order: of int8 the CPU kernels' bits.
// Device code only.
//
//               token_tile            a block: 1 to 4 math warpgroups of 64 columns each, one
//            +-------------+          producer warpgroup (one warp copies activations, one
//    WG 0    |  64 columns |          weights, one scales per (token, group)). A cluster of two
//    WG 1    |  64 columns |          blocks works on neighbouring columns and shares the
//    WG 2    |  64 columns |          activations: each block copies half and multicasts it.
//            +-------------+
//
//    slabs ------- bulk copies ------> ring of slices --(LDS, q - z)--> registers --A--+
//    activations --tensor copies-----> ring of stages ------------------------------B--+--> sums
//
// A stage is 128 bytes of k of every token: 128 k, or 64 of 16-bit operands. While the products of
// one stage run, the codes of the next are expanded into a second set of registers; while a
// warpgroup promotes its sums, the others' products run.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/register_budget.h"
#include "gemm/cuda/rs_operands.h"
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/slab_scales.h"
#include "gemm/cuda/tensor_map.h"
#include "gemm/cuda/tile_output.h"
#include "gemm/cuda/wgmma.h"

namespace nibble::cuda {

inline constexpr int kSharedLimit = 232448;  // of a block
inline constexpr int kSharedOfTwo = 115712;  // beside another, which takes 1 KiB for itself

struct RsParams {
  const uint8_t* slabs;
  int64_t tiles, slices;  // of the weights
  bool bf16_scales;
  const float* t;  // (m, t_stride), of groups of group_size; null: a scale per token
  int t_stride, group_size;
  TileOutputParams end;
};

template <class OperandsOf, int kTokens_, int kMathGroups_, int kPromoted_, bool kGroupScales_,
          int kResident_ = 1>
struct RsShape {
  using Operands = OperandsOf;
  static constexpr int kTokens = kTokens_, kMathGroups = kMathGroups_, kPromoted = kPromoted_;
  static constexpr bool kGroupScales = kGroupScales_;
  static constexpr int kMathWarps = 4 * kMathGroups, kThreads = 128 * (kMathGroups + 1);
  static constexpr int kResident = kResident_;  // blocks that a multiprocessor holds
  // of a thread: 65536 are there for all blocks, and the producers are one warpgroup
  static constexpr bool kWide = kTokens == 96 && !kGroupScales;
  static constexpr int kMathRegisters = kMathGroups == 1   ? 200
                                        : kResident == 2   ? 104
                                        : kMathGroups == 2 ? 232
                                        : kMathGroups == 3 ? (kWide ? 160 : 152)
                                                           : 112;
  static constexpr int kProducerRegisters = kMathGroups == 1   ? 56
                                            : kResident == 2   ? 32
                                            : kMathGroups == 2 ? 40
                                            : kMathGroups == 3 ? (kWide ? 32 : 56)
                                                               : 32;
  static_assert(registers_suffice(kResident, 128 * kMathGroups, kMathRegisters, 128,
                                  kProducerRegisters));
  // Codes of the next stage are expanded while products read those of this one; where registers do
  // not hold both, when the products are done.
  static constexpr bool kConverts = std::is_same_v<typename Operands::Sum, int>;
  static constexpr int kCodeSets =
      kMathGroups == 4 || kTokens == 192 || (kTokens == 160 && kConverts) ? 1 : 2;
  // Parts of a tile may be summed in a cluster; elsewhere it would take registers from the loop.
  static constexpr bool kInCluster = kPromoted == 128 && kTokens != 96 && kTokens <= 128 &&
                                     kMathGroups != 4 && !(kGroupScales && kResident == 2);
  // A token's scale is asked for before the products; elsewhere it would spill.
  static constexpr bool kScalesEarly = kPromoted == 128 && kTokens != 96 && kTokens <= 128 &&
                                       kMathGroups != 4 && !kGroupScales && kResident == 1;
  // The first slice comes block by block. Of 32 rows it gains nothing; with short groups or a scale
  // per (token, group) it is not tried yet.
  static constexpr bool kFirstByBlocks = kTokens > 32 && kPromoted == 128 && !kGroupScales;

  static constexpr int kSlabGroups = kSlabDepth / kPromoted;
  // scales of a slab in registers; where there are too few, they are loaded for each block of k
  static constexpr int kKeptScales = kGroupScales ? 1 : kSlabGroups;
  static constexpr int kSlabBytes = kSlabCodeBytes + kSlabGroups * 40;
  static constexpr int kZeros = kSlabCodeBytes + kSlabGroups * 32;
  static constexpr int kSums = kTokens / 2;        // accumulators of a thread
  static constexpr int kActBytes = kTokens * 128;  // of a stage
  static constexpr int kSliceBytes = kMathWarps * kSlabBytes;
  using Output = TileOutput<kTokens, kMathGroups>;
  static constexpr int kStageOut = Output::kStageBytes;     // of a warpgroup
  static constexpr int kBlocks = kSlabDepth / kBlockDepth;  // of a slice
  static constexpr int kSpan = Operands::kSpan;             // stages of a block
  static constexpr int kStages = kBlocks * kSpan;           // of a slice
  // stages of activations in the ring
  static constexpr int kActs = kMathGroups == 1              ? 2 * kStages
                               : kSpan == 1 && kTokens == 32 ? 2 * kStages
                               : kSpan == 2 && kTokens > 64  ? kStages / 2
                                                             : kStages;
  static_assert(!kGroupScales || kSpan == 1);
  static constexpr int kScaleSlices = kGroupScales ? 4 : 0;  // the same of scales per group
  static constexpr int kScaleBytes = kTokens * 4;            // of a block of k
  static constexpr int kSharedBytes = kResident == 2 ? kSharedOfTwo : kSharedLimit;
  static constexpr int kOut = kActs * kActBytes;
  static constexpr int kScales = kOut + kMathGroups * kStageOut;
  static constexpr int kWeights = kScales + kScaleSlices * kBlocks * kScaleBytes;
  static constexpr int kRoom = kSharedBytes - 512 - kMathGroups * kTokens * 4 - kWeights;
  static constexpr int kSlices = kRoom / kSliceBytes < 3 ? kRoom / kSliceBytes : 3;
  static constexpr int kTokenScales = (kWeights + kSlices * kSliceBytes + 15) / 16 * 16;
  static constexpr int kBarriers = kTokenScales + kMathGroups * kTokens * 4;
  static constexpr int kFirstBarriers = kFirstByBlocks ? kBlocks : 0;
  static constexpr int kShared =
      kBarriers + 8 * (2 * (kActs + kSlices + kScaleSlices) + kFirstBarriers);
  static_assert(kSlices >= 2 && kShared <= kSharedBytes && kWeights % 16 == 0);
};

template <class S>
struct RsKernel {
  using Operands = typename S::Operands;
  using Sum = typename Operands::Sum;
  static constexpr int kTokens = S::kTokens;
  static constexpr int kMathWarps = S::kMathWarps;
  static constexpr int kDepth = kBlockDepth / S::kSpan;               // k of a stage
  static constexpr bool kPaired = S::kPromoted == 2 * kDepth;         // two stages a promotion
  static constexpr int kParts = kPaired ? 1 : kDepth / S::kPromoted;  // promotions of a stage
  static constexpr int kSteps = 4 / kParts;                           // between promotions
  static_assert(!kPaired || S::kCodeSets == 2);
  // Whole slices that the ring of activations holds, or the half of one.
  static constexpr int kRingSlices = S::kActs < S::kStages ? 1 : S::kActs / S::kStages;

  const RsParams& p;
  uint32_t base;
  int rank, cluster, lane;
  int first_of_pair;  // of the two blocks that share activations, its rank in the cluster

  __device__ uint32_t act_full(int i) const { return base + S::kBarriers + 8 * i; }
  __device__ uint32_t act_empty(int i) const { return act_full(S::kActs + i); }
  __device__ uint32_t slice_full(int i) const { return act_full(2 * S::kActs + i); }
  __device__ uint32_t slice_empty(int i) const { return slice_full(S::kSlices + i); }
  __device__ uint32_t scales_full(int i) const { return slice_full(2 * S::kSlices + i); }
  __device__ uint32_t scales_empty(int i) const { return scales_full(S::kScaleSlices + i); }
  /// Block u > 0 of the first slice, which comes block by block.
  __device__ uint32_t first_full(int u) const { return scales_empty(S::kScaleSlices + u); }
  __device__ uint32_t group_scales(int slice, int u) const {
    return base + S::kScales + (slice * S::kBlocks + u) * S::kScaleBytes;
  }
  __device__ void init_barriers() const {
    for (int i = 0; i < S::kActs; ++i) {
      ptx::mbarrier_init(act_full(i), 1);
      ptx::mbarrier_init(act_empty(i), 2 * kMathWarps);  // the warps of both blocks
    }
    for (int i = 0; i < S::kSlices; ++i) {
      ptx::mbarrier_init(slice_full(i), 1);
      ptx::mbarrier_init(slice_empty(i), kMathWarps);
    }
    for (int i = 0; i < S::kScaleSlices; ++i) {
      ptx::mbarrier_init(scales_full(i), 1);
      ptx::mbarrier_init(scales_empty(i), kMathWarps);
    }
    for (int u = 1; u < (S::kFirstByBlocks ? S::kBlocks : 0); ++u) {
      ptx::mbarrier_init(first_full(u), 1);
    }
    ptx::fence_mbarrier_init();
  }

  __device__ bool in_cluster() const { return S::kInCluster && p.end.schedule.parts > 1; }
  __device__ int items() const {
    return in_cluster() ? 1 : p.end.schedule.items_of_whole_k(cluster);
  }
  __device__ RsWork work_of(int item) const {
    return in_cluster() ? p.end.schedule.part(cluster)
                        : p.end.schedule.work_of_whole_k(cluster, item);
  }
  /// One thread: this block's half of every stage of activations, for both blocks of the pair.
  __device__ void copy_activations(const CUtensorMap* map) const {
    ptx::grid_wait();
    int stage = 0;
    uint32_t phase = 1;  // the first pass through the ring does not wait
    const int count = items();
#pragma unroll 1
    for (int item = 0; item < count; ++item) {
      const RsWork work = work_of(item);
      const int row = work.token_tile * kTokens + rank * (kTokens / 2);
#pragma unroll 1
      for (int u = work.slice0 * S::kStages; u < work.slice1 * S::kStages; ++u) {
        ptx::mbarrier_wait(act_empty(stage), phase);
        ptx::mbarrier_expect(act_full(stage), S::kActBytes);
        ptx::tensor_load_multicast(base + stage * S::kActBytes + rank * (S::kActBytes / 2), map,
                                   u * kDepth, row, act_full(stage), 3 << first_of_pair);
        if (++stage == S::kActs) stage = 0, phase ^= 1;
      }
    }
  }

  /// The first lanes of one warp: a slab each, one for every math warp.
  __device__ void copy_weights() const {
    int stage = 0;
    uint32_t phase = 1;
    const int count = items();
#pragma unroll 1
    for (int item = 0; item < count; ++item) {
      const RsWork work = work_of(item);
      const int64_t wanted =
          int64_t{work.weight_tile} * (2 * kMathWarps) + rank * kMathWarps + lane;
      const int64_t tile = wanted < p.tiles ? wanted : p.tiles - 1;
      const uint8_t* from = p.slabs + (tile * p.slices + work.slice0) * S::kSlabBytes;
      int slice = work.slice0;
      if (S::kFirstByBlocks && item == 0) {
        copy_first_slab(from);
        stage = 1, ++slice, from += S::kSlabBytes;
      }
#pragma unroll 1
      for (; slice < work.slice1; ++slice, from += S::kSlabBytes) {
        ptx::mbarrier_wait(slice_empty(stage), phase);
        if (lane == 0) ptx::mbarrier_expect(slice_full(stage), S::kSliceBytes);
        __syncwarp((1 << kMathWarps) - 1);
        ptx::bulk_load(base + S::kWeights + stage * S::kSliceBytes + lane * S::kSlabBytes, from,
                       S::kSlabBytes, slice_full(stage), ptx::kEvictFirst);
        if (++stage == S::kSlices) stage = 0, phase ^= 1;
      }
    }
  }

  /// To stage 0, block by block: all multiprocessors begin at once, and what one asks for takes a
  /// microsecond and more to come.
  __device__ void copy_first_slab(const uint8_t* from) const {
    constexpr int kBlockBytes = kSlabCodeBytes / S::kBlocks;
    constexpr int kScaleBytes = S::kSlabBytes - kSlabCodeBytes;
    const uint32_t to = base + S::kWeights + lane * S::kSlabBytes;
    if (lane == 0) {
      ptx::mbarrier_expect(slice_full(0), kMathWarps * (kBlockBytes + kScaleBytes));
      for (int u = 1; u < S::kBlocks; ++u) {
        ptx::mbarrier_expect(first_full(u), kMathWarps * kBlockBytes);
      }
    }
    __syncwarp((1 << kMathWarps) - 1);
    ptx::bulk_load(to + kSlabCodeBytes, from + kSlabCodeBytes, kScaleBytes, slice_full(0),
                   ptx::kEvictFirst);
    for (int u = 0; u < S::kBlocks; ++u) {
      ptx::bulk_load(to + u * kBlockBytes, from + u * kBlockBytes, kBlockBytes,
                     u == 0 ? slice_full(0) : first_full(u), ptx::kEvictFirst);
    }
  }

  /// One warp: the scales of each block of k, one a token of the tile.
  __device__ void copy_scales() const {
    ptx::grid_wait();
    uint32_t done = 0;
    const int count = items();
#pragma unroll 1
    for (int item = 0; item < count; ++item) {
      const RsWork work = work_of(item);
      const int64_t token = int64_t{work.token_tile} * kTokens;
      const auto left = static_cast<int>(p.end.m - token);
      const float* tile = p.t + token * p.t_stride;
#pragma unroll 1
      for (int slice = work.slice0; slice < work.slice1; ++slice, ++done) {
        // volatile: else a pointer a token is kept, and there are no registers for them
        const int u = ptx::lane() & 3, row = ptx::lane() >> 2;
        // past K and past M there is no scale, and nothing that matters to scale
        const int group = (slice * S::kBlocks + u) * kBlockDepth / p.group_size;
        const float* from = tile + (group < p.t_stride ? group : p.t_stride - 1);
        float t[kTokens / 8];
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
          t[i] = ptx::load_float(from + (row + 8 * i < left ? row + 8 * i : left - 1) * p.t_stride);
        }
        ptx::mbarrier_wait(scales_empty(done % S::kScaleSlices), ~(done / S::kScaleSlices) & 1);
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
          ptx::store_float_shared(group_scales(done % S::kScaleSlices, u) + (row + 8 * i) * 4,
                                  t[i]);
        }
        __syncwarp();
        ptx::mbarrier_arrive_if(lane == 0, scales_full(done % S::kScaleSlices));
      }
    }
  }

  // ---- math -------------------------------------------------------------------------------------

  /// What a lane needs of one slice beside the codes: zero points and scales of its two columns.
  struct SliceScales {
    uint32_t zeros[S::kSlabGroups / 4];  // bytes; low nibble: column r, high: column r + 8
    uint32_t scales[S::kKeptScales];     // low half: column r; high half: column r + 8
  };

  __device__ void fetch_scales(SliceScales& s, uint32_t slab) const {
    const uint32_t group = (lane >> 2) * S::kSlabGroups;
#pragma unroll
    for (int i = 0; i < S::kSlabGroups / 4; ++i) {
      s.zeros[i] = ptx::load4_shared(slab + S::kZeros + group + 4 * i);
      if constexpr (S::kGroupScales) continue;
      const uint4 four = ptx::load16_shared(slab + kSlabCodeBytes + (group + 4 * i) * 4);
      s.scales[4 * i] = four.x;
      s.scales[4 * i + 1] = four.y;
      s.scales[4 * i + 2] = four.z;
      s.scales[4 * i + 3] = four.w;
    }
  }

  /// Stage u of the slab whose codes of this lane begin at `codes`, as operand A.
  __device__ void expand(uint32_t (&a)[4][4], const SliceScales& s, uint32_t codes, int u) const {
    Operands::template expand<S::kPromoted>(
        a, codes, u, [&](int group) { return s.zeros[group / 4] >> (8 * (group % 4)); });
#pragma unroll
    for (int j = 0; j < 4; ++j) wgmma_settle(a[j]);
  }

  /// The stage behind stage u; behind the last, the first of the next slab.
  __device__ void expand_next(uint32_t (&a)[4][4], const SliceScales& s, const SliceScales& next,
                              uint32_t slab, int u) const {
    const int v = (u + 1) % S::kStages;
    expand(a, v == 0 ? next : s, slab + lane * 16, v);
  }

  /// Of the weights' group, for this lane's columns r and r + 8.
  __device__ float2 weight_scales(uint32_t pair) const {
    const float2 s = scales_of(pair, p.bf16_scales);
    if constexpr (Operands::kUnit == 1) return s;
    return {s.x * Operands::kUnit, s.y * Operands::kUnit};
  }

  __device__ void promote(const Sum (&c)[S::kSums], float (&f)[S::kSums], float2 s) const {
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      f[i] = __fmaf_rn(static_cast<float>(c[i]), (i & 2) ? s.y : s.x, f[i]);
    }
  }
  /// t: the scales of this thread's tokens, 8 tokens apart.
  __device__ void promote(const Sum (&c)[S::kSums], float (&f)[S::kSums], float2 s,
                          uint32_t t) const {
#pragma unroll
    for (int i = 0; i < S::kSums; i += 4) {
      const float2 of = ptx::load_float2_shared(t + 8 * i);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f[i + e] = __fmaf_rn(__fmul_rn(static_cast<float>(c[i + e]), (e & 1) ? of.y : of.x),
                             (e & 2) ? s.y : s.x, f[i + e]);
      }
    }
  }

  __device__ void multiply(const CUtensorMap* out_map) const {
    const int count = items();
    if (count == 0) return ptx::cluster_arrive();
    const uint32_t tokens = wgmma_operand(base);
    Sum c[S::kSums];
    float f[S::kSums];
    uint32_t a[S::kCodeSets][4][4];
    SliceScales scales;
    uint32_t done = 0;  // slices
    uint32_t slab = base + S::kWeights + (ptx::thread() >> 5) * S::kSlabBytes;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) c[i] = 0;
    ptx::mbarrier_wait(slice_full(0), 0);
    fetch_scales(scales, slab);
    expand(a[0], scales, slab + lane * 16, 0);
    ptx::grid_wait();
#pragma unroll 1
    for (int item = 0; item < count; ++item) {
      const RsWork work = work_of(item);
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) f[i] = 0.0f;
      const float t = S::kScalesEarly ? scale_for_later(work) : 1.0f;
#pragma unroll 1
      for (int left = work.slice1 - work.slice0; left > 0; --left) {
        const bool more = left > 1 || item + 1 < count;
        SliceScales next;
        const int acts = done % kRingSlices * S::kStages;  // the slice's stages in the ring
        if constexpr (S::kGroupScales) {
          ptx::mbarrier_wait(scales_full(done % S::kScaleSlices), done / S::kScaleSlices & 1);
        }
#pragma unroll
        for (int u = 0; u < S::kStages; ++u) {
          if constexpr (S::kGroupScales) {
            scales.scales[0] =
                ptx::load4_shared(slab + kSlabCodeBytes + ((lane >> 2) * S::kSlabGroups + u) * 4);
          }
          ptx::mbarrier_wait(act_full(acts + u % S::kActs), act_phase(done, u));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
              const int step = part * kSteps + j;
              Operands::multiply(
                  c, a[u % S::kCodeSets][step],
                  wgmma_descriptor(tokens + (acts + u % S::kActs) * (S::kActBytes >> 4) + 2 * step),
                  j != 0 || (kPaired && u % 2 != 0));
            }
            wgmma_commit();
            if (part == 0) {                // meanwhile, the codes of the next stage
              if (kPaired && u % 2 != 0) {  // into registers that the stage before has read
                wgmma_wait<1>();
                release_stage(acts + (u - 1) % S::kActs);
              }
              if (u + 1 == S::kStages) {
                leave_slab(done, slab);
                ptx::mbarrier_wait_if(more, slice_full((done + 1) % S::kSlices),
                                      (done + 1) / S::kSlices & 1);
                fetch_scales(next, slab);
              } else if (S::kFirstByBlocks && (u + 1) % S::kSpan == 0) {
                ptx::mbarrier_wait_if(done == 0, first_full((u + 1) / S::kSpan), 0);
              }
              if constexpr (S::kCodeSets == 2) expand_next(a[(u + 1) % 2], scales, next, slab, u);
            }
            if (kPaired && u % 2 == 0) continue;  // promoted with the next stage
            wgmma_wait<0>();
            wgmma_settle(c);
            if (part + 1 == kParts) release_stage(acts + u % S::kActs);
            if constexpr (S::kCodeSets == 1) expand_next(a[0], scales, next, slab, u);
            const int group = (u * kDepth + part * (kDepth / kParts)) / S::kPromoted;
            const float2 scale = weight_scales(scales.scales[S::kGroupScales ? 0 : group]);
            if constexpr (S::kGroupScales) {
              promote(c, f, scale, group_scales(done % S::kScaleSlices, u) + (lane & 3) * 8);
            } else {
              promote(c, f, scale);
            }
          }
        }
        if constexpr (S::kGroupScales) {
          __syncwarp();
          ptx::mbarrier_arrive_if(lane == 0, scales_empty(done % S::kScaleSlices));
        }
        ++done;
        scales = next;
      }
      const int of = ptx::thread() >> 7;
      const uint32_t token_scales = S::kScalesEarly ? base + S::kTokenScales + of * kTokens * 4 : 0;
      if (S::kScalesEarly && (ptx::thread() & 127) < kTokens) {
        ptx::store_float_shared(token_scales + (ptx::thread() & 127) * 4, t);
      }
      if (in_cluster()) {
        const int warp = ptx::thread() >> 5;
        const typename S::Output output{p.end, cluster, rank, ptx::lane(), token_scales};
        return output.finish_in_cluster(work_of(0), f, warp >> 2,
                                        base + S::kWeights + warp * S::kSlabBytes, S::kSliceBytes);
      }
      if (item + 1 == count) ptx::cluster_arrive();  // the other block's barriers are done with
      // all of it made anew: nothing of it takes registers while products run
      const typename S::Output output{p.end, cluster, rank, ptx::lane(), token_scales};
      output.finish(work_of(ptx::opaque(item)), f, out_map, of, base + S::kOut + of * S::kStageOut);
    }
    typename S::Output{p.end, cluster, rank, lane}.finish_spread(ptx::thread() >> 7);
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_all();
  }

  /// p.end.t of one of the tile's tokens a thread, asked for before the products.
  __device__ float scale_for_later(const RsWork& work) const {
    const int token = ptx::thread() & 127;
    const int64_t row = int64_t{work.token_tile} * kTokens + token;
    return p.end.t == nullptr || token >= kTokens || row >= p.end.m
               ? 1.0f
               : ptx::load_float(p.end.t + row);
  }

  /// Of stage u of slice `done` of this block's work: how often the ring was full before, modulo 2.
  __device__ static uint32_t act_phase(uint32_t done, int u) {
    if constexpr (S::kActs < S::kStages) {
      return (done * (S::kStages / S::kActs) + u / S::kActs) & 1;
    } else {
      return done / kRingSlices & 1;
    }
  }

  /// This warp's products have read that stage of the activations.
  __device__ void release_stage(int act) const {
    ptx::mbarrier_arrive_cluster_if(
        lane < 2, ptx::cluster_address(act_empty(act), first_of_pair + (lane & 1)));
  }

  /// This warp has read its slab of slice `done`; on to the next in the ring.
  __device__ void leave_slab(uint32_t done, uint32_t& slab) const {
    __syncwarp();
    ptx::mbarrier_arrive_if(lane == 0, slice_empty(done % S::kSlices));
    const bool last = (done + 1) % S::kSlices == 0;
    slab += last ? (1 - S::kSlices) * S::kSliceBytes : S::kSliceBytes;
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    rs_product(const __grid_constant__ CUtensorMap act_map,
               const __grid_constant__ CUtensorMap out_map, const __grid_constant__ RsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  if (threadIdx.x == 32) {
    ptx::tensor_prefetch(&act_map);
    ptx::tensor_prefetch(&out_map);
  }
  const RsKernel<S> kernel{
      p,
      ptx::shared_address(shared),
      static_cast<int>(blockIdx.x & 1),
      static_cast<int>(blockIdx.x >> 1),
      static_cast<int>(threadIdx.x & 31),
      S::kInCluster ? static_cast<int>(blockIdx.x) % (2 * p.end.schedule.parts) & ~1 : 0};
  // Weights are copied at once: to this block alone, and no kernel in front has written them.
  const bool copies_weights = warp == S::kMathWarps + 1;
  if (copies_weights && kernel.lane == 0) kernel.init_barriers();
  __syncwarp();
  ptx::cluster_arrive();
  if (!copies_weights) ptx::cluster_wait();
  ptx::grid_launch_dependents();
  if (warp >= S::kMathWarps) {
    ptx::register_decrease<S::kProducerRegisters>();
    if (warp == S::kMathWarps && kernel.lane == 0) kernel.copy_activations(&act_map);
    if (copies_weights) {
      if (kernel.lane < S::kMathWarps) kernel.copy_weights();
      __syncwarp();
      ptx::cluster_wait();
    }
    if constexpr (S::kGroupScales) {
      if (warp == S::kMathWarps + 2) kernel.copy_scales();
    }
    ptx::cluster_arrive();
    if (kernel.in_cluster()) {  // these only come along: finish_in_cluster()
      ptx::cluster_wait();
      ptx::cluster_arrive();
    }
  } else {
    ptx::register_increase<S::kMathRegisters>();
    kernel.multiply(&out_map);
  }
  ptx::cluster_wait();  // nobody leaves while the other still arrives at its barriers
}

// ---- launch -------------------------------------------------------------------------------------

/// acts: (args.m, padded_k) of bytes or of 16 bits, contiguous, in the order of the operands.
template <class S>
cudaError_t launch_rs_product(const GemmArgs& args, const void* acts, const RsConfig& config,
                              void* scratch, cudaStream_t stream) {
  const bool in_cluster = S::kInCluster && config.parts >= 2 && config.parts <= 4;
  if (config.parts != 1 && !in_cluster) return cudaErrorInvalidValue;
  if (config.parts > args.layout.slices) return cudaErrorInvalidValue;
  RsParams p = {};
  p.slabs = args.slabs;
  p.tiles = args.layout.tiles;
  p.slices = args.layout.slices;
  p.bf16_scales = args.bf16_scales;
  p.t = args.group_scales ? args.scales : nullptr;
  p.t_stride = static_cast<int>(args.layout.k / args.layout.group_size);
  p.group_size = static_cast<int>(args.layout.group_size);
  p.end.t = args.group_scales ? nullptr : args.scales;
  p.end.m = args.m;
  p.end.n = args.layout.n;
  p.end.out = args.out;
  p.end.schedule = rs_schedule_of(args.layout, args.m, config);
  p.end.spread = p.end.schedule.shares_widely();
  p.end.arrived = static_cast<uint32_t*>(scratch);
  p.end.parts = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + kFlagBytes);
  CUtensorMap act_map, out_map = {};
  const TensorElement act_type = S::kSpan == 1 ? TensorElement::u8 : TensorElement::f16;
  cudaError_t error =
      make_tensor_map(&act_map, acts, act_type, args.layout.padded_k(), args.m,
                      args.layout.padded_k(), kBlockDepth / S::kSpan, S::kTokens / 2);
  if (error != cudaSuccess) return error;
  if (args.out.type != Element::f32) {
    const TensorElement type =
        args.out.type == Element::bf16 ? TensorElement::bf16 : TensorElement::f16;
    error = make_tensor_map(&out_map, args.out.y, type, args.layout.n, args.m, args.out.stride, 64,
                            S::kTokens);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.end.schedule.workers * 2));
  return launch_kernel(rs_product<S>,
                       {.grid = grid,
                        .threads = S::kThreads,
                        .shared_bytes = S::kShared,
                        .stream = stream,
                        .programmatic = config.programmatic,
                        .cluster = 2 * config.parts},
                       act_map, out_map, p);
}

/// Launches the first of the shapes that is the wanted one.
template <class First, class... Rest>
cudaError_t launch_rs_shape(const GemmArgs& args, const void* acts, const RsConfig& config,
                            void* scratch, cudaStream_t stream) {
  if (config.token_tile == First::kTokens && config.math_groups == First::kMathGroups &&
      config.blocks == First::kResident && args.layout.promoted == First::kPromoted &&
      args.group_scales == First::kGroupScales) {
    return launch_rs_product<First>(args, acts, config, scratch, stream);
  }
  if constexpr (sizeof...(Rest) > 0) {
    return launch_rs_shape<Rest...>(args, acts, config, scratch, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda
