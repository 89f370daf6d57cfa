// w4a16 by wgmma: as w4a8_rs_sm90.cu draws it, with weights expanded to q - z in f16 or bf16 in
// registers (operand A), x in the order of reorder_sm90.cu in shared memory (operand B, the N
// side), float sums of at most 128 k and their promotion in order of k.
//
//    slabs ------- bulk copies ------> ring of slices --(LDS, q - z)--> registers --A--+
//    x     ------- tensor copies ----> ring of blocks (64 k) -----------------------B--+--> fp32
//
// A unit is 64 k: four products. While the products of one unit run, the codes of the next are
// expanded into a second set of registers; products of two units may be in flight.
#include <cuda.h>
#include <cuda_runtime.h>

#include "gemm/cuda/halves.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/register_budget.h"
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/slab_scales.h"
#include "gemm/cuda/tensor_map.h"
#include "gemm/cuda/tile_output.h"
#include "gemm/cuda/wgmma.h"
#include "gemm/cuda/wgmma_halves.h"

namespace nibble::cuda {
namespace {

constexpr int kSharedLimit = 232448;  // of a block
constexpr int kSharedOfTwo = 115712;  // of a block beside another, which takes 1 KiB for itself
constexpr int kUnit = 64;
constexpr int kSliceUnits = kSlabDepth / kUnit;

struct RsParams {
  const uint8_t* slabs;
  int64_t tiles, slices;  // of the weights
  bool bf16_scales;
  TileOutputParams end;
};

template <int tokens, int math_groups, int promoted, Element type>
struct Shape {
  static constexpr int kTokens = tokens, kMathGroups = math_groups, kPromoted = promoted;
  static constexpr Element kType = type;
  static constexpr int kMathWarps = 4 * kMathGroups, kThreads = 128 * (kMathGroups + 1);
  static constexpr int kResident = kTokens == 32 && kMathGroups == 2 ? 2 : 1;  // blocks at once
  // of a thread: 65536 are there for all blocks, and the producers are one warpgroup
  static constexpr int kMathRegisters = kResident == 2 ? 104 : kMathGroups == 2 ? 232 : 152;
  static constexpr int kProducerRegisters = kResident == 2 ? 32 : kMathGroups == 2 ? 40 : 56;
  static_assert(registers_suffice(kResident, 128 * kMathGroups, kMathRegisters, 128,
                                  kProducerRegisters));

  static constexpr int kSlabGroups = kSlabDepth / kPromoted;
  static constexpr int kSlabBytes = kSlabCodeBytes + kSlabGroups * 40;
  static constexpr int kZeros = kSlabCodeBytes + kSlabGroups * 32;
  static constexpr int kSums = kTokens / 2;  // accumulators of a thread
  static constexpr int kActBytes = kTokens * kUnit * 2;
  static constexpr int kSliceBytes = kMathWarps * kSlabBytes;
  static constexpr int kStageOut = kTokens * 128;      // of a warpgroup: 64 columns of 16 bits
  static constexpr int kActs = kTokens <= 64 ? 8 : 4;  // blocks of x in the ring
  static constexpr int kSharedBytes = kResident == 2 ? kSharedOfTwo : kSharedLimit;
  static constexpr int kRoom = kSharedBytes - 512 - kMathGroups * kStageOut - kActs * kActBytes;
  static constexpr int kSlices = kRoom / kSliceBytes < 3 ? kRoom / kSliceBytes : 3;
  static constexpr int kOut = kActs * kActBytes;
  static constexpr int kWeights = kOut + kMathGroups * kStageOut;
  static constexpr int kBarriers = (kWeights + kSlices * kSliceBytes + 15) / 16 * 16;
  static constexpr int kShared = kBarriers + 8 * 2 * (kActs + kSlices);
  static_assert(kSlices >= 2 && kShared <= kSharedBytes && kSliceUnits % kActs == 0);
};

template <class S>
struct Kernel {
  static constexpr int kTokens = S::kTokens, kMathGroups = S::kMathGroups;
  static constexpr int kMathWarps = S::kMathWarps;
  static constexpr int kSteps = S::kPromoted < kUnit ? S::kPromoted / 16 : 4;  // between promotions
  static constexpr int kParts = 4 / kSteps;                                    // of a unit
  static constexpr bool kPaired = S::kPromoted == kBlockDepth;  // two units a promotion

  const RsParams& p;
  uint32_t base;
  int rank, cluster, lane;

