// libFuzzer target: the recogniser on any table of tensors; whatever it accepts is unpacked whole.
// The first byte chooses between bytes of a safetensors file and a compact recipe of tensors, which
// reaches far more combinations of shapes than mutated JSON does.
//   ./fuzz_linear_format -runs=1000000 -max_len=2048
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "checkpoint_builder.h"

namespace {

using namespace nibble;

/// Bytes as a supply of small numbers; zeros once they are used up.
class Supply {
 public:
  Supply(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  uint8_t next() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  template <class T, size_t count>
  T one_of(const T (&choices)[count]) {
    return choices[next() % count];
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

QuantConfig make_config(Supply& supply) {
  static constexpr const char* kVersions[] = {"", "gemm", "gemv", "marlin", "gptq", "exllama"};
  static constexpr int64_t kGroups[] = {0, -1, 8, 16, 32, 64, 128, INT32_MAX};
  static constexpr int64_t kBits[] = {4, 4, 4, 0, 8};
  QuantConfig config;
  config.version = supply.one_of(kVersions);
  config.group_size = supply.one_of(kGroups);
  config.bits = supply.one_of(kBits);
  const uint8_t zero_point = supply.next();
  config.zero_point_given = zero_point % 2 != 0;
  config.zero_point = zero_point % 4 < 2;
  return config;
}

test::TensorStore make_tensors(Supply& supply) {
  static constexpr const char* kSuffixes[] = {"qweight",
                                              "qzeros",
                                              "scales",
                                              "bias",
                                              "scaled_zeros",
                                              "g_idx",
                                              "weight",
                                              "weight_scale",
                                              "weight_shape",
                                              "weight_packed",
                                              "weight_zero_point",
                                              "weight_g_idx"};
  static constexpr TensorDtype kDtypes[] = {TensorDtype::i32, TensorDtype::f16, TensorDtype::bf16,
                                            TensorDtype::i32, TensorDtype::f16, TensorDtype::i16,
                                            TensorDtype::f32, TensorDtype::i64, TensorDtype::u8};
  static constexpr int64_t kSizes[] = {1, 2, 4, 8, 16, 32, 64, 128, 0, 3, 5, 9, 12, 24, 30, 72};
  static constexpr size_t kRanks[] = {2, 2, 2, 2, 1, 0, 3};
  test::TensorStore store;
  while (!supply.empty()) {
    const std::string name =
        std::string(supply.next() % 8 == 0 ? "m.q_proj." : "m.k_proj.") + supply.one_of(kSuffixes);
    const TensorDtype dtype = supply.one_of(kDtypes);
    std::vector<int64_t> shape(supply.one_of(kRanks));
    int64_t elements = 1;
    for (int64_t& size : shape) elements *= size = supply.one_of(kSizes);
    if (elements > 1 << 10) continue;  // small layers: more of them per second
    std::vector<uint8_t> bytes(static_cast<size_t>(elements * tensor_dtype_bytes(dtype)));
    const uint8_t fill = supply.next();
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(fill * (i + 1));
    if (dtype == TensorDtype::i64 && elements == 2) {  // a weight_shape that may fit
      const int64_t values[] = {supply.one_of(kSizes), supply.one_of(kSizes)};
      std::memcpy(bytes.data(), values, sizeof values);
    }
    store.add(name, dtype, shape, bytes);
  }
  return store;
}

void check_layer(const QuantizedLinear& linear) {
  if (!linear.status.ok()) {
    NIBBLE_CHECK(linear.matrix.q == nullptr && linear.status.message().size() < 2000);
    return;
  }
  const QuantMatrix& matrix = linear.matrix;
  NIBBLE_CHECK(check_quant_matrix(matrix, "fuzz").ok());
  std::vector<float> weights(static_cast<size_t>(matrix.k * matrix.n));
  dequantize(matrix, 0, matrix.n, weights.data());
  std::vector<uint8_t> column(static_cast<size_t>(matrix.k));
  unpack_codes(matrix, matrix.n - 1, 1, column.data());
  for (const uint8_t code : column) NIBBLE_CHECK(code < 16);
  const ValueReport report = inspect_values(matrix);
  NIBBLE_CHECK(report.zero_point_min <= report.zero_point_max && report.zero_point_max < 16);
  NIBBLE_CHECK(linear.symmetric == (report.zero_point_min == 8 && report.zero_point_max == 8));
}

void check_tensors(const TensorMap& tensors, const QuantConfig& config) {
  const auto linears = find_quantized_linears(tensors, config);
  for (const QuantizedLinear& linear : linears) check_layer(linear);
  (void)check_fused_siblings(linears, {});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Supply supply(data, size);
  const bool is_file = supply.next() % 8 == 0;
  const QuantConfig config = make_config(supply);
  if (!is_file) {
    const test::TensorStore store = make_tensors(supply);
    check_tensors(store.tensors(), config);
    return 0;
  }
  std::vector<std::byte> file;
  while (!supply.empty()) file.push_back(std::byte{supply.next()});
  const auto parsed = parse_safetensors(file, "fuzz");
  if (parsed.ok()) check_tensors(parsed->tensors, config);
  return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Starts again from a valid layer of some format now and then, instead of a corpus in the
/// repository.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  if (size < 2 || seed % 64 == 0) {
    test::TensorStore store;
    test::LayerSpec spec{.name = "m.k_proj", .k = 32, .n = 16, .group_size = 32};
    spec.format = static_cast<LinearFormat>(seed / 64 % 9);
    test::add_layer(store, spec);
    const std::string image = std::string(5, '\0') + test::make_image(store.tensors());
    if (image.size() <= max_size) {
      std::memcpy(data, image.data(), image.size());
      size = image.size();
    }
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
