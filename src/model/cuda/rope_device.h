// Rotating heads and what the cache can hold of them: what rope.cu and the decode kernel do alike.
// Device code only.
#pragma once

#include "gemm/cuda/quantize_device.h"

namespace nibble::cuda {

/// One chunk of either half of a head: both ends of eight rotated pairs.
struct Halves {
  Chunk a, b;
};

/// x = a cos - b sin, y = b cos + a sin, as gemm/float_ops.h has it.
__device__ __forceinline__ float rotated_low(float a, float b, float cosine, float sine) {
  return a * cosine - b * sine;
}
__device__ __forceinline__ float rotated_high(float a, float b, float cosine, float sine) {
  return __fmaf_rn(b, cosine, a * sine);
}

__device__ __forceinline__ void rotate(Halves& x, const Chunk& cosine, const Chunk& sine) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float a = x.a.v[i], b = x.b.v[i];
    x.a.v[i] = rotated_low(a, b, cosine.v[i], sine.v[i]);
    x.b.v[i] = rotated_high(a, b, cosine.v[i], sine.v[i]);
  }
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.4028235e38f; }

/// Whether all are finite.
__device__ __forceinline__ bool finite(const Chunk& c) {
  bool good = true;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) good = good && finite(c.v[i]);
  return good;
}

/// What the type cannot hold becomes 0; false if there was such.
template <Element type>
__device__ __forceinline__ bool fit(Chunk& c) {
  const float largest = type == Element::f16 ? 65504.0f : 3.3895314e38f;
  bool good = true;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const bool fits = fabsf(c.v[i]) <= largest;
    good = good && fits;
    c.v[i] = fits ? c.v[i] : 0.0f;
  }
  return good;
}

}  // namespace nibble::cuda
