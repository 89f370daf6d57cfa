// safetensors: reading one file (memory-mapped, untrusted) and writing one.
// Format: 8-byte little-endian header length, that many bytes of JSON, then tensor bytes; see
// docs/formats.md. Everything a hostile header can do is refused: length limits, duplicate or
// unknown keys of an entry, overflowing shapes, dtype x shape against byte range, overlaps, holes,
// bytes left over. Not here: sharded directories (format/checkpoint.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace nibble {

/// The types of the safetensors specification that occur in language models.
enum class TensorDtype : int {
  boolean,
  u8,
  i8,
  f8_e4m3,
  f8_e5m2,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  i64,
  u64,
  f64
};

const char* tensor_dtype_name(TensorDtype dtype);  // as in the file: "F16", "I32", ...
int64_t tensor_dtype_bytes(TensorDtype dtype);

/// A tensor in a mapped file, or bytes to be written. Does not own `data`; any alignment.
struct TensorView {
  TensorDtype dtype = TensorDtype::u8;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t bytes = 0;

  int64_t elements() const;
  std::string shape_text() const;  // "[4096, 512]"
};

using TensorMap = std::map<std::string, TensorView, std::less<>>;

/// The table of a header: name -> view into the payload.
struct SafetensorsIndex {
  TensorMap tensors;
  std::map<std::string, std::string> metadata;  // __metadata__
};

/// Parses a whole file image. Views point into `file`, which must outlive the index.
/// `file_name` only appears in messages. Fails with corrupt_file, naming the tensor and what was
/// expected, or with unsupported for a type of the specification that TensorDtype lacks.
Result<SafetensorsIndex> parse_safetensors(std::span<const std::byte> file,
                                           std::string_view file_name);

/// A read-only memory map of a whole regular file. The file must not be cut short while mapped:
/// the system answers reads past its new end with SIGBUS.
class MappedFile {
 public:
  static Result<MappedFile> open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile() = default;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Writes one file through a temporary name in the same directory, synced, then renamed: a failure
/// (full disk, no permission) leaves no file at `path` and whatever was there before untouched.
/// Tensors are written in descending alignment, then by name; the header is padded to 8 bytes.
/// A file of that name is replaced. Fails with invalid_argument if a tensor's bytes do not match
/// its dtype and shape or a name is not UTF-8.
Status write_safetensors(const std::string& path, const TensorMap& tensors,
                         const std::map<std::string, std::string>& metadata);

}  // namespace nibble
