// The activation quantizer: every instruction set against ref::quantize bit for bit, then the
// properties that any correct quantizer has.
#include <rapidcheck.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>

#include "gemm/cpu/quantize.h"
#include "gemm_testing.h"

namespace nibble::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};

struct NamedOps {
  const char* name;
  const QuantizerOps* ops;
};

std::vector<NamedOps> find_runnable_ops() {
  std::vector<NamedOps> all;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    const QuantizerOps* ops = &quantizer_ops_for(isa);
    const bool known = std::any_of(all.begin(), all.end(),
                                   [&](const NamedOps& other) { return other.ops == ops; });
    if (known) {
      std::printf("SKIPPED QUANTIZER %s: not in this build or not on this CPU\n", isa_name(isa));
    } else {
      all.push_back({isa_name(isa), ops});
    }
  }
  return all;
}

/// The quantizers that this CPU runs. The ones it lacks are printed, once a process.
const std::vector<NamedOps>& runnable_ops() {
  static const std::vector<NamedOps> all = find_runnable_ops();
  return all;
}

float largest_finite(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return std::numeric_limits<float>::max();
    case Dtype::f16: return float_from_f16(0x7bff);
    case Dtype::bf16: return float_from_bf16(0x7f7f);
  }
  return 0;
}

/// x (m, k) of any dtype with rows `stride` apart, starting one element past an aligned address, so
/// that vectors are never aligned. The bytes between rows are NaNs.
struct Rows {
  std::vector<unsigned char> bytes;
  Dtype dtype;
  int64_t k, stride;

  Rows(Dtype type, int64_t m, int64_t columns, int64_t row_stride)
      : bytes(static_cast<size_t>((m * row_stride + 1) * dtype_bytes(type)), 0xff),
        dtype(type),
        k(columns),
        stride(row_stride) {}

  void* data() { return bytes.data() + dtype_bytes(dtype); }
  const void* data() const { return bytes.data() + dtype_bytes(dtype); }
  void set(int64_t row, int64_t i, float value) {
    store_from_float(data(), row * stride + i, dtype, value);
  }
  float get(int64_t row, int64_t i) const { return load_as_float(data(), row * stride + i, dtype); }
  const void* row(int64_t index) const {
    return static_cast<const unsigned char*>(data()) + index * stride * dtype_bytes(dtype);
  }
};

Rows random_rows(Dtype dtype, int64_t m, int64_t k, int64_t stride, std::mt19937& random) {
  Rows x(dtype, m, k, stride);
  for (int64_t row = 0; row < m; ++row) {
    const float magnitude = std::ldexp(1.0f, static_cast<int>(random() % 12) - 6);
    std::normal_distribution<float> values(0.1f, magnitude);
    for (int64_t i = 0; i < k; ++i) x.set(row, i, random() % 16 == 0 ? 0.0f : values(random));
  }
  return x;
}

/// What the quantizer is asked for, apart from x.
struct Options {
  Mode mode = Mode::w4a8;
  Granularity granularity = Granularity::token;
  bool symmetric = true;
  int64_t group_size = 0;  // 0: k
  float clip = 1;
  std::vector<float> static_scales = {};
};

Problem problem_of(const Options& options, const Rows& x, int64_t m) {
  return {.m = m,
          .n = 8,
          .k = x.k,
          .group_size = options.group_size == 0 ? x.k : options.group_size,
          .mode = options.mode,
          .x_dtype = x.dtype,
          .granularity = options.granularity,
          .symmetric = options.symmetric};
}

GemmInput input_of(const Options& options, const Rows& x) {
  return {x.data(), x.stride, options.clip,
          options.static_scales.empty() ? nullptr : options.static_scales.data()};
}

