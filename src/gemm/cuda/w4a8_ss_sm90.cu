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
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/ss_image.h"
#include "gemm/cuda/tensor_map.h"
#include "gemm/cuda/tile_output.h"
#include "gemm/cuda/wgmma.h"

namespace nibble::cuda {
namespace {

constexpr int kTokens = kSsTokens, kMathGroups = kSsMathGroups, kMathWarps = 4 * kMathGroups;
constexpr int kThreads = 128 * (kMathGroups + 1);
constexpr int kMathRegisters = 152, kProducerRegisters = 56;
constexpr int kSums = kTokens / 2;
constexpr int kStages = 4;
constexpr int kActBytes = kTokens * kBlockDepth;
constexpr int kWeightStage = (kImageBytes + 1023) / 1024 * 1024;
constexpr int kStageOut = TileOutput<kTokens, kMathGroups>::kStageBytes;

// shared memory
constexpr int kWeights = kStages * kActBytes;
constexpr int kOut = kWeights + kStages * kWeightStage;
constexpr int kBarriers = kOut + kMathGroups * kStageOut;
constexpr int kShared = kBarriers + 8 * 4 * kStages;
static_assert(kShared <= 232448 && 64 * kMathGroups == kImageColumns);

struct SsParams {
  const uint8_t* image;
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

  __device__ void copy_activations(const CUtensorMap* map) const {
    each_block([&](const RsWork& work, int b, int stage, uint32_t phase) {
      ptx::mbarrier_wait(act_empty(stage), phase ^ 1);
      ptx::mbarrier_expect(act_full(stage), kActBytes);
      ptx::tensor_load_multicast(base + stage * kActBytes + rank * (kActBytes / 2), map,
                                 b * kBlockDepth, work.token_tile * kTokens + rank * (kTokens / 2),
                                 act_full(stage), 3);
    });
  }

  __device__ void copy_weights() const {
    each_block([&](const RsWork& work, int b, int stage, uint32_t phase) {
      ptx::mbarrier_wait(weights_empty(stage), phase ^ 1);
      ptx::mbarrier_expect(weights_full(stage), kImageBytes);
      const int64_t block =
          (int64_t{work.weight_tile} * 2 + rank) * p.end.schedule.slices + b;
      ptx::bulk_load(base + kWeights + stage * kWeightStage, p.image + block * kImageBytes,
                     kImageBytes, weights_full(stage));
    });
  }

