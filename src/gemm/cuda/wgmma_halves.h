// wgmma on f16 and bf16 with weights as A in registers, tokens in shared memory as B, float sums:
//
//   D[64][N] (+)= A[64][16] * B[N][16]^T
//
// A: four words as of mma.m16n8k16. B and D as in wgmma.h, rows of 128 bytes being 64 k: the next
// 16 k are 2 more in the descriptor.
#pragma once

#include <cstdint>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/wgmma_operands.h"

namespace nibble::cuda {

#define NIBBLE_C(element) "+f"(element)

#define NIBBLE_WGMMA_32(types)                                             \
  asm volatile(                                                            \
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;"                             \
      " wgmma.mma_async.sync.aligned.m64n32k16.f32." types " {" NIBBLE_N16 \
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }"                        \
      : NIBBLE_C16(NIBBLE_C, 0)                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

#define NIBBLE_WGMMA_64(types)                                             \
  asm volatile(                                                            \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;"                             \
      " wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" NIBBLE_N32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"                        \
      : NIBBLE_C32(NIBBLE_C)                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

#define NIBBLE_WGMMA_96(types)                                             \
  asm volatile(                                                            \
      "{ .reg .pred p; setp.ne.b32 p, %53, 0;"                             \
      " wgmma.mma_async.sync.aligned.m64n96k16.f32." types " {" NIBBLE_N48 \
      "}, {%48, %49, %50, %51}, %52, p, 1, 1, 0; }"                        \
      : NIBBLE_C48(NIBBLE_C)                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

#define NIBBLE_WGMMA_128(types)                                             \
  asm volatile(                                                             \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;"                              \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {" NIBBLE_N64 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"                         \
      : NIBBLE_C64(NIBBLE_C)                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

#define NIBBLE_WGMMA_160(types)                                             \
  asm volatile(                                                             \
      "{ .reg .pred p; setp.ne.b32 p, %85, 0;"                              \
      " wgmma.mma_async.sync.aligned.m64n160k16.f32." types " {" NIBBLE_N80 \
      "}, {%80, %81, %82, %83}, %84, p, 1, 1, 0; }"                         \
      : NIBBLE_C80(NIBBLE_C)                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

/// keep = false overwrites the accumulators.
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[16], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_32("f16.f16");
  } else {
    NIBBLE_WGMMA_32("bf16.bf16");
  }
}
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[32], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_64("f16.f16");
  } else {
    NIBBLE_WGMMA_64("bf16.bf16");
  }
}
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[48], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_96("f16.f16");
  } else {
    NIBBLE_WGMMA_96("bf16.bf16");
  }
}
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[64], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_128("f16.f16");
  } else {
    NIBBLE_WGMMA_128("bf16.bf16");
  }
}
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[80], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_160("f16.f16");
  } else {
    NIBBLE_WGMMA_160("bf16.bf16");
  }
}
#undef NIBBLE_WGMMA_160
#undef NIBBLE_WGMMA_128
#undef NIBBLE_WGMMA_96
#undef NIBBLE_WGMMA_64
#undef NIBBLE_WGMMA_32
#undef NIBBLE_C

}  // namespace nibble::cuda