/// All rows by one instruction set, into dense rows. False if a row was refused.
bool quantize_by(const QuantizerOps& ops, const Options& options, const Rows& x, int64_t m,
                 ref::Activations* a) {
  const Problem p = problem_of(options, x, m);
  const GemmInput input = input_of(options, x);
  const int64_t groups = p.k / p.group_size;
  const int64_t per_row = scales_per_group(p.granularity) ? groups : 1;
  a->codes.assign(static_cast<size_t>(m * p.k), 99);
  a->scales.assign(static_cast<size_t>(m * per_row), -1);
  a->sums.assign(static_cast<size_t>(m * groups), -1);
  Scaling tensor;
  if (p.granularity == Granularity::tensor) {
    ElementRange all;
    for (int64_t row = 0; row < m; ++row) {
      all = merge_ranges(all, ops.range(x.row(row), x.dtype, p.k));
    }
    tensor = dynamic_scaling(all, p, options.clip);
  }
  for (int64_t row = 0; row < m; ++row) {
    const RowDestination to{
        &a->codes[row * p.k],      p.group_size,          kTileDepth, p.group_size,
        &a->scales[row * per_row], &a->sums[row * groups]};
    if (!quantize_row(ops, p, input, tensor, x.row(row), to)) return false;
  }
  return true;
}

std::string first_difference(const ref::Activations& a, const ref::Activations& b) {
  for (size_t i = 0; i < b.codes.size(); ++i) {
    if (a.codes[i] != b.codes[i]) {
      return "code " + std::to_string(i) + " is " + std::to_string(a.codes[i]) + ", expected " +
             std::to_string(b.codes[i]);
    }
  }
  for (size_t i = 0; i < b.scales.size(); ++i) {
    if (std::bit_cast<uint32_t>(a.scales[i]) != std::bit_cast<uint32_t>(b.scales[i])) {
      return "scale " + std::to_string(i) + " is " + std::to_string(a.scales[i]) + ", expected " +
             std::to_string(b.scales[i]);
    }
  }
  if (a.sums != b.sums) return "a sum differs";
  return "";
}

/// Every instruction set gives the oracle's bits; returns them.
ref::Activations expect_all_equal(const Options& options, const Rows& x, int64_t m) {
  const ref::Activations expected = ref::quantize(problem_of(options, x, m), input_of(options, x));
  for (const NamedOps& named : runnable_ops()) {
    ref::Activations actual;
    EXPECT_TRUE(quantize_by(*named.ops, options, x, m, &actual)) << named.name;
    EXPECT_EQ(first_difference(actual, expected), "")
        << named.name << ", " << granularity_name(options.granularity) << ", "
        << mode_name(options.mode) << (options.symmetric ? "" : " asymmetric") << ", "
        << dtype_name(x.dtype) << ", k " << x.k << ", group " << options.group_size;
  }
  return expected;
}

/// Each legal combination of mode, granularity and symmetry.
void for_each_kind(const std::function<void(Options)>& body) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    for (const Granularity granularity :
         {Granularity::tensor, Granularity::token, Granularity::group, Granularity::static_tensor,
          Granularity::static_group}) {
      body({.mode = mode, .granularity = granularity});
      const bool dynamic = granularity <= Granularity::group;
      if (mode == Mode::w4a4 && dynamic) {
        body({.mode = mode, .granularity = granularity, .symmetric = false});
      }
    }
  }
}

TEST(Oracle, RoundsToE4m3) {
  // every number of the format is itself; halfway between two, the even one wins
  float before = 0;
  int code = 0;
  for (int exponent = 0; exponent < 16; ++exponent) {
    for (int mantissa = 0; mantissa < (exponent == 15 ? 7 : 8); ++mantissa, ++code) {
      const auto significand = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa);
      const float value = std::ldexp(significand, std::max(exponent, 1) - 10);
      EXPECT_EQ(ref::round_to_e4m3(value), value);
      EXPECT_EQ(ref::round_to_e4m3(-value), -value);
      if (code > 0) {
        const float half = (before + value) / 2;
        EXPECT_EQ(ref::round_to_e4m3(half), code % 2 == 0 ? value : before) << half;
        EXPECT_EQ(ref::round_to_e4m3(std::nextafter(half, 1e9f)), value);
        EXPECT_EQ(ref::round_to_e4m3(std::nextafter(half, 0.0f)), before);
      }
      before = value;
    }
  }
  EXPECT_EQ(before, 448.0f);
}

