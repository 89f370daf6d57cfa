// What a CPU kernel is to the driver: a row of the table with two functions. Kernels compute; they
// never allocate, start threads, choose, or fail.
#pragma once

#include <cstdint>
#include <span>

#include "base/cpu_features.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/gemm.h"

namespace nibble {

/// How a block of quantized rows lies in memory. In both, each group of k is padded with zero
/// codes.
enum class ActivationLayout {
  // codes (rows, groups, quads * 4)
  rows,
  // codes (groups, ceil(rows / 16), ceil(group_size / 64), 16 rows, 64 k): one AMX A tile each,
  // in the order in which one group meets all rows
  tiles,
  // x itself as float (rows, k): w4a16
  floats,
};

inline constexpr int64_t kMaxBlockRows = 256;  // of one call of a kernel
inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kTileDepth = 64;  // bytes, so k, of one row of an int8 A tile
inline int64_t steps_of(int64_t group_size) { return (group_size + kTileDepth - 1) / kTileDepth; }

/// Operand A for one block of rows.
struct ActivationBlock {
  const int8_t* codes = nullptr;  // layout rows or tiles
  const float* floats = nullptr;  // layout floats
  const float* scales = nullptr;  // (rows) or (rows, groups); null for floats
  const int32_t* sums = nullptr;  // (rows, groups): sum of the codes of each group
};

/// One call of a kernel: rows [0, rows) of a block, at most kMaxBlockRows, times weight blocks
/// [block0, block1).
struct GemmBlock {
  const PackedWeights* weights = nullptr;
  ActivationBlock activations;
  int64_t rows = 0;
  int64_t block0 = 0, block1 = 0;
  bool group_scales = false;  // activations.scales is (rows, groups)
  void* y = nullptr;          // row 0 of the block; (rows, n)
  int64_t y_stride = 0;       // elements
  Dtype y_dtype = Dtype::f32;
  int32_t* partials = nullptr;  // (rows, groups, n) or null
};

/// Range of count elements of x.
struct ElementRange {
  uint32_t max_abs_bits = 0;  // of the float; >= 0x7f800000: a NaN or infinity is among them
  float low = 0, high = 0;    // min(0, x...), max(0, x...); unspecified if not finite
};

/// a = round_half_even(clamp(x * inverse_scale, low, high))
struct Encoding {
  float inverse_scale = 0;
  float low = 0, high = 0;  // integers
};

/// The vector code of the activation quantizer for one instruction set; all give the same bits.
struct QuantizerOps {
  ElementRange (*range)(const void* x, Dtype dtype, int64_t count);
  /// Writes codes j*64 .. j*64+63 at out + j * step_stride; returns their sum.
  int32_t (*encode)(const void* x, Dtype dtype, int64_t count, const Encoding& encoding,
                    int8_t* out, int64_t step_stride);
  /// Exact conversion to float.
  void (*to_float)(const void* x, Dtype dtype, int64_t count, float* out);
};

const QuantizerOps& quantizer_ops_scalar();
const QuantizerOps& quantizer_ops_avx2();
const QuantizerOps& quantizer_ops_avx512();
/// The widest that this CPU executes and no wider than `isa`.
const QuantizerOps& quantizer_ops_for(Isa isa);

struct CpuKernel {
  const char* name;
  Mode mode;
  Isa isa;
  ActivationLayout layout;
  void (*run)(const GemmBlock& block);
};

/// All kernels of this build, priority order within a mode.
std::span<const CpuKernel> cpu_kernels();

/// Null if this CPU executes `isa`, else why not.
const char* isa_missing_reason(Isa isa);

}  // namespace nibble
