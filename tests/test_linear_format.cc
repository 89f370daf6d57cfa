// The nibble orders against worked examples, every layout against the same logical matrix, and the
// recogniser on each format it runs and each it refuses. The golden file comes from
// golden/make_tiny_awq.py, which shares no code with this project.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>

#include "checkpoint_builder.h"

namespace nibble::test {
namespace {

using Columns = std::array<uint8_t, 8>;

QuantMatrix one_word(const uint32_t* word, const uint16_t* scales) {
  QuantMatrix matrix;
  matrix.k = matrix.group_size = 1;
  matrix.n = 8;
  matrix.q = matrix.zeros = reinterpret_cast<const std::byte*>(word);
  matrix.scales = reinterpret_cast<const std::byte*>(scales);
  return matrix;
}

Columns unpack_word(uint32_t word) {
  Columns columns;
  unpack_codes(one_word(&word, nullptr), 0, 8, columns.data());
  return columns;
}

TEST(AwqWord, WorkedExamples) {
  const std::vector<std::pair<Columns, uint32_t>> examples = {
      {{0, 1, 2, 3, 4, 5, 6, 7}, 0x75316420u},
      {{8, 9, 10, 11, 12, 13, 14, 15}, 0xFDB9ECA8u},
      {{3, 14, 0, 9, 15, 7, 8, 1}, 0x179E8F03u},
      {{8, 8, 8, 8, 8, 8, 8, 8}, 0x88888888u},
  };
  for (const auto& [columns, word] : examples) {
    EXPECT_EQ(pack_awq_word(columns.data()), word);
    EXPECT_EQ(unpack_word(word), columns);
    Columns zeros;
    unpack_zeros(one_word(&word, nullptr), 0, 8, zeros.data());
    EXPECT_EQ(zeros, columns);
    // One column at a time takes the path without the spread.
    for (int64_t i = 0; i < 8; ++i) {
      uint8_t column = 99;
      unpack_codes(one_word(&word, nullptr), i, 1, &column);
      EXPECT_EQ(column, columns[static_cast<size_t>(i)]);
    }
  }
  // Little-endian in the file.
  const uint32_t word = 0x75316420u;
  EXPECT_EQ(std::memcmp(&word, "\x20\x64\x31\x75", 4), 0);
}

TEST(AwqWord, TenThousandRandomWordsRoundTrip) {
  uint32_t word = 12345;
  for (int i = 0; i < 10'000; ++i) {
    word = word * 1664525u + 1013904223u;
    const Columns columns = unpack_word(word);
    ASSERT_EQ(pack_awq_word(columns.data()), word);
  }
}

struct ReadBack {
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> scales;
};

ReadBack read_back(const QuantMatrix& matrix, int64_t n0, int64_t count) {
  ReadBack out;
  out.codes.resize(static_cast<size_t>(matrix.k * count));
  out.zeros.resize(static_cast<size_t>(matrix.groups() * count));
  out.scales.resize(out.zeros.size());
  unpack_codes(matrix, n0, count, out.codes.data());
  unpack_zeros(matrix, n0, count, out.zeros.data());
  unpack_scales(matrix, n0, count, out.scales.data());
  return out;
}

template <class T>
std::vector<T> columns_of(const std::vector<T>& all, int64_t n, int64_t n0, int64_t count) {
  std::vector<T> out;
  for (size_t row = 0; row < all.size() / static_cast<size_t>(n); ++row) {
    const auto first = all.begin() + static_cast<int64_t>(row) * n + n0;
    out.insert(out.end(), first, first + count);
  }
  return out;
}

void expect_columns(const QuantMatrix& matrix, const LogicalLayer& layer, int64_t n0,
                    int64_t count) {
  const ReadBack read = read_back(matrix, n0, count);
  EXPECT_EQ(read.codes, columns_of(layer.codes, layer.n, n0, count));
  EXPECT_EQ(read.zeros, columns_of(layer.zeros, layer.n, n0, count));
  EXPECT_EQ(read.scales, columns_of(layer.scales, layer.n, n0, count));
}

QuantConfig config_of(const LayerSpec& spec) {
  auto config = parse_quant_config(make_config(spec), "config.json");
  EXPECT_TRUE(config.ok());
  return *config;
}

/// The one layer of `store`, recognised.
QuantizedLinear only_linear(const TensorStore& store, const QuantConfig& config) {
  auto linears = find_quantized_linears(store.tensors(), config);
  EXPECT_EQ(linears.size(), 1u);
  return linears.empty() ? QuantizedLinear{} : linears[0];
}

constexpr LinearFormat kReadable[] = {LinearFormat::awq_gemm, LinearFormat::awq_gemv,
                                      LinearFormat::ct_pack_asymmetric,
                                      LinearFormat::ct_pack_symmetric};

struct Shape {
  int64_t k, n, group_size;
};
// For gemv: one word of zero points; two because of padding; two needed; four because of padding;
// four needed; eight; and one group in all.
constexpr Shape kShapes[] = {{256, 16, 128}, {128, 16, 64}, {1024, 8, 64}, {64, 8, 32},
                             {1024, 8, 32},  {2048, 8, 32}, {256, 24, -1}, {1152, 40, 128},
                             {96, 72, 32},   {32, 8, 32}};

TEST(Layouts, TheSameMatrixReadsBackEqualFromEveryLayout) {
  for (const LinearFormat format : kReadable) {
    for (const Shape& shape : kShapes) {
      for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
        LayerSpec spec{.k = shape.k, .n = shape.n, .group_size = shape.group_size};
        spec.format = format;
        spec.scale_dtype = dtype;
        spec.bias = true;
        SCOPED_TRACE(std::string(linear_format_name(format)) + " K " + std::to_string(shape.k) +
                     " group " + std::to_string(shape.group_size));
        const LogicalLayer layer = make_layer(spec);
        TensorStore store;
        add_layer(store, spec, layer);
        const QuantizedLinear linear = only_linear(store, config_of(spec));
        ASSERT_TRUE(linear.status.ok()) << linear.status.message();
        EXPECT_EQ(linear.format, format);
        EXPECT_EQ(linear.name, spec.name);
        EXPECT_EQ(linear.matrix.k, layer.k);
        EXPECT_EQ(linear.matrix.n, layer.n);
        EXPECT_EQ(linear.matrix.group_size, layer.group_size);
        EXPECT_EQ(linear.matrix.scale_dtype, dtype);
        EXPECT_EQ(linear.symmetric, format == LinearFormat::ct_pack_symmetric);
        ASSERT_NE(linear.bias, nullptr);
        EXPECT_TRUE(check_quant_matrix(linear.matrix, "x").ok());
        expect_columns(linear.matrix, layer, 0, layer.n);
        expect_columns(linear.matrix, layer, layer.n - 8, 8);
        expect_columns(linear.matrix, layer, 3, 4);
        expect_columns(linear.matrix, layer, 1, layer.n - 1);
        expect_columns(linear.matrix, layer, 5, 0);
      }
    }
  }
}

TEST(Layouts, CompressedTensorsNeedNoMultiplesOfEight) {
  for (const LinearFormat format :
       {LinearFormat::ct_pack_asymmetric, LinearFormat::ct_pack_symmetric}) {
    const LayerSpec spec{.k = 30, .n = 13, .group_size = 10, .format = format};
    const LogicalLayer layer = make_layer(spec);
    TensorStore store;
    add_layer(store, spec, layer);
    const QuantizedLinear linear = only_linear(store, config_of(spec));
    ASSERT_TRUE(linear.status.ok()) << linear.status.message();
    expect_columns(linear.matrix, layer, 0, 13);
    expect_columns(linear.matrix, layer, 7, 5);
  }
}

TEST(Layouts, PointersMayHaveAnyAlignment) {
  for (const LinearFormat format : kReadable) {
    const LayerSpec spec{.k = 64, .n = 16, .group_size = 32, .format = format};
    const LogicalLayer layer = make_layer(spec);
    TensorStore store;
    add_layer(store, spec, layer);
    std::vector<std::vector<std::byte>> shifted;
    for (auto& [name, view] : store.tensors()) {
      auto& bytes = shifted.emplace_back(view.bytes + 1);
      std::memcpy(bytes.data() + 1, view.data, view.bytes);
      view.data = bytes.data() + 1;
    }
    const QuantizedLinear linear = only_linear(store, config_of(spec));
    ASSERT_TRUE(linear.status.ok()) << linear.status.message();
    expect_columns(linear.matrix, layer, 0, 16);
  }
}

TEST(Layouts, DequantizedWeightsAreExact) {
  for (const LinearFormat format : kReadable) {
    LayerSpec spec{.k = 64, .n = 16, .group_size = 32, .format = format};
    spec.scale_dtype = Dtype::bf16;
    const LogicalLayer layer = make_layer(spec);
    TensorStore store;
    add_layer(store, spec, layer);
    std::vector<float> weights(64 * 5);
    dequantize(only_linear(store, config_of(spec)).matrix, 2, 5, weights.data());
    for (int64_t k = 0; k < 64; ++k) {
      for (int64_t c = 0; c < 5; ++c) {
        const auto at = static_cast<size_t>(k / 32 * 16 + c + 2);
        const double scale = float_from_bf16(layer.scales[at]);
        const double expected =
            (layer.codes[static_cast<size_t>(k * 16 + c + 2)] - layer.zeros[at]) * scale;
        EXPECT_EQ(weights[static_cast<size_t>(k * 5 + c)], expected);
      }
    }
  }
}

TEST(Layouts, RandomShapesReadBack) {
  EXPECT_TRUE(rc::check([] {
    LayerSpec spec;
    spec.format = *rc::gen::elementOf(std::vector(std::begin(kReadable), std::end(kReadable)));
    spec.group_size = 32 << *rc::gen::inRange(0, 4);
    spec.k = spec.group_size * *rc::gen::inRange(1, 9);
    spec.n = 8 * *rc::gen::inRange(1, 6);
    spec.seed = *rc::gen::arbitrary<uint64_t>();
    const LogicalLayer layer = make_layer(spec);
    TensorStore store;
    add_layer(store, spec, layer);
    const QuantizedLinear linear = only_linear(store, config_of(spec));
    RC_ASSERT(linear.status.ok());
    RC_ASSERT(linear.format == spec.format);
    const int64_t n0 = *rc::gen::inRange<int64_t>(0, spec.n + 1);
    const int64_t count = *rc::gen::inRange<int64_t>(0, spec.n - n0 + 1);
    expect_columns(linear.matrix, layer, n0, count);
  }));
}

TEST(Layouts, PackAwqGemmIsTheInverseOfUnpacking) {
  const LayerSpec spec{.k = 64, .n = 24, .group_size = 32};
  const LogicalLayer layer = make_layer(spec);
  const AwqTensors packed = pack_awq_gemm(64, 24, 32, layer.codes.data(), layer.zeros.data(),
                                          layer.scales.data(), Dtype::f16);
  expect_columns(packed.view(), layer, 0, 24);
  TensorStore store;  // packed by the tests' own writer
  add_layer(store, spec, layer);
  const TensorView& qweight = store.tensors().at(spec.name + ".qweight");
  ASSERT_EQ(qweight.bytes, packed.qweight.size() * 4);
  EXPECT_EQ(std::memcmp(qweight.data, packed.qweight.data(), qweight.bytes), 0);
}

TEST(CheckQuantMatrix, NamesWhatDoesNotFit) {
  const auto message = [](int64_t k, int64_t n, int64_t g, WeightLayout layout,
                          int64_t zero_words = 0, Dtype dtype = Dtype::f16) {
    QuantMatrix matrix;
    matrix.k = k;
    matrix.n = n;
    matrix.group_size = g;
    matrix.layout = layout;
    matrix.zero_words = zero_words;
    matrix.scale_dtype = dtype;
    const Status status = check_quant_matrix(matrix, "w");
    EXPECT_EQ(status.ok(), status.code() != Code::invalid_argument);
    return status.message();
  };
  const auto gemm = WeightLayout::awq_gemm, gemv = WeightLayout::awq_gemv;
  EXPECT_EQ(message(64, 16, 32, gemm), "");
  EXPECT_EQ(message(64, 16, 48, gemm), "w: group size 48 does not divide K = 64");
  EXPECT_EQ(message(64, 16, 0, gemm), "w: group size 0 does not divide K = 64");
  EXPECT_NE(message(64, 12, 32, gemm).find("multiple of 8"), std::string::npos);
  EXPECT_NE(message(0, 16, 32, gemm).find("K = 0"), std::string::npos);
  EXPECT_NE(message(int64_t{1} << 31, 8, 1, gemm).find("not both in"), std::string::npos);
  EXPECT_NE(message(64, 8, 64, gemm, 0, Dtype::f32).find("f32"), std::string::npos);
  EXPECT_EQ(message(64, 3, 32, gemv, 1), "");
  EXPECT_NE(message(64, 3, 32, gemv, 0).find("cannot hold 2 groups"), std::string::npos);
  EXPECT_NE(message(12, 3, 12, gemv, 1).find("multiple of 8"), std::string::npos);
  EXPECT_EQ(message(9, 3, 3, WeightLayout::ct_pack), "");
}

TEST(Recogniser, EachRefusedFormatIsNamedWithItsShapes) {
  const std::vector<std::pair<LinearFormat, const char*>> cases = {
      {LinearFormat::gptq, "gptq layout is not supported; found qweight I32 [32, 64]"},
      {LinearFormat::awq_marlin, "awq-marlin layout is not supported; found qweight I32 [16, 128]"},
      {LinearFormat::awq_gemv_fast, "awq-gemv-fast layout is not supported; found qweight I16"},
      {LinearFormat::llm_awq, "llm-awq layout is not supported; found qweight I16 [16, 256]"},
      {LinearFormat::unknown, "fit no known 4-bit format; found qweight I32 [256, 16]"},
  };
  for (const auto& [format, fragment] : cases) {
    const LayerSpec spec{.format = format};
    TensorStore store;
    add_layer(store, spec);
    const QuantizedLinear linear = only_linear(store, config_of(spec));
    EXPECT_EQ(linear.format, format);
    EXPECT_EQ(linear.status.code(), Code::unsupported);
    EXPECT_NE(linear.status.message().find(fragment), std::string::npos) << linear.status.message();
    EXPECT_EQ(linear.matrix.q, nullptr);
  }
  // GPTQ without g_idx is known by its shapes.
  TensorStore store;
  const LayerSpec gptq{.format = LinearFormat::gptq};
  add_layer(store, gptq);
  store.remove(gptq.name + ".g_idx");
  const QuantizedLinear linear = only_linear(store, {});
  EXPECT_EQ(linear.format, LinearFormat::gptq);
  EXPECT_EQ(linear.matrix.k, 256);
  EXPECT_EQ(linear.matrix.group_size, 64);
}

/// A gemm layer changed by `change`; its status message must hold `fragment`.
template <class Change>
void expect_refused(LayerSpec spec, Code code, const std::string& fragment, Change change) {
  TensorStore store;
  add_layer(store, spec);
  QuantConfig config = config_of(spec);
  change(store, config);
  const QuantizedLinear linear = only_linear(store, config);
  EXPECT_EQ(linear.status.code(), code) << linear.status.message();
  EXPECT_NE(linear.status.message().find(fragment), std::string::npos)
      << linear.status.message() << "\nexpected: " << fragment;
  EXPECT_NE(linear.status.message().find(spec.name), std::string::npos);
  EXPECT_EQ(linear.matrix.q, nullptr);
}

TEST(Recogniser, ContradictionsAreRefused) {
  const LayerSpec gemm{.k = 256, .n = 64, .group_size = 64};
  const std::string name = gemm.name;
  expect_refused(gemm, Code::corrupt_file, "group size 128 in config.json, but the shapes say 64",
                 [](TensorStore&, QuantConfig& config) { config.group_size = 128; });
  expect_refused(gemm, Code::corrupt_file, "group size -1 in config.json, but the shapes say 64",
                 [](TensorStore&, QuantConfig& config) { config.group_size = -1; });
  expect_refused(gemm, Code::unsupported, "config.json says 8 bits",
                 [](TensorStore&, QuantConfig& config) { config.bits = 8; });
  expect_refused(gemm, Code::unsupported, "scales are F32", [&](TensorStore& store, QuantConfig&) {
    store.add(name + ".scales", TensorDtype::f32, {4, 64}, std::vector<float>(256));
  });
  expect_refused(
      gemm, Code::corrupt_file, "3 groups do not divide K = 256",
      [&](TensorStore& store, QuantConfig&) {
        store.add(name + ".scales", TensorDtype::f16, {3, 64}, std::vector<uint16_t>(192));
        store.add(name + ".qzeros", TensorDtype::i32, {3, 8}, std::vector<uint32_t>(24));
      });
  expect_refused(gemm, Code::corrupt_file, "qzeros should be [4, 8]",
                 [&](TensorStore& store, QuantConfig&) {
                   store.add(name + ".qzeros", TensorDtype::i32, {8, 4}, std::vector<uint32_t>(32));
                 });
  expect_refused(gemm, Code::unsupported, "qzeros is not a matrix of I32",
                 [&](TensorStore& store, QuantConfig&) {
                   store.add(name + ".qzeros", TensorDtype::f16, {4, 8}, std::vector<uint16_t>(32));
                 });
  expect_refused(gemm, Code::corrupt_file, "qzeros is missing",
                 [&](TensorStore& store, QuantConfig&) { store.remove(name + ".qzeros"); });
  expect_refused(gemm, Code::unsupported, "scales is missing",
                 [&](TensorStore& store, QuantConfig&) { store.remove(name + ".scales"); });
  expect_refused(gemm, Code::unsupported, "qweight is not a matrix of I32",
                 [&](TensorStore& store, QuantConfig&) {
                   store.add(name + ".qweight", TensorDtype::i32, {256 * 8},
                             std::vector<uint32_t>(256 * 8));
                 });
  expect_refused(
      gemm, Code::unsupported, "qweight is not a matrix of I32",
      [&](TensorStore& store, QuantConfig&) {
        store.add(name + ".qweight", TensorDtype::i32, {256, 0}, std::vector<uint32_t>());
      });
  expect_refused(gemm, Code::corrupt_file, "bias F16 [63] should be floats [64]",
                 [&](TensorStore& store, QuantConfig&) {
                   store.add(name + ".bias", TensorDtype::f16, {63}, std::vector<uint16_t>(63));
                 });
  expect_refused(gemm, Code::corrupt_file, "bias I32 [64]", [&](TensorStore& store, QuantConfig&) {
    store.add(name + ".bias", TensorDtype::i32, {64}, std::vector<int32_t>(64));
  });
}

TEST(Recogniser, GemvGroupSizeNeedsTheConfigOnlyWherePaddingHidesIt) {
  LayerSpec spec{.k = 1024, .n = 16, .group_size = 128, .format = LinearFormat::awq_gemv};
  expect_refused(spec, Code::corrupt_file, "fit group size 128 and 256 and 1024",
                 [](TensorStore&, QuantConfig& config) { config.group_size = 0; });
  expect_refused(spec, Code::corrupt_file,
                 "group size 64 in config.json, but 1 words of zero points per channel say 128",
                 [](TensorStore&, QuantConfig& config) { config.group_size = 64; });
  // Wrong but not contradicted: one word holds the zero points of either size.
  TensorStore store;
  add_layer(store, spec);
  QuantConfig config;
  config.group_size = 512;
  EXPECT_EQ(only_linear(store, config).matrix.group_size, 512);

  spec.group_size = 64;
  TensorStore plain;
  add_layer(plain, spec);
  const QuantizedLinear linear = only_linear(plain, {});
  EXPECT_TRUE(linear.status.ok()) << linear.status.message();
  EXPECT_EQ(linear.matrix.group_size, 64);
}

TEST(Recogniser, TheConfigChoosesWhereShapesFitTwoLayouts) {
  // qweight [N, 4], qzeros [N, 4], scales [N, 32]: gemv with one group of 32, or gemm with a scale
  // for every weight.
  const LayerSpec spec{.k = 32, .n = 64, .group_size = 32, .format = LinearFormat::awq_gemv};
  const LogicalLayer layer = make_layer(spec);
  TensorStore store;
  add_layer(store, spec, layer);
  QuantConfig config;
  QuantizedLinear linear = only_linear(store, config);
  EXPECT_EQ(linear.format, LinearFormat::unknown);
  EXPECT_NE(linear.status.message().find("fit both awq-gemm and awq-gemv"), std::string::npos);
  config.group_size = 32;
  linear = only_linear(store, config);
  EXPECT_EQ(linear.format, LinearFormat::awq_gemv);
  expect_columns(linear.matrix, layer, 0, 64);
  config.group_size = 0;
  config.version = "gemv";
  EXPECT_EQ(only_linear(store, config).format, LinearFormat::awq_gemv);
  config.version = "gemm";
  EXPECT_EQ(only_linear(store, config).format, LinearFormat::awq_gemm);
  // Where the shapes are clear the version says nothing.
  TensorStore clear;
  add_layer(clear, {});
  for (const char* version : {"gemv", "marlin", "exllama", "gptq", "anything"}) {
    config.version = version;
    EXPECT_EQ(only_linear(clear, config).format, LinearFormat::awq_gemm);
  }
}

TEST(Recogniser, SquareLayersAreNotConfused) {
  for (const LinearFormat format : kReadable) {
    const LayerSpec spec{.k = 128, .n = 128, .group_size = 32, .format = format};
    TensorStore store;
    add_layer(store, spec);
    EXPECT_EQ(only_linear(store, {}).format, format);
  }
}

TEST(Recogniser, SymmetricGemmHasZeroPointsThatAreUsed) {
  // AutoRound and converted Gemma files: zero_point false, and qzeros of 0x88888888 all the same.
  LayerSpec spec{.k = 64, .n = 16, .group_size = 32, .symmetric = true};
  TensorStore store;
  add_layer(store, spec);
  const TensorView& zeros = store.tensors().at(spec.name + ".qzeros");
  EXPECT_EQ(std::memcmp(zeros.data, std::string(zeros.bytes, '\x88').data(), zeros.bytes), 0);
  const QuantConfig config = config_of(spec);
  EXPECT_TRUE(config.zero_point_given && !config.zero_point);
  QuantizedLinear linear = only_linear(store, config);
  EXPECT_TRUE(linear.status.ok() && linear.symmetric);
  EXPECT_NE(linear.matrix.zeros, nullptr);

  // zero_point false does not make stored zero points symmetric.
  spec.symmetric = false;
  TensorStore odd;
  const LogicalLayer layer = make_layer(spec);
  add_layer(odd, spec, layer);
  linear = only_linear(odd, config);
  EXPECT_TRUE(linear.status.ok() && !linear.symmetric);
  expect_columns(linear.matrix, layer, 0, 16);

  // Without the tensor, zero_point false is what makes 8 the zero point.
  store.remove(spec.name + ".qzeros");
  linear = only_linear(store, config);
  EXPECT_TRUE(linear.status.ok() && linear.symmetric) << linear.status.message();
  EXPECT_EQ(linear.matrix.zeros, nullptr);
  EXPECT_EQ(inspect_values(linear.matrix).zero_point_min, 8);
}

TEST(Recogniser, CompressedTensorsContradictionsAreRefused) {
  const LayerSpec spec{
      .k = 64, .n = 16, .group_size = 32, .format = LinearFormat::ct_pack_asymmetric};
  const std::string name = spec.name;
  const auto shape = [&](int64_t n, int64_t k) {
    return [=](TensorStore& store, QuantConfig&) {
      store.add(name + ".weight_shape", TensorDtype::i64, {2}, std::vector<int64_t>{n, k});
    };
  };
  expect_refused(spec, Code::corrupt_file, "weight_shape holds [64, 16]", shape(64, 16));
  expect_refused(spec, Code::corrupt_file, "weight_shape holds [16, 65]", shape(16, 65));
  expect_refused(spec, Code::corrupt_file, "weight_shape holds [16, 56]", shape(16, 56));
  expect_refused(spec, Code::corrupt_file, "weight_shape holds [16, -64]", shape(16, -64));
  expect_refused(spec, Code::corrupt_file, "weight_shape holds", shape(16, INT64_MAX));
  expect_refused(spec, Code::corrupt_file, "2 groups do not divide K = 63", shape(16, 63));
  expect_refused(spec, Code::corrupt_file, "weight_shape is missing",
                 [&](TensorStore& store, QuantConfig&) { store.remove(name + ".weight_shape"); });
  expect_refused(spec, Code::corrupt_file, "weight_scale is missing",
                 [&](TensorStore& store, QuantConfig&) { store.remove(name + ".weight_scale"); });
  expect_refused(spec, Code::unsupported, "weight_g_idx", [&](TensorStore& store, QuantConfig&) {
    store.add(name + ".weight_g_idx", TensorDtype::i32, {64}, std::vector<int32_t>(64));
  });
  expect_refused(
      spec, Code::corrupt_file, "weight_zero_point should be [2, 2]",
      [&](TensorStore& store, QuantConfig&) {
        store.add(name + ".weight_zero_point", TensorDtype::i32, {4, 1}, std::vector<int32_t>(4));
      });
  expect_refused(
      spec, Code::unsupported, "weight_packed is not a matrix of I32",
      [&](TensorStore& store, QuantConfig&) {
        store.add(name + ".weight_packed", TensorDtype::u8, {16, 32}, std::vector<uint8_t>(512));
      });
  expect_refused(spec, Code::corrupt_file, "group size 64 in config.json, but the shapes say 32",
                 [](TensorStore&, QuantConfig& config) { config.group_size = 64; });
}

TEST(Recogniser, LayersComeInNaturalOrder) {
  TensorStore store;
  for (const char* name : {"layers.10.x", "layers.9.x", "layers.2.x", "layers.02.x", "layers.2.w",
                           "layers.99999999999999999999999.x", "a", "layers.x"}) {
    add_layer(store, {.name = name, .k = 32, .n = 8, .group_size = 32});
  }
  std::vector<std::string> names;
  for (const auto& linear : find_quantized_linears(store.tensors(), {})) {
    names.push_back(linear.name);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"a", "layers.2.w", "layers.02.x", "layers.2.x",
                                             "layers.9.x", "layers.10.x",
                                             "layers.99999999999999999999999.x", "layers.x"}));
}

