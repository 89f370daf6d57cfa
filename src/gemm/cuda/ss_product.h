// The products of w4a8_ss_sm90 and w4a16_ss_sm90, by wgmma for many tokens: weights are expanded
// first, those of the first tiles by a launch before this one (expand_sm90.cu), the others here,
// beside the products (ss_beside.h); then both operands are multiplied from shared memory.
// Promotion to float every 128 k, in order of k: the bits of the CPU kernels. Source of the scheme:
// DeepGEMM's promotion, here with one scale per weight column and group. Device code only.
//
//               T tokens              a block: two or three math warpgroups of 64 columns, one
//            +-------------+          producer warpgroup: a warp that copies activations, one that
//    WG 0    |  64 columns |          copies weights, two that expand them. A cluster of two blocks
//    WG 1    |  64 columns |          works on neighbouring columns and shares the
//   (WG 2)   |  64 columns |          activations: each block copies half and multicasts it.
//            +-------------+
//
//    image ------- bulk copies ----> ring --------wgmma A--+
//    activations - tensor copies --> ring --------wgmma B--+--> accumulators --> fp32 --> y
//
// A stage of the rings is 128 bytes of k: 128 k, or 64 of 16-bit operands.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/register_budget.h"
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/ss_beside.h"
#include "gemm/cuda/ss_image.h"
#include "gemm/cuda/tensor_map.h"
#include "gemm/cuda/tile_output.h"
#include "gemm/cuda/wgmma.h"
#include "gemm/cuda/wgmma_shared.h"

namespace nibble::cuda {

#ifdef NIBBLE_RACECHECK  // it knows of an arrival only what the arriving thread itself has done
inline constexpr int kReaders = 32;
#else
inline constexpr int kReaders = 1;  // lanes of a warp that say that it has read its weights' scales
#endif

/// What products take as weights.
template <class Products>
inline constexpr Expanded kOperandOf = Expanded::int8;
template <>
inline constexpr Expanded kOperandOf<E4m3Products> = Expanded::e4m3;
template <>
inline constexpr Expanded kOperandOf<HalfProducts<Element::f16>> = Expanded::f16;
template <>
inline constexpr Expanded kOperandOf<HalfProducts<Element::bf16>> = Expanded::bf16;

/// halved: sums of half the tokens are promoted while the others are multiplied.
template <class ProductsOf, int tokens, int math_groups, bool halved, bool group_scales>
struct SsShape {
  using Products = ProductsOf;
  static constexpr bool kHalved = halved, kGroupScales = group_scales;
  static constexpr int kTokens = tokens, kMathGroups = math_groups, kMathWarps = 4 * kMathGroups;
  static constexpr int kThreads = 128 * (kMathGroups + 1);
  // of a thread; a block starts with as many for all as there are, in steps of 8
  static constexpr int kMathRegisters = kMathGroups == 2 ? 224 : 144;
  static constexpr int kProducerRegisters = kMathGroups == 2 ? 56 : 80;
  static_assert(registers_suffice(1, 128 * kMathGroups, kMathRegisters, 128, kProducerRegisters));
  static constexpr int kSums = kTokens / 2;
  static constexpr int kSpan = Products::kSpan;  // stages of 128 k
  static constexpr int kStages = 4;
  static constexpr Expanded kOperand = kOperandOf<Products>;
  static constexpr SsImage kImage = {.columns = 64 * kMathGroups, .weight_bytes = kSpan};
  static constexpr int kActBytes = kTokens * 128;
  static constexpr int kWeightStage =
      (kImage.part_bytes() + kImage.scale_bytes() + 1023) / 1024 * 1024;
  static constexpr int kStageOut = TileOutput<kTokens, kMathGroups>::kStageBytes;
  static constexpr int kScaleBytes = kTokens * 4;

  // shared memory
  static constexpr int kWeights = kStages * kActBytes;
  static constexpr int kOut = kWeights + kStages * kWeightStage;
  static constexpr int kBarriers = kOut + kMathGroups * kStageOut;
  static constexpr int kActScales = kBarriers + 8 * 4 * kStages;           // of a group
  static constexpr int kTokenScales = kActScales + kStages * kScaleBytes;  // of each warpgroup
  static constexpr int kShared = kTokenScales + kMathGroups * kScaleBytes;
  static_assert(kShared <= 232448 && kTokens % 16 == 0);
  static_assert(128 * (kMathGroups * kMathRegisters + kProducerRegisters) <=
                kThreads * (65536 / kThreads / 8 * 8));  // more would never come
};

struct SsParams {
  const uint8_t* image;
  const float* group_scales;  // of the activations: (groups, scale_rows), or null
  int64_t scale_rows;
  int blocks_of_group;
  SsBeside beside;
  TileOutputParams end;
};

template <class S>
struct SsKernel {
  const SsParams& p;
  uint32_t base;
  int rank, cluster, lane;