  __device__ uint32_t act_full(int i) const { return base + S::kBarriers + 8 * i; }
  __device__ uint32_t act_empty(int i) const { return act_full(S::kActs + i); }
  __device__ uint32_t slice_full(int i) const { return act_full(2 * S::kActs + i); }
  __device__ uint32_t slice_empty(int i) const { return act_full(2 * S::kActs + S::kSlices + i); }
  __device__ void init_barriers() const {
    for (int i = 0; i < S::kActs; ++i) {
      ptx::mbarrier_init(act_full(i), 1);
      ptx::mbarrier_init(act_empty(i), 2 * kMathWarps);  // the warps of both blocks
    }
    for (int i = 0; i < S::kSlices; ++i) {
      ptx::mbarrier_init(slice_full(i), 1);
      ptx::mbarrier_init(slice_empty(i), kMathWarps);
    }
    ptx::fence_mbarrier_init();
  }

  /// One thread: this block's half of every block of x, for both blocks of the cluster.
  __device__ void copy_activations(const CUtensorMap* map) const {
    ptx::grid_wait();
    uint32_t phase = 1;  // the first pass through the ring does not wait
    const int items = p.end.schedule.items(cluster);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
      const int row = work.token_tile * kTokens + rank * (kTokens / 2);
#pragma unroll 1
      for (int unit = work.slice0 * kSliceUnits; unit < work.slice1 * kSliceUnits;
           unit += S::kActs, phase ^= 1) {
#pragma unroll 1
        for (int i = 0; i < S::kActs; ++i) {
          ptx::mbarrier_wait(act_empty(i), phase);
          ptx::mbarrier_expect(act_full(i), S::kActBytes);
          ptx::tensor_load_multicast(base + i * S::kActBytes + rank * (S::kActBytes / 2), map,
                                     (unit + i) * kUnit, row, act_full(i), 3);
        }
      }
    }
  }

  /// The first lanes of one warp: a slab each, one for every math warp.
  __device__ void copy_weights() const {
    int stage = 0;
    uint32_t phase = 1;
    const int items = p.end.schedule.items(cluster);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
      const int64_t wanted =
          int64_t{work.weight_tile} * (2 * kMathWarps) + rank * kMathWarps + lane;
      const int64_t tile = wanted < p.tiles ? wanted : p.tiles - 1;
      const uint8_t* from = p.slabs + (tile * p.slices + work.slice0) * S::kSlabBytes;
#pragma unroll 1
      for (int slice = work.slice0; slice < work.slice1; ++slice, from += S::kSlabBytes) {
        ptx::mbarrier_wait(slice_empty(stage), phase);
        if (lane == 0) ptx::mbarrier_expect(slice_full(stage), S::kSliceBytes);
        __syncwarp((1 << kMathWarps) - 1);
        ptx::bulk_load(base + S::kWeights + stage * S::kSliceBytes + lane * S::kSlabBytes, from,
                       S::kSlabBytes, slice_full(stage), ptx::kEvictFirst);
        if (++stage == S::kSlices) stage = 0, phase ^= 1;
      }
    }
  }

  // ---- math -------------------------------------------------------------------------------------

  /// What a lane needs of one slice beside the codes: zero points and scales of its two columns.
  struct SliceScales {
    uint32_t zeros[S::kSlabGroups / 4];  // bytes; low nibble: column r, high: column r + 8
    uint32_t scales[S::kSlabGroups];     // low half: column r; high half: column r + 8
  };

  __device__ void fetch_scales(SliceScales& s, uint32_t slab) const {
    const uint32_t group = (lane >> 2) * S::kSlabGroups;
#pragma unroll
    for (int i = 0; i < S::kSlabGroups / 4; ++i) {
      s.zeros[i] = ptx::load4_shared(slab + S::kZeros + group + 4 * i);
      const uint4 four = ptx::load16_shared(slab + kSlabCodeBytes + (group + 4 * i) * 4);
      s.scales[4 * i] = four.x;
      s.scales[4 * i + 1] = four.y;
      s.scales[4 * i + 2] = four.z;
      s.scales[4 * i + 3] = four.w;
    }
  }

