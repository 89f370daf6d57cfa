// The results of attention_decode.cu as the codes that the product behind it multiplies: a head of
// 128 channels is a group of its own scale, so whoever has the head needs no one else. The bits are
// those of the head in 16 bits, quantized. Device code only.
#pragma once

#include "gemm/cuda/quantize_device.h"
#include "model/cuda/kernels.h"

namespace nibble::cuda {

/// Stores codes and scale of a head, by a whole warp. v[i] of a lane is channel 4 lane + i (kRun
/// 4), or 2 lane + i and, from i = 2 on, 64 further (kRun 2).
template <int kRun>
__device__ __forceinline__ void store_head_codes(const DecodeArgs& a, int row, int head,
                                                 const float (&v)[4], int lane) {
  const QuantizeArgs& to = a.codes;
  Chunk c = {};  // zeros behind them change no range
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t pair = rounded_pair(to.type, v[i], v[i + 1]);
    const bool f16 = to.type == Element::f16;
    c.v[i] = f16 ? float_of<Element::f16>(pair & 0xffffu) : float_of<Element::bf16>(pair & 0xffffu);
    c.v[i + 1] = f16 ? float_of<Element::f16>(pair >> 16) : float_of<Element::bf16>(pair >> 16);
  }
  Range range = widen({}, c, to.symmetric);
  range.amax = __reduce_max_sync(kAllLanes, range.amax);
  if (!to.symmetric) {
    range.high = __reduce_max_sync(kAllLanes, range.high);
    range.low = __reduce_max_sync(kAllLanes, range.low);
  }
  const Encoding e = choose_encoding(range, to, head);
  if (lane == 0) to.scales[int64_t{row} * a.attention.heads + head] = e.scale;
  const uint32_t codes = encode(c, e).x;
  int8_t* begin = to.codes + row * to.padded_k + int64_t{head} * kCodesHeadDim;
  const auto place = [&](int word) {  // as OperandOrder has it
    return to.wgmma_order ? (word & ~7) + (word & 1) * 4 + (word >> 1 & 3) : word;
  };
  if constexpr (kRun == 4) {
    *reinterpret_cast<uint32_t*>(begin + place(lane) * 4) = codes;
  } else {
    const int half = lane % 2 * 2;
    auto* low = reinterpret_cast<uint16_t*>(begin + place(lane / 2) * 4 + half);
    auto* high = reinterpret_cast<uint16_t*>(begin + place(16 + lane / 2) * 4 + half);
    *low = static_cast<uint16_t>(codes);
    *high = static_cast<uint16_t>(codes >> 16);
  }
}

/// A row that is left out is a row of zeros, whatever its codes. By a whole warp.
__device__ __forceinline__ void store_no_scales(const DecodeArgs& a, int row, int lane) {
  const int heads = static_cast<int>(a.attention.heads);
  for (int head = lane; head < heads; head += 32) a.codes.scales[int64_t{row} * heads + head] = 0;
}

}  // namespace nibble::cuda