  __device__ uint32_t act_full(int i) const { return base + S::kBarriers + 8 * i; }
  __device__ uint32_t act_empty(int i) const { return act_full(S::kStages + i); }
  __device__ uint32_t weights_full(int i) const { return act_full(2 * S::kStages + i); }
  __device__ uint32_t weights_empty(int i) const { return act_full(3 * S::kStages + i); }

  __device__ void init_barriers() const {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(act_full(i), 1);
      ptx::mbarrier_init(act_empty(i), 2 * S::kMathWarps);  // the warps of both blocks
      ptx::mbarrier_init(weights_full(i), 1);
      ptx::mbarrier_init(weights_empty(i), S::kMathWarps * kReaders);
    }
    ptx::fence_mbarrier_init();
  }

  /// What each role does with each block of k of this worker, stage after stage: part 0 and, of
  /// 16-bit operands, part 1.
  template <class Body>
  __device__ void each_stage(const Body& body) const {
    int stage = 0;
    uint32_t phase = 0;
    const int items = p.end.schedule.items(cluster);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
#pragma unroll 1
      for (int b = work.slice0; b < work.slice1; ++b) {
#pragma unroll
        for (int part = 0; part < S::kSpan; ++part) {
          body(work, b, part, stage, phase);
          if (++stage == S::kStages) stage = 0, phase ^= 1;
        }
      }
    }
  }

  __device__ void copy_activations(const CUtensorMap* map) const {
    each_stage([&](const RsWork& work, int b, int part, int stage, uint32_t phase) {
      constexpr int kDepth = kBlockDepth / S::kSpan, kRows = S::kTokens / 2;
      ptx::mbarrier_wait(act_empty(stage), phase ^ 1);
      ptx::mbarrier_expect(act_full(stage), S::kActBytes + (S::kGroupScales ? S::kScaleBytes : 0));
      if constexpr (S::kGroupScales) {
        ptx::bulk_load(base + S::kActScales + stage * S::kScaleBytes,
                       p.group_scales + b / p.blocks_of_group * p.scale_rows +
                           int64_t{work.token_tile} * S::kTokens,
                       S::kScaleBytes, act_full(stage));
      }
      ptx::tensor_load_multicast(base + stage * S::kActBytes + rank * (S::kActBytes / 2), map,
                                 (b * S::kSpan + part) * kDepth,
                                 work.token_tile * S::kTokens + rank * kRows, act_full(stage), 3);
    });
  }

  __device__ void copy_weights() const {
    each_stage([&](const RsWork& work, int b, int part, int stage, uint32_t phase) {
      // the scales come with the last part, behind which they lie
      const int bytes =
          S::kImage.part_bytes() + (part + 1 == S::kSpan ? S::kImage.scale_bytes() : 0);
      const int tile = work.weight_tile * 2 + rank;
      constexpr int kBlocks = kSlabDepth / kBlockDepth;
      const bool next_piece = part == 0 && (b % kBlocks == 0 || b == work.slice0);
      if (next_piece && p.beside.has(tile)) p.beside.wait<S::kImage>(tile, b / kBlocks);
      ptx::mbarrier_wait(weights_empty(stage), phase ^ 1);
      ptx::mbarrier_expect(weights_full(stage), bytes);
      const int64_t block = int64_t{tile} * p.end.schedule.slices + b;
      ptx::bulk_load(base + S::kWeights + stage * S::kWeightStage,
                     p.image + block * S::kImage.block_bytes() + part * S::kImage.part_bytes(),
                     bytes, weights_full(stage));
    });
  }

  /// What two warps do beside.
  __device__ void expand_weights() const {
    if (p.beside.first_pair < p.beside.pairs) p.beside.expand<S::kOperand, S::kImage>(lane);
  }

  /// The sums of a warpgroup. Wherever it comes, the stage that is next has been waited for: that,
  /// and the scales, while products are under way.
  struct Sums {
    using Sum = typename S::Products::Sum;
    static constexpr int kHalf = S::kSums / 2;

    const SsKernel& k;
    uint32_t weights, tokens;     // operands of stage 0
    uint32_t scales, act_scales;  // shared addresses of stage 0
    float f[S::kSums];
    int stage = 0;
    uint32_t phase = 0;

    __device__ Sums(const SsKernel& kernel, int group, int warp)
        : k(kernel),
          weights(wgmma_operand(kernel.base + S::kWeights + group * 64 * 128)),
          tokens(wgmma_operand(kernel.base)),
          scales(kernel.base + S::kWeights + S::kImage.part_bytes() +
                 (group * 64 + warp * 16 + (kernel.lane >> 2)) * 4),
          act_scales(kernel.base + S::kActScales + (kernel.lane & 3) * 8) {}

    __device__ void wait_full(bool wanted) const {
      ptx::mbarrier_wait_if(wanted, k.weights_full(stage), phase);
      ptx::mbarrier_wait_if(wanted, k.act_full(stage), phase);
    }

    /// Of the next products, ahead of time: ptxas would make it from the thread's number again.
    __device__ uint32_t next_weights() const {
      return ptx::opaque(weights + stage * (S::kWeightStage >> 4));
    }

    /// Of the stage's tokens from `token` on, as many as c has sums for; keep: added to c.
    template <int sums>
    __device__ void start(Sum (&c)[sums], uint32_t a, int token, bool keep) const {
      const uint32_t t = tokens + stage * (S::kActBytes >> 4) + token * (128 >> 4);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        S::Products::multiply(c, wgmma_descriptor(a + 2 * j), wgmma_descriptor(t + 2 * j),
                              keep || j != 0);
      }
      wgmma_commit();
    }

    /// On to the next stage; returns the one that this was. Waits for it, if wanted.
    __device__ int advance(uint32_t& a, bool wanted) {
      const int now = stage;
      if (++stage == S::kStages) stage = 0, phase ^= 1;
      a = next_weights();
      wait_full(wanted);
      return now;
    }

    __device__ float2 scales_of(int at) const {  // of this thread's two columns
      return {ptx::load_float_shared(scales + at * S::kWeightStage),
              ptx::load_float_shared(scales + at * S::kWeightStage + 32)};
    }

    /// c: of the tokens from `first` on, products of stage `at`.
    template <int sums>
    __device__ void promote(const Sum (&c)[sums], int first, float2 s, int at) {
#pragma unroll
      for (int j = 0; j < sums / 4; ++j) {
        float t[2];
        if constexpr (S::kGroupScales) {
          const uint2 pair =
              ptx::load8_shared(act_scales + at * S::kScaleBytes + first * 4 + j * 32);
          t[0] = __uint_as_float(pair.x), t[1] = __uint_as_float(pair.y);
        }
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          float sum = static_cast<float>(c[i]);
          if constexpr (S::kGroupScales) sum = __fmul_rn(sum, t[i & 1]);
          float& to = f[first / 2 + i];
          to = __fmaf_rn(sum, (i & 2) ? s.y : s.x, to);
        }
      }
    }

    __device__ void free_stage(int at) const {
      ptx::mbarrier_arrive_cluster_if(k.lane < 2,
                                      ptx::cluster_address(k.act_empty(at), k.lane & 1));
      ptx::mbarrier_arrive_if(k.lane < kReaders, k.weights_empty(at));
    }

    /// Of `count` blocks; more: others follow.
    __device__ void sum(int count, bool more) {
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) f[i] = 0.0f;
      if constexpr (S::kHalved) {
        sum_halves(count, more);
      } else {
        sum_whole(count, more);
      }
    }

    __device__ void sum_whole(int count, bool more) {
      Sum c[S::kSums];
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) c[i] = 0;
      uint32_t a = next_weights();
