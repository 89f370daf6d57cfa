// What `nibble quantize` is asked to do, and its two methods: round to nearest, and AWQ. Each
// writes the whole output. Not here: what is decided beforehand (quantize_plan.h) and what is
// printed (quantize.cc).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli.h"
#include "format/checkpoint.h"
#include "format/round_to_nearest.h"
#include "quantize_plan.h"

namespace nibble::cli {

struct QuantizeArguments {
  std::string directory, out;
  std::string method = "awq";
  int64_t group_size = 128;
  bool symmetric = false;
  std::string scale_dtype = "f16";
  std::vector<std::string> skip;
  bool as_json = false;
  ProgressMode progress = ProgressMode::automatic;
  // AWQ only:
  std::vector<std::string> texts;  // files; empty: the bundled text
  int64_t sequences = 32, sequence_length = 512;
  std::string rounding = "compensated";
  bool scale = true, clip = true;
  int threads = 0;

  Dtype scale_type() const { return scale_dtype == "bf16" ? Dtype::bf16 : Dtype::f16; }
};

/// One quantized layer, in the order of QuantizePlan::linears.
struct LayerResult {
  uint64_t bytes = 0;
  // rtn: of the weights. awq: of the layer's output on the calibration text, and what rounding to
  // nearest would have had. Infinite if the layer is reproduced exactly.
  double snr_db = 0;
  std::optional<double> rtn_snr_db;
};

Result<std::vector<LayerResult>> run_rtn(const Checkpoint& checkpoint, const QuantizePlan& plan,
                                         const QuantizeArguments& arguments);

/// AWQ with everything it needs besides the weights: made before anything is written.
class AwqJob {
 public:
  /// unsupported if the model or its tokenizer is of a kind that cannot be run here; the message
  /// names --method rtn. Adds to `plan` what memory and disk the run takes.
  static Result<AwqJob> prepare(const Checkpoint& checkpoint, const QuantizeArguments& arguments,
                                QuantizePlan& plan);
  AwqJob(AwqJob&&) noexcept;
  ~AwqJob();

  std::string text_summary() const;  // "32 sequences of 512 tokens of the bundled text"
  int64_t tokens() const;
  /// Finished blocks are kept beside the output until it is complete; a later run of the same job
  /// goes on from there.
  Result<std::vector<LayerResult>> run(const QuantizePlan& plan,
                                       const QuantizeArguments& arguments);

 private:
  struct State;
  explicit AwqJob(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// The tensors of one layer; they view `tensors`.
TensorMap views_of(const std::string& name, const AwqTensors& tensors);

/// config.json of the output.
nlohmann::json quantized_config(const Checkpoint& checkpoint, const QuantizePlan& plan,
                                const QuantizeArguments& arguments);

}  // namespace nibble::cli
