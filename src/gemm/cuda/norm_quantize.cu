// Residual add + RMSNorm + quantize, a block a row. The row is read once and stays in registers.
#include <cuda_bf16.h>

#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/quantize_rows.h"

namespace nibble::cuda {
namespace {

constexpr int kSumChunks = 32;  // of one partial sum
constexpr int kMostSums = kRowThreads * kMostChunks / kSumChunks;

template <Element type>
__device__ __forceinline__ uint32_t bits_of(float v) {
  return type == Element::f16 ? __half_as_ushort(__float2half_rn(v))
                              : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

template <Element type>
__device__ __forceinline__ Raw<type> rounded_sum(const Raw<type>& x, const Raw<type>& residual) {
  const Chunk a = values_of<type>(x), b = values_of<type>(residual);
  uint32_t words[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    words[i] = bits_of<type>(a.v[2 * i] + b.v[2 * i]) |
               bits_of<type>(a.v[2 * i + 1] + b.v[2 * i + 1]) << 16;
  }
  return {{{words[0], words[1], words[2], words[3]}}};
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = v + __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

/// Sum of the squares of the row, in every thread; the order is that of fused_quantize.h. One
/// barrier; not to be called twice by a kernel.
template <int kChunks>
__device__ __forceinline__ float row_squares(const Chunk (&x)[kChunks], int row_chunks) {
  __shared__ float partial[kMostSums];
  const int lane = threadIdx.x % 32, sums = row_chunks / kSumChunks;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    float s = 0;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) s = __fmaf_rn(x[i].v[e], x[i].v[e], s);
    s = warp_sum(s);
    const int index = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) / 32;
    if (lane == 0 && index < sums) partial[index] = s;
  }
  __syncthreads();
  float s = 0;
  for (int i = lane; i < sums; i += 32) s = s + partial[i];
  return warp_sum(s);
}

template <Element type, int kChunks, Reach reach>
__global__ void __launch_bounds__(kRowThreads, 1)
    norm_rows(const __grid_constant__ NormQuantizeArgs a, const __grid_constant__ Dealing dealing) {
  ptx::grid_launch_dependents();
  const int row_chunks = static_cast<int>(a.to.padded_k / kChunk);
  const int k_chunks = static_cast<int>(a.to.k / kChunk);
  const auto chunk_of = [](int i) {
    return i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  };
  const auto load_weight = [&](int i) {
    return load_raw<type>(a.weight, chunk_of(i), chunk_of(i) < k_chunks);
  };
  // Few rows: the weight is there before the row is. Many: registers are worth more, and other
  // blocks run meanwhile.
  constexpr bool kEarlyWeight = kChunks == 1;
  Raw<type> early = {};
  if constexpr (kEarlyWeight) early = load_weight(0);
  ptx::grid_wait();
  const int64_t row = blockIdx.x;
  const auto* from = static_cast<const char*>(a.to.x) + row * a.to.x_stride * 2;
  Raw<type> h[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    h[i] = load_raw<type>(from, chunk_of(i), chunk_of(i) < k_chunks);
  }
  if (a.residual != nullptr) {
    const int64_t offset = row * a.residual_stride * 2;
    Raw<type> residual[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      residual[i] = load_raw<type>(static_cast<const char*>(a.residual) + offset, chunk_of(i),
                                   chunk_of(i) < k_chunks);
    }
    auto* sum = reinterpret_cast<uint4*>(static_cast<char*>(a.sum) + offset);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      h[i] = rounded_sum(h[i], residual[i]);
      if (chunk_of(i) < k_chunks) sum[chunk_of(i)] = h[i].words[0];
    }
  }
  Chunk x[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) x[i] = values_of<type>(h[i]);
  const float mean = row_squares(x, row_chunks) / static_cast<float>(a.to.k);
  const float factor = 1.0f / sqrtf(mean + a.eps);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const Chunk w = values_of<type>(kEarlyWeight ? early : load_weight(i));
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      x[i].v[e] = x[i].v[e] * factor * (a.one_plus ? 1.0f + w.v[e] : w.v[e]);
    }
  }
  quantize_part<kChunks, reach>(x, a.to, dealing, row, 0, row_chunks);
}

template <Element type, int kChunks>
cudaError_t launch(const NormQuantizeArgs& args, const RowGrid& g, cudaStream_t stream) {
  const auto kernel = lane_groups(args.to) ? norm_rows<type, kChunks, Reach::lanes>
                                           : norm_rows<type, kChunks, Reach::block>;
  return launch_rows(kernel, dim3(static_cast<unsigned>(args.to.m)), g.threads,
                     args.to.programmatic, stream, args, g.dealing);
}

template <Element type>
cudaError_t launch(const NormQuantizeArgs& args, cudaStream_t stream) {
  RowGrid g;
  g.dealing = row_dealing(args.to);
  deal_block(&g, static_cast<int>(args.to.padded_k / kChunk), args.to.m, true);
  switch (g.chunks) {
    case 1: return launch<type, 1>(args, g, stream);
    case 2: return launch<type, 2>(args, g, stream);
    case 4: return launch<type, 4>(args, g, stream);
  }
  return cudaErrorInvalidValue;  // k > 32768
}

}  // namespace

cudaError_t launch_norm_quantize(const NormQuantizeArgs& args, cudaStream_t stream) {
  const QuantizeArgs& to = args.to;
  const bool by_group = to.scaling == Scaling::group || to.scaling == Scaling::static_group;
  const bool aligned = vector_rows(to.x, to.x_stride, to.k, to.type) &&
                       vector_rows(args.weight, 0, to.k, to.type) &&
                       (args.residual == nullptr ||
                        (vector_rows(args.residual, args.residual_stride, to.k, to.type) &&
                         vector_rows(args.sum, args.residual_stride, to.k, to.type)));
  if (to.type == Element::f32 || to.scaling == Scaling::tensor || !aligned ||
      (by_group && to.group_size < to.k && !lane_groups(to))) {
    return cudaErrorInvalidValue;
  }
  return to.type == Element::f16 ? launch<Element::f16>(args, stream)
                                 : launch<Element::bf16>(args, stream);
}

}  // namespace nibble::cuda
