// Two word orders (AWQ's and natural) and three placements of words; docs/formats.md draws them.
// Words are spread eight bytes at a time, since this is what loading a whole model spends.
#include "format/quant_matrix.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "base/check.h"

namespace nibble {
namespace {

static_assert(std::endian::native == std::endian::little, "words in files are little-endian");

constexpr int64_t kMaxDimension = INT32_MAX;  // the kernels count channels in int32
constexpr int kPerWord = 8;                   // nibbles in an int32
constexpr uint8_t kSymmetricZero = 8;

// Nibble of an AWQ word that holds column 8c + j.
constexpr int kAwqNibble[kPerWord] = {0, 4, 1, 5, 2, 6, 3, 7};

int64_t words_for(int64_t values) { return (values + kPerWord - 1) / kPerWord; }

uint32_t load_word(const std::byte* words, int64_t index) {
  uint32_t word;
  std::memcpy(&word, words + index * 4, sizeof word);
  return word;
}

uint16_t load_half(const std::byte* halves, int64_t index) {
  uint16_t half;
  std::memcpy(&half, halves + index * 2, sizeof half);
  return half;
}

uint8_t nibble_of(uint32_t word, int nibble) { return (word >> (4 * nibble)) & 15; }

/// Byte i of the result is nibble i of `word`.
uint64_t spread_natural(uint64_t word) {
  word = (word | word << 16) & 0x0000ffff0000ffffu;
  word = (word | word << 8) & 0x00ff00ff00ff00ffu;
  return (word | word << 4) & 0x0f0f0f0f0f0f0f0fu;
}

/// Byte i of the result is column i of an AWQ word, whose low half holds the even columns in order
/// and whose high half the odd ones.
uint64_t spread_awq(uint32_t word) {
  const auto every_other_byte = [](uint64_t half) {
    half = (half | half << 24) & 0x000000ff000000ffu;
    return (half | half << 12) & 0x000f000f000f000fu;
  };
  return every_other_byte(word & 0xffff) | every_other_byte(word >> 16) << 8;
}

/// Codes or zero points of awq_gemm: `rows` rows of n/8 words.
void unpack_awq_rows(const std::byte* words, int64_t rows, int64_t n, int64_t n0, int64_t count,
                     uint8_t* out) {
  const int64_t row_words = n / kPerWord;
  if (n0 % kPerWord == 0 && count % kPerWord == 0) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = row * row_words + n0 / kPerWord;
      for (int64_t w = 0; w < count / kPerWord; ++w, out += kPerWord) {
        const uint64_t columns = spread_awq(load_word(words, first + w));
        std::memcpy(out, &columns, sizeof columns);
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = n0; column < n0 + count; ++column) {
      const uint32_t word = load_word(words, row * row_words + column / kPerWord);
      *out++ = nibble_of(word, kAwqNibble[column % kPerWord]);
    }
  }
}

/// Rows of words along the other axis: row n holds `length` values of output channel n in natural
/// order; out is (length, count). Eight channels at a time, so that stores are runs of bytes.
void unpack_transposed(const std::byte* words, int64_t row_words, int64_t length, int64_t n0,
                       int64_t count, uint8_t* out) {
  for (int64_t c0 = 0; c0 < count; c0 += kPerWord) {
    const int64_t columns = std::min<int64_t>(kPerWord, count - c0);
    for (int64_t i0 = 0; i0 < length; i0 += kPerWord) {
      const int64_t values = std::min<int64_t>(kPerWord, length - i0);
      uint64_t bytes[kPerWord] = {};
      for (int64_t c = 0; c < columns; ++c) {
        bytes[c] = spread_natural(load_word(words, (n0 + c0 + c) * row_words + i0 / kPerWord));
      }
      for (int64_t i = 0; i < values; ++i) {
        uint8_t* row = out + (i0 + i) * count + c0;
        for (int64_t c = 0; c < columns; ++c) row[c] = (bytes[c] >> (8 * i)) & 15;
      }
    }
  }
}

void require_columns(const QuantMatrix& matrix, int64_t n0, int64_t count) {
  NIBBLE_CHECK(n0 >= 0 && count >= 0 && n0 <= matrix.n - count);
}

}  // namespace

const char* weight_layout_name(WeightLayout layout) {
  switch (layout) {
    case WeightLayout::awq_gemm: return "awq_gemm";
    case WeightLayout::awq_gemv: return "awq_gemv";
    case WeightLayout::ct_pack: return "ct_pack";
  }
  return "?";
}

