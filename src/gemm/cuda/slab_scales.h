// Scales of a slab as floats. Device code only.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace nibble::cuda {

/// The two scales of a word of packed.h: columns r and r + 8.
__device__ __forceinline__ float2 scales_of(uint32_t pair, bool bf16) {
  if (bf16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

}  // namespace nibble::cuda
