// See forward.h. Here: the order of a pass, from tokens to logits. What it needs beforehand is in
// forward_plans.cc, its products in forward_products.cc, its attention in forward_attention.cc.
#include "model/cuda/forward.h"

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {

Status Forward::layers(const PassInputs& inputs, int64_t rows, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  EmbeddingArgs embedding;
  embedding.type = static_cast<Element>(model_.embedding_type);
  embedding.table = model_.embedding.as<>();
  embedding.vocab = c.vocab;
  embedding.width = c.hidden;
  embedding.tokens = inputs.tokens;
  embedding.rows = rows;
  embedding.scale = model_.embedding_scale;
  residual_ = 0;
  embedding.hidden = residual();
  embedding.programmatic = model_.device.programmatic();
  NIBBLE_TRY(mark("start", stream));
  NIBBLE_TRY(to_status(launch_embedding(embedding, stream), "embedding"));
  NIBBLE_TRY(mark("embedding", stream));
  Source norm;
  norm.kind = Source::Kind::norm;
  norm.width = c.hidden;
  for (int64_t i = 0; i < c.layers; ++i) {
    const DeviceNorms& norms = model_.layers[static_cast<size_t>(i)].norms;
    norm.norm = norms.input.as<float>();
    norm.delta = i == 0 ? nullptr : delta_.as<>();
    norm.post_norm =
        i == 0 ? nullptr : model_.layers[static_cast<size_t>(i - 1)].norms.post_mlp.as<float>();
    NIBBLE_TRY(run_slot(i, Slot::qkv, norm, rows, qkv_.as<>(), stream));
    const std::optional<QuantizeArgs> codes = attention_codes(i, inputs, rows);
    NIBBLE_TRY(attend(i, inputs, rows, codes ? &*codes : nullptr, stream));
    NIBBLE_TRY(mark(codes ? "attention, quantizing" : "attention", stream));
    Source attended;
    if (codes) attended.kind = Source::Kind::codes;
    attended.x = attention_.as<>();
    attended.width = c.heads * c.head_dim;
    NIBBLE_TRY(run_slot(i, Slot::o, attended, rows, delta_.as<>(), stream));
    norm.norm = norms.mlp.as<float>();
    norm.delta = delta_.as<>();
    norm.post_norm = norms.post_attention.as<float>();
    Source gated;
    gated.width = c.intermediate;
    const Plan *gate_plan = nullptr, *down_plan = nullptr;
    const auto fused = fused_slot(i, Slot::gate_up, Fusion::norm_and_gate, rows, &gate_plan);
    if (fused && fused_slot(i, Slot::down, Fusion::rows, rows, &down_plan)) {
      NIBBLE_TRY(run_fused(i, Slot::gate_up, norm, Fusion::norm_and_gate, *gate_plan, *fused,
                           gated_.as<>(), stream));
      gated.x = gated_.as<>();
      gated.floats = true;
      gated.ranges = ranges_of_gate(*gate_plan, *fused);
    } else {
      NIBBLE_TRY(run_slot(i, Slot::gate_up, norm, rows, gate_up_.as<>(), stream));
      gated.kind = Source::Kind::gate;
    }
    NIBBLE_TRY(run_slot(i, Slot::down, gated, rows, delta_.as<>(), stream));
  }
  return {};
}

Status Forward::finish(const int32_t* gather, int64_t count, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  HeadNormArgs args;
  args.hidden = residual();
  args.delta = delta_.as<>();
  args.delta_type = model_.type;
  args.post_norm = model_.layers.back().norms.post_mlp.as<float>();
  args.norm = model_.final_norm.as<float>();
  args.eps = static_cast<float>(c.norm_eps);
  args.rows = count;
  args.k = c.hidden;
  args.gather = gather;
  args.out = states();
  args.parts = {static_cast<Element>(model_.head_type()), high_.as<>(), low_.as<>()};
  args.programmatic = model_.device.programmatic();
  return to_status(launch_head_norm(args, stream), "norm before the head");
}

Status Forward::split_states(int64_t count, cudaStream_t stream) {
  const SplitRows to{static_cast<Element>(model_.head_type()), high_.as<>(), low_.as<>()};
  return to_status(launch_split(states(), count, model_.config.hidden, to, stream), "split");
}

Status Forward::head(int64_t first, int64_t count, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  const int64_t offset = first * c.hidden;
  if (model_.head_rows() == nullptr) {
    const Result<const Plan*> plan = plan_for(model_.head, LinearSpec{}, count, Dtype::f32);
    if (!plan.ok()) return plan.status();
    note((*plan)->kernel_name(), mode_name(Mode::w4a16));
    DeviceInput input;
    input.x = high_.as<uint16_t>() + offset;
    input.x_stride = c.hidden;
    return run_gemm(**plan, input, model_.head.weights, logits(), logits_stride(),
                    workspace_.as<>(), stream);
  }
  HeadArgs args;
  args.x = {static_cast<Element>(model_.head_type()), high_.as<uint16_t>() + offset,
            low_.as<uint16_t>() + offset};
  args.w = model_.head_rows();
  args.rows = count;
  args.n = c.vocab;
  args.k = c.hidden;
  args.y = logits();
  args.y_stride = logits_stride();
  args.programmatic = model_.device.programmatic();
  note("w16_head_mma_sm80");
  return to_status(launch_w16_head_mma_sm80(args, stream), "w16_head_mma_sm80");
}

const void* DeviceModel::head_rows() const {
  if (tied()) return embedding.as<>();
  return head.quantized ? nullptr : head.dense.as<>();
}

int64_t Forward::logits_stride() const { return (model_.config.vocab + 3) / 4 * 4; }

void Forward::note(const std::string& kernel, const char* mode) { kernels_[kernel] = mode; }

}  // namespace nibble::cuda
