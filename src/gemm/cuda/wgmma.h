// wgmma with weights as A in registers, tokens in shared memory as B: instructions of sm_90a that
// have no function in CUDA C++. Source: PTX ISA, "wgmma". A in shared memory: wgmma_shared.h.
//
//   D[64][N] (+)= A[64][32] * B[N][32]^T      s8, int32 accumulators; e4m3, float ones
//
// Thread 4 r + c of warp w holds D rows 16 w + r and 16 w + r + 8; accumulator 4 j + 2 h + i is row
// 16 w + r + 8 h, column (token) 8 j + 2 c + i. A: four words as of mma.m16n8k32.
#pragma once

#include <cstdint>

#include "gemm/cuda/wgmma_operands.h"

namespace nibble::cuda {

/// B in shared memory: rows of 128 bytes (one token, 128 k), 128-byte swizzle, 8 rows = 1024 bytes.
/// The low word of its descriptor; the next 32 k are 2 more. address: a multiple of 1024.
__device__ __forceinline__ uint32_t wgmma_operand(uint32_t address) {
  return address >> 4 | 1u << 16;
}
/// The whole descriptor.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t operand) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kRowGroupStride | operand;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving what reads or makes these registers across this place.
template <int kCount, class Integer>
__device__ __forceinline__ void wgmma_settle(Integer (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(c[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void wgmma_settle(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// One overload per shape that a kernel uses; keep = false overwrites the accumulators.
#define NIBBLE_C(element) "+r"(element)
__device__ __forceinline__ void wgmma(int (&c)[16], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;"
      " wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {" NIBBLE_N16
      "}, {%16, %17, %18, %19}, %20, p; }"
      : NIBBLE_C16(NIBBLE_C, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[32], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;"
      " wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" NIBBLE_N32
      "}, {%32, %33, %34, %35}, %36, p; }"
      : NIBBLE_C32(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[48], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %53, 0;"
      " wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {" NIBBLE_N48
      "}, {%48, %49, %50, %51}, %52, p; }"
      : NIBBLE_C48(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[64], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;"
      " wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NIBBLE_N64
      "}, {%64, %65, %66, %67}, %68, p; }"
      : NIBBLE_C64(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[80], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %85, 0;"
      " wgmma.mma_async.sync.aligned.m64n160k32.s32.s8.s8 {" NIBBLE_N80
      "}, {%80, %81, %82, %83}, %84, p; }"
      : NIBBLE_C80(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[96], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %101, 0;"
      " wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {" NIBBLE_N96
      "}, {%96, %97, %98, %99}, %100, p; }"
      : NIBBLE_C96(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
#undef NIBBLE_C

// The same of e4m3 with float sums: promotion needs no conversion.
#define NIBBLE_C(element) "+f"(element)
__device__ __forceinline__ void wgmma_e4m3(float (&c)[16], const uint32_t (&a)[4], uint64_t b,
                                           bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;"
      " wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" NIBBLE_N16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1; }"
      : NIBBLE_C16(NIBBLE_C, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma_e4m3(float (&c)[32], const uint32_t (&a)[4], uint64_t b,
                                           bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;"
      " wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" NIBBLE_N32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1; }"
      : NIBBLE_C32(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma_e4m3(float (&c)[48], const uint32_t (&a)[4], uint64_t b,
                                           bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %53, 0;"
      " wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 {" NIBBLE_N48
      "}, {%48, %49, %50, %51}, %52, p, 1, 1; }"
      : NIBBLE_C48(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma_e4m3(float (&c)[64], const uint32_t (&a)[4], uint64_t b,
                                           bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;"
      " wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" NIBBLE_N64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1; }"
      : NIBBLE_C64(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma_e4m3(float (&c)[80], const uint32_t (&a)[4], uint64_t b,
                                           bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %85, 0;"
      " wgmma.mma_async.sync.aligned.m64n160k32.f32.e4m3.e4m3 {" NIBBLE_N80
      "}, {%80, %81, %82, %83}, %84, p, 1, 1; }"
      : NIBBLE_C80(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma_e4m3(float (&c)[96], const uint32_t (&a)[4], uint64_t b,
                                           bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %101, 0;"
      " wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {" NIBBLE_N96
      "}, {%96, %97, %98, %99}, %100, p, 1, 1; }"
      : NIBBLE_C96(NIBBLE_C)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
#undef NIBBLE_C

}  // namespace nibble::cuda