#pragma unroll 1
      for (; count > 0; --count) {
        start(c, a, 0, false);
        if constexpr (S::kSpan == 2) {
          const int first = advance(a, true);
          start(c, a, 0, true);
          wgmma_wait<1>();
          free_stage(first);
        }
        const float2 s = scales_of(stage);
        const int now = advance(a, more || count > 1);
        wgmma_wait<0>();
        wgmma_settle(c);
        if (!S::kGroupScales) free_stage(now);
        promote(c, 0, s, now);
        if (S::kGroupScales) free_stage(now);
      }
    }

    // A warpgroup that waits for its products before it promotes them leaves the tensor cores to
    // the others, which do the same: with conversions from int32, a third of the time. So half of
    // the tokens is always under way. ptxas takes no products across the end of a loop that are
    // read behind it (C7514): several blocks of k a turn.
    __device__ void sum_halves(int count, bool more) {
      constexpr int kBlocks = S::kGroupScales ? 1 : 2;  // more spill
#pragma unroll 1
      for (; count >= kBlocks; count -= kBlocks) sum_blocks<kBlocks>(more || count > kBlocks);
#pragma unroll 1
      for (; count > 0; --count) sum_blocks<1>(more || count > 1);
    }

    template <int blocks>
    __device__ void sum_blocks(bool more) {
      static_assert(S::kSpan == 1);
      Sum c[2][kHalf];
      uint32_t a = next_weights();
      start(c[0], a, 0, false);
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        start(c[1], a, kHalf * 2, false);
        const float2 s = scales_of(stage);
        const int now = advance(a, more || b + 1 < blocks);
        wgmma_wait<1>();
        wgmma_settle(c[0]);
        promote(c[0], 0, s, now);
        if (b + 1 < blocks) {
          start(c[0], a, 0, false);
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        wgmma_settle(c[1]);
        if (!S::kGroupScales) free_stage(now);
        promote(c[1], kHalf * 2, s, now);
        if (S::kGroupScales) free_stage(now);
      }
    }
  };

  __device__ float bias(int64_t column) const {  // -0: what it is added to stays as it is
    return p.end.out.bias == nullptr || column >= p.end.n ? -0.0f : __ldg(p.end.out.bias + column);
  }

  /// Of a tile that is nobody else's: what TileOutput::finish() does, with the scales of the tokens
  /// in shared memory, because nothing is multiplied meanwhile.
  template <Element type>
  __device__ void store(const RsWork& work, const float (&f)[S::kSums], const CUtensorMap* map,
                        int group, uint32_t stage) const {
    // made anew: nothing of it takes registers while products run
    const int thread = ptx::thread() & 127, warp = thread >> 5, lane = ptx::lane();
    const int column0 = (work.weight_tile * 2 + rank) * S::kImage.columns + group * 64;
    const int column = column0 + warp * 16 + (lane >> 2);
    const float b[2] = {bias(column), bias(column + 8)};
    if (thread == 0) ptx::bulk_wait_read<0>();
    ptx::copy_wait<0>();  // of the scales
    ptx::barrier_sync(1 + group, 128);
    const uint32_t scales = token_scales(group) + (lane & 3) * 8;
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; j += 2) {
      uint32_t r[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint2 pair = ptx::load8_shared(scales + (j + h) * 32);
        const float t0 = __uint_as_float(pair.x), t1 = __uint_as_float(pair.y);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* sum = f + 4 * (j + h) + 2 * i;
          r[2 * h + i] =
              rounded_pair<type>(__fmaf_rn(sum[0], t0, b[i]), __fmaf_rn(sum[1], t1, b[i]));
        }
      }
      const int token = 8 * (j + (lane >> 4)) + (lane & 7), chunk = 2 * warp + ((lane >> 3) & 1);
      ptx::store_matrices_transposed(stage + token * 128 + ((chunk ^ (token & 7)) << 4),
                                     make_uint4(r[0], r[1], r[2], r[3]));
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(1 + group, 128);
    if (thread == 0 && column0 < p.end.n) {
      ptx::tensor_store(map, column0, work.token_tile * S::kTokens, stage);
      ptx::bulk_commit();
    }
  }

  /// Where the scales of a tile's tokens lie for a warpgroup.
  __device__ uint32_t token_scales(int group) const {
    return base + S::kTokenScales + group * S::kScaleBytes;
  }
  /// Asks for the scales of the tokens from token0 on, without registers to wait in.
  __device__ void copy_token_scales(int64_t token0, int group) const {
    for (int i = threadIdx.x & 127; i < S::kTokens; i += 128) {
      const int64_t token = token0 + i;
      const bool exists = token < p.end.m;
      ptx::copy4_async(token_scales(group) + i * 4, p.end.t + (exists ? token : 0), exists ? 4 : 0);
    }
    ptx::copy_commit();
  }

  __device__ void multiply(const CUtensorMap* out_map) const {
    const int items = p.end.schedule.items(cluster);
    if (items == 0) return;
    const int group = threadIdx.x >> 7;
    if (p.end.t == nullptr) {
      for (int i = threadIdx.x & 127; i < S::kTokens; i += 128) {
        ptx::store_float_shared(token_scales(group) + i * 4, 1.0f);
      }
    }
    Sums sums(*this, group, (threadIdx.x >> 5) & 3);
    sums.wait_full(true);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
      if (p.end.t != nullptr) copy_token_scales(int64_t{work.token_tile} * S::kTokens, group);
      sums.sum(work.slice1 - work.slice0, item + 1 < items);
      const int of = ptx::thread() >> 7;
      const uint32_t stage = base + S::kOut + of * S::kStageOut;
      const bool whole = work.slice0 == 0 && work.slice1 == p.end.schedule.slices;
      if (whole && p.end.out.type != Element::f32) {
        if (p.end.out.type == Element::bf16) {
          store<Element::bf16>(work, sums.f, out_map, of, stage);
        } else {
          store<Element::f16>(work, sums.f, out_map, of, stage);
        }
      } else {
        const TileOutput<S::kTokens, S::kMathGroups> output{p.end, cluster, rank, ptx::lane()};
        output.finish(work, sums.f, out_map, of, stage);
      }
    }
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_all();
  }
};