  template <class Accumulator>
  __device__ void multiply(const CUtensorMap* out_map) const {
    const int group = threadIdx.x >> 7, warp = (threadIdx.x >> 5) & 3;
    const uint32_t scales =
        base + kWeights + kImageScales + (group * 64 + warp * 16 + (lane >> 2)) * 4;
    const uint32_t weights = wgmma_operand(base + kWeights + group * 64 * kBlockDepth);
    const uint32_t tokens = wgmma_operand(base);
    Accumulator c[kSums];
    float f[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) c[i] = 0;
    int stage = 0;
    uint32_t phase = 0;
    const int items = p.end.schedule.items(cluster);
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const RsWork work = p.end.schedule.work(cluster, item);
#pragma unroll
      for (int i = 0; i < kSums; ++i) f[i] = 0.0f;
#pragma unroll 1
      for (int b = work.slice0; b < work.slice1; ++b) {
        ptx::mbarrier_wait(weights_full(stage), phase);
        const float s0 = ptx::load_float_shared(scales + stage * kWeightStage);
        const float s1 = ptx::load_float_shared(scales + stage * kWeightStage + 32);
        ptx::mbarrier_wait(act_full(stage), phase);
        const uint32_t a = weights + stage * (kWeightStage >> 4);
        const uint32_t t = tokens + stage * (kActBytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma(c, wgmma_descriptor(a + 2 * j), wgmma_descriptor(t + 2 * j), j != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(c);
        ptx::mbarrier_arrive_cluster_if(lane < 2,
                                        ptx::cluster_address(act_empty(stage), lane & 1));
        ptx::mbarrier_arrive_if(lane == 0, weights_empty(stage));
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          f[i] = __fmaf_rn(static_cast<float>(c[i]), (i & 2) ? s1 : s0, f[i]);
        }
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      const TileOutput<kTokens, kMathGroups> output{p.end, cluster, rank, lane};
      output.finish(work, f, out_map, group, base + kOut + group * kStageOut);
    }
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_all();
  }
};

template <class Accumulator>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    w4a8_ss_sm90(const __grid_constant__ CUtensorMap act_map,
                 const __grid_constant__ CUtensorMap out_map, const __grid_constant__ SsParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  const Kernel kernel{p, ptx::shared_address(shared), static_cast<int>(blockIdx.x & 1),
                      static_cast<int>(blockIdx.x >> 1), static_cast<int>(threadIdx.x & 31)};
  if (threadIdx.x == 0) kernel.init_barriers();
  ptx::cluster_sync();
  if (warp >= kMathWarps) {
    ptx::register_decrease<kProducerRegisters>();
    if (warp == kMathWarps && kernel.lane == 0) kernel.copy_activations(&act_map);
    if (warp == kMathWarps + 1 && kernel.lane == 0) kernel.copy_weights();
  } else {
    ptx::register_increase<kMathRegisters>();
    kernel.multiply<Accumulator>(&out_map);
  }
  ptx::cluster_sync();  // nobody leaves while the other still arrives at its barriers
}

template <class Accumulator>
cudaError_t launch(const GemmArgs& args, const void* codes, const SsConfig& config, void* scratch,
                   cudaStream_t stream) {
  const SsScratch at = ss_scratch(args.layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  SsParams p = {};
  p.image = bytes + at.image;
  p.end.t = args.scales;
  p.end.m = args.m;
  p.end.n = args.layout.n;
  p.end.out = args.out;
  p.end.schedule = ss_schedule_of(args.layout, args.m, config);
  p.end.arrived = reinterpret_cast<uint32_t*>(bytes);
  p.end.parts = reinterpret_cast<float*>(bytes + at.parts);
  CUtensorMap act_map, out_map = {};
  cudaError_t error =
      make_tensor_map(&act_map, codes, TensorElement::u8, args.layout.padded_k(), args.m,
                          args.layout.padded_k(), kBlockDepth, kTokens / 2);
  if (error != cudaSuccess) return error;
  if (args.out.type != Element::f32) {
    const TensorElement type =
        args.out.type == Element::bf16 ? TensorElement::bf16 : TensorElement::f16;
    error = make_tensor_map(&out_map, args.out.y, type, args.layout.n, args.m, args.out.stride, 64,
                            kTokens);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.end.schedule.workers * 2));
  return launch_kernel(
      w4a8_ss_sm90<Accumulator>,
      {.grid = grid, .threads = kThreads, .shared_bytes = kShared, .stream = stream}, act_map,
      out_map, p);
}

}  // namespace

cudaError_t launch_w4a8_ss_sm90(const GemmArgs& args, const SsConfig& config, void* scratch,
                                cudaStream_t stream) {
  if (args.group_scales) return cudaErrorInvalidValue;
  const SsScratch at = ss_scratch(args.layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  cudaError_t error = launch_expand(args, config.e4m3, bytes + at.image, stream);
  if (error != cudaSuccess) return error;
  if (!config.e4m3) return launch<int>(args, args.codes, config, scratch, stream);
  if (config.e4m3_codes) return launch<float>(args, args.codes, config, scratch, stream);
  error = launch_codes_to_e4m3(args.codes, bytes + at.codes, args.m * args.layout.padded_k(),
                               stream);
  if (error != cudaSuccess) return error;
  return launch<float>(args, bytes + at.codes, config, scratch, stream);
}

}  // namespace nibble::cuda
