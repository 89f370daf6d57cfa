// nibble verify: every quantized layer of a checkpoint (or of a synthetic model) through every
// mode's real kernel, checked against the oracle, measured against FP16 and W4A16, timed against
// "dequantize + matmul". See layer_check.h for what is checked per layer.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <regex>

#include "base/cpu_features.h"
#include "cli.h"
#include "format/checkpoint.h"
#include "layer_check.h"
#include "verify_cuda.h"

namespace nibble::cli {
namespace {

struct Options {
  std::string directory, reference, layer_regex, input = "normal", activations = "mix";
  std::string device = "cpu";
  std::vector<std::string> modes = {"w4a16", "w4a8", "w4a4"};
  bool json = false, no_timing = false;
  ProgressMode progress = ProgressMode::automatic;
  CheckOptions check;
};

const std::map<std::string, InputKind> kInputs = {{"normal", InputKind::normal},
                                                  {"outliers", InputKind::outliers}};
/// Layers to check with whatever owns their memory.
struct Model {
  std::optional<Checkpoint> checkpoint, reference;
  std::vector<QuantizedLinear> linears;
  std::vector<AwqTensors> synthetic;
  std::vector<QuantMatrix> synthetic_views;
  std::vector<LayerToCheck> layers;
  std::vector<std::string> failures;  // of the model as a whole
};

std::vector<float> read_bias(const TensorView& tensor) {
  const Dtype dtype = *float_dtype(tensor.dtype);  // the recogniser refuses any other
  std::vector<float> bias;
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    bias.push_back(load_as_float(tensor.data, i, dtype));
  }
  return bias;
}

/// The original weight of a layer: it must exist as a float matrix.
Result<const TensorView*> reference_weight(const Checkpoint& reference, const std::string& layer) {
  const TensorView* weight = reference.find(layer + ".weight");
  if (weight == nullptr) {
    return Status(Code::corrupt_file, fmt::format("{}: no tensor {}.weight for the reference",
                                                  reference.directory(), layer));
  }
  if (!float_dtype(weight->dtype).has_value()) {
    return Status(Code::unsupported, fmt::format("{}.weight of the reference is {}, expected F16, "
                                                 "BF16 or F32",
                                                 layer, tensor_dtype_name(weight->dtype)));
  }
  return weight;
}

Status load_directory(const Options& options, Model& model) {
  Result<Checkpoint> checkpoint = Checkpoint::open(options.directory);
  if (!checkpoint.ok()) return checkpoint.status();
  model.checkpoint.emplace(std::move(*checkpoint));
  if (!options.reference.empty()) {
    Result<Checkpoint> reference = Checkpoint::open(options.reference);
    if (!reference.ok()) return reference.status();
    model.reference.emplace(std::move(*reference));
  }
  model.linears = find_quantized_linears(*model.checkpoint);
  if (model.linears.empty()) {
    return Status(Code::unsupported,
                  fmt::format("{}: no quantized linear layer found", options.directory));
  }
  model.failures = check_fused_siblings(model.linears, find_dense_linears(*model.checkpoint));
  for (const QuantizedLinear& linear : model.linears) {
    if (!linear.status.ok()) return linear.status;
    LayerToCheck layer;
    layer.name = linear.name;
    layer.matrix = &linear.matrix;
    if (linear.bias != nullptr) layer.bias = read_bias(*linear.bias);
    if (model.reference.has_value()) {
      Result<const TensorView*> weight = reference_weight(*model.reference, linear.name);
      if (!weight.ok()) return weight.status();
      layer.dense = *weight;
    }
    model.layers.push_back(std::move(layer));
  }
  return {};
}

void make_synthetic(const Options& options, Model& model) {
  const std::vector<SyntheticWeight> specs = synthetic_model();
  for (const SyntheticWeight& spec : specs) {
    model.synthetic.push_back(make_synthetic_weight(spec, options.check.seed));
  }
  for (const AwqTensors& tensors : model.synthetic) model.synthetic_views.push_back(tensors.view());
  for (size_t i = 0; i < specs.size(); ++i) {
    LayerToCheck layer;
    layer.name = specs[i].name;
    layer.matrix = &model.synthetic_views[i];
    if (specs[i].bias) layer.bias = make_input(InputKind::normal, 1, specs[i].n, 3);
    model.layers.push_back(std::move(layer));
  }
}

Status select_layers(const std::string& pattern, Model& model) {
  if (pattern.empty()) return {};
  std::regex regex;
  try {
    regex.assign(pattern);
  } catch (const std::regex_error& error) {
    return Status(Code::invalid_argument, fmt::format("--layer '{}': {}", pattern, error.what()));
  }
  std::erase_if(model.layers,
                [&](const LayerToCheck& layer) { return !std::regex_search(layer.name, regex); });
  if (!model.layers.empty()) return {};
  return Status(Code::invalid_argument, fmt::format("--layer '{}' matches no layer", pattern));
}

void print_layer(const LayerResult& layer) {
  fmt::print("{}  K={} N={} g={} {} {} scales", layer.name, layer.k, layer.n, layer.group_size,
             layer.symmetric ? "symmetric" : "asymmetric", dtype_name(layer.scale_dtype));
  if (layer.weight_snr != 0) fmt::print(", weights {} dB", decibels(layer.weight_snr));
  for (const std::string& note : layer.notes) fmt::print("; note: {}", note);
  fmt::print("\n");
  for (const std::string& failure : layer.failures) fmt::print("  FAILED: {}\n", failure);
  for (const ModeResult& mode : layer.modes) {
    fmt::print("  {:<6}{:<17}{:<13}{:>6}{:>8}{:>8}  {:.1e} {:.1e} {:.6f}", mode_name(mode.mode),
               mode.kernel, mode.activation, decibels(mode.snr_vs_fp16),
               mode.mode == Mode::w4a16 ? "-" : decibels(mode.snr_vs_w4a16),
               decibels(mode.snr_vs_exact), mode.rel_err, mode.max_err, mode.cosine);
    if (mode.us_median > 0) fmt::print(" {:>9.1f}", mode.us_median);
    if (mode.speedup() > 0) fmt::print(" {:>6.1f}x {}", mode.speedup(), mode.baseline);
    fmt::print("  {}\n", mode.failures.empty() ? "ok" : "FAILED");
    for (const std::string& failure : mode.failures) fmt::print("    FAILED: {}\n", failure);
  }
}

/// Worst and median SNR and median speed-up of one mode over all layers.
void print_summary(const std::vector<LayerResult>& layers, Mode mode) {
  std::vector<double> fp16, w4a16, exact, speedups;
  for (const LayerResult& layer : layers) {
    for (const ModeResult& result : layer.modes) {
      if (result.mode != mode) continue;
      fp16.push_back(result.snr_vs_fp16);
      w4a16.push_back(result.snr_vs_w4a16);
      exact.push_back(result.snr_vs_exact);
      speedups.push_back(result.speedup());
    }
  }
  if (fp16.empty()) return;
  const auto range = [](std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return fmt::format("{} / {}", decibels(v.front()), decibels(v[v.size() / 2]));
  };
  std::sort(speedups.begin(), speedups.end());
  fmt::print("{:<6} SNR dB worst / median: vs FP16 {}, vs W4A16 {}, vs fp64 {}", mode_name(mode),
             range(fp16), mode == Mode::w4a16 ? "-" : range(w4a16), range(exact));
  if (speedups.back() > 0) {
    fmt::print("; speed-up over dequantize + matmul, median {:.1f}x ({:.1f}x .. {:.1f}x)",
               speedups[speedups.size() / 2], speedups.front(), speedups.back());
  }
  fmt::print("\n");
}

void print_head(const Options& options, const Model& model) {
  const CheckOptions& check = options.check;
  fmt::print("{}\n", device_summary());
  fmt::print("{}: {} layers, M={} rows of {} input in f16, seed {}\n",
             options.directory.empty() ? "synthetic model" : options.directory, model.layers.size(),
             check.rows, options.input, check.seed);
  fmt::print("FP16 is {}. {} rows of every product are compared with the oracle bit for bit.\n\n",
             model.reference.has_value() ? "the weights of " + options.reference
                                         : "the dequantized weights rounded to fp16",
             std::min(check.rows, kOracleRows));
  fmt::print("  {:<6}{:<17}{:<13}{:>6}{:>8}{:>8}  {:<7} {:<7} {:<8}{}\n", "mode", "kernel",
             "activation", "vsFP16", "vsW4A16", "vs fp64", "rms err", "max err", "cosine",
             check.timing ? "   us (cold)  speed-up over" : "");
}

nlohmann::json to_json(const Options& options, const Model& model,
                       const std::vector<LayerResult>& layers, int passed, int failed) {
  nlohmann::json json = report_header();
  json["directory"] = options.directory;
  json["reference"] = options.reference;
  json["rows"] = options.check.rows;
  json["input"] = options.input;
  json["seed"] = options.check.seed;
  json["passed"] = passed;
  json["failed"] = failed;
  json["failures"] = model.failures;
  json["layers"] = nlohmann::json::array();
  for (const LayerResult& layer : layers) json["layers"].push_back(nibble::to_json(layer));
  return json;
}

std::string progress_note(const LayerResult& layer) {
  const ModeResult* last = layer.modes.empty() ? nullptr : &layer.modes.back();
  const std::string name = layer.name.substr(layer.name.rfind('.') + 1);
  return last == nullptr ? name : fmt::format("{} {} dB", name, decibels(last->snr_vs_fp16));
}

int run_verify(Options options) {
  options.check.modes.clear();
  for (const std::string& name : options.modes)
    options.check.modes.push_back(modes_by_name().at(name));
  options.check.input = kInputs.at(options.input);
  options.check.timing = !options.no_timing;
  options.check.activations.mix = options.activations == "mix";
  if (options.activations != "mix") {
    options.check.activations.granularity = granularities_by_name().at(options.activations);
  }
  Model model;
  if (options.directory.empty()) {
    make_synthetic(options, model);
  } else if (const Status status = load_directory(options, model); !status.ok()) {
    return fail(status);
  }
  if (const Status s = select_layers(options.layer_regex, model); !s.ok()) return fail(s);
  if (options.device == "cuda") {
    return verify_on_cuda(model.layers, model.failures, options.check, options.json);
  }
  if (!options.json) print_head(options, model);

  int passed = 0, failed = static_cast<int>(model.failures.size());
  std::vector<LayerResult> results;
  {
    Progress progress(options.progress, "layer", static_cast<int64_t>(model.layers.size()));
    for (const LayerToCheck& layer : model.layers) {
      if (interrupted()) return kExitInterrupted;
      Result<LayerResult> result = check_layer(layer, options.check);
      if (!result.ok()) return fail(result.status());
      failed += static_cast<int>(result->failures.size());
      for (const ModeResult& mode : result->modes) mode.failures.empty() ? ++passed : ++failed;
      if (!options.json) {
        print_layer(*result);
        std::fflush(stdout);  // keeps its place among the progress lines
      }
      progress.advance(progress_note(*result));
      results.push_back(std::move(*result));
    }
  }
  if (options.json) {
    fmt::print("{}\n", to_json(options, model, results, passed, failed).dump(1));
  } else {
    fmt::print("\n");
    for (const Mode mode : options.check.modes) print_summary(results, mode);
    for (const std::string& failure : model.failures) fmt::print("FAILED: {}\n", failure);
    fmt::print("{} passed, {} failed\n", passed, failed);
  }
  return failed == 0 ? kExitOk : kExitFailed;
}

}  // namespace

