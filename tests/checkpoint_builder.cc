// The writers here are deliberately naive, one nibble at a time, and share no code with the
// library's packing and unpacking.
#include "checkpoint_builder.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/check.h"

namespace nibble::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// splitmix64: the same values on every platform, unlike the standard distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int limit) { return static_cast<int>(next() % static_cast<uint64_t>(limit)); }
  float between(float low, float high) {
    return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f;
  }

 private:
  uint64_t state_;
};

uint16_t bits_of(float value, Dtype dtype) {
  NIBBLE_CHECK(dtype != Dtype::f32);
  return dtype == Dtype::f16 ? f16_from_float(value) : bf16_from_float(value);
}

TensorDtype tensor_dtype(Dtype dtype) {
  return dtype == Dtype::f16    ? TensorDtype::f16
         : dtype == Dtype::bf16 ? TensorDtype::bf16
                                : TensorDtype::f32;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A matrix of int32 words, filled one nibble at a time.
struct Words {
  int64_t rows, columns;
  std::vector<uint32_t> words;

  Words(int64_t r, int64_t c) : rows(r), columns(c), words(static_cast<size_t>(r * c)) {}
  void put(int64_t row, int64_t column, int64_t nibble, uint8_t value) {
    words[static_cast<size_t>(row * columns + column)] |= uint32_t{value} << (4 * nibble);
  }
};

void add_words(TensorStore& store, const std::string& name, const Words& words) {
  store.add(name, TensorDtype::i32, {words.rows, words.columns}, words.words);
}

/// `values` (rows, n) packed along n in AWQ's order: nibble i of a word is column kOrder[i].
Words pack_awq(const std::vector<uint8_t>& values, int64_t rows, int64_t n) {
  static constexpr int kOrder[] = {0, 2, 4, 6, 1, 3, 5, 7};
  Words out(rows, n / 8);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t word = 0; word < n / 8; ++word) {
      for (int64_t i = 0; i < 8; ++i) {
        out.put(row, word, i, values[static_cast<size_t>(row * n + word * 8 + kOrder[i])]);
      }
    }
  }
  return out;
}

/// `values` (length, n) transposed: row n holds its values along `length` in natural order.
Words pack_transposed(const std::vector<uint8_t>& values, int64_t length, int64_t n,
                      int64_t row_words) {
  Words out(n, row_words);
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t column = 0; column < n; ++column) {
      out.put(column, i / 8, i % 8, values[static_cast<size_t>(i * n + column)]);
    }
  }
  return out;
}

void add_gemm(TensorStore& store, const LayerSpec& spec, const LogicalLayer& layer) {
  add_words(store, spec.name + ".qweight", pack_awq(layer.codes, layer.k, layer.n));
  add_words(store, spec.name + ".qzeros", pack_awq(layer.zeros, layer.groups(), layer.n));
  store.add(spec.name + ".scales", tensor_dtype(spec.scale_dtype), {layer.groups(), layer.n},
            layer.scales);
}

/// (groups, n) to (n, stride), padded with zeros.
std::vector<uint16_t> transpose_scales(const LogicalLayer& layer, int64_t stride) {
  std::vector<uint16_t> out(static_cast<size_t>(layer.n * stride));
  for (int64_t group = 0; group < layer.groups(); ++group) {
    for (int64_t column = 0; column < layer.n; ++column) {
      out[static_cast<size_t>(column * stride + group)] =
          layer.scales[static_cast<size_t>(group * layer.n + column)];
    }
  }
  return out;
}

void add_gemv(TensorStore& store, const LayerSpec& spec, const LogicalLayer& layer) {
  const int64_t multiple = layer.group_size >= 128 ? 1 : layer.group_size == 64 ? 2 : 4;
  const int64_t words = ceil_div(ceil_div(layer.groups(), 8), multiple) * multiple;
  add_words(store, spec.name + ".qweight",
            pack_transposed(layer.codes, layer.k, layer.n, layer.k / 8));
  add_words(store, spec.name + ".qzeros",
            pack_transposed(layer.zeros, layer.groups(), layer.n, words));
  store.add(spec.name + ".scales", tensor_dtype(spec.scale_dtype), {layer.n, words * 8},
            transpose_scales(layer, words * 8));
}

void add_compressed_tensors(TensorStore& store, const LayerSpec& spec, const LogicalLayer& layer) {
  add_words(store, spec.name + ".weight_packed",
            pack_transposed(layer.codes, layer.k, layer.n, ceil_div(layer.k, 8)));
  store.add(spec.name + ".weight_scale", tensor_dtype(spec.scale_dtype), {layer.n, layer.groups()},
            transpose_scales(layer, layer.groups()));
  store.add(spec.name + ".weight_shape", TensorDtype::i64, {2},
            std::vector<int64_t>{layer.n, layer.k});
  if (spec.format == LinearFormat::ct_pack_symmetric) return;
  Words zeros(ceil_div(layer.n, 8), layer.groups());
  for (int64_t group = 0; group < layer.groups(); ++group) {
    for (int64_t column = 0; column < layer.n; ++column) {
      zeros.put(column / 8, group, column % 8,
                layer.zeros[static_cast<size_t>(group * layer.n + column)]);
    }
  }
  add_words(store, spec.name + ".weight_zero_point", zeros);
}

