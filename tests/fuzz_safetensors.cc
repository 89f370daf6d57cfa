// libFuzzer target: parse_safetensors on any bytes. Whatever it accepts must be a sound table: all
// views inside the file, of the size their type and shape say, tiling the data.
//   ./fuzz_safetensors -runs=1000000 -max_len=1024
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "checkpoint_builder.h"

namespace {

using namespace nibble;

void check_table(const SafetensorsIndex& index, std::span<const std::byte> file) {
  size_t tensor_bytes = 0;
  const std::byte* data_begin = file.data() + file.size();
  for (const auto& [name, view] : index.tensors) {
    NIBBLE_CHECK(view.elements() * tensor_dtype_bytes(view.dtype) ==
                 static_cast<int64_t>(view.bytes));
    NIBBLE_CHECK(view.data >= file.data() && view.data + view.bytes <= file.data() + file.size());
    tensor_bytes += view.bytes;
    if (view.data < data_begin) data_begin = view.data;
  }
  uint64_t header = 0;
  std::memcpy(&header, file.data(), sizeof header);
  NIBBLE_CHECK(8 + header + tensor_bytes == file.size());
  NIBBLE_CHECK(index.tensors.empty() || data_begin == file.data() + 8 + header);
}

void parse(const std::vector<std::byte>& file) {
  const auto parsed = parse_safetensors(file, "fuzz");
  if (parsed.ok()) {
    check_table(*parsed, file);
  } else {
    NIBBLE_CHECK(parsed.status().message().size() < 1000);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A copy of exactly this size, so that the sanitizer sees one byte too many.
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  std::vector<std::byte> file(bytes, bytes + size);
  parse(file);
  // Repaired length: the rest as header text before as much data as its first byte says. Otherwise
  // every insertion into a header would only be a wrong length.
  if (size == 0) return 0;
  const uint64_t header = size - 1;
  std::vector<std::byte> repaired(8 + header + data[0]);
  std::memcpy(repaired.data(), &header, sizeof header);
  std::memcpy(repaired.data() + 8, data + 1, header);
  parse(repaired);
  return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

/// Starts again from a valid file now and then, instead of a corpus in the repository.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  if (size < 2 || seed % 64 == 0) {
    test::TensorStore store;
    store.add("a", TensorDtype::f16, {2, 3}, std::vector<uint16_t>(6));
    if (seed % 3 != 0) store.add("b", TensorDtype::i64, {1}, std::vector<int64_t>(1));
    if (seed % 3 == 2) store.add("", TensorDtype::boolean, {0, 5}, std::vector<uint8_t>());
    std::string image = test::make_image(store.tensors());
    if (seed % 5 != 0) {  // the repaired form: data size, then header text
      uint64_t header = 0;
      std::memcpy(&header, image.data(), sizeof header);
      const auto data_bytes = static_cast<char>(image.size() - 8 - header);
      image = data_bytes + image.substr(8, header);
      image.insert(2, R"("__metadata__":{"format":"pt"},)");
    }
    if (image.size() <= max_size) {
      std::memcpy(data, image.data(), image.size());
      size = image.size();
    }
  }
  return LLVMFuzzerMutate(data, size, max_size);
}
