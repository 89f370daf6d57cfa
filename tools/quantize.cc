// `nibble quantize DIR OUT`: a 16/32-bit checkpoint to AutoAWQ's 4-bit layout by round-to-nearest.
// Everything that can be refused is refused before the first byte is written. Then one layer at a
// time, so memory use is that of the largest layer.
// Not here: which layers, sizes and room (quantize_plan.h); the arithmetic
// (format/round_to_nearest.h).
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cli.h"
#include "format/checkpoint.h"
#include "format/linear_format.h"
#include "format/round_to_nearest.h"
#include "quantize_plan.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

struct Options {
  std::string directory, out;
  std::string method = "rtn";
  int64_t group_size = 128;
  bool symmetric = false;
  std::string scale_dtype = "f16";
  std::vector<std::string> skip;
  bool as_json = false;
  ProgressMode progress = ProgressMode::automatic;

  RoundToNearestOptions rounding() const {
    return {group_size, symmetric, scale_dtype == "bf16" ? Dtype::bf16 : Dtype::f16};
  }
};

struct LayerResult {
  uint64_t bytes = 0;
  double snr_db = 0;  // infinite if the layer is reproduced exactly
};

// ---- the work ----------------------------------------------------------------------------------

/// Signal-to-noise ratio of the quantized weight against the original, all sums in double.
double weight_snr_db(const DenseLinear& linear, const QuantMatrix& matrix) {
  const Dtype dtype = *float_dtype(linear.weight->dtype);
  const int64_t blocks = (linear.n + kSnrColumns - 1) / kSnrColumns;
  // Per block and added up in order: the same number for any number of threads.
  std::vector<double> signal(static_cast<size_t>(blocks)), noise(signal.size());
#pragma omp parallel for schedule(dynamic)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t n0 = block * kSnrColumns;
    const int64_t count = std::min(kSnrColumns, linear.n - n0);
    std::vector<float> values(static_cast<size_t>(linear.k * count));
    dequantize(matrix, n0, count, values.data());
    double block_signal = 0, block_noise = 0;
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t k = 0; k < linear.k; ++k) {
        const double exact = load_as_float(linear.weight->data, (n0 + c) * linear.k + k, dtype);
        const double error = exact - values[static_cast<size_t>(k * count + c)];
        block_signal += exact * exact;
        block_noise += error * error;
      }
    }
    signal[static_cast<size_t>(block)] = block_signal;
    noise[static_cast<size_t>(block)] = block_noise;
  }
  double total_signal = 0, total_noise = 0;
  for (size_t i = 0; i < signal.size(); ++i) {
    total_signal += signal[i];
    total_noise += noise[i];
  }
  if (total_noise == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(total_signal / total_noise);
}

TensorView view_of(TensorDtype dtype, std::vector<int64_t> shape, const void* data) {
  TensorView view{dtype, std::move(shape), static_cast<const std::byte*>(data), 0};
  view.bytes = static_cast<size_t>(view.elements() * tensor_dtype_bytes(dtype));
  return view;
}

Result<LayerResult> quantize_layer(const DenseLinear& linear, const Options& options,
                                   CheckpointWriter& writer) {
  const auto tensors = quantize_round_to_nearest(linear.name, *linear.weight, options.rounding());
  if (!tensors.ok()) return tensors.status();
  const int64_t groups = tensors->k / tensors->group_size, words = tensors->n / 8;
  const TensorDtype scale_dtype =
      tensors->scale_dtype == Dtype::bf16 ? TensorDtype::bf16 : TensorDtype::f16;
  const TensorView parts[] = {
      view_of(TensorDtype::i32, {tensors->k, words}, tensors->qweight.data()),
      view_of(TensorDtype::i32, {groups, words}, tensors->qzeros.data()),
      view_of(scale_dtype, {groups, tensors->n}, tensors->scales.data())};
  LayerResult result;
  const char* const suffixes[] = {".qweight", ".qzeros", ".scales"};
  for (size_t i = 0; i < std::size(parts); ++i) {
    NIBBLE_TRY(writer.add(linear.name + suffixes[i], parts[i]));
    result.bytes += parts[i].bytes;
  }
  result.snr_db = weight_snr_db(linear, tensors->view());
  return result;
}