TEST(DenseLinears, AreTheFloatMatricesThatAreNotQuantized) {
  TempDir dir;
  TensorStore store;
  add_layer(store, {.name = "model.q", .k = 64, .n = 16});
  add_layer(store,
            {.name = "model.ct", .k = 64, .n = 16, .format = LinearFormat::ct_pack_symmetric});
  store.add_dense("model.q.weight", 16, 64, Dtype::f16, 1);  // a leftover beside the triple
  store.add_dense("model.ct.weight", 16, 64, Dtype::f16, 1);
  store.add_dense("lm_head.weight", 100, 64, Dtype::bf16, 2);
  store.add_dense("model.layers.10.o.weight", 8, 64, Dtype::f32, 3);
  store.add_dense("model.layers.9.o.weight", 8, 64, Dtype::f32, 3);
  store.add("model.layers.9.o.bias", TensorDtype::f16, {8}, std::vector<uint16_t>(8));
  store.add_dense("model.embed_tokens.weight", 100, 64, Dtype::f16, 4);
  store.add("model.norm.weight", TensorDtype::f16, {64}, std::vector<uint16_t>(64));
  store.add("model.ids.weight", TensorDtype::i32, {2, 2}, std::vector<int32_t>(4));
  ASSERT_TRUE(write_checkpoint(dir.path(), store.tensors(), nlohmann::json::object()).ok());
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  const auto dense = find_dense_linears(*checkpoint);
  ASSERT_EQ(dense.size(), 3u);
  EXPECT_EQ(dense[0].name, "lm_head");
  EXPECT_EQ(dense[0].n, 100);
  EXPECT_EQ(dense[0].k, 64);
  EXPECT_EQ(dense[1].name, "model.layers.9.o");
  EXPECT_NE(dense[1].bias, nullptr);
  EXPECT_EQ(dense[2].name, "model.layers.10.o");
  EXPECT_EQ(find_quantized_linears(*checkpoint).size(), 2u);
}

