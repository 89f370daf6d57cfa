#include "awq/block.h"

#include <fmt/format.h>

#include "base/thread_pool.h"
#include "format/message.h"

namespace nibble::awq {
namespace {

struct Shape {
  int64_t k, n;
};

std::array<Shape, kParts> shapes_of(const ModelConfig& config) {
  const int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
  return {{{config.hidden, q},
           {config.hidden, kv},
           {config.hidden, kv},
           {q, config.hidden},
           {config.hidden, config.intermediate},
           {config.hidden, config.intermediate},
           {config.intermediate, config.hidden}}};
}

/// The tensor `name` as floats; its shape must be `shape`.
Result<std::vector<float>> load_tensor(const Checkpoint& checkpoint, const std::string& name,
                                       const std::vector<int64_t>& shape, Dtype* dtype,
                                       int threads) {
  const TensorView* tensor = checkpoint.find(name);
  if (tensor == nullptr) {
    return Status(Code::corrupt_file,
                  fmt::format("the checkpoint has no tensor {}", quote_name(name)));
  }
  const auto found = float_dtype(tensor->dtype);
  if (!found || tensor->shape != shape) {
    return Status(
        Code::corrupt_file,
        fmt::format("{}: expected [{}] of F32, F16 or BF16, found {} {}", quote_name(name),
                    joined(shape, ", "), tensor_dtype_name(tensor->dtype), tensor->shape_text()));
  }
  *dtype = *found;
  const int64_t rows = shape[0], columns = shape.size() > 1 ? shape[1] : 1;
  std::vector<float> values(static_cast<size_t>(rows * columns));
  parallel_for(threads, rows, [&](int64_t row) {
    for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
      values[static_cast<size_t>(i)] = load_as_float(tensor->data, i, *found);
    }
  });
  return values;
}

Status load_norm(const Checkpoint& checkpoint, const std::string& tensor, const ModelConfig& config,
                 BlockNorm& norm) {
  auto weight = load_tensor(checkpoint, tensor, {config.hidden}, &norm.dtype, 1);
  if (!weight.ok()) return weight.status();
  norm.tensor = tensor;
  norm.weight = std::move(*weight);
  norm.offset = config.unit_offset_norm ? 1.0f : 0.0f;
  return {};
}

}  // namespace

std::vector<Part> parts_of(Slot slot) {
  switch (slot) {
    case Slot::qkv: return {Part::q, Part::k, Part::v};
    case Slot::o: return {Part::o};
    case Slot::gate_up: return {Part::gate, Part::up};
    case Slot::down: return {Part::down};
  }
  return {};
}

std::array<std::string, kParts> linear_names(const ModelNames& names, int64_t index) {
  const std::string layer = names.layer(index);
  return {layer + "self_attn.q_proj", layer + "self_attn.k_proj", layer + "self_attn.v_proj",
          layer + "self_attn.o_proj", layer + "mlp.gate_proj",    layer + "mlp.up_proj",
          layer + "mlp.down_proj"};
}

Result<Block> load_block(const Checkpoint& checkpoint, const ModelNames& names,
                         const ModelConfig& config, int64_t index,
                         const std::function<bool(const std::string& name)>& is_quantized,
                         int threads) {
  Block block;
  const auto linears = linear_names(names, index);
  const auto shapes = shapes_of(config);
  for (size_t i = 0; i < linears.size(); ++i) {
    BlockLinear& linear = block.linears[i];
    linear.name = linears[i];
    linear.k = shapes[i].k;
    linear.n = shapes[i].n;
    linear.quantized = is_quantized(linear.name);
    Dtype dtype;
    auto weight =
        load_tensor(checkpoint, linear.name + ".weight", {linear.n, linear.k}, &dtype, threads);
    if (!weight.ok()) return weight.status();
    linear.weight = std::move(*weight);
    drop_pages(*checkpoint.find(linear.name + ".weight"));
    if (checkpoint.find(linear.name + ".bias") == nullptr) continue;
    auto bias = load_tensor(checkpoint, linear.name + ".bias", {linear.n}, &linear.bias_dtype, 1);
    if (!bias.ok()) return bias.status();
    linear.bias = std::move(*bias);
  }
  // Gemma 3 has norms after attention and MLP as well; its one before the MLP has a name of its
  // own.
  const std::string layer = names.layer(index);
  NIBBLE_TRY(load_norm(checkpoint, layer + "input_layernorm.weight", config, block.input_norm));
  NIBBLE_TRY(load_norm(checkpoint,
                       layer + (config.post_norms ? "pre_feedforward_layernorm.weight"
                                                  : "post_attention_layernorm.weight"),
                       config, block.mlp_norm));
  return block;
}

uint64_t block_bytes(const ModelConfig& config) {
  int64_t elements = 2 * config.hidden;
  for (const Shape& shape : shapes_of(config)) elements += shape.k * shape.n;
  return static_cast<uint64_t>(elements) * sizeof(float);
}

}  // namespace nibble::awq
