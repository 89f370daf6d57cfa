// w4a8_ss_sm90, w4a4_ss_sm90 and w4a8_fp8_ss_sm90, by wgmma for many tokens: weights are expanded
// to 8 bits first (expand_sm90.cu), then both operands are multiplied from shared memory. Promotion
// to float every 128 k, in order of k: the bits of the CPU kernels. Source of the scheme:
// DeepGEMM's promotion, here with one scale per weight column and group.
//
//               128 tokens            a block: 192 columns, three math warpgroups of 64, one
//            +-------------+          producer warpgroup. A cluster of two blocks works on
//    WG 0    |  64 columns |          384 neighbouring columns and shares the activations:
//    WG 1    |  64 columns |          each block copies half and multicasts it.
//    WG 2    |  64 columns |
//            +-------------+
//
//    image ------- bulk copies ----> ring --------wgmma A--+
//    activations - tensor copies --> ring --------wgmma B--+--> accumulators --> fp32 --> y
//
// int8: accumulators are int32. e4m3, for w4a4: weights q - z and activations of magnitude up to 8
// are exact in e4m3, and so is their sum over 128 k in the 14 bits that Hopper's fp8 accumulation
// keeps (|S| <= 15 * 8 * 128 < 2^14; not beyond); promotion then needs no conversion. For w4a8-fp8
// the activations are e4m3 bytes, and each product of 32 k loses what lies 13 bits below its
// largest addend.
#include <cuda.h>
#include <cuda_runtime.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/register_budget.h"
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/ss_image.h"
#include "gemm/cuda/tensor_map.h"
#include "gemm/cuda/tile_output.h"
#include "gemm/cuda/wgmma.h"

namespace nibble::cuda {
namespace {

constexpr int kTokens = kSsTokens, kMathGroups = kSsMathGroups, kMathWarps = 4 * kMathGroups;
constexpr int kThreads = 128 * (kMathGroups + 1);
constexpr int kMathRegisters = 160, kProducerRegisters = 32;
static_assert(registers_suffice(1, 128 * kMathGroups, kMathRegisters, 128, kProducerRegisters));
constexpr int kSums = kTokens / 2;
constexpr int kStages = 4;
constexpr int kActBytes = kTokens * kBlockDepth;
constexpr int kWeightStage = (kImageBytes + 1023) / 1024 * 1024;
constexpr int kStageOut = TileOutput<kTokens, kMathGroups>::kStageBytes;
constexpr int kScaleBytes = kTokens * 4;

// shared memory
constexpr int kWeights = kStages * kActBytes;
constexpr int kOut = kWeights + kStages * kWeightStage;
constexpr int kBarriers = kOut + kMathGroups * kStageOut;
constexpr int kActScales = kBarriers + 8 * 4 * kStages;           // of a group, in group scales
constexpr int kTokenScales = kActScales + kStages * kScaleBytes;  // of each math warpgroup
constexpr int kShared = kTokenScales + kMathGroups * kScaleBytes;
static_assert(kShared <= 232448 && 64 * kMathGroups == kImageColumns);

struct SsParams {
  const uint8_t* image;
  const float* group_scales;  // of the activations: (groups, scale_rows), or null
  int64_t scale_rows;
  int blocks_of_group;
  TileOutputParams end;
};

struct Kernel {
  const SsParams& p;
  uint32_t base;
  int rank, cluster, lane;

  __device__ uint32_t act_full(int i) const { return base + kBarriers + 8 * i; }
  __device__ uint32_t act_empty(int i) const { return act_full(kStages + i); }
  __device__ uint32_t weights_full(int i) const { return act_full(2 * kStages + i); }
  __device__ uint32_t weights_empty(int i) const { return act_full(3 * kStages + i); }