TEST(InspectValues, CountsWhatIsUnusual) {
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    const LayerSpec spec{.k = 64, .n = 16, .group_size = 32, .scale_dtype = dtype};
    LogicalLayer layer = make_layer(spec);
    const float subnormal = dtype == Dtype::f16 ? 0x1p-20f : 0x1p-130f;
    const float infinity = std::numeric_limits<float>::infinity();
    const std::vector<float> odd = {-0.5f, subnormal, -subnormal, 0.0f, -0.0f};
    for (size_t i = 0; i < odd.size(); ++i) {
      store_from_float(layer.scales.data(), static_cast<int64_t>(i), dtype, odd[i]);
    }
    ValueReport report;
    const auto inspect = [&] {
      TensorStore store;
      add_layer(store, spec, layer);
      report = inspect_values(only_linear(store, {}).matrix);
    };
    inspect();
    EXPECT_EQ(report.negative_scales, 2);
    EXPECT_EQ(report.subnormal_scales, 2);
    EXPECT_EQ(report.zero_scales, 2);
    EXPECT_EQ(report.non_finite_scales, 0);
    EXPECT_EQ(report.first_non_finite, "");
    store_from_float(layer.scales.data(), 16 + 3, dtype, -infinity);
    store_from_float(layer.scales.data(), 16 + 9, dtype, std::nanf(""));
    inspect();
    EXPECT_EQ(report.non_finite_scales, 2);
    EXPECT_EQ(report.negative_scales, 2);
    EXPECT_EQ(report.first_non_finite, "group 1, column 3");
    std::fill(layer.zeros.begin(), layer.zeros.end(), uint8_t{5});
    layer.zeros[7] = 3;
    layer.zeros[9] = 11;
    inspect();
    EXPECT_EQ(report.zero_point_min, 3);
    EXPECT_EQ(report.zero_point_max, 11);
  }
}