TEST(Quantizer, EveryKindDtypeAndGroupEqualsTheReference) {
  std::mt19937 random(1);
  for_each_kind([&](Options options) {
    for (const Dtype dtype : kDtypes) {
      for (const int64_t group :
           {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 200}) {
        for (const int64_t groups : {1, 3}) {
          const int64_t k = group * groups;
          const Rows x = random_rows(dtype, 3, k, k + random() % 5, random);
          options.group_size = group;
          options.static_scales.resize(static_cast<size_t>(groups));
          for (float& t : options.static_scales) {
            t = std::uniform_real_distribution<float>(0.001f, 0.2f)(random);
          }
          for (const float clip : {1.0f, 0.9f, 0.3f}) {
            options.clip = clip;
            expect_all_equal(options, x, 3);
          }
        }
      }
    }
  });
}

// The layouts of the kernels: groups padded to a multiple of 4 or 64, tiles 1024 bytes apart.
TEST(Quantizer, PaddingIsZeroedAndNothingElseIsTouched) {
  std::mt19937 random(2);
  for (const NamedOps& named : runnable_ops()) {
    for (const int64_t group : {1, 5, 63, 64, 65, 130}) {
      const int64_t groups = 2, steps = (group + 63) / 64;
      const Rows x = random_rows(Dtype::f32, 1, group * groups, group * groups, random);
      const Options options{.group_size = group};
      const Problem p = problem_of(options, x, 1);
      const GemmInput input = input_of(options, x);
      const ref::Activations expected = ref::quantize(p, input);
      constexpr int64_t kStep = 1024;
      std::vector<int8_t> codes(static_cast<size_t>(groups * steps * kStep), 99);
      float scale = 0;
      ASSERT_TRUE(quantize_row(*named.ops, p, input, {}, x.row(0),
                               {codes.data(), steps * kStep, kStep, steps * 64, &scale, nullptr}));
      for (int64_t i = 0; i < static_cast<int64_t>(codes.size()); ++i) {
        const int64_t in_group = i / kStep % steps * 64 + i % kStep;
        int8_t value = 99;
        if (i % kStep < 64) {
          value =
              in_group < group ? expected.codes[i / (steps * kStep) * group + in_group] : int8_t{0};
        }
        ASSERT_EQ(codes[i], value) << named.name << ", group " << group << ", byte " << i;
      }
    }
  }
}

int half_to_even(int floor_value) { return floor_value % 2 == 0 ? floor_value : floor_value + 1; }

TEST(Quantizer, TiesRoundToEven) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const int limit = mode == Mode::w4a8 ? 127 : 7;
    for (const Dtype dtype : kDtypes) {
      for (const float t : {0.25f, 1.0f, 8.0f}) {  // powers of two: x * (1 / t) = n + 0.5 exactly
        Rows x(dtype, 1, 2 * limit + 1, 2 * limit + 1);
        for (int n = -limit; n < limit; ++n) x.set(0, n + limit, (n + 0.5f) * t);
        x.set(0, 2 * limit, limit * t);
        for (const Granularity granularity : {Granularity::token, Granularity::static_tensor}) {
          const ref::Activations a = expect_all_equal(
              {.mode = mode, .granularity = granularity, .static_scales = {t}}, x, 1);
          EXPECT_EQ(a.scales[0], t);
          for (int n = -limit; n < limit; ++n) {
            ASSERT_EQ(a.codes[n + limit], half_to_even(n)) << n << " + 0.5, t " << t;
          }
        }
      }
    }
  }
}