void add_refused(TensorStore& store, const LayerSpec& spec, const LogicalLayer& layer) {
  Random random(spec.seed);
  const auto add = [&](const char* suffix, TensorDtype dtype, int64_t rows, int64_t columns) {
    std::vector<uint8_t> bytes(static_cast<size_t>(rows * columns * tensor_dtype_bytes(dtype)));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.below(60));  // finite as f16
    store.add(spec.name + "." + suffix, dtype, {rows, columns}, bytes);
  };
  const int64_t k = layer.k, n = layer.n, groups = layer.groups();
  const TensorDtype scale = tensor_dtype(spec.scale_dtype);
  switch (spec.format) {
    case LinearFormat::gptq: {
      add("qweight", TensorDtype::i32, k / 8, n);
      add("qzeros", TensorDtype::i32, groups, n / 8);
      add("scales", scale, groups, n);
      std::vector<int32_t> g_idx(static_cast<size_t>(k));
      for (int64_t i = 0; i < k; ++i) {
        g_idx[static_cast<size_t>(i)] = static_cast<int32_t>(i / layer.group_size);
      }
      store.add(spec.name + ".g_idx", TensorDtype::i32, {k}, g_idx);
      return;
    }
    case LinearFormat::awq_marlin:
      add("qweight", TensorDtype::i32, k / 16, 2 * n);
      add("scales", scale, groups, n);
      return;
    case LinearFormat::awq_gemv_fast:
    case LinearFormat::llm_awq:
      add("qweight", TensorDtype::i16, n / 4, k);
      add("scales", scale, ceil_div(groups, 8) * 8, n);
      add(spec.format == LinearFormat::llm_awq ? "scaled_zeros" : "qzeros", scale,
          ceil_div(groups, 8) * 8, n);
      return;
    default:
      // 8-bit codes, say: right names, but shapes of no 4-bit format.
      add("qweight", TensorDtype::i32, k, n / 4);
      add("scales", scale, groups, n);
  }
}

}  // namespace

LogicalLayer make_layer(const LayerSpec& spec) {
  Random random(spec.seed);
  LogicalLayer layer;
  layer.k = spec.k;
  layer.n = spec.n;
  layer.group_size = spec.group_size == -1 ? spec.k : spec.group_size;
  NIBBLE_CHECK(layer.k % layer.group_size == 0);
  layer.codes.resize(static_cast<size_t>(layer.k * layer.n));
  for (uint8_t& code : layer.codes) code = static_cast<uint8_t>(random.below(16));
  const auto scales = static_cast<size_t>(layer.groups() * layer.n);
  const bool symmetric = spec.symmetric || spec.format == LinearFormat::ct_pack_symmetric;
  for (size_t i = 0; i < scales; ++i) {
    layer.zeros.push_back(static_cast<uint8_t>(symmetric ? 8 : random.below(16)));
    layer.scales.push_back(bits_of(random.between(0.002f, 0.02f), spec.scale_dtype));
  }
  for (int64_t i = 0; spec.bias && i < layer.n; ++i) {
    layer.bias.push_back(bits_of(random.between(-1.0f, 1.0f), spec.scale_dtype));
  }
  return layer;
}

TensorView& TensorStore::add_bytes(const std::string& name, TensorDtype dtype,
                                   std::vector<int64_t> shape, const void* data, size_t bytes) {
  auto& owned = bytes_.emplace_back(bytes);
  if (bytes > 0) std::memcpy(owned.data(), data, bytes);
  TensorView& view = tensors_[name];
  view = {dtype, std::move(shape), owned.data(), bytes};
  NIBBLE_CHECK(view.elements() * tensor_dtype_bytes(dtype) == static_cast<int64_t>(bytes));
  return view;
}

void TensorStore::add_dense(const std::string& name, int64_t n, int64_t k, Dtype dtype,
                            uint64_t seed) {
  Random random(seed);
  std::vector<std::byte> bytes(static_cast<size_t>(n * k * dtype_bytes(dtype)));
  for (int64_t i = 0; i < n * k; ++i) {
    store_from_float(bytes.data(), i, dtype, random.between(-0.1f, 0.1f));
  }
  add(name, tensor_dtype(dtype), {n, k}, bytes);
}

void add_layer(TensorStore& store, const LayerSpec& spec, const LogicalLayer& layer) {
  switch (spec.format) {
    case LinearFormat::awq_gemm: add_gemm(store, spec, layer); break;
    case LinearFormat::awq_gemv: add_gemv(store, spec, layer); break;
    case LinearFormat::ct_pack_asymmetric:
    case LinearFormat::ct_pack_symmetric: add_compressed_tensors(store, spec, layer); break;
    default: add_refused(store, spec, layer); break;
  }
  if (layer.bias.empty()) return;
  store.add(spec.name + ".bias", tensor_dtype(spec.scale_dtype), {layer.n}, layer.bias);
}