json quantized_config(const Checkpoint& checkpoint, const QuantizePlan& plan,
                      const Options& options) {
  // Other readers convert every linear that is not listed, except lm_head.
  json left = json::array();
  for (const DenseLinear& linear : plan.left) {
    if (components(linear.name).back() != "lm_head") left.push_back(linear.name);
  }
  json config = checkpoint.config();
  config["quantization_config"] = {{"quant_method", "awq"},
                                   {"zero_point", !options.symmetric},
                                   {"group_size", options.group_size},
                                   {"bits", 4},
                                   {"version", "gemm"},
                                   {"modules_to_not_convert", left.empty() ? json() : left}};
  return config;
}

Status interrupted_status() {
  return Status(Code::interrupted, "interrupted; nothing was written");
}

Result<std::vector<LayerResult>> write_output(const Checkpoint& checkpoint,
                                              const QuantizePlan& plan, const Options& options) {
  auto writer = CheckpointWriter::create(options.out, kShardBytes);
  if (!writer.ok()) return writer.status();
  NIBBLE_TRY(writer->write_config(quantized_config(checkpoint, plan, options)));
  NIBBLE_TRY(writer->copy_side_files(options.directory));
  for (const std::string& name : plan.copied) {
    if (interrupted()) return interrupted_status();
    NIBBLE_TRY(writer->add(name, *checkpoint.find(name)));
  }
  std::vector<LayerResult> results;
  {
    Progress progress(options.progress, "layer", static_cast<int64_t>(plan.linears.size()));
    for (const DenseLinear& linear : plan.linears) {
      if (interrupted()) return interrupted_status();
      const auto result = quantize_layer(linear, options, *writer);
      if (!result.ok()) return result.status();
      results.push_back(*result);
      progress.advance(
          fmt::format("{} {:.1f} dB", printable(components(linear.name).back()), result->snr_db));
    }
  }
  if (interrupted()) return interrupted_status();
  // From here on the output is completed even if a signal comes.
  NIBBLE_TRY(writer->commit());
  return results;
}

// ---- what is said ------------------------------------------------------------------------------

void print_plan(const Checkpoint& checkpoint, const QuantizePlan& plan, const Options& options) {
  const auto disk = free_disk(options.out);
  const auto memory = available_memory();
  std::vector<std::string> left;
  for (const DenseLinear& linear : plan.left) left.push_back(linear.name);
  Table table("<<");
  table.add(
      {"input", fmt::format("{}, {}, {}", printable(options.directory),
                            printable(checkpoint.architecture()), bytes_text(plan.input_bytes))});
  table.add({"method",
             fmt::format("round to nearest, group size {}, {}, {} scales", options.group_size,
                         options.symmetric ? "symmetric" : "zero points", options.scale_dtype)});
  table.add({"quantized", fmt::format("{} with {} weights", plural(plan.linears.size(), "layer"),
                                      count_text(plan.parameters))});
  table.add({"left as they are", left.empty() ? "no linear layer"
                                              : fmt::format("{}: {}", plural(left.size(), "linear"),
                                                            some_of(left, 4))});
  table.add(
      {"output", fmt::format("{}, {}", printable(options.out), bytes_text(plan.output_bytes))});
  table.add({"disk", fmt::format("{} at most while writing, {} free", bytes_text(peak_disk(plan)),
                                 disk ? bytes_text(*disk) : "unknown")});
  table.add({"memory",
             fmt::format("{} beside the mapped input, {} available", bytes_text(plan.memory_bytes),
                         memory ? bytes_text(*memory) : "unknown")});
  table.print(stdout);
  for (const std::string& note : notes_on(plan)) fmt::print("note: {}\n", note);
  fmt::print("\n");
  std::fflush(stdout);
}

/// One row per kind of layer: "q_proj".
void print_results(const QuantizePlan& plan, const std::vector<LayerResult>& results) {
  struct Kind {
    size_t layers = 0, worst = 0;
    double sum = 0;
    uint64_t bytes = 0;
  };
  std::map<std::string, Kind> kinds;
  for (size_t i = 0; i < results.size(); ++i) {
    Kind& kind = kinds[components(plan.linears[i].name).back()];
    if (kind.layers++ == 0 || results[i].snr_db < results[kind.worst].snr_db) kind.worst = i;
    kind.sum += results[i].snr_db;
    kind.bytes += results[i].bytes;
  }
  Table table("<>>><");
  table.add({"kind", "layers", "size", "mean SNR", "lowest SNR"});
  for (const auto& [name, kind] : kinds) {
    table.add({printable(name), fmt::format("{}", kind.layers), bytes_text(kind.bytes),
               fmt::format("{:.1f} dB", kind.sum / static_cast<double>(kind.layers)),
               fmt::format("{:.1f} dB in {}", results[kind.worst].snr_db,
                           printable(plan.linears[kind.worst].name))});
  }
  table.print(stdout);
}