Status check_quant_matrix(const QuantMatrix& matrix, const char* name) {
  const auto bad = [&](const std::string& reason) {
    return Status(Code::invalid_argument, fmt::format("{}: {}", name, reason));
  };
  const auto [k, n, g] = std::tuple(matrix.k, matrix.n, matrix.group_size);
  if (k < 1 || n < 1 || k > kMaxDimension || n > kMaxDimension) {
    return bad(fmt::format("K = {}, N = {} are not both in 1..{}", k, n, kMaxDimension));
  }
  if (g < 1 || k % g != 0) return bad(fmt::format("group size {} does not divide K = {}", g, k));
  if (matrix.scale_dtype != Dtype::f16 && matrix.scale_dtype != Dtype::bf16) {
    return bad(fmt::format("scales are {}, expected f16 or bf16", dtype_name(matrix.scale_dtype)));
  }
  switch (matrix.layout) {
    case WeightLayout::awq_gemm:
      if (n % kPerWord == 0) return {};
      return bad(fmt::format("awq_gemm needs N = {} to be a multiple of 8", n));
    case WeightLayout::awq_gemv:
      if (k % kPerWord != 0) {
        return bad(fmt::format("awq_gemv needs K = {} to be a multiple of 8", k));
      }
      if (matrix.zero_words >= words_for(k / g) && matrix.zero_words <= kMaxDimension) return {};
      return bad(fmt::format("{} words of zero points per channel cannot hold {} groups",
                             matrix.zero_words, k / g));
    case WeightLayout::ct_pack: return {};
  }
  return bad(fmt::format("unknown weight layout {}", static_cast<int>(matrix.layout)));
}

void unpack_code_rows(const QuantMatrix& matrix, int64_t k0, int64_t rows, int64_t n0,
                      int64_t count, uint8_t* out) {
  require_columns(matrix, n0, count);
  NIBBLE_CHECK(k0 % kPerWord == 0 && k0 >= 0 && rows >= 0 && k0 + rows <= matrix.k);
  NIBBLE_CHECK(rows % kPerWord == 0 || k0 + rows == matrix.k);
  if (matrix.layout == WeightLayout::awq_gemm) {
    const int64_t row_bytes = matrix.n / kPerWord * 4;
    unpack_awq_rows(matrix.q + k0 * row_bytes, rows, matrix.n, n0, count, out);
  } else {
    unpack_transposed(matrix.q + k0 / kPerWord * 4, words_for(matrix.k), rows, n0, count, out);
  }
}

void unpack_codes(const QuantMatrix& matrix, int64_t n0, int64_t count, uint8_t* out) {
  unpack_code_rows(matrix, 0, matrix.k, n0, count, out);
}

void unpack_zeros(const QuantMatrix& matrix, int64_t n0, int64_t count, uint8_t* out) {
  require_columns(matrix, n0, count);
  const int64_t groups = matrix.groups();
  if (matrix.zeros == nullptr) {
    std::fill_n(out, groups * count, kSymmetricZero);
    return;
  }
  switch (matrix.layout) {
    case WeightLayout::awq_gemm:
      unpack_awq_rows(matrix.zeros, groups, matrix.n, n0, count, out);
      return;
    case WeightLayout::awq_gemv:
      unpack_transposed(matrix.zeros, matrix.zero_words, groups, n0, count, out);
      return;
    case WeightLayout::ct_pack:
      // The only tensor packed along N in natural order: eight channels of one group per word.
      for (int64_t c = 0; c < count; ++c) {
        const int64_t channel = n0 + c;
        const int64_t first = channel / kPerWord * groups;
        for (int64_t group = 0; group < groups; ++group) {
          out[group * count + c] = nibble_of(load_word(matrix.zeros, first + group),
                                             static_cast<int>(channel % kPerWord));
        }
      }
      return;
  }
}

void unpack_scales(const QuantMatrix& matrix, int64_t n0, int64_t count, uint16_t* out) {
  require_columns(matrix, n0, count);
  const int64_t groups = matrix.groups();
  if (matrix.layout == WeightLayout::awq_gemm) {
    for (int64_t group = 0; group < groups; ++group) {
      const std::byte* row = matrix.scales + (group * matrix.n + n0) * 2;
      if (count > 0) std::memcpy(out + group * count, row, static_cast<size_t>(count) * 2);
    }
    return;
  }
  const int64_t stride =
      matrix.layout == WeightLayout::awq_gemv ? matrix.zero_words * kPerWord : groups;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t group = 0; group < groups; ++group) {
      out[group * count + c] = load_half(matrix.scales, (n0 + c) * stride + group);
    }
  }
}

