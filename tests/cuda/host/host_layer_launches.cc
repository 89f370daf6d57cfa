// Norms, gates, rope, attention and tokens on the device of host_device.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm/float_ops.h"
#include "host_device.h"
#include "host_quantize.h"
#include "model/cuda/attention_prefill.h"
#include "model/cuda/check.h"
#include "model/cuda/kernels.h"
#include "model/sampler.h"

namespace nibble::cuda {
namespace host {

void normalize(std::vector<float>& row, const float* weight, float eps) {
  float_ops().rms_norm(row.data(), weight, static_cast<int64_t>(row.size()), eps, row.data());
}

std::vector<float> residual_row(const float* hidden, const void* delta, Element type,
                                const float* post_norm, int64_t row, int64_t k, float eps) {
  std::vector<float> d(static_cast<size_t>(k)), h(hidden + row * k, hidden + (row + 1) * k);
  if (delta == nullptr) return h;
  for (int64_t i = 0; i < k; ++i) d[static_cast<size_t>(i)] = load(delta, type, row * k + i);
  if (post_norm != nullptr) normalize(d, post_norm, eps);
  for (size_t i = 0; i < d.size(); ++i) h[i] += d[i];
  return h;
}

namespace {

/// The rows of a norm, and their residual sums where they belong.
std::vector<float> norm_rows(const NormArgs& a) {
  std::vector<float> rows;
  for (int64_t r = 0; r < a.m; ++r) {
    const int64_t from = a.gather == nullptr ? r : a.gather[r];
    std::vector<float> row = residual_row(a.hidden, a.delta, a.type, a.post_norm, from, a.k, a.eps);
    if (a.gather == nullptr) std::copy(row.begin(), row.end(), a.hidden + r * a.k);
    normalize(row, a.norm, a.eps);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return rows;
}

std::vector<float> gate_rows(const GateQuantizeArgs& a) {
  std::vector<float> rows(static_cast<size_t>(a.to.m * a.to.k)), gate(static_cast<size_t>(a.to.k)),
      up(gate);
  for (int64_t r = 0; r < a.to.m; ++r) {
    for (int64_t k = 0; k < a.to.k; ++k) {
      gate[static_cast<size_t>(k)] = load(a.to.x, a.to.type, r * a.to.x_stride + k);
      up[static_cast<size_t>(k)] = load(a.up, a.to.type, r * a.up_stride + k);
    }
    const auto function =
        a.function == GateFunction::silu ? float_ops().silu_mul : float_ops().gelu_tanh_mul;
    function(gate.data(), up.data(), a.to.k, rows.data() + r * a.to.k);
  }
  return rows;
}

void store_rows(const std::vector<float>& rows, Element type, int64_t k, void* out,
                int64_t stride) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    store(out, type, at / k * stride + at % k, rows[i]);
  }
}

/// Index of a channel in the keys or values, as KvPages draws it.
int64_t kv_index(const KvPages& kv, int32_t sequence, int64_t position, int64_t head,
                 int64_t channel) {
  const int64_t page = kv.page_table[sequence * kv.max_pages + position / kPagePositions];
  const int64_t t = position % kPagePositions, piece = channel % kKvSlice / 8;
  const int64_t slices = padded_head_dim(kv.head_dim) / kKvSlice;
  return page * kv.page_stride +
         ((head * slices + channel / kKvSlice) * kPagePositions + t) * kKvSlice +
         (piece ^ (t % 8)) * 8 + channel % 8;
}

void rope_row(const RopeArgs& a, int64_t row) {
  const int64_t d = a.kv.head_dim;
  const int32_t position = a.position[row], sequence = a.sequence[row];
  if (position < 0) return;
  std::vector<float> x(static_cast<size_t>(d));
  for (int64_t head = 0; head < a.heads + 2 * a.kv.kv_heads; ++head) {
    const bool is_q = head < a.heads, is_v = head >= a.heads + a.kv.kv_heads;
    for (int64_t c = 0; c < d; ++c) {
      x[static_cast<size_t>(c)] = load(a.qkv, a.type, row * a.qkv_stride + head * d + c);
    }
    if (!is_v) {
      if (a.q_norm != nullptr) normalize(x, is_q ? a.q_norm : a.k_norm, a.eps);
      float_ops().rope(x.data(), a.cosine + position * (d / 2), a.sine + position * (d / 2), d / 2);
    }
    for (int64_t c = 0; c < d; ++c) {
      const float v = x[static_cast<size_t>(c)];
      if (!std::isfinite(v)) a.faults[sequence] = 1;
      if (is_q) {
        store(a.q, a.kv.type, row * a.q_stride + head * d + c, v);
      } else {
        const int64_t kv_head = (head - a.heads) % a.kv.kv_heads;
        store(is_v ? a.kv.values : a.kv.keys, a.kv.type,
              kv_index(a.kv, sequence, position, kv_head, c), v);
      }
    }
  }
}

void attend_row(const AttentionArgs& a, int64_t row, int32_t sequence, int64_t position) {
  if (position < 0) return;
  const int64_t d = a.kv.head_dim;
  const int64_t first = a.window > 0 ? std::max<int64_t>(0, position - a.window + 1) : 0;
  for (int64_t head = 0; head < a.heads; ++head) {
    const int64_t kv_head = head / (a.heads / a.kv.kv_heads);
    std::vector<float> weights, sums(static_cast<size_t>(d));
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t t = first; t <= position; ++t) {
      float dot = 0;
      for (int64_t c = 0; c < d; ++c) {
        dot += load(a.q, a.kv.type, row * a.q_stride + head * d + c) *
               load(a.kv.keys, a.kv.type, kv_index(a.kv, sequence, t, kv_head, c));
      }
      weights.push_back(dot * a.scale);
      largest = std::max(largest, weights.back());
    }
    for (float& weight : weights) total += weight = std::exp(weight - largest);
    for (int64_t t = first; t <= position; ++t) {
      for (int64_t c = 0; c < d; ++c) {
        sums[static_cast<size_t>(c)] +=
            weights[static_cast<size_t>(t - first)] *
            load(a.kv.values, a.kv.type, kv_index(a.kv, sequence, t, kv_head, c));
      }
    }
    for (int64_t c = 0; c < d; ++c) {
      store(a.out, a.type, row * a.out_stride + head * d + c, sums[static_cast<size_t>(c)] / total);
    }
  }
}

/// What launch_attention_decode() does with codes: of rows that are left out, scales of 0.
void quantize_heads(const DecodeArgs& args) {
  const AttentionArgs& a = args.attention;
  const int64_t k = args.codes.k;
  QuantizeArgs to = args.codes;
  to.m = args.rows;
  std::vector<float> rows(static_cast<size_t>(to.m * k), 0.0f);
  for (int64_t i = 0; i < to.m * k; ++i) {
    if (args.position[i / k] < 0) continue;
    rows[static_cast<size_t>(i)] = load(a.out, a.type, i / k * a.out_stride + i % k);
  }
  write_codes(to, rows);
}

cudaError_t prefill(const PrefillArgs& args, cudaStream_t stream) {
  enqueue(stream, [=] {
    for (int64_t i = 0; i < args.num_tiles; ++i) {
      const PrefillTile& tile = args.tiles[i];
      for (int32_t j = 0; j < tile.count; ++j) {
        attend_row(args.attention, tile.row + j, tile.sequence, tile.position + j);
      }
    }
  });
  return cudaSuccess;
}

}  // namespace
}  // namespace host