double bits_per_weight(const QuantizePlan& plan) {
  return 8 * static_cast<double>(plan.quantized_bytes) / static_cast<double>(plan.parameters);
}

json results_json(const QuantizePlan& plan, const Options& options,
                  const std::vector<LayerResult>& results, double seconds) {
  json document = report_header();
  document["input"] = options.directory;
  document["output"] = options.out;
  document["method"] = options.method;
  document["group_size"] = options.group_size;
  document["symmetric"] = options.symmetric;
  document["scale_dtype"] = options.scale_dtype;
  document["notes"] = notes_on(plan);
  document["layers"] = json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    const DenseLinear& linear = plan.linears[i];
    const double snr = results[i].snr_db;
    document["layers"].push_back({{"name", linear.name},
                                  {"k", linear.k},
                                  {"n", linear.n},
                                  {"bytes", results[i].bytes},
                                  {"snr_db", std::isfinite(snr) ? json(snr) : json(nullptr)}});
  }
  document["input_bytes"] = plan.input_bytes;
  document["bytes"] = plan.output_bytes;
  document["bits_per_weight"] = bits_per_weight(plan);
  document["seconds"] = seconds;
  return document;
}

int run_quantize(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  const Result<Checkpoint> checkpoint = Checkpoint::open(options.directory);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  if (const Status status = check_directories(options.directory, options.out); !status.ok())
    return fail(status);
  const Result<QuantizePlan> plan =
      make_quantize_plan(*checkpoint, options.group_size, options.skip);
  if (!plan.ok()) return fail(plan.status());
  if (!options.as_json) print_plan(*checkpoint, *plan, options);
  if (const Status status = check_room(*plan, options.out); !status.ok()) return fail(status);

  const auto results = write_output(*checkpoint, *plan, options);
  if (!results.ok()) return fail(results.status());
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (options.as_json) {
    // A path may hold any byte.
    fmt::print("{}\n", results_json(*plan, options, *results, seconds)
                           .dump(2, ' ', false, json::error_handler_t::replace));
    return kExitOk;
  }
  print_results(*plan, *results);
  fmt::print("\n{}: {} from {} in {:.1f} s, {:.4f} bits per quantized weight\n",
             printable(options.out), bytes_text(plan->output_bytes), bytes_text(plan->input_bytes),
             seconds, bits_per_weight(*plan));
  return kExitOk;
}

}  // namespace

void add_quantize_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("quantize", "Quantize a 16-bit checkpoint to AutoAWQ's 4-bit layout");
  command->add_option("DIR", options->directory, "checkpoint in F16, BF16 or F32")->required();
  command->add_option("OUT", options->out, "directory to make; must not exist or be empty")
      ->required();
  command->add_option("--method", options->method, "rtn: round to nearest")
      ->check(CLI::IsMember({"rtn"}))
      ->capture_default_str()
      ->group("Quantization");
  command
      ->add_option("--group-size", options->group_size,
                   "input channels that share a scale; -1: all of K")
      ->check(CLI::IsMember({128, 64, 32, -1}))
      ->capture_default_str()
      ->group("Quantization");
  command->add_flag("--symmetric", options->symmetric, "zero point 8 everywhere, not one a group")
      ->group("Quantization");
  command->add_option("--scale-dtype", options->scale_dtype, "type of the scales")
      ->check(CLI::IsMember({"f16", "bf16"}))
      ->capture_default_str()
      ->group("Quantization");
  command
      ->add_option("--skip", options->skip,
                   "leave layers whose name holds a match as they are; may be repeated")
      ->allow_extra_args(false)
      ->type_name("REGEX")
      ->group("Quantization");
  command->add_flag("--json", options->as_json, "print one JSON document at the end")
      ->group("Output");
  add_progress_option(*command, options->progress);
  command->footer(
      "Every linear inside the decoder layers is quantized; lm_head, embeddings, expert routers\n"
      "and encoders for images or audio are copied, like all other tensors and side files.\n"
      "OUT appears when it is complete; a failure or Ctrl-C leaves nothing.\n"
      "\nExample:\n"
      "  nibble quantize build/models/SmolLM2-135M-Instruct /tmp/SmolLM2-AWQ --group-size 64");
  command->callback([options, &exit_code] { exit_code = run_quantize(*options); });
}

}  // namespace nibble::cli