TEST(InspectValues, PaddingOfGemvIsNotCounted) {
  const LayerSpec spec{.k = 64, .n = 8, .group_size = 32, .format = LinearFormat::awq_gemv};
  TensorStore store;
  add_layer(store, spec);
  const ValueReport report = inspect_values(only_linear(store, config_of(spec)).matrix);
  EXPECT_EQ(report.zero_scales, 0);
}

TEST(FusedSiblings, DisagreementIsOneSentence) {
  TensorStore store;
  const auto add = [&](const std::string& name, int64_t group, Dtype dtype = Dtype::f16) {
    add_layer(store, {.name = name, .k = 128, .n = 16, .group_size = group, .scale_dtype = dtype});
  };
  for (const char* leaf : {"q_proj", "k_proj", "v_proj"}) {
    add(std::string("m.0.self_attn.") + leaf, 32);
    add(std::string("m.10.self_attn.") + leaf, leaf[0] == 'k' ? 64 : 32);
    if (leaf[0] != 'q') add(std::string("m.9.self_attn.") + leaf, 32);
  }
  add("m.0.mlp.gate_proj", 32);
  add("m.0.mlp.up_proj", 32, Dtype::bf16);
  add("m.0.mlp.down_proj", 64);
  const DenseLinear dense_q{"m.9.self_attn.q_proj", 128, 16, nullptr, nullptr};
  const auto sentences =
      check_fused_siblings(find_quantized_linears(store.tensors(), {}), {dense_q});
  ASSERT_EQ(sentences.size(), 3u);
  EXPECT_EQ(sentences[0],
            "m.0.mlp: fused layers disagree: gate_proj is awq-gemm group size 32 with f16 scales, "
            "up_proj is awq-gemm group size 32 with bf16 scales.");
  EXPECT_TRUE(sentences[1].starts_with("m.9.self_attn:"));
  EXPECT_NE(sentences[1].find("q_proj is not quantized"), std::string::npos);
  EXPECT_NE(sentences[2].find("k_proj is awq-gemm group size 64"), std::string::npos);
}

