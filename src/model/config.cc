#include "model/config.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "format/message.h"

namespace nibble {
namespace {

using nlohmann::json;

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of any dimension; far above every real model
constexpr int64_t kMaxLayers = 4096;

/// Reads keys of one JSON object; the first problem is kept and everything after it ignored.
class Reader {
 public:
  explicit Reader(const json& object) : object_(object) {}

  const json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t integer(const char* key, std::optional<int64_t> fallback, int64_t low, int64_t high) {
    const json* value = find(key);
    if (value == nullptr) {
      if (!fallback) fail(fmt::format("config.json has no {}", quote_name(key)));
      return fallback.value_or(low);
    }
    if (!value->is_number_integer()) return bad(key, "an integer", *value), low;
    const int64_t number =
        value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)
            ? INT64_MAX
            : value->get<int64_t>();
    if (number < low || number > high) {
      bad(key, fmt::format("an integer in {}..{}", low, high), *value);
      return low;
    }
    return number;
  }

  double number(const char* key, std::optional<double> fallback, double low) {
    const json* value = find(key);
    if (value == nullptr) {
      if (!fallback) fail(fmt::format("config.json has no {}", quote_name(key)));
      return fallback.value_or(1);
    }
    const double found = value->is_number() ? value->get<double>() : NAN;
    if (!(std::isfinite(found) && found > low)) {
      bad(key, fmt::format("a number above {}", low), *value);
      return 1;
    }
    return found;
  }

  bool boolean(const char* key, bool fallback) {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) return bad(key, "true or false", *value), fallback;
    return value->get<bool>();
  }

  std::string text(const char* key, const std::string& fallback) {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) return bad(key, "a string", *value), fallback;
    return value->get<std::string>();
  }

  void bad(const char* key, const std::string& expected, const json& found) {
    const std::string text = found.dump(-1, ' ', true, json::error_handler_t::replace);
    fail(fmt::format("config.json: {}: expected {}, found {}", quote_name(key), expected,
                     quote_name(text)));
  }
  void fail(std::string message, Code code = Code::corrupt_file) {
    if (status_.ok()) status_ = Status(code, std::move(message));
  }
  const Status& status() const { return status_; }
  const json& object() const { return object_; }

 private:
  const json& object_;
  Status status_;
};

struct Family {
  const char* model_type;  // of the text part
  const char* class_name;  // in "architectures"
  Architecture architecture;
};
constexpr std::array<Family, 6> kFamilies = {{
    {"llama", "LlamaForCausalLM", Architecture::llama},
    {"mistral", "MistralForCausalLM", Architecture::mistral},
    {"qwen2", "Qwen2ForCausalLM", Architecture::qwen2},
    {"qwen3", "Qwen3ForCausalLM", Architecture::qwen3},
    {"gemma3_text", "Gemma3ForCausalLM", Architecture::gemma3},
    {"gemma3", "Gemma3ForConditionalGeneration", Architecture::gemma3},
}};

/// By the class that was saved; model_type decides if there is none.
Result<Architecture> find_architecture(const json& document) {
  std::string found;
  if (const auto it = document.find("architectures");
      it != document.end() && it->is_array() && !it->empty() && it->front().is_string()) {
    found = it->front().get<std::string>();
    for (const Family& family : kFamilies) {
      if (found == family.class_name) return family.architecture;
    }
  } else if (const auto type = document.find("model_type");
             type != document.end() && type->is_string()) {
    found = type->get<std::string>();
    for (const Family& family : kFamilies) {
      if (found == family.model_type) return family.architecture;
    }
  }
  return Status(Code::unsupported,
                fmt::format("config.json: architecture {} is not one that is run here: "
                            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
                            "Qwen3ForCausalLM, Gemma3ForCausalLM, Gemma3ForConditionalGeneration",
                            found.empty() ? "(none)" : quote_name(found)));
}

/// One rope description: `object` holds rope_type and its numbers.
RopeConfig parse_rope(Reader& outer, const json& object, double theta) {
  RopeConfig rope;
  rope.theta = theta;
  if (!object.is_object()) {
    outer.bad("rope_scaling", "an object", object);
    return rope;
  }
  Reader reader(object);
  rope.theta = reader.number("rope_theta", theta, 0);
  const std::string type = reader.text("rope_type", reader.text("type", "default"));
  if (type == "linear") {
    rope.linear_factor = reader.number("factor", {}, 0);
  } else if (type == "llama3") {
    rope.llama3 = true;
    rope.factor = reader.number("factor", {}, 0);
    rope.low_freq_factor = reader.number("low_freq_factor", {}, 0);
    rope.high_freq_factor = reader.number("high_freq_factor", {}, 0);
    rope.original_context = reader.number("original_max_position_embeddings", {}, 0);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      reader.fail("config.json: rope high_freq_factor must be above low_freq_factor");
    }
  } else if (type != "default") {
    reader.fail(fmt::format("config.json: rope type {} is not run here: default, linear, llama3",
                            quote_name(type)),
                Code::unsupported);
  }
  if (const double partial = reader.number("partial_rotary_factor", 1.0, 0); partial != 1.0) {
    reader.fail("config.json: partial_rotary_factor other than 1 is not run here",
                Code::unsupported);
  }
  if (!reader.status().ok()) outer.fail(reader.status().message(), reader.status().code());
  return rope;
}

