// Attention of a layer: rope and the way of keys and values into the cache, then rows of prompts in
// tiles or a row of every sequence; the latter may leave the operand of o's product.
#include "model/cuda/forward.h"

#include "gemm/cuda/operand.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {

AttentionArgs Forward::attention_args(int64_t layer) const {
  const ModelConfig& c = model_.config;
  AttentionArgs attention;
  attention.q = q_.as<>();
  attention.q_stride = c.heads * c.head_dim;
  attention.heads = c.heads;
  attention.kv = pool_.layer(layer);
  attention.window = c.window[static_cast<size_t>(layer)];
  attention.scale = static_cast<float>(c.attention_scale);
  attention.type = model_.type;
  attention.out = attention_.as<>();
  attention.out_stride = attention.q_stride;
  attention.programmatic = model_.device.programmatic();
  return attention;
}

std::optional<QuantizeArgs> Forward::attention_codes(int64_t layer, const PassInputs& inputs,
                                                     int64_t rows) {
  const DeviceGroup& group =
      model_.layers[static_cast<size_t>(layer)].groups[static_cast<int>(Slot::o)];
  const LinearSpec& spec = plan_.at(layer, Slot::o);
  if (inputs.num_tiles > 0 || group.parts.size() != 1 || runs_16bit(group.parts[0], spec)) {
    return std::nullopt;
  }
  const Plan* plan = nullptr;
  if (fused_slot(layer, Slot::o, Fusion::rows, rows, &plan) || plan == nullptr) return std::nullopt;
  DeviceInput input;
  input.clip = spec.clip;
  input.static_scales =
      static_scales_[static_cast<size_t>(layer * kSlots + static_cast<int>(Slot::o))].as<float>();
  const QuantizeArgs to = quantize_args(*plan, input, workspace_operand(*plan, workspace_.as<>()));
  if (!decode_quantizes(attention_args(layer), to)) return std::nullopt;
  return to;
}

Status Forward::attend(int64_t layer, const PassInputs& inputs, int64_t rows,
                       const QuantizeArgs* codes, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  const DeviceNorms& norms = model_.layers[static_cast<size_t>(layer)].norms;
  const AttentionArgs attention = attention_args(layer);
  const int kind = attention.window > 0 ? 1 : 0;
  RopeArgs rope;
  rope.type = model_.type;
  rope.qkv = qkv_.as<>();
  rope.qkv_stride = (c.heads + 2 * c.kv_heads) * c.head_dim;
  rope.rows = rows;
  rope.heads = c.heads;
  rope.q = q_.as<>();
  rope.q_stride = attention.q_stride;
  rope.kv = attention.kv;
  rope.sequence = inputs.sequence;
  rope.position = inputs.position;
  rope.cosine = model_.cosine[kind].as<float>();
  rope.sine = model_.sine[kind].as<float>();
  rope.q_norm = norms.q.as<float>();
  rope.k_norm = norms.k.as<float>();
  rope.eps = static_cast<float>(c.norm_eps);
  rope.faults = faults();
  rope.programmatic = model_.device.programmatic();
  const bool together = inputs.num_tiles == 0 && decode_takes(rope);
  if (!together) {
    NIBBLE_TRY(to_status(launch_rope(rope, stream), "rope"));
    NIBBLE_TRY(mark("rope, keys and values", stream));
  }
  if (inputs.num_tiles > 0) {
    // num_tiles fits: see PassStaging.
    const bool wgmma = model_.device.capability == 90;
    const PrefillArgs args{attention, inputs.tiles, inputs.num_tiles, wgmma};
    note(wgmma ? "attention_prefill_sm90" : "attention_prefill_sm80");
    return to_status(launch_attention_prefill(args, stream), "attention_prefill");
  }
  DecodeArgs args;
  args.attention = attention;
  args.rows = rows;
  args.sequence = inputs.sequence;
  args.position = inputs.position;
  args.max_context = pool_.shape().context;
  args.scratch = decode_scratch_.as<>();
  args.multiprocessors = model_.device.multiprocessors;
  if (together) args.rope = rope;
  if (codes != nullptr) args.codes = *codes;
  note("attention_decode");
  return to_status(launch_attention_decode(args, stream), "attention_decode");
}

}  // namespace nibble::cuda