TEST(Quantizer, AsymmetricTiesRoundToEven) {
  for (const Dtype dtype : kDtypes) {
    for (const float sign : {1.0f, -1.0f}) {
      Rows x(dtype, 1, 16, 16);
      for (int n = 0; n < 15; ++n) x.set(0, n, sign * (n + 0.5f));
      x.set(0, 15, sign * 15.0f);
      const ref::Activations a = expect_all_equal({.mode = Mode::w4a4, .symmetric = false}, x, 1);
      EXPECT_EQ(a.scales[0], 1.0f);
      for (int n = 0; n < 15; ++n) ASSERT_EQ(a.codes[n], sign * half_to_even(n)) << n;
    }
  }
}

TEST(Quantizer, StaticScalesClampHugeValues) {
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const int limit = mode == Mode::w4a8 ? 127 : 7;
    for (const Dtype dtype : kDtypes) {
      const float most = largest_finite(dtype);
      for (const float t : {0x1p-100f, 1e-20f, 1.0f}) {
        Rows x(dtype, 1, 37, 37);
        for (int64_t i = 0; i < 37; ++i) x.set(0, i, i % 3 == 0 ? most : i % 3 == 1 ? -most : 0);
        const ref::Activations a = expect_all_equal(
            {.mode = mode, .granularity = Granularity::static_tensor, .static_scales = {t}}, x, 1);
        for (int i = 0; i < 37; ++i) {
          ASSERT_EQ(a.codes[i], i % 3 == 0 ? limit : i % 3 == 1 ? -limit : 0) << "t " << t;
        }
      }
      Rows x(dtype, 1, 9, 9);
      for (int64_t i = 0; i < 9; ++i) x.set(0, i, 1.0f);
      const ref::Activations a =
          expect_all_equal({.mode = mode,
                            .granularity = Granularity::static_tensor,
                            .static_scales = {std::numeric_limits<float>::max()}},
                           x, 1);
      EXPECT_EQ(a.sums[0], 0);
    }
  }
}

TEST(Quantizer, ZerosAndRangesBelowTwoToMinus100GiveScaleZero) {
  const float subnormal = std::numeric_limits<float>::denorm_min() * 0x10000;
  for_each_kind([&](Options options) {
    if (options.granularity > Granularity::group) return;
    for (const float value : {0.0f, -0.0f, subnormal, -subnormal, 0x1.fp-101f}) {
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
        Rows x(dtype, 2, 21, 21);
        for (int64_t i = 0; i < 42; ++i) x.set(i / 21, i % 21, i % 2 == 0 ? value : 0.0f);
        const ref::Activations a = expect_all_equal(options, x, 2);
        for (const float t : a.scales) ASSERT_EQ(std::bit_cast<uint32_t>(t), 0u);
        for (const int8_t code : a.codes) ASSERT_EQ(code, 0);
      }
    }
  });
  Rows x(Dtype::f32, 1, 20, 20);
  for (int64_t i = 0; i < 20; ++i) x.set(0, i, i % 2 == 0 ? 0x1p-100f : 0.0f);
  const ref::Activations a = expect_all_equal({}, x, 1);  // the smallest range that counts
  EXPECT_GT(a.scales[0], 0.0f);
  EXPECT_EQ(a.codes[0], 127);
}

// The subnormals of f16 are ordinary floats: they must not be flushed.
TEST(Quantizer, HalfSubnormalsAreQuantized) {
  Rows x(Dtype::f16, 1, 33, 33);
  for (int64_t i = 0; i < 33; ++i) x.set(0, i, static_cast<float>(i) * 0x1p-24f);
  const ref::Activations a = expect_all_equal({}, x, 1);
  EXPECT_EQ(a.codes[32], 127);
  EXPECT_EQ(a.scales[0], 32 * 0x1p-24f / 127);
}

TEST(Quantizer, NegativeZeroIsZero) {
  for_each_kind([&](Options options) {
    options.static_scales = {0.5f};
    for (const float other : {1.0f, -1.0f}) {
      Rows x(Dtype::f32, 1, 19, 19);
      for (int64_t i = 0; i < 19; ++i) x.set(0, i, -0.0f);
      x.set(0, 7, other);
      const ref::Activations a = expect_all_equal(options, x, 1);
      for (int64_t i = 0; i < 19; ++i) ASSERT_EQ(a.codes[i] == 0, i != 7);
    }
  });
}

