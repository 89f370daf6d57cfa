// y = x W^T with 8-bit weights and activations: the optional form of lm_head, which as 16 bits is
// half of all bytes that a small model reads per token. One scale per output channel,
// s = max|w| / 127, and one per token; integer sums are exact, so every kernel gives the same bits:
//   y = (float(S) * s) * t
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/status.h"
#include "gemm/gemm.h"

namespace nibble {

/// Blocks of 16 output channels, each (ceil(k / 4) quads) lines of 64 bytes: byte 4 * c + i of a
/// line is w[16 * block + c][4 * quad + i] + 128. Missing rows and channels are 128, so zero.
struct Int8Weights {
  int64_t k = 0, n = 0;
  int64_t quads = 0, blocks = 0;
  AlignedBuffer storage;
  std::vector<float> scales;  // (blocks * 16)

  const uint8_t* block(int64_t index) const { return storage.as<uint8_t>() + index * quads * 64; }
  uint64_t bytes() const { return storage.bytes() + scales.size() * sizeof(float); }
};

/// weight (n, k) row-major of `dtype`, any alignment. non_finite if it has a NaN or infinity.
Result<Int8Weights> pack_int8(int64_t n, int64_t k, const void* weight, Dtype dtype, int threads);

/// y (m, n) = x (m, k) W^T, rows x_stride and y_stride elements apart. non_finite names a row of x.
Status run_int8(const Int8Weights& weights, int64_t m, const float* x, int64_t x_stride, float* y,
                int64_t y_stride, int threads);

/// "w8a8_avx512vnni", ...: the kernel this CPU uses.
const char* int8_kernel_name();

/// One call of a kernel: rows of quantized x times blocks [block0, block1).
struct Int8Block {
  const Int8Weights* weights = nullptr;
  const int8_t* codes = nullptr;  // (rows, at least quads * 4), rows code_stride apart, padding 0
  const float* scales = nullptr;  // (rows)
  const int32_t* sums = nullptr;  // (rows) of the codes
  int64_t code_stride = 0;
  int64_t rows = 0, block0 = 0, block1 = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

/// All kernels of this build, priority order; the first that the CPU executes is used.
struct Int8Kernel {
  const char* name;
  Isa isa;
  void (*run)(const Int8Block& block);
};
std::span<const Int8Kernel> int8_kernels();

}  // namespace nibble
