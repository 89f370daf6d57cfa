// 4-bit weights in the one layout that all CPU kernels read. Drawn in docs/formats.md.
//
// Columns go in blocks of kBlockColumns = 32; n is padded to it, each group of k to a multiple of
// 4, with codes and zero points 0. A block is contiguous:
//   codes   (groups, quads) lines of 64 bytes; a quad is 4 neighbouring k of one group.
//           byte 4*c + i of a line: low nibble = q[4*quad + i][c], high = q[4*quad + i][16 + c]
//   scales  (groups, 32) f16 or bf16 bits
//   zeros   (groups, 32) bytes
// At group size 128 that is 4 + 16/128 + 8/128 = 4.1875 bits a weight (of n rounded up to 32).
// The bias, if there is one, follows the blocks: blocks * 32 floats, padded with zeros.
// Masking the low nibbles of a line gives one row of an AMX B tile, or one VPDPBUSD operand, for
// columns 0..15; shifting first gives columns 16..31: no permutation, and raw codes are unsigned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "format/quant_matrix.h"

namespace nibble {

inline constexpr int64_t kBlockColumns = 32;
inline constexpr int64_t kLineBytes = 64;
inline int64_t quads_of(int64_t group_size) { return (group_size + 3) / 4; }

/// A view of a packed weight, and its owner where `storage` is not empty. Moves.
struct PackedWeights {
  int64_t k = 0, n = 0, group_size = 0;
  int64_t groups = 0;
  int64_t quads = 0;   // per group: ceil(group_size / 4)
  int64_t blocks = 0;  // ceil(n / 32)
  Dtype scale_dtype = Dtype::f16;
  const std::byte* data = nullptr;  // the blocks; 64-byte aligned
  std::span<const float> bias;      // empty, or blocks * 32 values
  AlignedBuffer storage;            // empty: the memory is somebody else's

  int64_t codes_bytes() const { return groups * quads * kLineBytes; }  // of one block
  int64_t scales_bytes() const { return groups * kBlockColumns * 2; }  // of one block
  int64_t zeros_bytes() const { return groups * kBlockColumns; }       // of one block
  int64_t block_bytes() const {  // padded, so that every block starts on a cache line
    return (codes_bytes() + scales_bytes() + zeros_bytes() + kLineBytes - 1) / kLineBytes *
           kLineBytes;
  }
  const uint8_t* codes(int64_t block) const {
    return reinterpret_cast<const uint8_t*>(data) + block * block_bytes();
  }
  const uint16_t* scales(int64_t block) const {
    return reinterpret_cast<const uint16_t*>(codes(block) + codes_bytes());
  }
  const uint8_t* zeros(int64_t block) const {
    return codes(block) + codes_bytes() + scales_bytes();
  }
  int64_t bytes() const { return blocks * block_bytes(); }  // without the bias
};

/// The sizes of `matrix` when it is packed; no memory yet. out_of_memory if they overflow.
Result<PackedWeights> packed_shape(const QuantMatrix& matrix);
/// Of the blocks and, if there is one, the bias of a shape.
int64_t packed_bytes(const PackedWeights& shape, bool has_bias);
/// Points a shape at memory of packed_bytes(shape, has_bias), 64-byte aligned.
void attach(PackedWeights& shape, const std::byte* memory, bool has_bias);

/// What is packed into a weight. bias: (n) of bias_dtype, or null.
struct PackSource {
  const QuantMatrix& matrix;
  const void* bias = nullptr;
  Dtype bias_dtype = Dtype::f32;
};

/// Packs into `memory`, of packed_bytes() of the source's shape, 64-byte aligned and zero, with
/// `threads` threads (<= 0: all).
Status pack_weights_into(const PackSource& source, int threads, std::byte* memory);

/// Packs `matrix`. bias: (n) of bias_dtype, or null. Uses `threads` threads (<= 0: all).
Result<PackedWeights> pack_weights(const QuantMatrix& matrix, const void* bias = nullptr,
                                   Dtype bias_dtype = Dtype::f32, int threads = 0);

}  // namespace nibble
