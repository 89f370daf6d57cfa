// Where things lie in the pages of the KV cache (model/cuda/kernels.h). Device code only.
#pragma once

#include "gemm/cuda/ptx.h"
#include "model/cuda/kernels.h"

namespace nibble::cuda {

inline constexpr int kRowBytes = kKvSlice * 2;                  // of a position in a slice
inline constexpr int kSliceBytes = kPagePositions * kRowBytes;  // of a head's slice of a page

/// Byte of piece `piece` (channels 8 piece ..) of position t in a head of `positions` positions a
/// slice.
template <int positions = kPagePositions>
__device__ __forceinline__ int piece_offset(int t, int piece) {
  return piece / 8 * (positions * kRowBytes) + t * kRowBytes + ((piece % 8) ^ (t % 8)) * 16;
}

/// Bytes from the beginning of the layer's keys (or values) to one head of the page that holds
/// positions 64 index .. of a sequence.
__device__ __forceinline__ int64_t page_head_offset(const KvPages& kv, int sequence, int index,
                                                    int kv_head) {
  const int64_t page = kv.page_table[sequence * kv.max_pages + index];
  const int slices = static_cast<int>(kv.head_dim + kKvSlice - 1) / kKvSlice;
  return page * kv.page_stride * 2 + int64_t{kv_head} * slices * kSliceBytes;
}

// ---- attention ---------------------------------------------------------------------------------

/// The first position that the query at position p sees; window 0: all.
__device__ __forceinline__ int first_position(int p, int64_t window) {
  return window > 0 && p >= window ? p - static_cast<int>(window) + 1 : 0;
}

inline constexpr float kLog2E = 1.4426950408889634f;

/// d += A * B, m16n8k16.
template <Element type>
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  if constexpr (type == Element::bf16) {
    ptx::mma_bf16(d, a, b0, b1);
  } else {
    ptx::mma_f16(d, a, b0, b1);
  }
}

}  // namespace nibble::cuda
