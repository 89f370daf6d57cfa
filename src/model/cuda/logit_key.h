// The largest of a row of logits and where it is, as one number to be compared.
#pragma once

#include "gemm/cuda/quantize_device.h"
#include "model/sampling.h"

namespace nibble::cuda {

constexpr uint64_t kFaultyLogit = ~uint64_t{0};

/// Larger keys are better: sampling::key_of(), then the lower index.
/// A NaN or an infinity is better than all.
__device__ __forceinline__ uint64_t logit_key(float v, uint32_t index) {
  if ((__float_as_uint(v) & 0x7fffffffu) >= kInfinityBits) return kFaultyLogit;
  return uint64_t{sampling::key_of(v)} << 32 | (0xffffffffu - index);
}

/// Of a key that is not faulty.
__device__ __forceinline__ int32_t index_of_key(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

/// Over a block of `threads`, in thread 0.
template <int threads>
__device__ __forceinline__ uint64_t block_best(uint64_t key) {
  __shared__ uint64_t of_warp[threads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, d));
  if (lane == 0) of_warp[warp] = key;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (const uint64_t other : of_warp) key = max(key, other);
  }
  return key;
}

}  // namespace nibble::cuda
