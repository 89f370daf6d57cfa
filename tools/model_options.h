// What the commands that run a whole model share: their options, what a mode means for a given
// checkpoint, and loading with the memory said on stderr before it is taken.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"
#include "cli.h"
#include "format/checkpoint.h"
#include "model/cpu_runner.h"
#include "model/model.h"
#include "model/runner.h"

namespace nibble::cli {

/// How a checkpoint with no 4-bit linears runs. Not one of the modes of gemm.h.
inline constexpr const char* kMode16Bit = "16bit";

struct ModelArguments {
  std::string directory;
  std::vector<std::string> modes;  // empty: default_mode()
  std::string activations = "mix", kv = "bf16", head = "16", device = "cpu";
  int threads = 0;
  int64_t context = 0;
  bool batch_invariant = false;
  bool expanded = false;

  /// activations as uniform_plan() takes it.
  std::optional<Granularity> granularity() const;
  /// The options for Model::load; `context` where the user named none.
  ModelOptions model_options(int64_t default_context, int64_t sequences) const;
  /// Prompt tokens that go through the layers at once: enough for full speed.
  int64_t pass_tokens() const { return device == "cuda" ? 2048 : 512; }
};

/// DIR, --mode (several of them if `many_modes`), --act, --kv, --head, --device, --threads, ...
/// What --context means differs: each command adds its own.
void add_model_arguments(CLI::App& command, ModelArguments& arguments, bool many_modes);

/// A checkpoint, its configuration, and from load() on the model.
class LoadedModel {
 public:
  /// Reads config.json and the table of tensors; no weights yet.
  static Result<std::unique_ptr<LoadedModel>> open(const std::string& directory);

  /// Says on stderr what memory it will take, then loads. Refuses what does not fit. device:
  /// "cpu" or "cuda".
  Status load(const ModelOptions& options, const std::string& device = "cpu");

  const std::string& directory() const { return checkpoint_.directory(); }
  const Checkpoint& checkpoint() const { return checkpoint_; }
  const ModelConfig& config() const { return config_; }
  bool quantized() const { return quantized_; }
  bool has_plan() const;              // config.json holds one
  Model& model() { return *model_; }  // of device "cpu" only
  Runner& runner() { return *runner_; }
  const Runner& runner() const { return *runner_; }
  const MemoryEstimate& memory() const { return memory_; }
  double load_seconds() const { return load_seconds_; }
  /// What runs it, for reports: device_summary() or the name of the GPU.
  std::string device() const;

  /// A second runner beside the first, of the same weights dequantized to 16 bits: what
  /// `bench model --device cuda --mode 16bit` compares with.
  Status load_dequantized(const ModelOptions& options);
  /// The one that runs `mode`.
  Runner& runner_of(const std::string& mode) {
    return dequantized_ != nullptr && mode == kMode16Bit ? *dequantized_ : *runner_;
  }

  /// "auto" with a saved plan, else "w4a8"; "16bit" if nothing is quantized.
  std::string default_mode() const;
  /// What `mode` means here. unsupported: w4a8 of an unquantized checkpoint, or, unless
  /// load_dequantized() is going to be called, the reverse.
  Result<ModelPlan> plan(const std::string& mode, std::optional<Granularity> granularity,
                         bool dequantizes = false) const;

 private:
  LoadedModel(Checkpoint checkpoint, ModelConfig config);
  Status load_cuda(const ModelOptions& options);
  Checkpoint checkpoint_;
  ModelConfig config_;
  bool quantized_ = false;
  MemoryEstimate memory_;
  double load_seconds_ = 0;
  std::optional<Model> model_;
  std::unique_ptr<Runner> runner_, dequantized_;
};

/// arguments.modes, or the default one; every one checked against the checkpoint.
struct NamedPlan {
  std::string mode;
  ModelPlan plan;
};
/// Refuses what the device of `arguments` has no kernels for.
Status check_mode(const std::string& mode, const ModelArguments& arguments);
Result<std::vector<NamedPlan>> plans_of(const LoadedModel& loaded, const ModelArguments& arguments,
                                        bool dequantizes = false);

/// "w4a8 mix": mode and activation scales, the latter only where they have a meaning.
std::string mode_text(const std::string& mode, const ModelArguments& arguments);

nlohmann::json memory_json(const MemoryEstimate& memory);

/// The whole file, or standard input for "-".
Result<std::string> read_text_file(const std::string& path);

}  // namespace nibble::cli