  __device__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(act_full(i), 1);
      ptx::mbarrier_init(act_empty(i), 2 * kMathWarps);  // the warps of both blocks
      ptx::mbarrier_init(weights_full(i), 1);
      ptx::mbarrier_init(weights_empty(i), kMathWarps);
    }
    ptx::fence_mbarrier_init();
  }

  /// What each role does with each block of k of this worker, in the same order.
  template <class Body>
  __device__ void each_block(const Body& body) const {
    int stage = 0;
    uint32_t phase = 0;
    const int items = p.end.schedule.items(cluster);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
#pragma unroll 1
      for (int b = work.slice0; b < work.slice1; ++b) {
        body(work, b, stage, phase);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
    }
  }

  template <bool kGroupScales>
  __device__ void copy_activations(const CUtensorMap* map) const {
    each_block([&](const RsWork& work, int b, int stage, uint32_t phase) {
      ptx::mbarrier_wait(act_empty(stage), phase ^ 1);
      ptx::mbarrier_expect(act_full(stage), kActBytes + (kGroupScales ? kScaleBytes : 0));
      if constexpr (kGroupScales) {
        ptx::bulk_load(base + kActScales + stage * kScaleBytes,
                       p.group_scales + b / p.blocks_of_group * p.scale_rows +
                           int64_t{work.token_tile} * kTokens,
                       kScaleBytes, act_full(stage));
      }
      ptx::tensor_load_multicast(base + stage * kActBytes + rank * (kActBytes / 2), map,
                                 b * kBlockDepth, work.token_tile * kTokens + rank * (kTokens / 2),
                                 act_full(stage), 3);
    });
  }

  __device__ void copy_weights() const {
    each_block([&](const RsWork& work, int b, int stage, uint32_t phase) {
      ptx::mbarrier_wait(weights_empty(stage), phase ^ 1);
      ptx::mbarrier_expect(weights_full(stage), kImageBytes);
      const int64_t block = (int64_t{work.weight_tile} * 2 + rank) * p.end.schedule.slices + b;
      ptx::bulk_load(base + kWeights + stage * kWeightStage, p.image + block * kImageBytes,
                     kImageBytes, weights_full(stage));
    });
  }

  /// The sums of a warpgroup. Wherever it comes, the stage that is next has been waited for: that,
  /// and the scales, while products are under way.
  template <class Accumulator, bool kGroupScales>
  struct Sums {
    const Kernel& k;
    uint32_t weights, tokens;     // operands of stage 0
    uint32_t scales, act_scales;  // shared addresses of stage 0
    float f[kSums];
    Accumulator c[kSums];
    int stage = 0;
    uint32_t phase = 0;

    __device__ Sums(const Kernel& kernel, int group, int warp)
        : k(kernel),
          weights(wgmma_operand(kernel.base + kWeights + group * 64 * kBlockDepth)),
          tokens(wgmma_operand(kernel.base)),
          scales(kernel.base + kWeights + kImageScales +
                 (group * 64 + warp * 16 + (kernel.lane >> 2)) * 4),
          act_scales(kernel.base + kActScales + (kernel.lane & 3) * 8) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) c[i] = 0;
    }

    __device__ void wait_full(bool wanted) const {
      ptx::mbarrier_wait_if(wanted, k.weights_full(stage), phase);
      ptx::mbarrier_wait_if(wanted, k.act_full(stage), phase);
    }

    /// Of the next products, ahead of time: ptxas would make it from the thread's number again.
    __device__ uint32_t next_weights() const {
      return ptx::opaque(weights + stage * (kWeightStage >> 4));
    }

    __device__ void start(uint32_t a) {
      const uint32_t t = tokens + stage * (kActBytes >> 4);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma(c, wgmma_descriptor(a + 2 * j), wgmma_descriptor(t + 2 * j), j != 0);
      }
      wgmma_commit();
    }

    /// s0, s1: of this thread's columns; t_shared: scales of its tokens.
    __device__ void promote(float s0, float s1, uint32_t t_shared) {
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j) {
        float t[2];
        if constexpr (kGroupScales) {
          const uint2 pair = ptx::load8_shared(t_shared + j * 32);
          t[0] = __uint_as_float(pair.x), t[1] = __uint_as_float(pair.y);
        }
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          float sum = static_cast<float>(c[i]);
          if constexpr (kGroupScales) sum = __fmul_rn(sum, t[i & 1]);
          f[i] = __fmaf_rn(sum, (i & 2) ? s1 : s0, f[i]);
        }
      }
    }

    __device__ void free_stage(int at) const {
      ptx::mbarrier_arrive_cluster_if(k.lane < 2,
                                      ptx::cluster_address(k.act_empty(at), k.lane & 1));
      ptx::mbarrier_arrive_if(k.lane == 0, k.weights_empty(at));
    }

    /// Of `count` blocks; more: others follow.
    __device__ void sum(int count, bool more) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) f[i] = 0.0f;
      uint32_t a = next_weights();
