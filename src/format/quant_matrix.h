// One 4-bit weight matrix exactly as it lies in a file: the only thing of a checkpoint that
// src/gemm sees. A QuantMatrix is a view: it owns nothing and its pointers may have any alignment.
// Also here: what its values are like, and packing one.
//
//   w[k][n] = (q[k][n] - z[k / group_size][n]) * s[k / group_size][n]      q, z in 0..15
//
// y = x * w (+ bias) with x (M, K) and w (K, N): k is the input channel, n the output channel.
// The byte layouts are drawn in docs/formats.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"

namespace nibble {

/// How codes, zero points and scales lie in memory. `G` = K / group_size.
enum class WeightLayout : int {
  // q int32 (K, N/8), z int32 (G, N/8), nibble order 0 2 4 6 1 3 5 7 along N; s (G, N)
  awq_gemm = 0,
  // q int32 (N, K/8), z int32 (N, zero_words), natural order along K; s (N, zero_words * 8)
  awq_gemv = 1,
  // compressed-tensors pack-quantized: q int32 (N, ceil(K/8)) natural order along K,
  // z int32 (ceil(N/8), G) natural order along N; s (N, G)
  ct_pack = 2,
};

const char* weight_layout_name(WeightLayout layout);

struct QuantMatrix {
  int64_t k = 0;           // input channels
  int64_t n = 0;           // output channels
  int64_t group_size = 0;  // input channels per scale; 1..k, divides k (a file's -1 is k here)
  WeightLayout layout = WeightLayout::awq_gemm;
  Dtype scale_dtype = Dtype::f16;    // f16 or bf16, kept as it is
  const std::byte* q = nullptr;      // codes
  const std::byte* zeros = nullptr;  // null: the zero point is 8 everywhere (symmetric)
  const std::byte* scales = nullptr;
  int64_t zero_words = 0;  // awq_gemv only: int32 words per row of z, padding included

  int64_t groups() const { return k / group_size; }
};

/// Checks that the numbers of `matrix` agree with each other (not its pointers). `name` is put in
/// front of the message.
Status check_quant_matrix(const QuantMatrix& matrix, const char* name);

/// Codes of columns [n0, n0 + count) to out (k, count) row-major, one byte each, 0..15.
/// Requires n0 + count <= n.
void unpack_codes(const QuantMatrix& matrix, int64_t n0, int64_t count, uint8_t* out);

/// The same for input channels [k0, k0 + rows) only: out (rows, count). k0 and rows must be
/// multiples of 8 or end at k.
void unpack_code_rows(const QuantMatrix& matrix, int64_t k0, int64_t rows, int64_t n0,
                      int64_t count, uint8_t* out);

/// Zero points of columns [n0, n0 + count) to out (groups, count) row-major, 0..15.
void unpack_zeros(const QuantMatrix& matrix, int64_t n0, int64_t count, uint8_t* out);

/// Scale bits (f16 or bf16, see scale_dtype) of columns [n0, n0 + count) to out (groups, count).
void unpack_scales(const QuantMatrix& matrix, int64_t n0, int64_t count, uint16_t* out);

/// Dequantized columns [n0, n0 + count) to out (k, count) row-major. Exact: (q - z) has 5 bits and
/// s at most 11, so the product fits float.
void dequantize(const QuantMatrix& matrix, int64_t n0, int64_t count, float* out);

/// What is wrong or worth knowing about the values of one layer.
struct ValueReport {
  int64_t non_finite_scales = 0;
  int64_t negative_scales = 0;   // legal and computed right; other int8 paths print garbage
  int64_t subnormal_scales = 0;  // of the scale dtype; flush-to-zero would kill such groups
  int64_t zero_scales = 0;
  int zero_point_min = 15, zero_point_max = 0;
  std::string first_non_finite;  // "group 3, column 17"
};
ValueReport inspect_values(const QuantMatrix& matrix);

/// Owned tensors of one matrix in awq_gemm layout, ready to be written.
struct AwqTensors {
  int64_t k = 0, n = 0, group_size = 0;
  Dtype scale_dtype = Dtype::f16;
  std::vector<uint32_t> qweight;  // (K, N/8)
  std::vector<uint32_t> qzeros;   // (G, N/8)
  std::vector<uint16_t> scales;   // (G, N) bits of scale_dtype

  QuantMatrix view() const;
};

/// One word of qweight or qzeros: eight neighbouring columns, each 0..15, in AWQ's nibble order.
uint32_t pack_awq_word(const uint8_t columns[8]);

/// Packs codes (K, N), zeros (G, N) and scale bits (G, N), all row-major, as awq_gemm.
/// Requires n % 8 == 0, k % group_size == 0, codes and zeros in 0..15.
AwqTensors pack_awq_gemm(int64_t k, int64_t n, int64_t group_size, const uint8_t* codes,
                         const uint8_t* zeros, const uint16_t* scale_bits, Dtype scale_dtype);

/// `matrix` of any layout as awq_gemm; zero points are written out. Requires n % 8 == 0.
AwqTensors to_awq_gemm(const QuantMatrix& matrix);

}  // namespace nibble
