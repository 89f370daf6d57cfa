// See layer_source.h.
#include "model/layer_source.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "format/message.h"

namespace nibble {
namespace {

Status missing(const std::string& name) {
  return Status(Code::corrupt_file,
                fmt::format("the checkpoint has no tensor {}", quote_name(name)));
}

/// The element type of `tensor`, which must be a vector of `size` floats of any width.
Result<Dtype> check_vector(const std::string& name, const TensorView& tensor, int64_t size) {
  const auto dtype = float_dtype(tensor.dtype);
  if (dtype && tensor.shape == std::vector<int64_t>{size}) return *dtype;
  return Status(Code::corrupt_file,
                fmt::format("{}: expected [{}] of F32, F16 or BF16, found {} {}", quote_name(name),
                            size, tensor_dtype_name(tensor.dtype), tensor.shape_text()));
}

/// A vector of `size` floats; `offset` is added to each value.
Result<std::vector<float>> load_vector(const Checkpoint& checkpoint, const std::string& name,
                                       int64_t size, float offset) {
  const TensorView* tensor = checkpoint.find(name);
  if (tensor == nullptr) return missing(name);
  const Result<Dtype> dtype = check_vector(name, *tensor, size);
  if (!dtype.ok()) return dtype.status();
  std::vector<float> values(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    values[static_cast<size_t>(i)] = load_as_float(tensor->data, i, *dtype) + offset;
  }
  return values;
}

Status check_shape(const std::string& name, int64_t k, int64_t n, int64_t expected_k,
                   int64_t expected_n) {
  if (k == expected_k && n == expected_n) return {};
  return Status(Code::corrupt_file,
                fmt::format("{}: expected {} inputs and {} outputs by config.json, found {} and {}",
                            quote_name(name), expected_k, expected_n, k, n));
}

struct Bias {
  const TensorView* tensor = nullptr;
  Dtype dtype = Dtype::f32;
  const void* data() const { return tensor == nullptr ? nullptr : tensor->data; }
};

Result<Bias> find_bias(const Checkpoint& checkpoint, const std::string& linear, int64_t n,
                       bool required) {
  Bias bias;
  const std::string name = linear + ".bias";
  bias.tensor = checkpoint.find(name);
  if (bias.tensor == nullptr) {
    if (required) return missing(name);
    return bias;
  }
  const Result<Dtype> dtype = check_vector(name, *bias.tensor, n);
  if (!dtype.ok()) return dtype.status();
  bias.dtype = *dtype;
  return bias;
}

Result<LinearSource> find_quantized(const Checkpoint& checkpoint, const std::string& name,
                                    SuffixFamily family, int64_t k, int64_t n, bool bias_required) {
  const QuantizedLinear found =
      recognise_linear(checkpoint.tensors(), name, family, checkpoint.quant_config());
  if (!found.status.ok()) return found.status;
  NIBBLE_TRY(check_shape(name, found.matrix.k, found.matrix.n, k, n));
  const Result<Bias> bias = find_bias(checkpoint, name, n, bias_required);
  if (!bias.ok()) return bias.status();
  return LinearSource{name, k, n, found.matrix, nullptr, Dtype::f16, bias->data(), bias->dtype};
}

Result<LinearSource> find_dense(const Checkpoint& checkpoint, const std::string& name, int64_t k,
                                int64_t n, bool bias_required) {
  const TensorView* weight = checkpoint.find(name + ".weight");
  if (weight == nullptr) return missing(name + ".weight (or .qweight, or .weight_packed)");
  const auto dtype = float_dtype(weight->dtype);
  if (!dtype || weight->shape.size() != 2) {
    return Status(Code::corrupt_file,
                  fmt::format("{}: expected [{}, {}] of F32, F16 or BF16, found {} {}",
                              quote_name(name + ".weight"), n, k, tensor_dtype_name(weight->dtype),
                              weight->shape_text()));
  }
  NIBBLE_TRY(check_shape(name, weight->shape[1], weight->shape[0], k, n));
  const Result<Bias> bias = find_bias(checkpoint, name, n, bias_required);
  if (!bias.ok()) return bias.status();
  return LinearSource{name, k, n, std::nullopt, weight->data, *dtype, bias->data(), bias->dtype};
}

struct LinearShape {
  Slot slot;
  const char* name;
  int64_t k, n;
  bool bias_required;
};

}  // namespace

void drop_pages(const TensorView& tensor) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + tensor.bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

void drop_pages(const Checkpoint& checkpoint, const std::string& linear) {
  for (const char* part : {".qweight", ".qzeros", ".scales", ".weight_packed", ".weight_scale",
                           ".weight_zero_point", ".weight"}) {
    if (const TensorView* tensor = checkpoint.find(linear + part)) drop_pages(*tensor);
  }
}

Result<LinearSource> find_linear(const Checkpoint& checkpoint, const std::string& name, int64_t k,
                                 int64_t n, bool bias_required) {
  if (checkpoint.find(name + ".qweight") != nullptr) {
    return find_quantized(checkpoint, name, SuffixFamily::awq, k, n, bias_required);
  }
  if (checkpoint.find(name + ".weight_packed") != nullptr) {
    return find_quantized(checkpoint, name, SuffixFamily::compressed_tensors, k, n, bias_required);
  }
  return find_dense(checkpoint, name, k, n, bias_required);
}

Result<ModelNames> find_model_names(const Checkpoint& checkpoint, const ModelConfig& config) {
  ModelNames names;
  constexpr std::array<const char*, 4> kPrefixes = {"model.", "language_model.model.",
                                                    "model.language_model.", "language_model."};
  const auto prefix = std::find_if(kPrefixes.begin(), kPrefixes.end(), [&](const char* text) {
    return checkpoint.find(std::string(text) + "embed_tokens.weight") != nullptr;
  });
  if (prefix == kPrefixes.end()) {
    return Status(Code::corrupt_file,
                  "the checkpoint has no embed_tokens.weight under model., language_model.model., "
                  "model.language_model. or language_model.");
  }
  names.decoder = *prefix;
  if (config.tied_head) return names;
  for (const char* name : {"lm_head", "language_model.lm_head"}) {
    for (const char* suffix : {".weight", ".qweight", ".weight_packed"}) {
      if (checkpoint.find(std::string(name) + suffix) != nullptr) names.lm_head = name;
    }
  }
  if (names.lm_head.empty()) {
    return Status(
        Code::corrupt_file,
        "the checkpoint has no tensor \"lm_head.weight\", and config.json does not tie it "
        "to the embedding (tie_word_embeddings)");
  }
  return names;
}

Result<LayerSource> find_layer(const Checkpoint& checkpoint, const ModelNames& names,
                               const ModelConfig& config, int64_t index) {
  LayerSource layer;
  const std::string prefix = names.layer(index);
  const int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  const LinearShape shapes[] = {
      {Slot::qkv, "self_attn.q_proj", config.hidden, q, config.qkv_bias},
      {Slot::qkv, "self_attn.k_proj", config.hidden, kv, config.qkv_bias},
      {Slot::qkv, "self_attn.v_proj", config.hidden, kv, config.qkv_bias},
      {Slot::o, "self_attn.o_proj", q, config.hidden, config.o_bias},
      {Slot::gate_up, "mlp.gate_proj", config.hidden, config.intermediate, config.mlp_bias},
      {Slot::gate_up, "mlp.up_proj", config.hidden, config.intermediate, config.mlp_bias},
      {Slot::down, "mlp.down_proj", config.intermediate, config.hidden, config.mlp_bias},
  };
  for (const LinearShape& shape : shapes) {
    Result<LinearSource> linear =
        find_linear(checkpoint, prefix + shape.name, shape.k, shape.n, shape.bias_required);
    if (!linear.ok()) return linear.status();
    layer.groups[static_cast<int>(shape.slot)].push_back(std::move(*linear));
  }
  struct Norm {
    std::vector<float>* to;
    const char* name;
    int64_t size;
    bool wanted;
  };
  const Norm norms[] = {
      {&layer.norms.input, "input_layernorm", config.hidden, true},
      {&layer.norms.mlp,
       config.post_norms ? "pre_feedforward_layernorm" : "post_attention_layernorm", config.hidden,
       true},
      {&layer.norms.post_attention, "post_attention_layernorm", config.hidden, config.post_norms},
      {&layer.norms.post_mlp, "post_feedforward_layernorm", config.hidden, config.post_norms},
      {&layer.norms.q, "self_attn.q_norm", config.head_dim, config.qk_norm},
      {&layer.norms.k, "self_attn.k_norm", config.head_dim, config.qk_norm},
  };
  for (const Norm& norm : norms) {
    if (!norm.wanted) continue;
    Result<std::vector<float>> values =
        load_vector(checkpoint, prefix + norm.name + ".weight", norm.size,
                    config.unit_offset_norm ? 1.0f : 0.0f);
    if (!values.ok()) return values.status();
    *norm.to = std::move(*values);
  }
  return layer;
}

Result<std::vector<float>> load_final_norm(const Checkpoint& checkpoint, const ModelNames& names,
                                           const ModelConfig& config) {
  return load_vector(checkpoint, names.decoder + "norm.weight", config.hidden,
                     config.unit_offset_norm ? 1.0f : 0.0f);
}

Result<Dtype> check_vocabulary_matrix(const std::string& name, const TensorView& tensor,
                                      const ModelConfig& config) {
  const auto dtype = float_dtype(tensor.dtype);
  if (dtype && tensor.shape.size() == 2 && tensor.shape[0] >= config.vocab &&
      tensor.shape[1] == config.hidden) {
    return *dtype;
  }
  return Status(
      Code::corrupt_file,
      fmt::format("\"{}\": expected [{}, {}] of F32, F16 or BF16, found {} {}", name, config.vocab,
                  config.hidden, tensor_dtype_name(tensor.dtype), tensor.shape_text()));
}

float embedding_scale(const ModelConfig& config, Dtype embedding_dtype) {
  uint32_t rounded = 0;
  store_from_float(&rounded, 0, embedding_dtype, static_cast<float>(config.embedding_scale));
  return load_as_float(&rounded, 0, embedding_dtype);
}

}  // namespace nibble
