// The layers of a model on a GPU: what is launched, in which order, for one pass of rows.
// Everything goes to one stream; nothing waits, so a pass may be captured into a CUDA graph once
// its workspace is there (prepare()).
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "gemm/cuda/cublas.h"
#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/head_product.h"
#include "model/config.h"
#include "model/cuda/kv_pool.h"
#include "model/cuda/profile.h"
#include "model/cuda/step_fusion.h"
#include "model/cuda/weights.h"

namespace nibble::cuda {

/// The weights of a whole model, and what else stays as it is.
struct DeviceModel {
  DeviceInfo device;
  ModelConfig config;
  Element type = Element::bf16;  // of what goes in and out of products: f16 or bf16
  std::vector<DeviceLayer> layers;
  DeviceBuffer final_norm;
  DeviceBuffer embedding;  // (vocab, hidden) of embedding_type
  Dtype embedding_type = Dtype::bf16;
  float embedding_scale = 1;
  DeviceLinear head;                // tied: empty, and embedding is multiplied
  DeviceBuffer cosine[2], sine[2];  // (context, head_dim / 2): full attention, sliding

  Dtype dtype() const { return static_cast<Dtype>(type); }
  bool tied() const { return head.n == 0; }
  /// 16-bit weights of lm_head; null if it is quantized.
  const void* head_rows() const;
  /// Of what is multiplied by the head.
  Dtype head_type() const {
    if (tied()) return embedding_type;
    return head.quantized ? dtype() : head.dense_type;
  }
};

/// What a pass reads, in device memory.
struct PassInputs {
  const int32_t* tokens = nullptr;     // (rows)
  const int32_t* sequence = nullptr;   // (rows) row of the page table
  int32_t* position = nullptr;         // (rows)
  const PrefillTile* tiles = nullptr;  // (num_tiles); none: every row is of another sequence
  int64_t num_tiles = 0;
};

class Forward {
 public:
  /// rows: of a pass, at most. `model` and `pool` must outlive it.
  /// expanded: weights are expanded once for the kernels that want it (ModelOptions::expanded).
  static Result<std::unique_ptr<Forward>> create(DeviceModel& model, const KvPool& pool,
                                                 int64_t rows, bool expanded);
  ~Forward();

  /// Takes effect with the next pass. unsupported: mixed groups. Weights that are to be kept
  /// expanded are, as this plan wants them; then it waits.
  Status set_plan(const ModelPlan& plan);

  /// Plans all products of `rows` rows and makes their workspace large enough. *moved: whether
  /// buffers are elsewhere now, so that graphs captured before are void. May wait.
  Status prepare(int64_t rows, bool* moved);

  /// Embedding and layers of prepared rows. Their last residual is added by finish().
  Status layers(const PassInputs& inputs, int64_t rows, cudaStream_t stream);
  /// The norm before the head of rows gather[0..count) of that pass (null: 0, 1, ...): to
  /// states() and into the head's operand.
  Status finish(const int32_t* gather, int64_t count, cudaStream_t stream);
  float* states() const { return states_.as<float>(); }  // (rows, hidden)
  /// What finish() leaves, from states() that were put there otherwise.
  Status split_states(int64_t count, cudaStream_t stream);
  /// Logits of states [first, first + count), count <= kHeadRows, to logits() (count, vocab).
  Status head(int64_t first, int64_t count, cudaStream_t stream);
  float* logits() const { return logits_.as<float>(); }
  int64_t logits_stride() const;

  /// Faults of sequences, see RopeArgs.
  int32_t* faults() const { return faults_.as<int32_t>(); }

  /// Marks the operations that are enqueued from now on; null: no longer.
  void set_profile(Profile* profile) { profile_ = profile; }
  Status mark(const char* operation, cudaStream_t stream) {
    return profile_ == nullptr ? Status() : profile_->mark(operation, stream);
  }

  /// Kernels that have been launched, by mode ("" for those that are not of one).
  const std::map<std::string, std::string>& kernels() const { return kernels_; }