/// rope_parameters (transformers 5: flat or per attention kind), else rope_theta, rope_scaling and
/// rope_local_base_freq.
void parse_ropes(Reader& reader, ModelConfig& config) {
  const bool gemma = config.architecture == Architecture::gemma3;
  const double theta = reader.number("rope_theta", gemma ? 1e6 : 10000.0, 0);
  const json none = json::object();
  if (const json* parameters = reader.find("rope_parameters")) {
    if (!parameters->is_object()) return reader.bad("rope_parameters", "an object", *parameters);
    const auto full = parameters->find("full_attention");
    const auto sliding = parameters->find("sliding_attention");
    const bool nested = full != parameters->end() || sliding != parameters->end();
    config.rope = parse_rope(reader,
                             !nested                     ? *parameters
                             : full != parameters->end() ? *full
                                                         : none,
                             theta);
    config.local_rope = !nested || sliding == parameters->end()
                            ? config.rope
                            : parse_rope(reader, *sliding, gemma ? 10000.0 : theta);
    return;
  }
  const json* scaling = reader.find("rope_scaling");
  config.rope = parse_rope(reader, scaling != nullptr ? *scaling : none, theta);
  config.local_rope = config.rope;
  if (gemma) {
    config.local_rope = RopeConfig{};
    config.local_rope.theta = reader.number("rope_local_base_freq", 10000.0, 0);
  }
}

/// Which layers see only a window: layer_types, else the family's own rule.
void parse_windows(Reader& reader, ModelConfig& config) {
  config.window.assign(static_cast<size_t>(config.layers), 0);
  const bool gemma = config.architecture == Architecture::gemma3;
  const bool qwen =
      config.architecture == Architecture::qwen2 || config.architecture == Architecture::qwen3;
  if (config.architecture == Architecture::llama) return;
  if (qwen && !reader.boolean("use_sliding_window", false)) return;
  if (!gemma && reader.find("sliding_window") == nullptr) return;
  const int64_t window = reader.integer("sliding_window", 4096, 1, INT32_MAX);
  if (const json* types = reader.find("layer_types")) {
    if (!types->is_array() || types->size() != static_cast<size_t>(config.layers)) {
      return reader.bad("layer_types", fmt::format("a list of {} names", config.layers), *types);
    }
    for (int64_t i = 0; i < config.layers; ++i) {
      const json& type = (*types)[static_cast<size_t>(i)];
      if (type == "sliding_attention") {
        config.window[static_cast<size_t>(i)] = window;
      } else if (type != "full_attention") {
        return reader.bad("layer_types", "full_attention or sliding_attention", type);
      }
    }
    return;
  }
  const int64_t pattern = gemma ? reader.integer("sliding_window_pattern", 6, 1, kMaxLayers) : 0;
  const int64_t first = qwen ? reader.integer("max_window_layers", 28, 0, INT32_MAX) : 0;
  for (int64_t i = 0; i < config.layers; ++i) {
    const bool sliding = gemma ? (i + 1) % pattern != 0 : i >= first;
    if (sliding) config.window[static_cast<size_t>(i)] = window;
  }
}

/// Token ids: a multimodal model's may stand beside its text_config.
void parse_tokens(Reader& reader, Reader& outer, ModelConfig& config) {
  const bool gemma = config.architecture == Architecture::gemma3;
  const json* eos = reader.find("eos_token_id");
  if (eos == nullptr) eos = outer.find("eos_token_id");
  const json fallback = gemma ? json(1) : json::array();
  const json list = eos == nullptr ? fallback : *eos;
  for (const json& token : list.is_array() ? list : json::array({list})) {
    if (!token.is_number_integer() || token.get<int64_t>() < 0 || token.get<int64_t>() > kMaxSize) {
      return reader.bad("eos_token_id", "token ids", list);
    }
    config.eos_tokens.push_back(token.get<int32_t>());
  }
  Reader& bos = reader.find("bos_token_id") != nullptr ? reader : outer;
  config.bos_token =
      static_cast<int32_t>(bos.integer("bos_token_id", gemma ? 2 : -1, -1, kMaxSize));
  if (!outer.status().ok()) reader.fail(outer.status().message(), outer.status().code());
}

void parse_activation(Reader& reader, ModelConfig& config) {
  const std::string name = reader.text("hidden_activation", reader.text("hidden_act", ""));
  if (name == "silu" || name == "swish") {
    config.activation = Activation::silu;
  } else if (name == "gelu_pytorch_tanh") {
    config.activation = Activation::gelu_tanh;
  } else if (name.empty()) {
    const bool gemma = config.architecture == Architecture::gemma3;
    config.activation = gemma ? Activation::gelu_tanh : Activation::silu;
  } else {
    reader.fail(fmt::format("config.json: activation {} is not run here: silu, gelu_pytorch_tanh",
                            quote_name(name)),
                Code::unsupported);
  }
}

}  // namespace