void dequantize(const QuantMatrix& matrix, int64_t n0, int64_t count, float* out) {
  const auto k = static_cast<size_t>(matrix.k), groups = static_cast<size_t>(matrix.groups());
  const auto columns = static_cast<size_t>(count);
  std::vector<uint8_t> codes(k * columns), zeros(groups * columns);
  std::vector<uint16_t> scale_bits(groups * columns);
  unpack_codes(matrix, n0, count, codes.data());
  unpack_zeros(matrix, n0, count, zeros.data());
  unpack_scales(matrix, n0, count, scale_bits.data());
  std::vector<float> scales(scale_bits.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = load_as_float(scale_bits.data(), static_cast<int64_t>(i), matrix.scale_dtype);
  }
  for (size_t row = 0; row < k; ++row) {
    const size_t group = row / static_cast<size_t>(matrix.group_size);
    for (size_t c = 0; c < columns; ++c) {
      const int code = codes[row * columns + c] - zeros[group * columns + c];
      out[row * columns + c] = static_cast<float>(code) * scales[group * columns + c];
    }
  }
}

ValueReport inspect_values(const QuantMatrix& matrix) {
  ValueReport report;
  const auto count = static_cast<size_t>(matrix.groups() * matrix.n);
  std::vector<uint16_t> scales(count);
  unpack_scales(matrix, 0, matrix.n, scales.data());
  const float smallest_normal = matrix.scale_dtype == Dtype::f16 ? 0x1p-14f : 0x1p-126f;
  for (size_t i = 0; i < count; ++i) {
    const auto index = static_cast<int64_t>(i);
    const float scale = load_as_float(scales.data(), index, matrix.scale_dtype);
    if (!std::isfinite(scale)) {
      if (report.non_finite_scales++ == 0) {
        report.first_non_finite =
            fmt::format("group {}, column {}", index / matrix.n, index % matrix.n);
      }
      continue;
    }
    report.negative_scales += scale < 0;
    report.zero_scales += scale == 0;
    report.subnormal_scales += scale != 0 && std::abs(scale) < smallest_normal;
  }
  std::vector<uint8_t> zeros(count);
  unpack_zeros(matrix, 0, matrix.n, zeros.data());
  const auto [low, high] = std::minmax_element(zeros.begin(), zeros.end());
  report.zero_point_min = *low;
  report.zero_point_max = *high;
  return report;
}

uint32_t pack_awq_word(const uint8_t columns[8]) {
  uint32_t word = 0;
  for (int column = 0; column < kPerWord; ++column) {
    word |= static_cast<uint32_t>(columns[column]) << (4 * kAwqNibble[column]);
  }
  return word;
}

QuantMatrix AwqTensors::view() const {
  QuantMatrix matrix;
  matrix.k = k;
  matrix.n = n;
  matrix.group_size = group_size;
  matrix.layout = WeightLayout::awq_gemm;
  matrix.scale_dtype = scale_dtype;
  matrix.q = reinterpret_cast<const std::byte*>(qweight.data());
  matrix.zeros = reinterpret_cast<const std::byte*>(qzeros.data());
  matrix.scales = reinterpret_cast<const std::byte*>(scales.data());
  return matrix;
}

AwqTensors pack_awq_gemm(int64_t k, int64_t n, int64_t group_size, const uint8_t* codes,
                         const uint8_t* zeros, const uint16_t* scale_bits, Dtype scale_dtype) {
  const int64_t groups = k / group_size, row_words = n / kPerWord;
  AwqTensors out{k, n, group_size, scale_dtype, {}, {}, {}};
  for (int64_t i = 0; i < k * row_words; ++i) {
    out.qweight.push_back(pack_awq_word(codes + i * kPerWord));
  }
  for (int64_t i = 0; i < groups * row_words; ++i) {
    out.qzeros.push_back(pack_awq_word(zeros + i * kPerWord));
  }
  out.scales.assign(scale_bits, scale_bits + groups * n);
  return out;
}

AwqTensors to_awq_gemm(const QuantMatrix& matrix) {
  std::vector<uint8_t> codes(static_cast<size_t>(matrix.k * matrix.n));
  std::vector<uint8_t> zeros(static_cast<size_t>(matrix.groups() * matrix.n));
  std::vector<uint16_t> scales(zeros.size());
  unpack_codes(matrix, 0, matrix.n, codes.data());
  unpack_zeros(matrix, 0, matrix.n, zeros.data());
  unpack_scales(matrix, 0, matrix.n, scales.data());
  return pack_awq_gemm(matrix.k, matrix.n, matrix.group_size, codes.data(), zeros.data(),
                       scales.data(), matrix.scale_dtype);
}

}  // namespace nibble
