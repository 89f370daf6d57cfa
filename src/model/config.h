// What a decoder-only model is made of, read from config.json: shapes, norms, rope, attention
// kinds. Architectures: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM,
// Gemma3ForCausalLM and the text part of Gemma3ForConditionalGeneration.
// Not here: weights (model/layer.h) and the forward pass (model/layer.h).
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/status.h"

namespace nibble {

enum class Architecture : int { llama, mistral, qwen2, qwen3, gemma3 };
const char* architecture_name(Architecture architecture);  // "llama", ...

enum class Activation : int { silu, gelu_tanh };

/// Rotary position embedding of one attention kind. Pairs are (i, i + head_dim / 2).
struct RopeConfig {
  double theta = 10000;
  double linear_factor = 1;  // positions divided by it ("linear" scaling)
  bool llama3 = false;       // frequencies scaled per wavelength (Llama 3.1)
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  double original_context = 8192;
};

struct ModelConfig {
  Architecture architecture = Architecture::llama;
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  int64_t vocab = 0;
  int64_t max_positions = 0;  // of the file: the longest context the model was made for
  double norm_eps = 1e-6;
  bool unit_offset_norm = false;  // weights are stored as w, applied as 1 + w (Gemma)
  bool qk_norm = false;           // RMSNorm over head_dim of q and k, before rope
  bool post_norms = false;        // norms after attention and MLP, before the residual add
  bool qkv_bias = false, o_bias = false, mlp_bias = false;  // the file must have them
  bool tied_head = false;  // lm_head is the embedding, whatever else the file holds
  Activation activation = Activation::silu;
  double attention_scale = 0;   // of q . k
  double embedding_scale = 1;   // rounded to the embedding's dtype before it is applied
  RopeConfig rope;              // full-attention layers
  RopeConfig local_rope;        // sliding layers
  std::vector<int64_t> window;  // per layer: keys a query sees, itself included; 0: all
  std::vector<int32_t> eos_tokens;
  int32_t bos_token = -1;  // -1: none

  int64_t groups() const { return heads / kv_heads; }  // query heads per KV head
};

/// Reads config.json (`document`), also of a multimodal model whose text part is in "text_config".
/// unsupported names an architecture, rope type or activation that is not run here; corrupt_file a
/// key that is missing, of the wrong type or out of range.
Result<ModelConfig> parse_model_config(const nlohmann::json& document);

}  // namespace nibble
