#include "model/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/cpu_features.h"
#include "base/memory.h"
#include "base/thread_pool.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/float_ops.h"
#include "gemm/int8.h"

namespace nibble {
namespace {

// Rows of one pass over the layers: bounds the scratch memory of a long prompt.
constexpr int64_t kPassRows = 512;
constexpr int64_t kDefaultContext = 4096;

int64_t context_of(const ModelConfig& config, const ModelOptions& options) {
  return options.context > 0 ? options.context
                             : std::min<int64_t>(config.max_positions, kDefaultContext);
}

uint64_t round_up_to(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

/// Bytes that a linear takes once packed, from its tensors' shapes.
uint64_t packed_bytes(const Checkpoint& checkpoint, const std::string& name, int64_t k, int64_t n) {
  for (const char* suffix : {".qweight", ".weight_packed"}) {
    if (checkpoint.find(name + suffix) == nullptr) continue;
    const char* scales = suffix[1] == 'q' ? ".scales" : ".weight_scale";
    const TensorView* tensor = checkpoint.find(name + scales);
    const int64_t values = tensor == nullptr ? 0 : tensor->elements();
    const auto columns = round_up_to(static_cast<uint64_t>(n), 32);
    return columns * static_cast<uint64_t>(k) / 2 + static_cast<uint64_t>(values) * 3;
  }
  const TensorView* weight = checkpoint.find(name + ".weight");
  if (weight == nullptr) return 0;
  return round_up_to(static_cast<uint64_t>(n), kPanelColumns) * static_cast<uint64_t>(k) *
         static_cast<uint64_t>(tensor_dtype_bytes(weight->dtype));
}

}  // namespace

struct Model::State {
  const Checkpoint* checkpoint = nullptr;
  ModelConfig config;
  ModelOptions options;
  int threads = 1;
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;
  const TensorView* embedding = nullptr;  // (vocab, hidden)
  Dtype embedding_dtype = Dtype::bf16;
  float embedding_scale = 1;
  Linear head;
  std::unique_ptr<Int8Weights> int8_head;
  ModelPlan plan;
  bool quantized = false;
  std::unique_ptr<LayerRunner> runner;
  std::vector<std::string> head_kernels;
};

Model::Model(std::unique_ptr<State> state) : state_(std::move(state)) {}
Model::Model(Model&&) noexcept = default;
Model::~Model() = default;

Result<MemoryEstimate> Model::estimate(const Checkpoint& checkpoint, const ModelOptions& options) {
  const Result<ModelConfig> config = parse_model_config(checkpoint.config());
  if (!config.ok()) return config.status();
  const Result<ModelNames> names = find_model_names(checkpoint, *config);
  if (!names.ok()) return names.status();
  const ModelConfig& c = *config;
  MemoryEstimate estimate;
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  const auto add = [&](const std::string& name, int64_t k, int64_t n) {
    estimate.weights += packed_bytes(checkpoint, name, k, n);
  };
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string prefix = names->layer(i);
    add(prefix + "self_attn.q_proj", c.hidden, q);
    add(prefix + "self_attn.k_proj", c.hidden, kv);
    add(prefix + "self_attn.v_proj", c.hidden, kv);
    add(prefix + "self_attn.o_proj", q, c.hidden);
    add(prefix + "mlp.gate_proj", c.hidden, c.intermediate);
    add(prefix + "mlp.up_proj", c.hidden, c.intermediate);
    add(prefix + "mlp.down_proj", c.intermediate, c.hidden);
  }
  estimate.head =
      options.int8_head
          ? static_cast<uint64_t>(c.vocab) * static_cast<uint64_t>(c.hidden)
          : packed_bytes(checkpoint,
                         names->lm_head.empty() ? names->decoder + "embed_tokens" : names->lm_head,
                         c.hidden, c.vocab);
  const int64_t context = context_of(c, options);
  if (__builtin_mul_overflow(static_cast<uint64_t>(options.sequences),
                             KvCache::bytes_for(c, options.kv_dtype, context),
                             &estimate.kv_cache)) {
    estimate.kv_cache = UINT64_MAX / 4;
  }
  const int64_t rows = std::min<int64_t>(kPassRows, std::max(context, options.sequences));
  estimate.workspace =
      static_cast<uint64_t>(rows * (2 * q + 2 * kv + 3 * c.hidden + 3 * c.intermediate)) * 4 +
      static_cast<uint64_t>(options.sequences * c.vocab) * 4;
  estimate.available = available_memory_bytes();
  return estimate;
}

namespace {

Status check_fits(const MemoryEstimate& memory) {
  if (memory.available == 0 || memory.total() <= memory.available) return {};
  const auto gb = [](uint64_t bytes) { return static_cast<double>(bytes) / 1e9; };
  return Status(Code::out_of_memory,
                fmt::format("the model needs {:.2f} GB (weights {:.2f}, head {:.2f}, KV cache "
                            "{:.2f}, workspace {:.2f}); {:.2f} GB are available",
                            gb(memory.total()), gb(memory.weights), gb(memory.head),
                            gb(memory.kv_cache), gb(memory.workspace), gb(memory.available)));
}

}  // namespace

Status Model::find_embedding(const ModelNames& names, State& s) {
  const std::string name = names.embedding();
  s.embedding = s.checkpoint->find(name);
  const Result<Dtype> dtype = check_vocabulary_matrix(name, *s.embedding, s.config);
  if (!dtype.ok()) return dtype.status();
  s.embedding_dtype = *dtype;
  s.embedding_scale = embedding_scale(s.config, *dtype);
  return {};
}

Status Model::load_head(const ModelNames& names, const LoadOptions& load, State& s) {
  const ModelConfig& c = s.config;
  const bool tied = names.lm_head.empty();
  if (!tied && !s.options.int8_head) {
    Result<Linear> linear =
        load_linear(*s.checkpoint, names.lm_head, c.hidden, c.vocab, false, load);
    if (!linear.ok()) return linear.status();
    s.head = std::move(*linear);
    return {};
  }
  const std::string name = (tied ? names.decoder + "embed_tokens" : names.lm_head) + ".weight";
  const TensorView* head = s.checkpoint->find(name);
  if (head == nullptr) {
    return Status(Code::unsupported, "lm_head is quantized already: it has no 8-bit form");
  }
  const Result<Dtype> dtype = check_vocabulary_matrix(name, *head, c);
  if (!dtype.ok()) return dtype.status();
  if (s.options.int8_head) {
    Result<Int8Weights> packed = pack_int8(c.vocab, c.hidden, head->data, *dtype, s.threads);
    if (!packed.ok()) return packed.status();
    s.int8_head = std::make_unique<Int8Weights>(std::move(*packed));
  } else {
    Result<DenseWeights> packed =
        pack_dense(c.vocab, c.hidden, head->data, *dtype, nullptr, Dtype::f32, s.threads);
    if (!packed.ok()) return packed.status();
    s.head.name = name + " (tied)";
    s.head.k = c.hidden;
    s.head.n = c.vocab;
    s.head.dense = std::make_unique<DenseWeights>(std::move(*packed));
  }
  drop_pages(*head);
  return {};
}

Result<Model> Model::load(const Checkpoint& checkpoint, const ModelOptions& options) {
  auto state = std::make_unique<State>();
  State& s = *state;
  s.checkpoint = &checkpoint;
  s.options = options;
  s.threads = options.threads > 0 ? options.threads : available_cpus();
  Result<ModelConfig> config = parse_model_config(checkpoint.config());
  if (!config.ok()) return config.status();
  s.config = std::move(*config);
  const ModelConfig& c = s.config;
  const Result<ModelNames> names = find_model_names(checkpoint, c);
  if (!names.ok()) return names.status();
  const Result<MemoryEstimate> memory = estimate(checkpoint, options);
  if (!memory.ok()) return memory.status();
  NIBBLE_TRY(check_fits(*memory));
  NIBBLE_TRY(find_embedding(*names, s));
  LoadOptions load;
  load.threads = s.threads;
  // The head first: its source, which can be the largest tensor, is gone from memory before the
  // layers come.
  NIBBLE_TRY(load_head(*names, load, s));
  for (int64_t i = 0; i < c.layers; ++i) {
    Result<LayerWeights> layer = load_layer(checkpoint, *names, c, i, load);
    if (!layer.ok()) return layer.status();
    for (const LinearGroup& group : layer->groups) {
      for (const Linear& linear : group.linears) {
        s.quantized = s.quantized || linear.quantized != nullptr;
      }
    }
    s.layers.push_back(std::move(*layer));
  }
  Result<std::vector<float>> norm = load_final_norm(checkpoint, *names, c);
  if (!norm.ok()) return norm.status();
  s.final_norm = std::move(*norm);

  s.plan = uniform_plan(c.layers, Mode::w4a16);
  s.runner = std::make_unique<LayerRunner>(c, s.threads);
  return Model(std::move(state));
}

const ModelConfig& Model::config() const { return state_->config; }
bool Model::quantized() const { return state_->quantized; }
const LayerWeights& Model::layer(int64_t index) const {
  return state_->layers[static_cast<size_t>(index)];
}
const ModelPlan& Model::plan() const { return state_->plan; }
KvCache Model::make_cache() const { return KvCache(state_->config, state_->options.kv_dtype); }

Status Model::set_plan(ModelPlan plan) {
  const auto expected = static_cast<size_t>(state_->config.layers * kSlots);
  if (plan.specs.size() != expected) {
    return Status(
        Code::invalid_argument,
        fmt::format("a plan of {} linear groups for a model of {}", plan.specs.size(), expected));
  }
  state_->plan = std::move(plan);
  return {};
}

namespace {

Status check_items(const ModelConfig& config, std::span<const BatchItem> items) {
  for (size_t i = 0; i < items.size(); ++i) {
    const BatchItem& item = items[i];
    const auto same = [&](const BatchItem& other) { return other.cache == item.cache; };
    if (item.cache == nullptr || std::any_of(items.begin(), items.begin() + i, same)) {
      return Status(Code::invalid_argument,
                    fmt::format("item {} of the batch has no sequence of its own", i));
    }
    for (const int32_t token : item.tokens) {
      if (token >= 0 && token < config.vocab) continue;
      return Status(Code::invalid_argument,
                    fmt::format("token {} is outside the vocabulary of {}", token, config.vocab));
    }
    const int64_t length = item.cache->length() + static_cast<int64_t>(item.tokens.size());
    if (length > config.max_positions) {
      return Status(Code::invalid_argument,
                    fmt::format("{} tokens are more than the model's context of {}", length,
                                config.max_positions));
    }
    NIBBLE_TRY(item.cache->reserve(length));
  }
  return {};
}

}  // namespace

Status Model::forward(
    std::span<const BatchItem> items, float* hidden,
    const std::function<void(int64_t, Slot, const float*, int64_t, int64_t)>& observer) {
  State& s = *state_;
  const ModelConfig& c = s.config;
  NIBBLE_TRY(check_items(c, items));
  std::vector<size_t> taken(items.size(), 0);  // tokens of each item that have been run
  std::vector<int64_t> first_row(items.size());
  int64_t rows_before = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    first_row[i] = rows_before;
    rows_before += static_cast<int64_t>(items[i].tokens.size());
  }
  // Passes of at most kPassRows rows. A pass takes whole runs of items in order, so its rows are
  // neighbours in `hidden`.
  for (size_t item = 0; item < items.size();) {
    std::vector<BatchSpan> batch;
    const int64_t row0 = first_row[item] + static_cast<int64_t>(taken[item]);
    int64_t rows = 0;
    while (item < items.size() && rows < kPassRows) {
      const int64_t left =
          static_cast<int64_t>(items[item].tokens.size()) - static_cast<int64_t>(taken[item]);
      const int64_t count = std::min(left, kPassRows - rows);
      if (count > 0) batch.push_back({items[item].cache, rows, count});
      for (int64_t i = 0; i < count; ++i) {
        const int32_t token = items[item].tokens[taken[item] + static_cast<size_t>(i)];
        float* to = hidden + (row0 + rows + i) * c.hidden;
        for (int64_t j = 0; j < c.hidden; ++j) {
          to[j] = load_as_float(s.embedding->data, token * c.hidden + j, s.embedding_dtype) *
                  s.embedding_scale;
        }
      }
      rows += count;
      taken[item] += static_cast<size_t>(count);
      if (count == left) ++item;
    }
    float* pass = hidden + row0 * c.hidden;
    for (int64_t layer = 0; layer < c.layers; ++layer) {
      SlotObserver on_slot;
      if (observer) {
        on_slot = [&](Slot slot, const float* x, int64_t n, int64_t k) {
          observer(layer, slot, x, n, k);
        };
      }
      const std::span<const LinearSpec> specs(&s.plan.at(layer, Slot::qkv), kSlots);
      NIBBLE_TRY(s.runner->run(s.layers[static_cast<size_t>(layer)], layer, specs, batch, rows,
                               pass, on_slot));
    }
    for (const BatchSpan& span : batch) span.cache->set_length(span.cache->length() + span.count);
    const FloatOps& ops = float_ops();
    parallel_for(rows >= 16 ? s.threads : 1, rows, [&](int64_t row) {
      float* h = pass + row * c.hidden;
      ops.rms_norm(h, s.final_norm.data(), c.hidden, static_cast<float>(c.norm_eps), h);
    });
  }
  return {};
}