  /// At most, of one pass.
  static uint64_t workspace_bytes(const ModelConfig& config, const KvShape& shape, int64_t rows);

 private:
  Forward(DeviceModel& model, const KvPool& pool, int64_t rows, bool expanded);
  Status allocate();

  /// Where the input of a slot's products comes from.
  struct Source {
    enum class Kind { norm, gate, rows, codes } kind = Kind::rows;  // codes: the operand is there
    const float* norm = nullptr;                                    // of hidden + delta
    const float* post_norm = nullptr;
    const void* delta = nullptr;
    const void* x = nullptr;  // rows that are there
    int64_t width = 0;
    bool floats = false;  // those rows; else of the model's type
    RowRanges ranges;     // of float rows, if known

    const char* operation() const { return kind == Kind::norm ? "norm" : "gate"; }
    const char* quantizing() const {
      return kind == Kind::norm   ? "norm, quantizing"
             : kind == Kind::gate ? "gate, quantizing"
                                  : "quantizing";
    }
  };
  static bool runs_16bit(const DeviceLinear& linear, const LinearSpec& spec);
  static bool can_fuse(Source::Kind kind, const Problem& problem);
  Result<const Plan*> plan_for(const DeviceLinear& linear, const LinearSpec& spec, int64_t rows,
                               Dtype y_type);
  Status expand_weights();
  Status run_slot(int64_t layer, Slot slot, const Source& source, int64_t rows, void* y,
                  cudaStream_t stream);
  std::optional<SlabConfig> fused_slot(int64_t layer, Slot slot, Fusion fusion, int64_t rows,
                                       const Plan** plan);
  RowRanges ranges_of_gate(const Plan& plan, const SlabConfig& config) const;
  Status run_fused(int64_t layer, Slot slot, const Source& source, Fusion fusion, const Plan& plan,
                   const SlabConfig& config, void* y, cudaStream_t stream);
  NormArgs norm_args(const Source& source, int64_t rows) const;
  GateQuantizeArgs gate_args(int64_t rows) const;
  Status make_operand(const Source& source, bool first, const Plan& plan, const LinearSpec& spec,
                      const float* static_scales, cudaStream_t stream);
  Status make_rows(const Source& source, int64_t rows, const void** x, int64_t* stride,
                   cudaStream_t stream);
  /// What attention is to write for o's product, if it quantizes for it.
  std::optional<QuantizeArgs> attention_codes(int64_t layer, const PassInputs& inputs,
                                              int64_t rows);
  /// codes: see attention_codes(), or null.
  Status attend(int64_t layer, const PassInputs& inputs, int64_t rows, const QuantizeArgs* codes,
                cudaStream_t stream);
  AttentionArgs attention_args(int64_t layer) const;
  Status run_dense(const DeviceLinear& linear, const void* x, int64_t rows, void* y,
                   int64_t y_stride, cudaStream_t stream);
  void note(const std::string& kernel, const char* mode = "");

  DeviceModel& model_;
  const KvPool& pool_;
  int64_t rows_;
  bool expanded_;
  ModelPlan plan_;
  std::set<int64_t> prepared_;               // numbers of rows, under that plan
  std::vector<DeviceBuffer> static_scales_;  // of every slot of every layer; empty where none
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int, bool, int>;
  std::map<Key, Plan> plans_;
  std::unique_ptr<Cublas> cublas_;
  float* residual() const { return residuals_[residual_].as<float>(); }
  // The residual stream; a product that norms for itself reads one and writes the other.
  DeviceBuffer residuals_[2];
  int residual_ = 0;  // after what has been enqueued
  DeviceBuffer gated_, gated_ranges_;
  DeviceBuffer qkv_, q_, attention_, delta_, gate_up_, rows16_, workspace_;
  DeviceBuffer states_, high_, low_, logits_, decode_scratch_, faults_;
  std::map<std::string, std::string> kernels_;
  Profile* profile_ = nullptr;
};

}  // namespace nibble::cuda
