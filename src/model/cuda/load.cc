// See load.h.
#include "model/cuda/load.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/cpu_features.h"
#include "format/message.h"
#include "gemm/cuda/runtime.h"
#include "gemm/cuda/ss_image.h"
#include "model/rope.h"

namespace nibble::cuda {
namespace {

// Rows of one pass over the layers: products are as fast as they get, and it bounds the scratch
// memory of a long prompt.
constexpr int64_t kPassRows = 2048;
constexpr int64_t kDefaultContext = 4096;
constexpr int64_t kMostSequences = 1024;  // of a launch of attention_decode
constexpr int64_t kMostHidden = 16384;    // of norm_quantize
constexpr int64_t kWideHeadShared = 148
                                    << 10;  // bytes that attention_decode takes above 64 channels

Status unsupported(std::string message) { return Status(Code::unsupported, std::move(message)); }

Status check_shape(const ModelConfig& c, const ModelOptions& options, const DeviceInfo& device) {
  if (options.int8_head) {
    return unsupported("an 8-bit lm_head runs on the CPU only: --head 16 is for GPUs");
  }
  if (options.kv_dtype == Dtype::f32) {
    return unsupported("keys and values of a GPU are f16 or bf16, not f32");
  }
  if (c.head_dim % 16 != 0 || c.head_dim > 256) {
    return unsupported(
        fmt::format("head_dim {}: on a GPU attention takes multiples of 16 up to 256", c.head_dim));
  }
  if (c.groups() > 16) {
    return unsupported(
        fmt::format("{} query heads per KV head: on a GPU attention takes up to 16", c.groups()));
  }
  if (c.head_dim > 64 && device.shared_bytes < kWideHeadShared) {
    return unsupported(
        fmt::format("head_dim {}: attention takes {} bytes of shared memory, {} has "
                    "{}; up to 64 channels run there",
                    c.head_dim, kWideHeadShared, device.name, device.shared_bytes));
  }
  if (c.hidden % 8 != 0 || c.intermediate % 8 != 0 || c.hidden > kMostHidden) {
    return unsupported(
        fmt::format("hidden size {} and intermediate size {}: on a GPU they must "
                    "be multiples of 8, the former at most {}",
                    c.hidden, c.intermediate, kMostHidden));
  }
  return {};
}

uint64_t linear_bytes(const LinearSource& linear, WeightForm form = WeightForm::as_stored) {
  if (!linear.quantized || form == WeightForm::dequantized)
    return static_cast<uint64_t>(linear.n * linear.k * 2);
  const QuantMatrix& m = *linear.quantized;
  return static_cast<uint64_t>(packed_layout(m.n, m.k, m.group_size).bytes());
}

/// Of one that will be kept expanded as well. Side by side with others it is padded less.
uint64_t expanded_bytes(const LinearSource& linear, WeightForm form) {
  if (!linear.quantized || form == WeightForm::dequantized) return 0;
  const QuantMatrix& m = *linear.quantized;
  const PackedLayout layout = packed_layout(m.n, m.k, m.group_size);
  return layout.promoted == kBlockDepth ? kKeptImage.bytes(layout) : 0;
}

/// Looks at every linear: their bytes, and the type of those that are not quantized.
Status scan_layers(const Checkpoint& checkpoint, LoadPlan& plan) {
  std::optional<Dtype> dense;
  for (int64_t i = 0; i < plan.config.layers; ++i) {
    const Result<LayerSource> layer = find_layer(checkpoint, plan.names, plan.config, i);
    if (!layer.ok()) return layer.status();
    for (const auto& group : layer->groups) {
      for (const LinearSource& linear : group) {
        plan.memory.weights += linear_bytes(linear, plan.form);
        if (plan.expanded) plan.memory.weights += expanded_bytes(linear, plan.form);
        if (linear.quantized) {
          if (plan.form == WeightForm::dequantized) dense = Dtype::bf16;
          continue;
        }
        if (linear.dense_dtype == Dtype::f32 || (dense && *dense != linear.dense_dtype)) {
          return unsupported(
              fmt::format("{}: 16-bit weights of one model must be of one type on "
                          "a GPU, f16 or bf16; found {}",
                          quote_name(linear.name), dtype_name(linear.dense_dtype)));
        }
        dense = linear.dense_dtype;
      }
    }
  }
  // Products of 16 bits take rows of the weights' own type.
  if (dense) plan.type = static_cast<Element>(*dense);
  return {};
}

Status scan_head(const Checkpoint& checkpoint, LoadPlan& plan) {
  const ModelConfig& c = plan.config;
  const std::string name = plan.names.embedding();
  const TensorView* embedding = checkpoint.find(name);
  const Result<Dtype> dtype = check_vocabulary_matrix(name, *embedding, c);
  if (!dtype.ok()) return dtype.status();
  if (*dtype == Dtype::f32) {
    return unsupported(
        fmt::format("{}: F32; on a GPU an embedding is F16 or BF16", quote_name(name)));
  }
  plan.memory.head = static_cast<uint64_t>(c.vocab * c.hidden * 2);
  if (plan.names.lm_head.empty()) return {};
  const Result<LinearSource> head =
      find_linear(checkpoint, plan.names.lm_head, c.hidden, c.vocab, false);
  if (!head.ok()) return head.status();
  if (!head->quantized && head->dense_dtype == Dtype::f32) {
    return unsupported(
        fmt::format("{}: F32; on a GPU lm_head is F16, BF16 or 4-bit", quote_name(head->name)));
  }
  if (head->bias != nullptr) {
    return unsupported(
        fmt::format("{} has a bias, which does not run on a GPU", quote_name(head->name)));
  }
  plan.memory.head += linear_bytes(*head);
  return {};
}

Result<DeviceBuffer> rope_table(const DeviceInfo& device, const RopeConfig& rope, int64_t head_dim,
                                int64_t context, bool sine) {
  const std::vector<float> frequencies = rope_frequencies(rope, head_dim);
  const auto half = static_cast<size_t>(head_dim / 2);
  std::vector<float> table(static_cast<size_t>(context) * half), other(half);
  for (int64_t position = 0; position < context; ++position) {
    float* row = table.data() + static_cast<size_t>(position) * half;
    rope_angles(frequencies, position, sine ? other.data() : row, sine ? row : other.data());
  }
  return upload_floats(device, table);
}

}  // namespace

Result<LoadPlan> plan_load(const Checkpoint& checkpoint, const ModelOptions& options,
                           WeightForm form) {
  LoadPlan plan;
  plan.form = form;
  plan.expanded = options.expanded;
  plan.threads = options.threads > 0 ? options.threads : available_cpus();
  Result<DeviceInfo> device = device_info(0);
  if (!device.ok()) return device.status();
  plan.device = *device;
  Result<ModelConfig> config = parse_model_config(checkpoint.config());
  if (!config.ok()) return config.status();
  plan.config = std::move(*config);
  const ModelConfig& c = plan.config;
  NIBBLE_TRY(check_shape(c, options, plan.device));
  Result<ModelNames> names = find_model_names(checkpoint, c);
  if (!names.ok()) return names.status();
  plan.names = std::move(*names);
  plan.type = static_cast<Element>(options.kv_dtype);
  NIBBLE_TRY(scan_layers(checkpoint, plan));
  NIBBLE_TRY(scan_head(checkpoint, plan));
  plan.kv = {.layers = c.layers,
             .kv_heads = c.kv_heads,
             .head_dim = c.head_dim,
             .type = static_cast<Element>(options.kv_dtype),
             .sequences = options.sequences,
             .context = options.context > 0 ? options.context
                                            : std::min<int64_t>(c.max_positions, kDefaultContext)};
  if (plan.kv.sequences > kMostSequences) {
    return unsupported(
        fmt::format("{} sequences at once: a GPU takes {}", plan.kv.sequences, kMostSequences));
  }
  // Both factors are below 2^31.
  plan.pass_rows = std::min(kPassRows, plan.kv.context * plan.kv.sequences);
  MemoryEstimate& memory = plan.memory;
  memory.kv_cache = static_cast<uint64_t>(plan.kv.bytes());
  memory.workspace = Forward::workspace_bytes(c, plan.kv, plan.pass_rows) +
                     static_cast<uint64_t>(plan.kv.context * c.head_dim * 8);
  const CurrentDevice current(plan.device.ordinal);
  NIBBLE_TRY(current.status());
  size_t free = 0, total = 0;
  NIBBLE_TRY(to_status(cudaMemGetInfo(&free, &total), "cudaMemGetInfo"));
  memory.available = free;
  return plan;
}

Status check_fits(const LoadPlan& plan) {
  const MemoryEstimate& m = plan.memory;
  if (m.total() <= m.available) return {};
  const auto gb = [](uint64_t bytes) { return static_cast<double>(bytes) / 1e9; };
  return Status(Code::out_of_memory,
                fmt::format("{}: the model needs {:.2f} GB (weights {:.2f}, embedding and head "
                            "{:.2f}, KV cache {:.2f}, workspace {:.2f}); {:.2f} GB are free",
                            plan.device.name, gb(m.total()), gb(m.weights), gb(m.head),
                            gb(m.kv_cache), gb(m.workspace), gb(m.available)));
}

Status load_model(const Checkpoint& checkpoint, const LoadPlan& plan, DeviceModel& model) {
  const ModelConfig& c = plan.config;
  model.device = plan.device;
  model.config = c;
  model.type = plan.type;
  const std::string embedding_name = plan.names.embedding();
  const TensorView* embedding = checkpoint.find(embedding_name);
  model.embedding_type = *check_vocabulary_matrix(embedding_name, *embedding, c);
  model.embedding_scale = embedding_scale(c, model.embedding_type);
  NIBBLE_TRY(model.embedding.upload(embedding->data, static_cast<size_t>(c.vocab * c.hidden * 2),
                                    model.device));
  drop_pages(*embedding);
  if (!plan.names.lm_head.empty()) {
    const Result<LinearSource> head =
        find_linear(checkpoint, plan.names.lm_head, c.hidden, c.vocab, false);
    if (!head.ok()) return head.status();
    Result<DeviceGroup> group =
        upload_group(model.device, {&*head, 1}, WeightForm::as_stored, plan.threads);
    if (!group.ok()) return group.status();
    model.head = std::move(group->parts.front());
    drop_pages(checkpoint, head->name);
  }
  for (int64_t i = 0; i < c.layers; ++i) {
    const Result<LayerSource> source = find_layer(checkpoint, plan.names, c, i);
    if (!source.ok()) return source.status();
    Result<DeviceLayer> layer = upload_layer(model.device, *source, plan.form, plan.threads);
    if (!layer.ok()) return layer.status();
    model.layers.push_back(std::move(*layer));
    for (const auto& group : source->groups) {
      for (const LinearSource& linear : group) drop_pages(checkpoint, linear.name);
    }
  }
  const Result<std::vector<float>> norm = load_final_norm(checkpoint, plan.names, c);
  if (!norm.ok()) return norm.status();
  Result<DeviceBuffer> final_norm = upload_floats(model.device, *norm);
  if (!final_norm.ok()) return final_norm.status();
  model.final_norm = std::move(*final_norm);
  for (int kind = 0; kind < 2; ++kind) {
    const RopeConfig& rope = kind == 0 ? c.rope : c.local_rope;
    for (const bool sine : {false, true}) {
      Result<DeviceBuffer> table =
          rope_table(model.device, rope, c.head_dim, plan.kv.context, sine);
      if (!table.ok()) return table.status();
      (sine ? model.sine : model.cosine)[kind] = std::move(*table);
    }
  }
  return {};
}

}  // namespace nibble::cuda