  /// Unit u of the slab whose codes of this lane begin at `codes`, as q - z.
  __device__ void expand(uint32_t (&a)[4][4], const SliceScales& s, uint32_t codes, int u) const {
    const uint4 half = ptx::load16_shared(codes + u * 512);
    uint32_t step[2][2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int group = (u * kUnit + 32 * j) / S::kPromoted;
      const uint32_t zero = s.zeros[group / 4] >> (8 * (group % 4));
      const HalfExpander<S::kType> r(zero & 15), r8(zero >> 4 & 15);
      if (j == 0) {
        expand_step<false>(half, r, r8, step[0]);
      } else {
        expand_step<true>(half, r, r8, step[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) a[i][w] = step[i / 2][i % 2][w];
      wgmma_settle(a[i]);
    }
  }

  __device__ void promote(const float (&c)[S::kSums], float (&f)[S::kSums], float2 s) const {
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) f[i] = __fmaf_rn(c[i], (i & 2) ? s.y : s.x, f[i]);
  }

  __device__ void multiply(const CUtensorMap* out_map) const {
    const int items = p.end.schedule.items(cluster);
    if (items == 0) return ptx::cluster_arrive();
    const uint32_t tokens = wgmma_operand(base);
    float c[S::kSums];
    float f[S::kSums];
    uint32_t a[2][4][4];
    SliceScales scales;
    int stage = 0;
    uint32_t phase = 0, slice_phase = 0,
             slab = base + S::kWeights + (ptx::thread() >> 5) * S::kSlabBytes;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) c[i] = 0;
    ptx::mbarrier_wait(slice_full(0), 0);
    fetch_scales(scales, slab);
    expand(a[0], scales, slab + lane * 16, 0);
    ptx::grid_wait();
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
#pragma unroll
      for (int i = 0; i < S::kSums; ++i) f[i] = 0.0f;
#pragma unroll 1
      for (int left = work.slice1 - work.slice0; left > 0; --left) {
        const bool more = left > 1 || item + 1 < items;
        SliceScales next;
#pragma unroll
        for (int u = 0; u < kSliceUnits; ++u) {
          const int act = u % S::kActs;
          const uint32_t b = tokens + act * (S::kActBytes >> 4);
          ptx::mbarrier_wait(act_full(act), phase);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < kSteps; ++j) {
              const int step = part * kSteps + j;
              wgmma_halves<S::kType>(c, a[u % 2][step], wgmma_descriptor(b + 2 * step),
                                     j != 0 || (kPaired && u % 2 != 0));
            }
            wgmma_commit();
            if (part == 0) {
              // the unit before has read its registers, which take the codes of the next
              if (kPaired && u % 2 != 0) {
                wgmma_wait<1>();
                release_block((u - 1) % S::kActs);
              }
              if (u + 1 < kSliceUnits) {
                expand(a[(u + 1) % 2], scales, slab + lane * 16, u + 1);
              } else {
                leave_slab(stage, slice_phase, slab);
                ptx::mbarrier_wait_if(more, slice_full(stage), slice_phase);
                fetch_scales(next, slab);
                expand(a[0], next, slab + lane * 16, 0);
              }
            }
            if (kPaired && u % 2 == 0) continue;  // promoted with the next unit
            wgmma_wait<0>();
            wgmma_settle(c);
            if (part + 1 == kParts) release_block(act);
            const int at = (u * kUnit + part * S::kPromoted) / S::kPromoted;
            promote(c, f, scales_of(scales.scales[kPaired ? u / 2 : at], p.bf16_scales));
          }
          if ((u + 1) % S::kActs == 0) phase ^= 1;
        }
        scales = next;
      }
      if (item + 1 == items) ptx::cluster_arrive();  // the other block's barriers are done with
      // all of it made anew: nothing of it takes registers while products run
      const TileOutput<kTokens, kMathGroups> output{p.end, cluster, rank, ptx::lane()};
      const int of = ptx::thread() >> 7;
      output.finish(p.end.schedule.work(cluster, ptx::opaque(item)), f, out_map, of,
                    base + S::kOut + of * S::kStageOut);
    }
    TileOutput<kTokens, kMathGroups>{p.end, cluster, rank, lane}.finish_spread(ptx::thread() >> 7);
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_all();
  }

  /// This warp's products have read block i of the ring of x.
  __device__ void release_block(int i) const {
    ptx::mbarrier_arrive_cluster_if(lane < 2, ptx::cluster_address(act_empty(i), lane & 1));
  }

  /// This warp has read its slab of the slice; on to the next in the ring.
  __device__ void leave_slab(int& stage, uint32_t& phase, uint32_t& slab) const {
    __syncwarp();
    ptx::mbarrier_arrive_if(lane == 0, slice_empty(stage));
    const bool last = stage + 1 == S::kSlices;
    stage = last ? 0 : stage + 1;
    phase ^= last;
    slab += last ? (1 - S::kSlices) * S::kSliceBytes : S::kSliceBytes;
  }
};