template <class S>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(S::kThreads, 1)
    ss_product(const __grid_constant__ CUtensorMap act_map,
               const __grid_constant__ CUtensorMap out_map, const __grid_constant__ SsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  const SsKernel<S> kernel{p, ptx::shared_address(shared), static_cast<int>(blockIdx.x & 1),
                           static_cast<int>(blockIdx.x >> 1), static_cast<int>(threadIdx.x & 31)};
  if (threadIdx.x == 0) {
    kernel.init_barriers();
    ptx::tensor_prefetch(&act_map);
    if (p.end.out.type != Element::f32) ptx::tensor_prefetch(&out_map);
  }
  ptx::cluster_sync();
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  if (warp >= S::kMathWarps) {
    ptx::register_decrease<S::kProducerRegisters>();
    if (warp == S::kMathWarps && kernel.lane == 0) kernel.copy_activations(&act_map);
    if (warp == S::kMathWarps + 1 && kernel.lane == 0) kernel.copy_weights();
    if (warp >= S::kMathWarps + 2) kernel.expand_weights();
  } else {
    ptx::register_increase<S::kMathRegisters>();
    kernel.multiply(&out_map);
  }
  ptx::cluster_sync();  // nobody leaves while the other still arrives at its barriers
}

/// acts: (args.m, columns) of `type`, rows `stride` elements apart.
struct SsActivations {
  const void* data;
  TensorElement type;
  int64_t columns, stride;
};

