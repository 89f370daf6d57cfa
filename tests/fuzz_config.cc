// libFuzzer target: the text of config.json or of an older quantization config. Nothing may throw,
// and a block that is accepted holds numbers in the documented ranges.
//   ./fuzz_config -runs=1000000 -max_len=2048
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "checkpoint_builder.h"

namespace {

using namespace nibble;

void check_block(const nlohmann::json& document, const char* source) {
  const auto config = parse_quant_config(document, source);
  if (!config.ok()) {
    NIBBLE_CHECK(config.status().code() == Code::corrupt_file);
    NIBBLE_CHECK(config.status().message().size() < 1000);
    return;
  }
  NIBBLE_CHECK(config->bits >= 0 && config->group_size >= -1);
  NIBBLE_CHECK(config->present == !config->source.empty());
  // The recogniser takes any config.
  test::TensorStore store;
  test::add_layer(store, {.name = "l", .k = 32, .n = 8, .group_size = 32});
  const auto linears = find_quantized_linears(store.tensors(), *config);
  NIBBLE_CHECK(linears.size() == 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto document = parse_json(text, "config.json");
  if (!document.ok()) {
    NIBBLE_CHECK(document.status().code() == Code::corrupt_file);
    return 0;
  }
  check_block(*document, "config.json");
  check_block(*document, "quant_config.json");
  return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Starts again from a real config now and then, instead of a corpus in the repository.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  if (size < 2 || seed % 64 == 0) {
    test::LayerSpec spec;
    spec.format = static_cast<LinearFormat>(seed / 64 % 9);
    nlohmann::json config = test::make_config(spec);
    if (seed / 640 % 4 == 1) config = {{"text_config", config}};
    if (seed / 640 % 4 == 2) config = config["quantization_config"];
    if (seed / 640 % 4 == 3) {
      config = {{"w_bit", 4}, {"q_group_size", 128}, {"zero_point", true}, {"version", "GEMM"}};
    }
    const std::string text = config.dump();
    if (text.size() <= max_size) {
      std::memcpy(data, text.data(), text.size());
      size = text.size();
    }
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
