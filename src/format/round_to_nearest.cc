// One block of output channels at a time: the codes of a group are collected and packed into whole
// cache lines of qweight. Blocks are independent, so they run in parallel with equal results.
#include "format/round_to_nearest.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "format/message.h"

namespace nibble {
namespace {

constexpr int64_t kBlockColumns = 128;   // 16 words: one cache line of a qweight row
constexpr float kSmallestRange = 1e-5f;  // AutoAWQ's clamp; keeps s from rounding to zero

struct GroupCode {
  uint16_t scale_bits = 0;
  int zero = 0;
  bool finite = true;
};

/// Half to even for |value| < 2^22, without depending on the rounding mode a libm call reads.
float round_even(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

/// Elements [first, first + values.size()) of `data` as floats.
void load_group(const std::byte* data, int64_t first, Dtype dtype, std::vector<float>& values) {
  const auto load = [&](auto constant) {  // the type is a constant inside the loop
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = load_as_float(data, first + static_cast<int64_t>(i), constant());
    }
  };
  switch (dtype) {
    case Dtype::f32: return load([] { return Dtype::f32; });
    case Dtype::f16: return load([] { return Dtype::f16; });
    case Dtype::bf16: return load([] { return Dtype::bf16; });
  }
}

/// Quantizes `values`, one group of one channel, to as many codes.
GroupCode quantize_group(const std::vector<float>& values, const RoundToNearestOptions& options,
                         uint8_t* codes) {
  GroupCode result;
  float low = values[0], high = values[0];
  for (const float value : values) {
    low = std::min(low, value);
    high = std::max(high, value);
    result.finite &= std::isfinite(value);
  }
  if (!result.finite) return result;
  // In double: high - low may overflow float.
  const double largest = std::max(std::abs(double{low}), std::abs(double{high}));
  const double range = options.symmetric ? largest : double{high} - double{low};
  const double exact = std::max(range, double{kSmallestRange}) / (options.symmetric ? 7 : 15);
  store_from_float(&result.scale_bits, 0, options.scale_dtype, static_cast<float>(exact));
  const float scale = load_as_float(&result.scale_bits, 0, options.scale_dtype);

  // Clamping before rounding changes nothing (the bounds are integers beyond every code), and
  // keeps quotients of a tiny scale inside the range of round_even.
  const auto rounded = [&](float value) {
    return round_even(std::clamp(value / scale, -64.0f, 64.0f));
  };
  const float zero = options.symmetric ? 8.0f : std::clamp(-rounded(low), 0.0f, 15.0f);
  for (size_t i = 0; i < values.size(); ++i) {
    const float code = std::clamp(rounded(values[i]) + zero, 0.0f, 15.0f);
    codes[i] = static_cast<uint8_t>(static_cast<int>(code));
  }
  result.zero = static_cast<int>(zero);
  return result;
}

/// What stopped the quantization; of several, the one that comes first in the weight.
class FirstProblem {
 public:
  void report(int64_t n, int64_t k, bool finite) {
    const std::lock_guard lock(mutex_);
    if (std::pair(n, k) < std::pair(n_, k_)) std::tie(n_, k_, finite_) = std::tie(n, k, finite);
  }
  bool any() const { return n_ != kNone; }
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  bool finite() const { return finite_; }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::mutex mutex_;
  int64_t n_ = kNone, k_ = kNone;
  bool finite_ = true;
};

}  // namespace

Result<AwqTensors> quantize_round_to_nearest(const std::string& name, const TensorView& weight,
                                             const RoundToNearestOptions& options) {
  const auto bad = [&](const std::string& reason, Code code = Code::invalid_argument) {
    return Status(code, fmt::format("{}: {}", quote_name(name), reason));
  };
  const auto dtype = float_dtype(weight.dtype);
  if (!dtype || weight.shape.size() != 2) {
    return bad(fmt::format("expected a matrix of F32, F16 or BF16, found {} {}",
                           tensor_dtype_name(weight.dtype), weight.shape_text()));
  }
  const int64_t n = weight.shape[0], k = weight.shape[1];
  const int64_t group_size = options.group_size == -1 ? k : options.group_size;
  if (n < 1 || k < 1 || n % 8 != 0) {
    return bad(fmt::format("shape {}: N must be a positive multiple of 8", weight.shape_text()));
  }
  if (group_size < 1 || k % group_size != 0) {
    return bad(fmt::format("group size {} does not divide K = {}", group_size, k));
  }
  if (options.scale_dtype == Dtype::f32) return bad("scales are stored as f16 or bf16, not f32");

  AwqTensors out{k, n, group_size, options.scale_dtype, {}, {}, {}};
  const int64_t groups = k / group_size, row_words = n / 8;
  out.qweight.resize(static_cast<size_t>(k * row_words));
  out.qzeros.resize(static_cast<size_t>(groups * row_words));
  out.scales.resize(static_cast<size_t>(groups * n));
  FirstProblem problem;

  const int64_t blocks = (n + kBlockColumns - 1) / kBlockColumns;
  parallel_for(available_cpus(), blocks, [&](int64_t block) {
    const int64_t n0 = block * kBlockColumns;
    const int64_t columns = std::min(kBlockColumns, n - n0);
    std::vector<float> values(static_cast<size_t>(group_size));
    std::vector<uint8_t> codes(static_cast<size_t>(group_size * kBlockColumns));
    uint8_t zeros[kBlockColumns];
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t k0 = group * group_size;
      for (int64_t c = 0; c < columns; ++c) {
        load_group(weight.data, (n0 + c) * k + k0, *dtype, values);
        const GroupCode code = quantize_group(values, options, codes.data() + c * group_size);
        const bool scale_ok =
            std::isfinite(load_as_float(&code.scale_bits, 0, options.scale_dtype));
        if (!code.finite || !scale_ok) problem.report(n0 + c, k0, code.finite);
        zeros[c] = static_cast<uint8_t>(code.zero);
        out.scales[static_cast<size_t>(group * n + n0 + c)] = code.scale_bits;
      }
      for (int64_t w = 0; w < columns / 8; ++w) {
        out.qzeros[static_cast<size_t>(group * row_words + n0 / 8 + w)] =
            pack_awq_word(zeros + 8 * w);
      }
      for (int64_t i = 0; i < group_size; ++i) {
        for (int64_t w = 0; w < columns / 8; ++w) {
          uint8_t word[8];
          for (int64_t c = 0; c < 8; ++c) {
            word[c] = codes[static_cast<size_t>((8 * w + c) * group_size + i)];
          }
          out.qweight[static_cast<size_t>((k0 + i) * row_words + n0 / 8 + w)] = pack_awq_word(word);
        }
      }
    }
  });
  if (problem.any()) {
    const std::string where = fmt::format("in output channel {}, input channels {}..{}",
                                          problem.n(), problem.k(), problem.k() + group_size - 1);
    if (!problem.finite()) return bad("NaN or infinity " + where, Code::non_finite);
    return bad(fmt::format("weights {} need a scale beyond the range of {}", where,
                           dtype_name(options.scale_dtype)));
  }
  return out;
}

}  // namespace nibble