cudaError_t launch_norm_quantize(const NormArgs& args, const QuantizeArgs& to,
                                 cudaStream_t stream) {
  host::enqueue(stream, [=] {
    QuantizeArgs shaped = to;
    shaped.m = args.m;
    shaped.k = args.k;
    host::write_codes(shaped, host::norm_rows(args));
  });
  return to.scaling == Scaling::tensor ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t launch_norm(const NormArgs& args, void* out, int64_t out_stride, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    const std::vector<float> rows = host::norm_rows(args);
    if (out != nullptr) host::store_rows(rows, args.type, args.k, out, out_stride);
  });
  return cudaSuccess;
}

cudaError_t launch_gate_quantize(const GateQuantizeArgs& args, cudaStream_t stream) {
  host::enqueue(stream, [=] { host::write_codes(args.to, host::gate_rows(args)); });
  return args.to.scaling == Scaling::tensor ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t launch_gate(const GateQuantizeArgs& args, void* out, int64_t out_stride,
                        cudaStream_t stream) {
  host::enqueue(stream, [=] {
    host::store_rows(host::gate_rows(args), args.to.type, args.to.k, out, out_stride);
  });
  return cudaSuccess;
}

cudaError_t launch_rope(const RopeArgs& args, cudaStream_t stream) {
  if (!pages_are_valid(args.kv)) return cudaErrorInvalidValue;
  host::enqueue(stream, [=] {
    for (int64_t row = 0; row < args.rows; ++row) host::rope_row(args, row);
  });
  return cudaSuccess;
}

int64_t decode_scratch_bytes(int64_t, int64_t, int64_t, int64_t) { return 16; }

cudaError_t launch_attention_decode(const DecodeArgs& args, cudaStream_t stream) {
  if (!attention_is_valid(args.attention)) return cudaErrorInvalidValue;
  if (args.codes.codes != nullptr && !decode_quantizes(args.attention, args.codes)) {
    return cudaErrorInvalidValue;
  }
  host::enqueue(stream, [=] {
    for (int64_t row = 0; row < args.rows; ++row) {
      if (args.rope.qkv != nullptr) host::rope_row(args.rope, row);
      host::attend_row(args.attention, row, args.sequence[row], args.position[row]);
    }
    if (args.codes.codes != nullptr) host::quantize_heads(args);
  });
  return cudaSuccess;
}

cudaError_t launch_attention_prefill_sm90(const PrefillArgs& args, cudaStream_t stream) {
  return host::prefill(args, stream);
}
cudaError_t launch_attention_prefill_sm80(const PrefillArgs& args, cudaStream_t stream) {
  return host::prefill(args, stream);
}

cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t i = 0; i < args.rows * args.width; ++i) {
      const int64_t token = args.tokens[i / args.width];
      const bool inside = token >= 0 && token < args.vocab;
      args.hidden[i] =
          inside
              ? host::load(args.table, args.type, token * args.width + i % args.width) * args.scale
              : NAN;
    }
  });
  return cudaSuccess;
}

int64_t argmax_scratch_bytes(int64_t) { return 16; }

cudaError_t launch_argmax(const ArgmaxArgs& args, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t row = 0; row < args.rows; ++row) {
      const float* logits = args.logits + row * args.stride;
      const bool good =
          std::all_of(logits, logits + args.vocab, [](float v) { return std::isfinite(v); });
      args.tokens[row] =
          good ? static_cast<int32_t>(std::max_element(logits, logits + args.vocab) - logits) : -1;
      if (args.position != nullptr && good && args.position[row] >= 0) ++args.position[row];
    }
  });
  return cudaSuccess;
}

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t row = 0; row < args.rows; ++row) {
      const std::span logits(args.logits + row * args.stride, static_cast<size_t>(args.vocab));
      if (!std::ranges::all_of(logits, [](float v) { return std::isfinite(v); })) {
        args.tokens[row] = -1;
        continue;
      }
      const sampling::Rule rule = args.rules[row];
      args.tokens[row] = draw_token(logits, rule, args.position[row] + 1);
      if (args.position[row] >= 0) ++args.position[row];
    }
  });
  return cudaSuccess;
}

}  // namespace nibble::cuda
