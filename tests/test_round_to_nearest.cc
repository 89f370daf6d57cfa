// Round-to-nearest quantization against a second, plain implementation of the same definition, and
// its corners: constant groups, tiny groups, values that do not fit the scale's type.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "checkpoint_builder.h"
#include "format/round_to_nearest.h"

namespace nibble::test {
namespace {

/// A dense F32 weight (n, k).
struct Weight {
  int64_t n, k;
  std::vector<float> values;
  TensorView view() const {
    return {TensorDtype::f32,
            {n, k},
            reinterpret_cast<const std::byte*>(values.data()),
            values.size() * sizeof(float)};
  }
};

Weight random_weight(int64_t n, int64_t k, uint64_t seed) {
  TensorStore store;
  store.add_dense("w", n, k, Dtype::f32, seed);
  const TensorView& view = store.tensors().at("w");
  Weight weight{n, k, std::vector<float>(static_cast<size_t>(n * k))};
  std::memcpy(weight.values.data(), view.data, view.bytes);
  return weight;
}

float round_to(float value, Dtype dtype) {
  return dtype == Dtype::f16 ? float_from_f16(f16_from_float(value))
                             : float_from_bf16(bf16_from_float(value));
}

struct Unpacked {
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales;
};

Unpacked unpack(const AwqTensors& tensors) {
  const QuantMatrix matrix = tensors.view();
  Unpacked out;
  out.codes.resize(static_cast<size_t>(matrix.k * matrix.n));
  out.zeros.resize(static_cast<size_t>(matrix.groups() * matrix.n));
  out.scales.resize(out.zeros.size());
  unpack_codes(matrix, 0, matrix.n, out.codes.data());
  unpack_zeros(matrix, 0, matrix.n, out.zeros.data());
  for (size_t i = 0; i < out.scales.size(); ++i) {
    out.scales[i] =
        load_as_float(tensors.scales.data(), static_cast<int64_t>(i), tensors.scale_dtype);
  }
  return out;
}

void expect_definition(const Weight& weight, const RoundToNearestOptions& options) {
  const auto result = quantize_round_to_nearest("w", weight.view(), options);
  ASSERT_TRUE(result.ok()) << result.status().message();
  ASSERT_TRUE(check_quant_matrix(result->view(), "w").ok());
  const int64_t group_size = options.group_size == -1 ? weight.k : options.group_size;
  ASSERT_EQ(result->group_size, group_size);
  const Unpacked read = unpack(*result);
  for (int64_t n = 0; n < weight.n; ++n) {
    for (int64_t group = 0; group < weight.k / group_size; ++group) {
      const float* first = weight.values.data() + n * weight.k + group * group_size;
      const auto [low, high] = std::minmax_element(first, first + group_size);
      float scale, zero;
      if (options.symmetric) {
        scale = round_to(std::max(std::max(-*low, *high), 1e-5f) / 7, options.scale_dtype);
        zero = 8;
      } else {
        scale = round_to(std::max(*high - *low, 1e-5f) / 15, options.scale_dtype);
        zero = std::clamp(-std::nearbyint(*low / scale), 0.0f, 15.0f);
      }
      const auto at = static_cast<size_t>(group * weight.n + n);
      ASSERT_EQ(read.scales[at], scale);
      ASSERT_EQ(read.zeros[at], zero);
      for (int64_t i = 0; i < group_size; ++i) {
        const float code = std::clamp(std::nearbyint(first[i] / scale) + zero, 0.0f, 15.0f);
        ASSERT_EQ(read.codes[static_cast<size_t>((group * group_size + i) * weight.n + n)], code);
      }
    }
  }
}

TEST(RoundToNearest, FollowsTheDefinition) {
  for (const bool symmetric : {false, true}) {
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
      for (const int64_t group_size : {32, 64, 128, -1}) {
        expect_definition(random_weight(24, 256, 7), {group_size, symmetric, dtype});
      }
      // More than one block of columns, the last one partial.
      expect_definition(random_weight(136, 64, 8), {32, symmetric, dtype});
    }
  }
}

TEST(RoundToNearest, AnyValuesFollowTheDefinition) {
  EXPECT_TRUE(rc::check([] {
    Weight weight{8, 32, {}};
    const float magnitude = std::ldexp(1.0f, *rc::gen::inRange(-40, 14));
    const float offset = static_cast<float>(*rc::gen::inRange(-2, 3)) * magnitude;
    for (int i = 0; i < 8 * 32; ++i) {
      const auto step = static_cast<float>(*rc::gen::inRange(-128, 129)) / 128;
      weight.values.push_back(step * magnitude + offset);
    }
    const auto dtype = *rc::gen::element(Dtype::f16, Dtype::bf16);
    expect_definition(weight, {32, *rc::gen::arbitrary<bool>(), dtype});
  }));
}

TEST(RoundToNearest, ErrorIsWithinHalfAStepWhereZeroIsInRange) {
  const Weight weight = random_weight(16, 128, 9);
  const auto result = quantize_round_to_nearest("w", weight.view(), {});
  ASSERT_TRUE(result.ok());
  std::vector<float> read(16 * 128);
  dequantize(result->view(), 0, 16, read.data());
  for (int64_t n = 0; n < 16; ++n) {
    const float scale = load_as_float(result->scales.data(), n, Dtype::f16);
    for (int64_t k = 0; k < 128; ++k) {
      const float error =
          read[static_cast<size_t>(k * 16 + n)] - weight.values[static_cast<size_t>(n * 128 + k)];
      // Half a step, and what rounding s and z leaves at the far end.
      EXPECT_LE(std::abs(error), scale * 1.01f);
    }
  }
}

TEST(RoundToNearest, TheLargestValuesOfSymmetricGroupsAreKept) {
  Weight weight{8, 32, std::vector<float>(8 * 32)};
  weight.values[3] = -7;
  weight.values[4] = 7;
  weight.values[5] = 0.5f;  // a tie, to even
  weight.values[6] = 1.5f;
  const auto result = quantize_round_to_nearest("w", weight.view(), {32, true, Dtype::f16});
  ASSERT_TRUE(result.ok());
  const Unpacked read = unpack(*result);
  EXPECT_EQ(read.scales[0], 1.0f);
  EXPECT_EQ(read.codes[3 * 8], 1);
  EXPECT_EQ(read.codes[4 * 8], 15);
  EXPECT_EQ(read.codes[5 * 8], 8);
  EXPECT_EQ(read.codes[6 * 8], 10);
}

TEST(RoundToNearest, FlatGroupsKeepAUsableScale) {
  for (const float value : {0.0f, 1.0f, -1.0f, 1e-30f, 65504.0f, 1e30f}) {
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
      const Weight weight{8, 64, std::vector<float>(8 * 64, value)};
      const auto result = quantize_round_to_nearest("w", weight.view(), {64, false, dtype});
      ASSERT_TRUE(result.ok()) << value;
      const ValueReport report = inspect_values(result->view());
      EXPECT_EQ(report.zero_scales, 0);
      EXPECT_EQ(report.non_finite_scales, 0);
    }
  }
}