/// The second of the two launches.
template <class S>
cudaError_t launch_ss_product(const GemmArgs& args, const SsActivations& acts,
                              const SsConfig& config, void* scratch, cudaStream_t stream) {
  const SsScratch at = ss_scratch(args.layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  SsParams p = {};
  p.image = config.expanded ? args.image : bytes + at.image;
  p.beside.weights = expand_source(args, bytes + at.image);
  p.beside.first_pair = static_cast<int>(ss_first_pairs(args.layout, config));
  p.beside.pairs = static_cast<int>(S::kImage.tiles(args.layout) / 2);
  p.beside.taken = reinterpret_cast<uint32_t*>(bytes + at.pieces);
  p.beside.pieces = p.beside.taken + 1;
  p.end.t = S::kGroupScales ? nullptr : args.scales;
  if (S::kGroupScales) {
    p.group_scales = reinterpret_cast<const float*>(bytes + at.scales);
    p.scale_rows = ss_scale_rows(args.m, config);
    const int64_t group_blocks = (args.layout.group_size + kBlockDepth - 1) / kBlockDepth;
    p.blocks_of_group = static_cast<int>(group_blocks);
  }
  p.end.m = args.m;
  p.end.n = args.layout.n;
  p.end.out = args.out;
  p.end.schedule = ss_schedule_of(args.layout, args.m, config);
  p.end.arrived = reinterpret_cast<uint32_t*>(bytes);
  p.end.parts = reinterpret_cast<float*>(bytes + at.parts);
  CUtensorMap act_map, out_map = {};
  cudaError_t error = make_tensor_map(&act_map, acts.data, acts.type, acts.columns, args.m,
                                      acts.stride, kBlockDepth / S::kSpan, S::kTokens / 2);
  if (error != cudaSuccess) return error;
  if (args.out.type != Element::f32) {
    const TensorElement type =
        args.out.type == Element::bf16 ? TensorElement::bf16 : TensorElement::f16;
    error = make_tensor_map(&out_map, args.out.y, type, args.layout.n, args.m, args.out.stride, 64,
                            S::kTokens);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.end.schedule.workers * 2));
  return launch_kernel(ss_product<S>,
                       {.grid = grid,
                        .threads = S::kThreads,
                        .shared_bytes = S::kShared,
                        .stream = stream,
                        .programmatic = config.programmatic},
                       act_map, out_map, p);
}

}  // namespace nibble::cuda
