// What the rs kernels (rs_product.h) multiply: how a lane's codes of packed.h become operand A in
// registers, and the products of one step, 32 bytes of k of every token. Device code only.
//
// kSpan: stages of 128 k, a stage being four steps. kUnit: what products have to be multiplied by.
#pragma once

#include "gemm/cuda/byte_columns.h"
#include "gemm/cuda/halves.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/packed.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/tensor_map.h"
#include "gemm/cuda/wgmma.h"
#include "gemm/cuda/wgmma_halves.h"

namespace nibble::cuda {

/// Operands of 8 bits.
template <class Column>
struct ByteOperands {
  static constexpr int kSpan = 1;
  static constexpr float kUnit = Column::kUnit;

  /// Stage u of the slab whose codes of this lane begin at `codes`. zeros(group): of the slab; low
  /// nibble: of column r, next nibble: of column r + 8.
  template <int promoted, class Zeros>
  __device__ __forceinline__ static void expand(uint32_t (&a)[4][4], uint32_t codes, int u,
                                                const Zeros& zeros) {
    const uint4 half[2] = {ptx::load16_shared(codes + u * 1024),
                           ptx::load16_shared(codes + u * 1024 + 512)};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 w = half[j / 2];
      const uint32_t zero = zeros((u * kBlockDepth + 32 * j) / promoted);
      const Column r(zero & 15), r8(zero >> 4 & 15);
      if (j % 2 == 0) {
        expand_step<low_nibbles>(a[j], w, r, r8);
      } else {
        expand_step<high_nibbles>(a[j], w, r, r8);
      }
    }
  }

 private:
  template <uint32_t nibbles(uint32_t)>
  __device__ __forceinline__ static void expand_step(uint32_t (&a)[4], const uint4& w,
                                                     const Column& r, const Column& r8) {
    a[0] = r(nibbles(w.x));
    a[1] = r8(nibbles(w.y));
    a[2] = r(nibbles(w.z));
    a[3] = r8(nibbles(w.w));
  }
};

struct Int8Operands : ByteOperands<Int8Column> {
  using Sum = int;
  template <int count>
  __device__ __forceinline__ static void multiply(int (&c)[count], const uint32_t (&a)[4],
                                                  uint64_t b, bool keep) {
    wgmma(c, a, b, keep);
  }
};

struct E4m3Operands : ByteOperands<E4m3Column> {
  using Sum = float;
  template <int count>
  __device__ __forceinline__ static void multiply(float (&c)[count], const uint32_t (&a)[4],
                                                  uint64_t b, bool keep) {
    wgmma_e4m3(c, a, b, keep);
  }
};

/// f16 or bf16; activations in the order of reorder_sm90.cu.
template <Element type>
struct HalfOperands {
  using Sum = float;
  static constexpr int kSpan = 2;
  static constexpr float kUnit = 1;

  template <int promoted, class Zeros>
  __device__ __forceinline__ static void expand(uint32_t (&a)[4][4], uint32_t codes, int u,
                                                const Zeros& zeros) {
    const uint4 half = ptx::load16_shared(codes + u * 512);
    uint32_t step[2][2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t zero = zeros((u * (kBlockDepth / 2) + 32 * j) / promoted);
      const HalfExpander<type> r(zero & 15), r8(zero >> 4 & 15);
      if (j == 0) {
        expand_step<false>(half, r, r8, step[0]);
      } else {
        expand_step<true>(half, r, r8, step[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < 4; ++w) a[i][w] = step[i / 2][i % 2][w];
    }
  }
  template <int count>
  __device__ __forceinline__ static void multiply(float (&c)[count], const uint32_t (&a)[4],
                                                  uint64_t b, bool keep) {
    wgmma_halves<type>(c, a, b, keep);
  }
};

}  // namespace nibble::cuda