const char* architecture_name(Architecture architecture) {
  switch (architecture) {
    case Architecture::llama: return "llama";
    case Architecture::mistral: return "mistral";
    case Architecture::qwen2: return "qwen2";
    case Architecture::qwen3: return "qwen3";
    case Architecture::gemma3: return "gemma3";
  }
  return "?";
}

Result<ModelConfig> parse_model_config(const json& document) {
  if (!document.is_object()) {
    return Status(Code::corrupt_file, "a model directory needs a config.json with an object");
  }
  const Result<Architecture> architecture = find_architecture(document);
  if (!architecture.ok()) return architecture.status();
  const auto text = document.find("text_config");
  const bool nested = text != document.end() && text->is_object();
  Reader reader(nested ? *text : document);
  ModelConfig config;
  config.architecture = *architecture;
  const bool gemma = config.architecture == Architecture::gemma3;
  using Default = std::optional<int64_t>;
  // Gemma-3's own files leave out what equals the defaults of its configuration class.
  const auto gemma_default = [&](int64_t value) { return gemma ? Default(value) : Default(); };

  config.layers = reader.integer("num_hidden_layers", gemma_default(26), 1, kMaxLayers);
  config.hidden = reader.integer("hidden_size", gemma_default(2304), 1, kMaxSize);
  config.intermediate = reader.integer("intermediate_size", gemma_default(9216), 1, kMaxSize);
  config.heads = reader.integer("num_attention_heads", gemma_default(8), 1, kMaxSize);
  config.kv_heads = reader.integer("num_key_value_heads",
                                   gemma ? Default(4) : Default(config.heads), 1, config.heads);
  const int64_t derived = gemma ? 256 : config.hidden / config.heads;
  if (derived < 1 && reader.find("head_dim") == nullptr) {
    reader.fail("config.json: hidden_size is below num_attention_heads");
  }
  config.head_dim = reader.integer("head_dim", std::max<int64_t>(derived, 1), 1, 1 << 16);
  config.vocab = reader.integer("vocab_size", gemma_default(262208), 1, kMaxSize);
  config.max_positions =
      reader.integer("max_position_embeddings", gemma ? 131072 : 2048, 1, INT32_MAX);
  config.norm_eps = reader.number("rms_norm_eps", 1e-6, 0);
  if (config.heads % config.kv_heads != 0) {
    reader.fail(fmt::format("config.json: {} heads are not a multiple of {} KV heads", config.heads,
                            config.kv_heads));
  }
  if (config.head_dim % 2 != 0) {
    reader.fail(fmt::format("config.json: head_dim {} is odd", config.head_dim));
  }
  // Bounds far above every real model, so that sizes made of them cannot overflow.
  constexpr int64_t kMaxGroups = 256, kMaxHeadDim = 4096, kMaxWidth = int64_t{1} << 20;
  if (config.groups() > kMaxGroups || config.head_dim > kMaxHeadDim ||
      config.heads * config.head_dim > kMaxWidth) {
    reader.fail(
        fmt::format("config.json: {} heads for {} KV heads of {} channels: at most {} heads "
                    "a KV head, {} channels a head and {} in all are run here",
                    config.heads, config.kv_heads, config.head_dim, kMaxGroups, kMaxHeadDim,
                    kMaxWidth),
        Code::unsupported);
  }
  config.unit_offset_norm = config.post_norms = gemma;
  config.qk_norm = gemma || config.architecture == Architecture::qwen3;
  const bool attention_bias = reader.boolean("attention_bias", false);
  config.qkv_bias = attention_bias || config.architecture == Architecture::qwen2;
  config.o_bias = attention_bias && config.architecture != Architecture::qwen2;
  config.mlp_bias = reader.boolean("mlp_bias", false);
  config.tied_head =
      reader.boolean("tie_word_embeddings", nested && document.contains("tie_word_embeddings") &&
                                                    document["tie_word_embeddings"].is_boolean()
                                                ? document["tie_word_embeddings"].get<bool>()
                                                : gemma);
  const double scalar = gemma ? reader.number("query_pre_attn_scalar", 256.0, 0)
                              : static_cast<double>(config.head_dim);
  config.attention_scale = 1 / std::sqrt(scalar);
  if (gemma) config.embedding_scale = std::sqrt(static_cast<double>(config.hidden));
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"}) {
    if (reader.find(key) != nullptr) {
      reader.fail(fmt::format("config.json: {} is not run here", key), Code::unsupported);
    }
  }
  if (reader.boolean("use_bidirectional_attention", false)) {
    reader.fail("config.json: bidirectional attention is not run here", Code::unsupported);
  }
  parse_activation(reader, config);
  parse_ropes(reader, config);
  parse_windows(reader, config);
  Reader outer(document);
  parse_tokens(reader, outer, config);
  if (!reader.status().ok()) return reader.status();
  return config;
}

}  // namespace nibble