TEST(Quantizer, LargestFiniteValuesDoNotOverflow) {
  for_each_kind([&](Options options) {
    if (options.granularity > Granularity::group) return;
    for (const Dtype dtype : kDtypes) {
      const float most = largest_finite(dtype);
      for (const bool both_signs : {false, true}) {
        Rows x(dtype, 1, 35, 35);
        for (int64_t i = 0; i < 35; ++i) {
          x.set(0, i, i % 5 == 0 ? most : i % 5 == 1 && both_signs ? -most : most / 1024);
        }
        const ref::Activations a = expect_all_equal(options, x, 1);
        const double t = a.scales[0];
        ASSERT_TRUE(std::isfinite(t) && t > 0);
        for (int64_t i = 0; i < 35; ++i) {
          ASSERT_LE(std::fabs(x.get(0, i) - a.codes[i] * t), t * 0.5001) << i;
        }
      }
    }
  });
}

TEST(Quantizer, NonFiniteValuesAreFoundAtEveryPosition) {
  constexpr int64_t k = 69;  // four vectors of 16 and a tail; eight of 8 and a tail
  std::mt19937 random(3);
  for_each_kind([&](Options options) {
    options.group_size = 23;
    options.static_scales.assign(3, 0.1f);
    for (const Dtype dtype : kDtypes) {
      Rows x = random_rows(dtype, 2, k, k, random);
      for (int64_t i = 0; i < k; ++i) {
        const float before = x.get(1, i);
        for (const float bad : {kInf, -kInf, std::nanf(""), -std::nanf("")}) {
          x.set(1, i, bad);
          for (const NamedOps& named : runnable_ops()) {
            const ElementRange range = named.ops->range(x.row(1), dtype, k);
            ASSERT_GE(range.max_abs_bits, kInfinityBits) << named.name << ", position " << i;
            if (options.granularity == Granularity::tensor) continue;  // refused by the driver
            ref::Activations a;
            ASSERT_FALSE(quantize_by(*named.ops, options, x, 2, &a)) << named.name << " " << i;
          }
        }
        x.set(1, i, before);
      }
    }
  });
}

TEST(Quantizer, TheFirstNonFiniteRowIsNamed) {
  std::mt19937 random(4);
  for_each_kind([&](Options options) {
    options.group_size = 16;
    options.static_scales.assign(3, 0.1f);
    for (const std::string& kernel : runnable_kernels(options.mode)) {
      for (const int threads : {1, 3}) {
        Rows x = random_rows(Dtype::f32, 300, 48, 50, random);
        x.set(297, 0, kInf);
        x.set(41, 47, std::nanf(""));
        x.set(42, 20, -kInf);
        const Result<Plan> plan = plan_gemm(problem_of(options, x, 300), kernel.c_str(), threads);
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        std::vector<int8_t> codes(300 * 48);
        std::vector<float> scales(300 * 3);
        const Status status =
            quantize_activations(*plan, input_of(options, x), codes.data(), scales.data(), nullptr);
        EXPECT_EQ(status.code(), Code::non_finite) << plan->describe();
        EXPECT_EQ(status.message(), "x has a NaN or infinity in row 41") << plan->describe();
      }
    }
  });
}