#pragma unroll 1
      for (; count > 0; --count) {
        start(a);
        const int now = stage;
        const float s0 = ptx::load_float_shared(scales + now * kWeightStage);
        const float s1 = ptx::load_float_shared(scales + now * kWeightStage + 32);
        if (++stage == kStages) stage = 0, phase ^= 1;
        a = next_weights();
        wait_full(more || count > 1);
        wgmma_wait<0>();
        wgmma_settle(c);
        if (!kGroupScales) free_stage(now);
        promote(s0, s1, act_scales + now * kScaleBytes);
        if (kGroupScales) free_stage(now);
      }
    }
  };

  __device__ float token_scale(int64_t token) const {
    return p.end.t == nullptr || token >= p.end.m ? 1.0f : p.end.t[token];
  }
  __device__ float bias(int64_t column) const {  // -0: what it is added to stays as it is
    return p.end.out.bias == nullptr || column >= p.end.n ? -0.0f : __ldg(p.end.out.bias + column);
  }

  /// Of a tile that is nobody else's: what TileOutput::finish() does, with the scales of the tokens
  /// in shared memory, because nothing is multiplied meanwhile.
  template <Element type>
  __device__ void store(const RsWork& work, const float (&f)[kSums], const CUtensorMap* map,
                        int group, uint32_t stage) const {
    const int warp = (threadIdx.x >> 5) & 3;
    const int column0 = (work.weight_tile * 2 + rank) * kImageColumns + group * 64;
    const int column = column0 + warp * 16 + (lane >> 2);
    const float b[2] = {bias(column), bias(column + 8)};
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_read<0>();
    ptx::barrier_sync(1 + group, 128);
    const uint32_t scales = base + kTokenScales + group * kScaleBytes + (lane & 3) * 8;
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
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
    if ((threadIdx.x & 127) == 0 && column0 < p.end.n) {
      ptx::tensor_store(map, column0, work.token_tile * kTokens, stage);
      ptx::bulk_commit();
    }
  }

  template <class Accumulator, bool kGroupScales>
  __device__ void multiply(const CUtensorMap* out_map) const {
    const int items = p.end.schedule.items(cluster);
    if (items == 0) return;
    const int group = threadIdx.x >> 7, warp = (threadIdx.x >> 5) & 3;
    Sums<Accumulator, kGroupScales> sums(*this, group, warp);
    sums.wait_full(true);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
      const float t = token_scale(work.token_tile * kTokens + (threadIdx.x & 127));
      sums.sum(work.slice1 - work.slice0, item + 1 < items);
      const uint32_t stage = base + kOut + group * kStageOut;
      const bool whole = work.slice0 == 0 && work.slice1 == p.end.schedule.slices;
      if (whole && p.end.out.type != Element::f32) {
        ptx::store_float_shared(base + kTokenScales + group * kScaleBytes + (threadIdx.x & 127) * 4,
                                t);
        if (p.end.out.type == Element::bf16) {
          store<Element::bf16>(work, sums.f, out_map, group, stage);
        } else {
          store<Element::f16>(work, sums.f, out_map, group, stage);
        }
      } else {
        const TileOutput<kTokens, kMathGroups> output{p.end, cluster, rank, lane};
        output.finish(work, sums.f, out_map, group, stage);
      }
    }
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_all();
  }
};