Status Model::logits(const float* hidden, int64_t rows, float* logits) {
  State& s = *state_;
  const ModelConfig& c = s.config;
  std::string kernel;
  if (s.int8_head != nullptr) {
    NIBBLE_TRY(run_int8(*s.int8_head, rows, hidden, c.hidden, logits, c.vocab, s.threads));
    kernel = int8_kernel_name();
  } else if (s.head.dense != nullptr) {
    run_dense(*s.head.dense, rows, hidden, c.hidden, logits, c.vocab, s.threads);
    kernel = dense_kernel_name();
  } else {
    Problem problem;
    problem.m = rows;
    problem.n = c.vocab;
    problem.k = c.hidden;
    problem.group_size = s.head.quantized->group_size;
    problem.mode = Mode::w4a16;
    const Result<Plan> plan = plan_gemm(problem, nullptr, s.threads);
    if (!plan.ok()) return plan.status();
    Result<AlignedBuffer> workspace = AlignedBuffer::zeroed(plan->workspace_bytes);
    if (!workspace.ok()) return workspace.status();
    GemmInput in;
    in.x = hidden;
    in.x_stride = c.hidden;
    const GemmTarget target{s.head.quantized.get(), logits, c.vocab, nullptr};
    NIBBLE_TRY(run_gemm(*plan, in, {&target, 1}, workspace->data()));
    kernel = plan->kernel_name();
  }
  if (std::find(s.head_kernels.begin(), s.head_kernels.end(), kernel) == s.head_kernels.end()) {
    s.head_kernels.push_back(kernel);
  }
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t largest = 0;  // magnitude bits: NaN and infinity are above every number
    for (int64_t i = 0; i < c.vocab; ++i) {
      largest = std::max(largest, std::bit_cast<uint32_t>(logits[row * c.vocab + i]) & 0x7fffffffu);
    }
    if (largest >= 0x7f800000u) {
      return Status(Code::non_finite, fmt::format("NaN or infinity in the logits of row {}", row));
    }
  }
  return {};
}

uint64_t Model::weight_bytes() const {
  uint64_t bytes = 0;
  for (const LayerWeights& layer : state_->layers) {
    for (const LinearGroup& group : layer.groups) {
      for (const Linear& linear : group.linears) bytes += linear.bytes();
    }
  }
  return bytes;
}

uint64_t Model::head_bytes() const {
  return state_->int8_head != nullptr ? state_->int8_head->bytes() : state_->head.bytes();
}

std::vector<std::string> Model::kernels() const {
  std::vector<std::string> all = state_->runner->kernels();
  for (const std::string& name : state_->head_kernels) {
    if (std::find(all.begin(), all.end(), name) == all.end()) all.push_back(name);
  }
  return all;
}

std::string Model::head_name() const {
  if (state_->int8_head != nullptr) return "int8";
  if (state_->head.dense != nullptr) return dtype_name(state_->head.dense->dtype);
  return "w4a16";
}

}  // namespace nibble