// With t = amax / 127 each float operation is off by a relative 2^-24 at most: t, 1 / t and
// x * (1 / t) together move x / t, which is at most 127, by less than 127 * 4 * 2^-24 < 0.0001.
TEST(QuantizerProperties, ErrorIsAtMostHalfAStep) {
  const bool ok = rc::check("|x - a * t| <= t / 2", [] {
    const auto seed = *rc::gen::arbitrary<uint32_t>();
    const auto group = *rc::gen::inRange<int64_t>(1, 80);
    const auto groups = *rc::gen::inRange<int64_t>(1, 4);
    std::mt19937 random(seed);
    Options options;
    options.group_size = group;
    options.mode = random() % 2 ? Mode::w4a8 : Mode::w4a4;
    options.symmetric = options.mode == Mode::w4a8 || random() % 2;
    options.granularity = static_cast<Granularity>(random() % 3);
    const int64_t m = 3, k = group * groups;
    const Rows x = random_rows(kDtypes[random() % 3], m, k, k, random);
    const ref::Activations a = expect_all_equal(options, x, m);
    const bool by_group = scales_per_group(options.granularity);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const double t = a.scales[by_group ? row * groups + g : row];
        int32_t sum = 0;
        for (int64_t i = g * group; i < (g + 1) * group; ++i) {
          const int8_t code = a.codes[row * k + i];
          RC_ASSERT(std::fabs(x.get(row, i) - code * t) <= t * 0.5001);
          sum += code;
        }
        RC_ASSERT(a.sums[row * groups + g] == sum);
      }
    }
  });
  EXPECT_TRUE(ok);
}

TEST(QuantizerProperties, TokenEqualsGroupWhenThereIsOneGroup) {
  std::mt19937 random(5);
  for (const Mode mode : {Mode::w4a8, Mode::w4a4}) {
    const Rows x = random_rows(Dtype::bf16, 4, 77, 80, random);
    const ref::Activations token =
        expect_all_equal({.mode = mode, .granularity = Granularity::token}, x, 4);
    const ref::Activations group =
        expect_all_equal({.mode = mode, .granularity = Granularity::group}, x, 4);
    EXPECT_EQ(first_difference(token, group), "");
  }
}

TEST(QuantizerProperties, ARowDoesNotDependOnItsBatch) {
  std::mt19937 random(6);
  for_each_kind([&](Options options) {
    if (options.granularity == Granularity::tensor) return;
    options.group_size = 13;
    options.static_scales = {0.1f, 0.02f, 0.3f};
    const Rows batch = random_rows(Dtype::f16, 6, 39, 41, random);
    const ref::Activations all = expect_all_equal(options, batch, 6);
    const int64_t per_row = scales_per_group(options.granularity) ? 3 : 1;
    for (int64_t row = 0; row < 6; ++row) {
      Rows one(Dtype::f16, 1, 39, 39);
      for (int64_t i = 0; i < 39; ++i) one.set(0, i, batch.get(row, i));
      const ref::Activations alone = expect_all_equal(options, one, 1);
      const ref::Activations in_batch{
          {&all.codes[row * 39], &all.codes[row * 39] + 39},
          {&all.scales[row * per_row], &all.scales[row * per_row] + per_row},
          {&all.sums[row * 3], &all.sums[row * 3] + 3}};
      EXPECT_EQ(first_difference(alone, in_batch), "") << row;
    }
  });
}

TEST(QuantizerProperties, TensorTakesItsScaleFromTheWholeBatch) {
  Rows x(Dtype::f32, 3, 10, 10);
  for (int64_t i = 0; i < 30; ++i) x.set(i / 10, i % 10, 0.5f);
  x.set(2, 9, -12.7f);
  const ref::Activations a = expect_all_equal({.granularity = Granularity::tensor}, x, 3);
  EXPECT_EQ(a.scales, std::vector<float>(3, 12.7f / 127));
  EXPECT_EQ(a.codes[0], 5);
  EXPECT_EQ(a.codes[29], -127);
}

TEST(Quantizer, EveryHalfConvertsToFloatExactly) {
  for (const NamedOps& named : runnable_ops()) {
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
      std::vector<uint16_t> bits(65536 + 3);
      for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
      std::vector<float> out(bits.size());
      named.ops->to_float(bits.data(), dtype, static_cast<int64_t>(bits.size()), out.data());
      for (size_t i = 0; i < bits.size(); ++i) {
        const float expected = load_as_float(bits.data(), static_cast<int64_t>(i), dtype);
        if (std::isnan(expected)) {
          ASSERT_TRUE(std::isnan(out[i])) << named.name << " " << i;
        } else {
          ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(expected)) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble::testing
