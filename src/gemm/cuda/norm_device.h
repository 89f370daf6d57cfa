// RMSNorm of a row that a block has in registers, chunk i * blockDim.x + threadIdx.x of it in x[i]
// of a thread: what norm_quantize.cu and the products that norm for themselves do alike. Device
// code only.
#pragma once

#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/quantize_device.h"

namespace nibble::cuda {

inline constexpr int kSumChunks = 32;  // of one partial sum

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = v + __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

/// Sum of the squares of the row, in every thread; the order is that of fused_quantize.h, whatever
/// the number of threads. One barrier; `partial`, a float for each 32 chunks, is not to be used
/// again.
template <int kChunks>
__device__ __forceinline__ float row_squares(const Chunk (&x)[kChunks], int row_chunks,
                                             float* partial) {
  const int lane = threadIdx.x % 32, sums = (row_chunks + kSumChunks - 1) / kSumChunks;
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

__device__ __forceinline__ float norm_factor(float squares, const NormArgs& a) {
  return 1.0f / sqrtf(squares / static_cast<float>(a.k) + a.eps);
}

/// x * factor * weight
template <int kChunks, class Load>
__device__ __forceinline__ void apply_norm(Chunk (&x)[kChunks], float factor, const Load& weight) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const Chunk w = values_of<Element::f32>(weight(i));
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[i].v[e] = x[i].v[e] * factor * w.v[e];
  }
}

}  // namespace nibble::cuda