template <class S>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(S::kThreads, S::kResident)
    w4a16_rs_sm90(const __grid_constant__ CUtensorMap act_map,
                  const __grid_constant__ CUtensorMap out_map, const __grid_constant__ RsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  if (threadIdx.x == 32) {
    ptx::tensor_prefetch(&act_map);
    ptx::tensor_prefetch(&out_map);
  }
  const Kernel<S> kernel{p, ptx::shared_address(shared), static_cast<int>(blockIdx.x & 1),
                         static_cast<int>(blockIdx.x >> 1), static_cast<int>(threadIdx.x & 31)};
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
    ptx::cluster_arrive();
  } else {
    ptx::register_increase<S::kMathRegisters>();
    kernel.multiply(&out_map);
  }
  ptx::cluster_wait();  // nobody leaves while the other still arrives at its barriers
}

// ---- launch -------------------------------------------------------------------------------------

template <class S>
cudaError_t launch(const GemmArgs& args, const RsConfig& config, void* scratch, const void* x,
                   cudaStream_t stream) {
  RsParams p = {};
  p.slabs = args.slabs;
  p.tiles = args.layout.tiles;
  p.slices = args.layout.slices;
  p.bf16_scales = args.bf16_scales;
  p.end.t = args.scales;
  p.end.m = args.m;
  p.end.n = args.layout.n;
  p.end.out = args.out;
  p.end.schedule = rs_schedule_of(args.layout, args.m, config);
  p.end.spread = p.end.schedule.shares_widely();
  p.end.arrived = static_cast<uint32_t*>(scratch);
  p.end.parts = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + kFlagBytes);
  CUtensorMap act_map, out_map = {};
  cudaError_t error = make_tensor_map(&act_map, x, TensorElement::f16, args.layout.padded_k(),
                                      args.m, args.layout.padded_k(), kUnit, S::kTokens / 2);
  if (error != cudaSuccess) return error;
  if (args.out.type != Element::f32) {
    const TensorElement type =
        args.out.type == Element::bf16 ? TensorElement::bf16 : TensorElement::f16;
    error = make_tensor_map(&out_map, args.out.y, type, args.layout.n, args.m, args.out.stride, 64,
                            S::kTokens);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.end.schedule.workers * 2));
  return launch_kernel(w4a16_rs_sm90<S>,
                       {.grid = grid,
                        .threads = S::kThreads,
                        .shared_bytes = S::kShared,
                        .stream = stream,
                        .programmatic = config.programmatic},
                       act_map, out_map, p);
}

template <int tokens, int math_groups, int promoted>
cudaError_t launch(const GemmArgs& args, const RsConfig& config, void* scratch, const void* x,
                   cudaStream_t stream) {
  return args.x_type == Element::f16 ? launch<Shape<tokens, math_groups, promoted, Element::f16>>(
                                           args, config, scratch, x, stream)
                                     : launch<Shape<tokens, math_groups, promoted, Element::bf16>>(
                                           args, config, scratch, x, stream);
}

}  // namespace

cudaError_t launch_w4a16_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                 void* reordered, cudaStream_t stream) {
  if (config.parts != 1) return cudaErrorInvalidValue;
  const void* x = args.x_is_reordered ? args.x : reordered;
  if (!args.x_is_reordered) {
    const cudaError_t error = launch_reorder(args, reordered, stream);
    if (error != cudaSuccess) return error;
  }
  const auto is = [&](int promoted, int tokens, int math_groups, int blocks = 1) {
    return args.layout.promoted == promoted && config.token_tile == tokens &&
           config.math_groups == math_groups && config.blocks == blocks;
  };
  if (is(128, 128, 2)) return launch<128, 2, 128>(args, config, scratch, x, stream);
  if (is(128, 64, 3)) return launch<64, 3, 128>(args, config, scratch, x, stream);
  if (is(128, 32, 3)) return launch<32, 3, 128>(args, config, scratch, x, stream);
  if (is(128, 32, 2, 2)) return launch<32, 2, 128>(args, config, scratch, x, stream);
  if (is(64, 64, 2)) return launch<64, 2, 64>(args, config, scratch, x, stream);
  if (is(32, 64, 2)) return launch<64, 2, 32>(args, config, scratch, x, stream);
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
