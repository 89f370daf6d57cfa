// Synthetic checkpoints for tests: layers with known codes, zero points and scales, written in any
// of the formats the recogniser knows. Start with write_checkpoint(); for a table of tensors
// without files, use TensorStore and add_layer().
//
//   TempDir dir;
//   write_checkpoint(dir.path(), {{.name = "model.layers.0.self_attn.q_proj", .k = 256, .n = 64}});
//   auto checkpoint = Checkpoint::open(dir.path());
#pragma once

#include <deque>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "format/linear_format.h"

namespace nibble::test {

/// One quantized layer to be written. Everything in it is a function of these fields.
struct LayerSpec {
  std::string name = "model.layers.0.mlp.down_proj";
  int64_t k = 256, n = 64;
  int64_t group_size = 64;  // -1: k
  LinearFormat format = LinearFormat::awq_gemm;
  bool symmetric = false;  // every zero point is 8; compressed-tensors then stores none
  bool bias = false;       // of scale_dtype
  Dtype scale_dtype = Dtype::f16;
  uint64_t seed = 1;
};

/// The layer a LayerSpec describes, free of any layout. w = (code - zero) * scale.
struct LogicalLayer {
  int64_t k = 0, n = 0, group_size = 0;
  std::vector<uint8_t> codes;    // (k, n), 0..15
  std::vector<uint8_t> zeros;    // (groups, n), 0..15
  std::vector<uint16_t> scales;  // (groups, n) bits of scale_dtype; 0.002 to 0.02
  std::vector<uint16_t> bias;    // (n) bits of scale_dtype, or empty

  int64_t groups() const { return k / group_size; }
};
LogicalLayer make_layer(const LayerSpec& spec);

/// Tensors that own their bytes.
class TensorStore {
 public:
  /// Adds or replaces. `values` are little-endian elements; their bytes must fit the shape.
  template <class T>
  TensorView& add(const std::string& name, TensorDtype dtype, std::vector<int64_t> shape,
                  const std::vector<T>& values) {
    return add_bytes(name, dtype, std::move(shape), values.data(), values.size() * sizeof(T));
  }
  TensorView& add_bytes(const std::string& name, TensorDtype dtype, std::vector<int64_t> shape,
                        const void* data, size_t bytes);
  /// A dense (n, k) matrix of small random values.
  void add_dense(const std::string& name, int64_t n, int64_t k, Dtype dtype, uint64_t seed);
  void remove(const std::string& name) { tensors_.erase(name); }

  TensorMap& tensors() { return tensors_; }
  const TensorMap& tensors() const { return tensors_; }

 private:
  std::deque<std::vector<std::byte>> bytes_;  // a deque: growing it moves no buffer
  TensorMap tensors_;
};

/// Adds the tensors of one layer. The four formats that can be read hold `layer`; the refused ones
/// get tensors of the right names, types and shapes with random contents.
/// Needs n % 8 == 0 and k % 8 == 0, except for compressed-tensors.
void add_layer(TensorStore& store, const LayerSpec& spec, const LogicalLayer& layer);
void add_layer(TensorStore& store, const LayerSpec& spec);

/// config.json as the usual writer of `spec.format` leaves it.
nlohmann::json make_config(const LayerSpec& spec);

struct CheckpointOptions {
  /// Merged into config.json as a JSON merge patch: null removes a key.
  nlohmann::json config_patch = nlohmann::json::object();
  /// Adds model.embed_tokens, model.norm and lm_head (64 rows, k of the first layer) in f16.
  bool dense_tensors = false;
  /// Tensors are dealt over this many shards, with an index if there is more than one.
  int shards = 1;
};

/// Writes `directory` (created if absent): safetensors, config.json of the first layer's format,
/// and a tokenizer.json as a side file.
Status write_checkpoint(const std::string& directory, const std::vector<LayerSpec>& layers,
                        const CheckpointOptions& options = {});
/// The same from tensors that already exist.
Status write_checkpoint(const std::string& directory, const TensorMap& tensors,
                        const nlohmann::json& config, int shards = 1);

/// A whole safetensors file in memory, made without the library's writer.
std::string make_image(const TensorMap& tensors);

void write_text(const std::string& path, std::string_view text);
std::string read_text(const std::string& path);
/// Names in `directory`, sorted.
std::vector<std::string> list_directory(const std::string& directory);

/// A directory below the system's temporary one, removed with everything in it.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace nibble::test
