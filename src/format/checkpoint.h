// A Hugging Face model directory: config.json, one or more safetensors files, side files.
// Finds tensors by name over all shards and writes complete directories atomically.
// Not here: what the tensors mean (format/linear_format.h, later src/model).
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/safetensors.h"

namespace nibble {

/// The quantization block of config.json, or of quant_config.json / quantize_config.json in older
/// directories. Only hints: each layer's format is decided by its tensors (linear_format.h).
struct QuantConfig {
  bool present = false;
  std::string method;      // "awq", "compressed-tensors", "gptq", ... as found, lower case
  std::string version;     // "gemm", "gemv", ... lower case; TF 5 calls it "format"
  int64_t bits = 0;        // 0: not given
  int64_t group_size = 0;  // -1: one group over all of K; 0: not given
  bool zero_point_given = false;
  bool zero_point = true;
  std::vector<std::string> modules_to_not_convert;
  std::string source;  // the file it was read from, relative to the directory
};

/// Reads the block of a parsed file; `source` is the file's name. Looks at quantization_config,
/// then at text_config's and llm_config's, then at compression_config; in a file that is not called
/// config.json the whole document is the block if it has none of these. corrupt_file if a key that
/// is read has the wrong type; null counts as absent.
Result<QuantConfig> parse_quant_config(const nlohmann::json& document, const std::string& source);

/// Parses JSON text of an untrusted file: corrupt_file with the offset instead of an exception,
/// also for more than 128 levels of nesting.
Result<nlohmann::json> parse_json(std::string_view text, const std::string& file_name);

class Checkpoint {
 public:
  /// Opens DIR: reads config.json (which may be absent), maps every shard that
  /// model.safetensors.index.json names, or model.safetensors if there is no index. io_error if
  /// something is missing; corrupt_file if the index and the shards disagree or a shard name leaves
  /// the directory; unsupported if the weights are only there as .pt or .bin.
  static Result<Checkpoint> open(const std::string& directory);

  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  const std::string& directory() const;
  const nlohmann::json& config() const;  // whole config.json; null if the directory has none
  const QuantConfig& quant_config() const;
  std::string architecture() const;  // config.json "architectures"[0], or model_type, or "unknown"
  const TensorMap& tensors() const;
  const TensorView* find(std::string_view name) const;  // null if absent
  const std::vector<std::string>& shards() const;       // file names
  uint64_t bytes() const;                               // of all tensors

 private:
  struct State;
  std::unique_ptr<State> state_;
  explicit Checkpoint(std::unique_ptr<State> state);
};

/// Writes a complete model directory: shards and index, config.json, and side files copied from
/// a source. Everything goes to a temporary sibling directory that `commit` renames to its final
/// name; destroying an uncommitted writer removes the temporary. Tensors may be added one by one:
/// they go to disk at once, so memory use is small and disk use peaks one shard above the result.
/// After a failed write every later call fails the same way.
class CheckpointWriter {
 public:
  /// Fails with invalid_argument if `directory` exists and is not empty.
  static Result<CheckpointWriter> create(const std::string& directory,
                                         uint64_t shard_bytes = uint64_t{5} << 30);
  CheckpointWriter(CheckpointWriter&&) noexcept;
  CheckpointWriter& operator=(CheckpointWriter&&) noexcept;
  ~CheckpointWriter();

  /// Copies the bytes of `tensor`. A name may be added once.
  Status add(const std::string& name, const TensorView& tensor);
  Status write_config(const nlohmann::json& config);
  /// Copies the regular files of a source directory that are neither weights, nor an index, nor
  /// config.json, nor an older quantization config.
  Status copy_side_files(const std::string& source_directory);
  Status commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
  explicit CheckpointWriter(std::unique_ptr<State> state);
};

}  // namespace nibble