void add_verify_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("verify", "Check and time every quantized layer in every mode");
  command->add_option("DIR", options->directory, "AWQ checkpoint; none: a synthetic model");
  command->add_option("--reference", options->reference,
                      "Directory of the original 16-bit model: FP16 results come from it");
  command->add_option("--mode", options->modes, "Modes, e.g. w4a8,w4a4")
      ->delimiter(',')
      ->check(CLI::IsMember({"w4a16", "w4a8", "w4a8-fp8", "w4a4"}))
      ->capture_default_str();
  command
      ->add_option("--device", options->device,
                   "Where; cuda: the kernels of GPU 0 against the oracle and fp64")
      ->check(one_device())
      ->capture_default_str();
  command->add_option("--layer", options->layer_regex, "Only layers whose name matches this regex");
  command
      ->add_option("--act", options->activations,
                   "Activation scales; mix: per group for down_proj, o_proj and w4a4, else per "
                   "token")
      ->check(CLI::IsMember({"mix", "token", "group", "tensor", "static-tensor", "static-group"}))
      ->capture_default_str();
  command->add_option("--input", options->input, "Kind of random input")
      ->check(CLI::IsMember({"normal", "outliers"}))
      ->capture_default_str();
  command->add_option("--rows", options->check.rows, "Rows of input (M)")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command->add_option("--seed", options->check.seed, "Seed of input and synthetic weights")
      ->capture_default_str();
  command->add_option("--threads", options->check.threads, "Threads; 0: all CPUs")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str();
  command->add_flag("--no-timing", options->no_timing, "Check accuracy only");
  command->add_flag("--json", options->json, "JSON on stdout instead of the table");
  add_progress_option(*command, options->progress);
  command->footer("Example: nibble verify build/models/SmolLM2-135M-Instruct-AWQ --mode w4a8");
  command->callback([options, &exit_code] { exit_code = run_verify(*options); });
}

}  // namespace nibble::cli
