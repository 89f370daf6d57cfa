// The activations of w4a4_mma_sm80: int4 codes two a byte, in the scratch of its plan, made of an
// int8 operand in natural order. Layout is pure arithmetic; int4_operand.cu makes it.
//
//   codes  (m, padded_k / 2). Of each 128 k, byte 16 c + 8 h + b (c 0..3, h 0..1, b 0..7) has the
//          code of k 64 h + 8 c + b in its low nibble and that of k 64 h + 32 + 8 c + b in its high
//          one: 16 neighbouring bytes are a lane's part of the B of two m16n8k64, in the order of k
//          in which the words of packed.h, as they are, are A.
//            symmetric   the code, two's complement
//            asymmetric  code + lift, 0..15: the lift of a run is the least that leaves none of its
//                        codes negative (not above the zero point of the scale, so 15 holds)
//   runs   (padded_k / promoted, m) int32: 16 * sum of the run's codes + lift (symmetric: 0)
#pragma once

#include <cstddef>

#include "gemm/cuda/packed.h"
#include "gemm/cuda/rs_schedule.h"

namespace nibble::cuda {

struct Int4Scratch {
  size_t codes = 0, runs = 0;  // byte offsets; kFlagBytes of other kernels come first
  size_t bytes = 0;
};

constexpr Int4Scratch int4_scratch(const PackedLayout& layout, int64_t m) {
  Int4Scratch at;
  at.codes = kFlagBytes;
  at.runs = at.codes + static_cast<size_t>(m * (layout.padded_k() / 2));
  at.bytes = at.runs + static_cast<size_t>(m * (layout.padded_k() / layout.promoted)) * 4;
  return at;
}

}  // namespace nibble::cuda
