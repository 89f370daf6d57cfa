// wgmma with weights as A, in registers or shared memory, tokens in shared memory as B:
// instructions of sm_90a that have no function in CUDA C++. Source: PTX ISA, "wgmma".
//
//   D[64][N] (+)= A[64][32] * B[N][32]^T      8-bit operands, int32 or float accumulators
//
// Thread 4 r + c of warp w holds D rows 16 w + r and 16 w + r + 8; accumulator 4 j + 2 h + i is row
// 16 w + r + 8 h, column (token) 8 j + 2 c + i. A: four words as of mma.m16n8k32.
#pragma once

#include <cstdint>

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
#define NIBBLE_C(i) "+r"(c[i])
// weights in registers
__device__ __forceinline__ void wgmma(int (&c)[16], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;"
      " wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, p; }"
      : NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6),
        NIBBLE_C(7), NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), NIBBLE_C(12),
        NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[32], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;"
      " wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p; }"
      : NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6),
        NIBBLE_C(7), NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), NIBBLE_C(12),
        NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18),
        NIBBLE_C(19), NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), NIBBLE_C(24),
        NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30),
        NIBBLE_C(31)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
__device__ __forceinline__ void wgmma(int (&c)[48], const uint32_t (&a)[4], uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %53, 0;"
      " wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47"
      "}, {%48, %49, %50, %51}, %52, p; }"
      : NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6),
        NIBBLE_C(7), NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), NIBBLE_C(12),
        NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18),
        NIBBLE_C(19), NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), NIBBLE_C(24),
        NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30),
        NIBBLE_C(31), NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), NIBBLE_C(36),
        NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42),
        NIBBLE_C(43), NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}));
}
// both operands in shared memory
__device__ __forceinline__ void wgmma(int (&c)[64], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;"
      " wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p; }"
      : NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6),
        NIBBLE_C(7), NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), NIBBLE_C(12),
        NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18),
        NIBBLE_C(19), NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), NIBBLE_C(24),
        NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30),
        NIBBLE_C(31), NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), NIBBLE_C(36),
        NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42),
        NIBBLE_C(43), NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47), NIBBLE_C(48),
        NIBBLE_C(49), NIBBLE_C(50), NIBBLE_C(51), NIBBLE_C(52), NIBBLE_C(53), NIBBLE_C(54),
        NIBBLE_C(55), NIBBLE_C(56), NIBBLE_C(57), NIBBLE_C(58), NIBBLE_C(59), NIBBLE_C(60),
        NIBBLE_C(61), NIBBLE_C(62), NIBBLE_C(63)
      : "l"(a), "l"(b), "r"(int{keep}));
}
#undef NIBBLE_C
#define NIBBLE_C(i) "+f"(c[i])
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;"
      " wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1; }"
      : NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6),
        NIBBLE_C(7), NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), NIBBLE_C(12),
        NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18),
        NIBBLE_C(19), NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), NIBBLE_C(24),
        NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30),
        NIBBLE_C(31), NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), NIBBLE_C(36),
        NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42),
        NIBBLE_C(43), NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47), NIBBLE_C(48),
        NIBBLE_C(49), NIBBLE_C(50), NIBBLE_C(51), NIBBLE_C(52), NIBBLE_C(53), NIBBLE_C(54),
        NIBBLE_C(55), NIBBLE_C(56), NIBBLE_C(57), NIBBLE_C(58), NIBBLE_C(59), NIBBLE_C(60),
        NIBBLE_C(61), NIBBLE_C(62), NIBBLE_C(63)
      : "l"(a), "l"(b), "r"(int{keep}));
}
#undef NIBBLE_C

}  // namespace nibble::cuda
