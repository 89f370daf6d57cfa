// `nibble quantize --method awq`: block by block, the calibration text runs through the 16-bit
// block, the block is quantized (awq/block_quantizer.h) and kept in the work directory; when all
// are there, the output is put together. Memory is bounded by one block and the text's hidden
// states.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "awq/block_quantizer.h"
#include "awq/calibration_text.h"
#include "awq/work_directory.h"
#include "base/cpu_features.h"
#include "base/sha256.h"
#include "model/calibration.h"
#include "quantize_run.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

// Part of the work directory's key: raise it when the same inputs give another result.
constexpr const char* kVersion = "nibble awq 1";

/// Beside OUT, which may have a slash at its end.
std::string work_path(const std::string& out) {
  std::string path = std::filesystem::absolute(out).lexically_normal().string();
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path + ".nibble-partial";
}

Result<std::vector<std::string>> read_texts(const std::vector<std::string>& paths) {
  std::vector<std::string> texts;
  for (const std::string& path : paths) {
    const auto file = MappedFile::open(path);
    if (!file.ok()) return file.status();
    const auto bytes = file->bytes();
    texts.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  if (texts.empty()) texts.emplace_back(awq::bundled_calibration_text());
  return texts;
}

Status with_advice(const Status& status) {
  if (status.code() != Code::unsupported && status.code() != Code::io_error) return status;
  return Status(status.code(), status.message() +
                                   "\nAWQ runs the model on a text; --method rtn needs neither the "
                                   "model's tokenizer nor to run it");
}

/// dB as text and back without loss, also infinity.
std::string db_text(double db) { return fmt::format("{}", db); }

double db_value(const std::map<std::string, std::string>& notes, const std::string& key) {
  const auto found = notes.find(key);
  double value = NAN;
  if (found == notes.end()) return value;
  const std::string& text = found->second;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

/// Floats as they are stored in a file.
class StoredFloats {
 public:
  StoredFloats(const std::vector<float>& values, Dtype dtype)
      : bytes_(values.size() * static_cast<size_t>(dtype_bytes(dtype))) {
    for (size_t i = 0; i < values.size(); ++i) {
      store_from_float(bytes_.data(), static_cast<int64_t>(i), dtype, values[i]);
    }
    view_.dtype = dtype == Dtype::f32   ? TensorDtype::f32
                  : dtype == Dtype::f16 ? TensorDtype::f16
                                        : TensorDtype::bf16;
    view_.shape = {static_cast<int64_t>(values.size())};
    view_.data = bytes_.data();
    view_.bytes = bytes_.size();
  }
  const TensorView& view() const { return view_; }

 private:
  std::vector<std::byte> bytes_;
  TensorView view_;
};

Status save_block(const awq::QuantizedBlock& block, awq::WorkDirectory& work) {
  TensorMap tensors;
  std::map<std::string, std::string> notes;
  std::vector<StoredFloats> stored;
  stored.reserve(block.linears.size() + block.norms.size());
  for (const awq::QuantizedLinearResult& linear : block.linears) {
    tensors.merge(views_of(linear.name, linear.tensors));
    if (!linear.bias.empty()) {
      tensors.emplace(linear.name + ".bias",
                      stored.emplace_back(linear.bias, linear.bias_dtype).view());
    }
    notes["snr " + linear.name] = db_text(linear.snr_db);
    notes["rtn snr " + linear.name] = db_text(linear.plain_snr_db);
  }
  for (const awq::BlockNorm& norm : block.norms) {
    tensors.emplace(norm.tensor, stored.emplace_back(norm.weight, norm.dtype).view());
  }
  return work.save(tensors, notes);
}

/// "12.3 dB" of a block, for the progress line: the mean of its layers.
std::string block_note(const awq::QuantizedBlock& block) {
  double sum = 0, plain = 0;
  for (const awq::QuantizedLinearResult& linear : block.linears) {
    sum += linear.snr_db;
    plain += linear.plain_snr_db;
  }
  const auto count = static_cast<double>(std::max<size_t>(1, block.linears.size()));
  return fmt::format("{:.1f} dB (RTN {:.1f})", sum / count, plain / count);
}

}  // namespace

struct AwqJob::State {
  const Checkpoint* checkpoint = nullptr;
  ModelConfig config;
  ModelNames names;
  awq::Sequences sequences;
  awq::QuantizeOptions options;
  std::set<std::string> quantized;  // names of the linears in the plan
  std::string text_name;
  std::string key;

  int64_t tokens() const {
    int64_t count = 0;
    for (const auto& sequence : sequences) count += static_cast<int64_t>(sequence.size());
    return count;
  }

  std::string make_key(const QuantizeArguments& arguments) const;
  uint64_t memory_bytes() const;
  Status check_layers() const;
  Status quantize_blocks(const QuantizeArguments& arguments, awq::WorkDirectory& work) const;
  Result<std::vector<LayerResult>> assemble(const QuantizePlan& plan,
                                            const QuantizeArguments& arguments,
                                            const awq::WorkDirectory& work) const;
};

AwqJob::AwqJob(std::unique_ptr<State> state) : state_(std::move(state)) {}
AwqJob::AwqJob(AwqJob&&) noexcept = default;
AwqJob::~AwqJob() = default;

/// Everything that the blocks depend on.
std::string AwqJob::State::make_key(const QuantizeArguments& arguments) const {
  Sha256 tokens;
  for (const auto& sequence : sequences) {
    const uint64_t length = sequence.size();
    tokens.update(&length, sizeof length);
    tokens.update(sequence.data(), sequence.size() * sizeof(int32_t));
  }
  const json parts = {{"version", kVersion},
                      {"model", model_digest(*checkpoint)},
                      {"config", sha256_hex(checkpoint->config().dump())},
                      {"tokens", tokens.finish()},
                      {"linears", quantized},
                      {"group_size", arguments.group_size},
                      {"symmetric", arguments.symmetric},
                      {"scale_dtype", arguments.scale_dtype},
                      {"rounding", arguments.rounding},
                      {"scale", arguments.scale},
                      {"clip", arguments.clip}};
  return parts.dump(-1, ' ', false, json::error_handler_t::replace);
}

uint64_t AwqJob::State::memory_bytes() const {
  const uint64_t run = awq::CalibrationRun::block_bytes(config);
  // The second moments stay while the block is quantized; its result is at most half a byte and a
  // scale per weight, less than the floats that it replaces.
  const uint64_t quantize = 2 * awq::MomentAccumulator::bytes_for(config.hidden) +
                            awq::MomentAccumulator::bytes_for(config.heads * config.head_dim) +
                            awq::MomentAccumulator::bytes_for(config.intermediate) +
                            awq::block_bytes(config) + awq::quantize_block_bytes(config, options);
  return awq::CalibrationRun::hidden_bytes(config, tokens()) + std::max(run, quantize);
}

/// The plan goes by names of tensors, AWQ by the architecture: they must mean the same linears.
Status AwqJob::State::check_layers() const {
  std::set<std::string> known;
  for (int64_t i = 0; i < config.layers; ++i) {
    for (const std::string& name : awq::linear_names(names, i)) known.insert(name);
  }
  for (const std::string& name : quantized) {
    if (known.contains(name)) continue;
    return Status(Code::unsupported,
                  fmt::format("{} is not a linear that {} models have; leave it out with --skip",
                              quote_name(name), architecture_name(config.architecture)));
  }
  return {};
}

Result<AwqJob> AwqJob::prepare(const Checkpoint& checkpoint, const QuantizeArguments& arguments,
                               QuantizePlan& plan) {
  auto state = std::make_unique<State>();
  State& s = *state;
  s.checkpoint = &checkpoint;
  Result<ModelConfig> config = parse_model_config(checkpoint.config());
  if (!config.ok()) return with_advice(config.status());
  s.config = std::move(*config);
  Result<ModelNames> names = find_model_names(checkpoint, s.config);
  if (!names.ok()) return with_advice(names.status());
  s.names = std::move(*names);
  for (const DenseLinear& linear : plan.linears) s.quantized.insert(linear.name);
  NIBBLE_TRY(with_advice(s.check_layers()));

  const auto texts = read_texts(arguments.texts);
  if (!texts.ok()) return texts.status();
  const Result<Tokenizer> tokenizer = Tokenizer::load(arguments.directory);
  if (!tokenizer.ok()) return with_advice(tokenizer.status());
  const int64_t length = std::min(arguments.sequence_length, s.config.max_positions);
  Result<awq::Sequences> sequences =
      awq::make_sequences(*tokenizer, *texts, {arguments.sequences, length});
  if (!sequences.ok()) return sequences.status();
  s.sequences = std::move(*sequences);
  s.text_name = arguments.texts.empty() ? "the bundled text" : some_of(arguments.texts, 3);

  s.options.grid = {arguments.group_size, arguments.symmetric, arguments.scale_type()};
  s.options.scale = arguments.scale;
  s.options.clip = arguments.clip;
  s.options.rounding =
      arguments.rounding == "nearest" ? awq::Rounding::nearest : awq::Rounding::compensated;
  s.options.threads = arguments.threads > 0 ? arguments.threads : available_cpus();
  s.key = s.make_key(arguments);
  plan.memory_bytes = s.memory_bytes();
  // What an interrupted run kept takes no new room.
  const uint64_t kept = awq::kept_bytes(work_path(arguments.out), s.key);
  plan.work_bytes = plan.quantized_bytes - std::min(plan.quantized_bytes, kept);
  return AwqJob(std::move(state));
}

std::string AwqJob::text_summary() const {
  size_t longest = 0;
  for (const auto& sequence : state_->sequences) longest = std::max(longest, sequence.size());
  return fmt::format("{} of {} tokens of {}", plural(state_->sequences.size(), "sequence"), longest,
                     state_->text_name);
}

int64_t AwqJob::tokens() const { return state_->tokens(); }

Status AwqJob::State::quantize_blocks(const QuantizeArguments& arguments,
                                      awq::WorkDirectory& work) const {
  if (work.finished() >= config.layers) return {};
  auto run = awq::CalibrationRun::create(*checkpoint, names, config, sequences, options.threads);
  if (!run.ok()) return run.status();
  const auto is_quantized = [&](const std::string& name) { return quantized.contains(name); };
  Progress progress(arguments.progress, "layer", config.layers);
  const int64_t kept = work.finished();
  for (int64_t i = 0; i < config.layers; ++i) {
    if (i < kept) {
      NIBBLE_TRY(run->skip_block(interrupted));
      progress.advance("kept from an earlier run");
      continue;
    }
    Result<awq::SlotStats> stats = run->measure_block(interrupted);
    if (!stats.ok()) return stats.status();
    Result<awq::Block> block =
        awq::load_block(*checkpoint, names, config, i, is_quantized, options.threads);
    if (!block.ok()) return block.status();
    const auto result =
        awq::quantize_block(config, std::move(*block), std::move(*stats), options, interrupted);
    if (!result.ok()) return result.status();
    NIBBLE_TRY(save_block(*result, work));
    progress.advance(block_note(*result));
  }
  return {};
}

Result<std::vector<LayerResult>> AwqJob::State::assemble(const QuantizePlan& plan,
                                                         const QuantizeArguments& arguments,
                                                         const awq::WorkDirectory& work) const {
  std::vector<awq::WorkDirectory::BlockFile> files;
  std::map<std::string, const TensorView*> made;
  std::map<std::string, std::string> notes;
  for (int64_t i = 0; i < config.layers; ++i) {
    auto file = work.load(i);
    if (!file.ok()) return file.status();
    files.push_back(std::move(*file));
  }
  for (const auto& file : files) {
    for (const auto& [name, view] : file.index.tensors) made[name] = &view;
    notes.insert(file.index.metadata.begin(), file.index.metadata.end());
  }

  auto writer = CheckpointWriter::create(arguments.out, kShardBytes);
  if (!writer.ok()) return writer.status();
  NIBBLE_TRY(writer->write_config(quantized_config(*checkpoint, plan, arguments)));
  NIBBLE_TRY(writer->copy_side_files(arguments.directory));
  const Status stopped(Code::interrupted, "interrupted");
  for (const std::string& name : plan.copied) {
    if (interrupted()) return stopped;
    const auto changed = made.find(name);
    NIBBLE_TRY(
        writer->add(name, changed != made.end() ? *changed->second : *checkpoint->find(name)));
  }
  std::vector<LayerResult> results;
  for (const DenseLinear& linear : plan.linears) {
    if (interrupted()) return stopped;
    LayerResult& result = results.emplace_back();
    for (const char* suffix : {".qweight", ".qzeros", ".scales"}) {
      const auto tensor = made.find(linear.name + suffix);
      if (tensor == made.end()) {
        return Status(Code::corrupt_file,
                      fmt::format("{} lacks {}: delete it and run again", work.path(),
                                  quote_name(linear.name + suffix)));
      }
      NIBBLE_TRY(writer->add(tensor->first, *tensor->second));
      result.bytes += tensor->second->bytes;
    }
    result.snr_db = db_value(notes, "snr " + linear.name);
    result.rtn_snr_db = db_value(notes, "rtn snr " + linear.name);
  }
  if (interrupted()) return stopped;
  // From here on the output is completed even if a signal comes.
  NIBBLE_TRY(writer->commit());
  return results;
}

Result<std::vector<LayerResult>> AwqJob::run(const QuantizePlan& plan,
                                             const QuantizeArguments& arguments) {
  auto work = awq::WorkDirectory::open(work_path(arguments.out), state_->key);
  if (!work.ok()) return work.status();
  // What is said when a run ends early: what there is, and how to go on.
  const auto early = [&](const Status& status) {
    if (work->finished() == 0) {
      const Status removed = work->remove();  // a failure to tidy up is not worth a second error
      return Status(status.code(), status.message() + "; nothing was written");
    }
    const bool passes = status.code() == Code::interrupted || status.code() == Code::io_error ||
                        status.code() == Code::out_of_memory;
    return Status(status.code(),
                  fmt::format("{}; {} of {} layers are kept in {}{}", status.message(),
                              work->finished(), state_->config.layers, printable(work->path()),
                              passes ? ": run the same command to go on" : ""));
  };
  if (const Status status = state_->quantize_blocks(arguments, *work); !status.ok()) {
    return early(status);
  }
  auto results = state_->assemble(plan, arguments, *work);
  if (!results.ok()) return early(results.status());
  if (const Status status = work->remove(); !status.ok()) {
    fmt::print(stderr, "nibble: note: the checkpoint is complete, but {}\n", status.message());
  }
  return results;
}

}  // namespace nibble::cli
