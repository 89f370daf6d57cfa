// Float instructions that CUDA C++ has no name for. Device code only.
#pragma once

namespace nibble::cuda::ptx {

/// 1 / x to one unit in the last place, as __fdividef() takes it for |x| >= 2^-126; smaller x count
/// as 0, which spares the test for them.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace nibble::cuda::ptx
