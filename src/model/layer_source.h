// The linears and norms of a model as they lie in its checkpoint, found by name and checked against
// config.json: what every device packs in its own way. Views into the checkpoint, which must
// outlive them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "format/checkpoint.h"
#include "format/quant_matrix.h"
#include "model/config.h"
#include "model/linear.h"

namespace nibble {

/// One linear, 4-bit or 16-bit (F32 too).
struct LinearSource {
  std::string name;
  int64_t k = 0, n = 0;
  std::optional<QuantMatrix> quantized;
  const std::byte* dense = nullptr;  // if not quantized: (n, k) of dense_dtype
  Dtype dense_dtype = Dtype::f16;
  const void* bias = nullptr;  // (n) of bias_dtype, or null
  Dtype bias_dtype = Dtype::f16;
};

/// All as float. They already hold 1 + w where config.unit_offset_norm.
struct LayerNorms {
  std::vector<float> input, mlp;                // (hidden); before attention, before MLP
  std::vector<float> post_attention, post_mlp;  // (hidden) or empty (config.post_norms)
  std::vector<float> q, k;                      // (head_dim) or empty
};

struct LayerSource {
  std::vector<LinearSource> groups[kSlots];  // q,k,v; o; gate,up; down in this order
  LayerNorms norms;
};

/// The tensor names of a checkpoint: prefix of the decoder ("model.", "language_model.model.",
/// "model.language_model.", ...), found by where embed_tokens is.
struct ModelNames {
  std::string decoder;  // ends with "."; layers are decoder + "layers.<i>."
  std::string lm_head;  // full name without ".weight"/".qweight", or empty (tied)
  std::string layer(int64_t index) const {
    return decoder + "layers." + std::to_string(index) + ".";
  }
  std::string embedding() const { return decoder + "embed_tokens.weight"; }
};
Result<ModelNames> find_model_names(const Checkpoint& checkpoint, const ModelConfig& config);

/// corrupt_file names the tensor, the expected and the found.
Result<LinearSource> find_linear(const Checkpoint& checkpoint, const std::string& name, int64_t k,
                                 int64_t n, bool bias_required);
Result<LayerSource> find_layer(const Checkpoint& checkpoint, const ModelNames& names,
                               const ModelConfig& config, int64_t index);

/// The norm before the head, as float, 1 + w where config.unit_offset_norm.
Result<std::vector<float>> load_final_norm(const Checkpoint& checkpoint, const ModelNames& names,
                                           const ModelConfig& config);

/// The element type of an embedding or head, which may have more rows (padding) than the
/// vocabulary.
Result<Dtype> check_vocabulary_matrix(const std::string& name, const TensorView& tensor,
                                      const ModelConfig& config);

/// config.embedding_scale as the reference applies it: it takes the embedding's type first.
float embedding_scale(const ModelConfig& config, Dtype embedding_dtype);

/// Tells the system that the mapped bytes of `tensor` are not needed soon; they stay readable.
void drop_pages(const TensorView& tensor);
/// The same for every tensor of a linear.
void drop_pages(const Checkpoint& checkpoint, const std::string& linear);

}  // namespace nibble