TEST(Golden, AFileOfIndependentOriginHoldsTheExpectedLayer) {
  const auto golden = std::filesystem::path(__FILE__).parent_path() / "golden";
  const auto file = MappedFile::open((golden / "tiny_awq.safetensors").string());
  ASSERT_TRUE(file.ok()) << file.status().message();
  const auto index = parse_safetensors(file->bytes(), "tiny_awq.safetensors");
  ASSERT_TRUE(index.ok()) << index.status().message();
  EXPECT_EQ(index->metadata.at("format"), "pt");
  const auto linears = find_quantized_linears(index->tensors, {});
  ASSERT_EQ(linears.size(), 1u);
  const QuantizedLinear& linear = linears[0];
  ASSERT_TRUE(linear.status.ok()) << linear.status.message();
  EXPECT_EQ(linear.name, "model.layers.0.self_attn.q_proj");
  EXPECT_EQ(linear.format, LinearFormat::awq_gemm);
  ASSERT_EQ(linear.matrix.k, 32);
  ASSERT_EQ(linear.matrix.n, 16);
  ASSERT_EQ(linear.matrix.group_size, 16);
  const ReadBack read = read_back(linear.matrix, 0, 16);
  std::vector<float> weights(32 * 16);
  dequantize(linear.matrix, 0, 16, weights.data());
  for (int k = 0; k < 32; ++k) {
    for (int n = 0; n < 16; ++n) {
      const auto at = static_cast<size_t>(k * 16 + n);
      const int group = k / 16;
      const auto group_at = static_cast<size_t>(group * 16 + n);
      const int code = (7 * k + 3 * n + k * n) % 16, zero = (5 * group + n) % 16;
      const float scale = static_cast<float>((n + 1) * (group + 1)) / 64;
      EXPECT_EQ(read.codes[at], code);
      EXPECT_EQ(read.zeros[group_at], zero);
      EXPECT_EQ(float_from_f16(read.scales[group_at]), scale);
      EXPECT_EQ(weights[at], static_cast<float>(code - zero) * scale);
    }
  }
  ASSERT_NE(linear.bias, nullptr);
  for (int n = 0; n < 16; ++n) {
    EXPECT_EQ(load_as_float(linear.bias->data, n, Dtype::f16), static_cast<float>(n - 8));
  }
}

}  // namespace
}  // namespace nibble::test