TEST(RoundToNearest, AllTypesOfWeightsGiveTheSameCodes) {
  // Values that every type holds exactly.
  Weight weight{8, 32, {}};
  for (int i = 0; i < 8 * 32; ++i) {
    weight.values.push_back(static_cast<float>(i * 37 % 101 - 50) / 64);
  }
  const auto expected = quantize_round_to_nearest("w", weight.view(), {32, false, Dtype::f16});
  ASSERT_TRUE(expected.ok());
  for (const auto& [tensor, dtype] :
       {std::pair{TensorDtype::f16, Dtype::f16}, std::pair{TensorDtype::bf16, Dtype::bf16}}) {
    std::vector<uint16_t> bits(weight.values.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      store_from_float(bits.data(), static_cast<int64_t>(i), dtype, weight.values[i]);
    }
    const TensorView view{
        tensor, {8, 32}, reinterpret_cast<const std::byte*>(bits.data()), bits.size() * 2};
    const auto result = quantize_round_to_nearest("w", view, {32, false, Dtype::f16});
    ASSERT_TRUE(result.ok());
    EXPECT_EQ(result->qweight, expected->qweight);
    EXPECT_EQ(result->qzeros, expected->qzeros);
    EXPECT_EQ(result->scales, expected->scales);
  }
}

void expect_error(const TensorView& view, const RoundToNearestOptions& options, Code code,
                  const std::string& fragment) {
  const auto result = quantize_round_to_nearest("model.q_proj", view, options);
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.status().code(), code);
  EXPECT_NE(result.status().message().find(fragment), std::string::npos)
      << result.status().message();
  EXPECT_NE(result.status().message().find("model.q_proj"), std::string::npos);
}

TEST(RoundToNearest, RefusesWhatItCannotQuantize) {
  const Weight good = random_weight(8, 64, 1);
  const auto bad = Code::invalid_argument;
  expect_error(random_weight(12, 64, 1).view(), {32}, bad, "multiple of 8");
  expect_error(good.view(), {48}, bad, "group size 48 does not divide K = 64");
  expect_error(good.view(), {0}, bad, "group size 0");
  expect_error(good.view(), {-2}, bad, "group size -2");
  expect_error(good.view(), {32, false, Dtype::f32}, bad, "f32");
  TensorView view = good.view();
  view.shape = {8 * 64};
  expect_error(view, {32}, bad, "F32 [512]");
  view = good.view();
  view.dtype = TensorDtype::i32;
  expect_error(view, {32}, bad, "I32 [8, 64]");
  expect_error({TensorDtype::f32, {0, 64}, nullptr, 0}, {32}, bad, "[0, 64]");
}

TEST(RoundToNearest, NamesTheFirstValueThatIsNotFinite) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {infinity, -infinity, std::nanf("")}) {
    Weight weight = random_weight(264, 64, 1);
    weight.values[5 * 64 + 40] = value;
    weight.values[200 * 64] = value;
    expect_error(weight.view(), {32}, Code::non_finite,
                 "NaN or infinity in output channel 5, input channels 32..63");
  }
}

TEST(RoundToNearest, AScaleBeyondItsTypeIsAnError) {
  Weight weight = random_weight(8, 64, 1);
  weight.values[0] = 2e6f;
  expect_error(weight.view(), {64}, Code::invalid_argument, "beyond the range of f16");
  EXPECT_TRUE(quantize_round_to_nearest("w", weight.view(), {64, false, Dtype::bf16}).ok());
  weight.values[0] = std::numeric_limits<float>::max();
  weight.values[1] = -std::numeric_limits<float>::max();
  EXPECT_TRUE(quantize_round_to_nearest("w", weight.view(), {64, false, Dtype::bf16}).ok());
}

}  // namespace
}  // namespace nibble::test