void add_layer(TensorStore& store, const LayerSpec& spec) {
  add_layer(store, spec, make_layer(spec));
}

json make_config(const LayerSpec& spec) {
  json quantization;
  switch (spec.format) {
    case LinearFormat::ct_pack_asymmetric:
    case LinearFormat::ct_pack_symmetric: {
      const bool symmetric = spec.format == LinearFormat::ct_pack_symmetric;
      const json weights = {{"num_bits", 4},
                            {"type", "int"},
                            {"symmetric", symmetric},
                            {"strategy", "group"},
                            {"group_size", spec.group_size}};
      quantization = {{"quant_method", "compressed-tensors"},
                      {"format", "pack-quantized"},
                      {"ignore", {"lm_head"}},
                      {"config_groups", {{"group_0", {{"weights", weights}}}}}};
      break;
    }
    case LinearFormat::gptq:
      quantization = {{"quant_method", "gptq"},
                      {"bits", 4},
                      {"group_size", spec.group_size},
                      {"sym", spec.symmetric},
                      {"desc_act", false}};
      break;
    default: {
      const char* version = spec.format == LinearFormat::awq_gemv        ? "gemv"
                            : spec.format == LinearFormat::awq_gemv_fast ? "gemv_fast"
                            : spec.format == LinearFormat::awq_marlin    ? "marlin"
                            : spec.format == LinearFormat::llm_awq       ? "llm-awq"
                                                                         : "gemm";
      quantization = {{"quant_method", "awq"},         {"bits", 4},
                      {"group_size", spec.group_size}, {"version", version},
                      {"zero_point", !spec.symmetric}, {"modules_to_not_convert", nullptr}};
    }
  }
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"torch_dtype", "float16"},
          {"hidden_size", spec.k},
          {"quantization_config", quantization}};
}

Status write_checkpoint(const std::string& directory, const std::vector<LayerSpec>& layers,
                        const CheckpointOptions& options) {
  NIBBLE_CHECK(!layers.empty());
  TensorStore store;
  for (const LayerSpec& spec : layers) add_layer(store, spec);
  if (options.dense_tensors) {
    const int64_t hidden = layers[0].k;
    store.add_dense("model.embed_tokens.weight", 64, hidden, Dtype::f16, 101);
    store.add_dense("lm_head.weight", 64, hidden, Dtype::f16, 102);
    const std::vector<uint16_t> ones(static_cast<size_t>(hidden), bits_of(1.0f, Dtype::f16));
    store.add("model.norm.weight", TensorDtype::f16, {hidden}, ones);
  }
  json config = make_config(layers[0]);
  config.merge_patch(options.config_patch);
  return write_checkpoint(directory, store.tensors(), config, options.shards);
}

Status write_checkpoint(const std::string& directory, const TensorMap& tensors, const json& config,
                        int shards) {
  fs::create_directories(directory);
  write_text(directory + "/config.json", config.dump(2));
  write_text(directory + "/tokenizer.json", "{\"version\": \"1.0\"}\n");
  if (shards == 1) {
    return write_safetensors(directory + "/model.safetensors", tensors, {{"format", "pt"}});
  }
  std::vector<TensorMap> parts(static_cast<size_t>(shards));
  json weight_map = json::object();
  uint64_t total = 0;
  size_t dealt = 0;
  const auto shard_name = [&](size_t i) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05d.safetensors", i + 1, shards);
    return std::string(name);
  };
  for (const auto& [name, view] : tensors) {
    const size_t part = dealt++ % parts.size();
    parts[part].emplace(name, view);
    weight_map[name] = shard_name(part);
    total += view.bytes;
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    NIBBLE_TRY(write_safetensors(directory + "/" + shard_name(i), parts[i], {{"format", "pt"}}));
  }
  write_text(directory + "/model.safetensors.index.json",
             json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump());
  return {};
}

std::string make_image(const TensorMap& tensors) {
  json header = json::object();
  std::string payload;
  for (const auto& [name, view] : tensors) {
    const size_t begin = payload.size();
    payload.append(reinterpret_cast<const char*>(view.data), view.bytes);
    header[name] = {{"dtype", tensor_dtype_name(view.dtype)},
                    {"shape", view.shape},
                    {"data_offsets", {begin, payload.size()}}};
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text + payload;
}

void write_text(const std::string& path, std::string_view text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  file.close();
  NIBBLE_CHECK(file.good());
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  NIBBLE_CHECK(file.good());
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> list_directory(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

TempDir::TempDir() {
  std::string pattern = (fs::temp_directory_path() / "nibble-test-XXXXXX").string();
  NIBBLE_CHECK(::mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace nibble::test