template <class Accumulator, bool kGroupScales>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    w4a8_ss_sm90(const __grid_constant__ CUtensorMap act_map,
                 const __grid_constant__ CUtensorMap out_map, const __grid_constant__ SsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  const Kernel kernel{p, ptx::shared_address(shared), static_cast<int>(blockIdx.x & 1),
                      static_cast<int>(blockIdx.x >> 1), static_cast<int>(threadIdx.x & 31)};
  if (threadIdx.x == 0) {
    kernel.init_barriers();
    ptx::tensor_prefetch(&act_map);
    if (p.end.out.type != Element::f32) ptx::tensor_prefetch(&out_map);
  }
  ptx::cluster_sync();
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  if (warp >= kMathWarps) {
    ptx::register_decrease<kProducerRegisters>();
    if (warp == kMathWarps && kernel.lane == 0) kernel.copy_activations<kGroupScales>(&act_map);
    if (warp == kMathWarps + 1 && kernel.lane == 0) kernel.copy_weights();
  } else {
    ptx::register_increase<kMathRegisters>();
    kernel.multiply<Accumulator, kGroupScales>(&out_map);
  }
  ptx::cluster_sync();  // nobody leaves while the other still arrives at its barriers
}

template <class Accumulator, bool kGroupScales>
cudaError_t launch(const GemmArgs& args, const void* codes, const SsConfig& config, void* scratch,
                   cudaStream_t stream) {
  const SsScratch at = ss_scratch(args.layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  SsParams p = {};
  p.image = bytes + at.image;
  p.end.t = kGroupScales ? nullptr : args.scales;
  if (kGroupScales) {
    p.group_scales = reinterpret_cast<const float*>(bytes + at.scales);
    p.scale_rows = ss_scale_rows(args.m);
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
  cudaError_t error = make_tensor_map(&act_map, codes, TensorElement::u8, args.layout.padded_k(),
                                      args.m, args.layout.padded_k(), kBlockDepth, kTokens / 2);
  if (error != cudaSuccess) return error;
  if (args.out.type != Element::f32) {
    const TensorElement type =
        args.out.type == Element::bf16 ? TensorElement::bf16 : TensorElement::f16;
    error = make_tensor_map(&out_map, args.out.y, type, args.layout.n, args.m, args.out.stride, 64,
                            kTokens);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.end.schedule.workers * 2));
  return launch_kernel(w4a8_ss_sm90<Accumulator, kGroupScales>,
                       {.grid = grid,
                        .threads = kThreads,
                        .shared_bytes = kShared,
                        .stream = stream,
                        .programmatic = config.programmatic},
                       act_map, out_map, p);
}

}  // namespace

cudaError_t launch_w4a8_ss_sm90(const GemmArgs& args, const SsConfig& config, void* scratch,
                                cudaStream_t stream) {
  const cudaError_t error = launch_expand(args, config, scratch, stream);
  if (error != cudaSuccess) return error;
  const void* codes = args.codes;
  if (config.e4m3 && !config.e4m3_codes) {
    codes = static_cast<uint8_t*>(scratch) + ss_scratch(args.layout, args.m, config).codes;
  }
  if (config.group_scales) {
    return config.e4m3 ? launch<float, true>(args, codes, config, scratch, stream)
                       : launch<int, true>(args, codes, config, scratch, stream);
  }
  return config.e4m3 ? launch<float, false>(args, codes, config, scratch, stream)
                     : launch<int, false>(args, codes, config, scratch, stream);
}

}  // namespace nibble::cuda
