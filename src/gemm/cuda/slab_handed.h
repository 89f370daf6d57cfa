// Activations that the first blocks of a slab kernel make and hand to all others, M <= 16: block b
// quantizes the rows b, b + blocks, ... of x into global memory, where every block then reads codes
// and scales as if a kernel in front had left them there (slab_codes.h). Arithmetic and bits are
// those of the quantizers (quantize_device.h).
//
//   block b < m   first slabs   x   range   codes, scales, 1 to the counter   | all  | product
//   other blocks  slabs                                    wait for counter   | of x |
//
// One counter in the plan's scratch, zero before and after a launch: makers add 1 when a row's
// codes are stored, blocks when they have seen all of them, and the last addition wraps it to zero.
// Blocks that wait need those with lower numbers to have started, which have been dealt out before
// them.
#pragma once

#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/slab_codes.h"
#include "gemm/cuda/slab_made.h"

namespace nibble::cuda::slab {

struct HandedParams : MadeParams {
  QuantizeArgs to;  // codes and scales: those of Params
  uint32_t* counter = nullptr;
};

template <class S>
struct HandedSlice : CodeSlice<S> {
  using Parameters = HandedParams;
  static constexpr bool kMade = true;
  static constexpr int kChunks = 4;  // of a thread at once
  uint4 x[kChunks];                  // eight elements each, on their way

  __device__ static int makers(const HandedParams& p) {
    return min(p.m, static_cast<int>(gridDim.x));
  }
  __device__ static bool makes(const HandedParams& p) {
    return static_cast<int>(blockIdx.x) < makers(p);
  }
  /// Where x is waited for, it goes in front of all slabs but the first.
  __device__ static int early_slabs(const HandedParams& p, const Place&) {
    return makes(p) ? 1 : p.stages;
  }
  __device__ static int chunk_of(int first, int i) {
    return first + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }

  __device__ __forceinline__ void ask(const HandedParams& p, int row, int first) {
    const auto* from = static_cast<const char*>(p.to.x) + row * p.to.x_stride * 2;
    const int chunks = static_cast<int>(p.to.k / kChunk);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = chunk_of(first, i);
      x[i] = load_raw<Element::bf16>(from, chunk, chunk < chunks).words[0];  // or f16
    }
  }
  __device__ __forceinline__ static Chunk values(const HandedParams& p, const uint4& words) {
    if (p.to.type == Element::f16) return values_of<Element::f16>({{words}});
    return values_of<Element::bf16>({{words}});
  }

  /// The row's codes and scales. What ask(p, row, 0) asked for is on its way. turn: 0, 1, 0, ...
  __device__ __forceinline__ void make_row(const HandedParams& p, int row, int turn,
                                           uint32_t shared) {
    const int chunks = p.padded_k / kChunk, batch = kChunks * static_cast<int>(blockDim.x);
    Encoding e;
    if constexpr (!S::kGroupScales) {
      Range range;
#pragma unroll 1
      for (int first = 0;;) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) range = widen(range, values(p, x[i]), true);
        first += batch;
        if (first >= chunks) break;
        ask(p, row, first);
      }
      e = choose_encoding(range_of_row(range, shared, turn), p.to, 0);
      if (threadIdx.x == 0) p.to.scales[row] = e.scale;
      if (batch < chunks) ask(p, row, 0);
    }
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int chunk = chunk_of(first, i);
        const Chunk v = values(p, x[i]);
        if constexpr (S::kGroupScales) e = encoding_of_group(p, v, row, chunk);
        if (chunk < chunks) {
          *reinterpret_cast<uint2*>(p.to.codes + row * p.to.padded_k + chunk * kChunk) =
              encode(v, e);
        }
      }
      first += batch;
      if (first >= chunks) break;
      ask(p, row, first);
    }
  }
  /// Groups of S::kPromoted elements, each of neighbouring lanes; stores the scale.
  __device__ __forceinline__ static Encoding encoding_of_group(const HandedParams& p,
                                                               const Chunk& v, int row, int chunk) {
    constexpr int kWidth = S::kPromoted / kChunk;
    const int group = chunk / kWidth;
    const Range range = lanes_range(widen({}, v, true), kWidth, true);
    const Encoding e = choose_encoding(range, p.to, min(group, p.groups - 1));
    if (chunk % kWidth == 0 && group < p.groups) p.to.scales[row * p.groups + group] = e.scale;
    return e;
  }

  /// This block's rows, if it has any; then all are there, for ordinary loads and for bulk copies.
  __device__ __forceinline__ void hand_round(const HandedParams& p, uint32_t shared) {
    const int blocks = static_cast<int>(gridDim.x), all = makers(p);
    const auto wrap = static_cast<uint32_t>(all + blocks - 1);
    if (makes(p)) {
      int turn = 0;
#pragma unroll 1
      for (int row = static_cast<int>(blockIdx.x);; turn ^= 1) {
        make_row(p, row, turn, shared);
        row += blocks;
        if (row >= p.m) break;
        ask(p, row, 0);
      }
      ptx::fence_async_global();
      __syncthreads();
      if (threadIdx.x == 0) ptx::increment_release(p.counter, wrap);
    }
    if (threadIdx.x == 0) {
      while (ptx::load_acquire(p.counter) < static_cast<uint32_t>(all)) {
      }
      ptx::increment_release(p.counter, wrap);
    }
    __syncthreads();
    ptx::fence_async_global();
  }

  __device__ __forceinline__ void prepare(const HandedParams&) {}
  __device__ __forceinline__ void fetch(const HandedParams& p, const Place&) {
    if (makes(p)) ask(p, static_cast<int>(blockIdx.x), 0);
  }
  // form `registers`
  __device__ __forceinline__ void load(const HandedParams& p, const Place& at, uint8_t* memory) {
    hand_round(p, ptx::shared_address(memory));
    CodeSlice<S>::load(p, at, memory);
  }
  // form `streamed`
  __device__ __forceinline__ void make(const HandedParams& p, const Place&, uint8_t* memory) {
    hand_round(p, ptx::shared_address(memory));
  }
};

}  // namespace nibble::cuda::slab
