// See model_options.h.
#include "model_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "format/linear_format.h"
#include "model/cuda/runner.h"
#include "model/plan_config.h"
#include "text.h"
#include "timing.h"

namespace nibble::cli {
namespace {

const std::map<std::string, Granularity> kActivations = {
    {"token", Granularity::token}, {"group", Granularity::group}, {"tensor", Granularity::tensor}};
const std::map<std::string, Dtype> kKvTypes = {
    {"f16", Dtype::f16}, {"bf16", Dtype::bf16}, {"f32", Dtype::f32}};

void print_memory(const std::string& directory, const ModelOptions& options,
                  const MemoryEstimate& memory) {
  Table table("<><");
  table.add({"memory", "", printable(directory)});
  const auto row = [&](const char* name, uint64_t bytes, std::string note) {
    table.add({fmt::format("  {}", name), bytes_text(bytes), std::move(note)});
  };
  row("weights", memory.weights, "");
  row("head", memory.head, options.int8_head ? "int8" : "");
  row("KV cache", memory.kv_cache,
      fmt::format("{}, {} of {} tokens", dtype_name(options.kv_dtype),
                  plural(static_cast<size_t>(options.sequences), "sequence"), options.context));
  row("workspace", memory.workspace, "");
  row("total", memory.total(), "");
  row("available", memory.available, "");
  table.print(stderr);
}

}  // namespace

std::optional<Granularity> ModelArguments::granularity() const {
  const auto found = kActivations.find(activations);
  if (found == kActivations.end()) return std::nullopt;  // "mix"
  return found->second;
}

ModelOptions ModelArguments::model_options(int64_t default_context, int64_t sequences) const {
  return {.threads = threads,
          .kv_dtype = kKvTypes.at(kv),
          .int8_head = head == "int8",
          .context = context > 0 ? context : default_context,
          .sequences = sequences,
          .batch_invariant = batch_invariant,
          .expanded = expanded};
}

void add_model_arguments(CLI::App& command, ModelArguments& arguments, bool many_modes) {
  command.add_option("DIR", arguments.directory, "model directory")->required();
  auto* mode =
      command
          .add_option("--mode", arguments.modes,
                      many_modes ? "modes, by comma; default: auto if config.json holds a plan, "
                                   "else w4a8 (16bit if nothing is quantized)"
                                 : "mode; default: auto if config.json holds a plan, else w4a8 "
                                   "(16bit if nothing is quantized)")
          ->check(CLI::IsMember({"w4a16", "w4a8", "w4a8-fp8", "w4a4", "auto", kMode16Bit}))
          ->type_name("MODE")
          ->group("Model");
  if (many_modes) {
    mode->delimiter(',')->allow_extra_args(false);  // what follows may be DIR
  } else {
    mode->expected(1);
  }
  command
      .add_option("--act", arguments.activations,
                  "activation scales of w4a8 and w4a4; mix: per group for o, down and w4a4, else "
                  "per token; w4a8-fp8: per token or tensor, mix is per token")
      ->check(CLI::IsMember({"mix", "token", "group", "tensor"}))
      ->capture_default_str()
      ->group("Model");
  command.add_option("--kv", arguments.kv, "type of keys and values in memory")
      ->check(CLI::IsMember({"f16", "bf16", "f32"}))
      ->capture_default_str()
      ->group("Model");
  command
      .add_option("--head", arguments.head,
                  "lm_head in the 16 bits of the file, or in 8 bits per output channel")
      ->check(CLI::IsMember({"16", "int8"}))
      ->capture_default_str()
      ->group("Model");
  command.add_option("--device", arguments.device, "where the model runs; cuda: the first GPU")
      ->check(one_device())
      ->capture_default_str()
      ->group("Model");
  command
      .add_flag(
          "--batch-invariant", arguments.batch_invariant,
          "on a GPU: the same bits for a sequence alone and beside others (--batch of them at "
          "most), at the cost of a full batch's steps; a CPU always gives them")
      ->group("Model");
  command
      .add_flag("--expanded", arguments.expanded,
                "on a GPU: keep the weights of 8-bit modes in 8 bits too, 8.3 bits a weight more: "
                "prompts are read faster; elsewhere refused")
      ->group("Model");
  command.add_option("--threads", arguments.threads, "threads; 0: all CPUs")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str()
      ->group("Model");
}

LoadedModel::LoadedModel(Checkpoint checkpoint, ModelConfig config)
    : checkpoint_(std::move(checkpoint)), config_(std::move(config)) {
  quantized_ = !find_quantized_linears(checkpoint_).empty();
}

Result<std::unique_ptr<LoadedModel>> LoadedModel::open(const std::string& directory) {
  Result<Checkpoint> checkpoint = Checkpoint::open(directory);
  if (!checkpoint.ok()) return checkpoint.status();
  if (checkpoint->config().is_null()) {
    return Status(Code::io_error, fmt::format("{}: no config.json", directory));
  }
  Result<ModelConfig> config = parse_model_config(checkpoint->config());
  if (!config.ok()) return config.status();
  return std::unique_ptr<LoadedModel>(new LoadedModel(std::move(*checkpoint), std::move(*config)));
}

Status LoadedModel::load(const ModelOptions& options, const std::string& device) {
  if (device == "cuda") return load_cuda(options);
  if (options.expanded) {
    return Status(Code::unsupported,
                  "--expanded is for --device cuda: a CPU has no kernels that start from weights "
                  "in 8 bits");
  }
  Result<MemoryEstimate> memory = Model::estimate(checkpoint_, options);
  if (!memory.ok()) return memory.status();
  memory_ = *memory;
  print_memory(directory(), options, memory_);
  const double start = now_seconds();
  Result<Model> model = Model::load(checkpoint_, options);
  if (!model.ok()) return model.status();
  load_seconds_ = now_seconds() - start;
  model_.emplace(std::move(*model));
  runner_ = std::make_unique<CpuRunner>(*model_);
  return {};
}

Status LoadedModel::load_cuda(const ModelOptions& options) {
  Result<MemoryEstimate> memory = cuda::estimate_runner(checkpoint_, options);
  if (!memory.ok()) return memory.status();
  memory_ = *memory;
  print_memory(directory(), options, memory_);
  const double start = now_seconds();
  Result<std::unique_ptr<Runner>> runner = cuda::make_runner(checkpoint_, options);
  if (!runner.ok()) return runner.status();
  load_seconds_ = now_seconds() - start;
  runner_ = std::move(*runner);
  return {};
}

std::string LoadedModel::device() const {
  return model_ ? device_summary() : runner_->device_name();
}

Status LoadedModel::load_dequantized(const ModelOptions& options) {
  const double start = now_seconds();
  Result<std::unique_ptr<Runner>> runner =
      cuda::make_runner(checkpoint_, options, cuda::WeightForm::dequantized);
  if (!runner.ok()) return runner.status();
  load_seconds_ += now_seconds() - start;
  dequantized_ = std::move(*runner);
  return {};
}

bool LoadedModel::has_plan() const { return nibble::has_plan(checkpoint_.config()); }

std::string LoadedModel::default_mode() const {
  if (!quantized_) return kMode16Bit;
  return has_plan() ? "auto" : "w4a8";
}

Result<ModelPlan> LoadedModel::plan(const std::string& mode, std::optional<Granularity> granularity,
                                    bool dequantizes) const {
  if (!quantized_) {
    if (mode == kMode16Bit || mode == "auto") return uniform_plan(config_.layers, Mode::w4a16);
    return Status(Code::unsupported,
                  fmt::format("{} has no 4-bit linears: mode {} cannot run it, 16bit can (nibble "
                              "quantize makes a 4-bit checkpoint)",
                              printable(directory()), mode));
  }
  if (mode == kMode16Bit && dequantizes) return uniform_plan(config_.layers, Mode::w4a16);
  if (mode == kMode16Bit) {
    return Status(Code::unsupported, fmt::format("{} is quantized: mode 16bit is for checkpoints "
                                                 "with 16-bit weights, w4a16 is the nearest",
                                                 printable(directory())));
  }
  if (mode != "auto") {
    return uniform_plan(config_.layers, modes_by_name().at(mode), granularity);
  }
  if (!has_plan()) {
    return Status(Code::invalid_argument,
                  fmt::format("{}: config.json holds no plan for mode auto; nibble plan makes one",
                              printable(directory())));
  }
  return plan_from_config(checkpoint_.config(), config_);
}

Status check_mode(const std::string& mode, const ModelArguments& arguments) {
  if (mode != mode_name(Mode::w4a8_fp8)) return {};
  if (arguments.device != "cuda") {
    return Status(Code::unsupported,
                  fmt::format("mode {} runs on GPUs only (--device cuda): CPUs have no products of "
                              "e4m3 numbers",
                              mode));
  }
  if (arguments.granularity() == Granularity::group) {
    return Status(Code::unsupported,
                  fmt::format("mode {} takes one activation scale per token or tensor, not --act "
                              "{}",
                              mode, arguments.activations));
  }
  return {};
}

Result<std::vector<NamedPlan>> plans_of(const LoadedModel& loaded, const ModelArguments& arguments,
                                        bool dequantizes) {
  std::vector<std::string> modes = arguments.modes;
  if (modes.empty()) modes.push_back(loaded.default_mode());
  std::vector<NamedPlan> plans;
  for (const std::string& mode : modes) {
    NIBBLE_TRY(check_mode(mode, arguments));
    Result<ModelPlan> plan = loaded.plan(mode, arguments.granularity(), dequantizes);
    if (!plan.ok()) return plan.status();
    plans.push_back({mode, std::move(*plan)});
  }
  return plans;
}

std::string mode_text(const std::string& mode, const ModelArguments& arguments) {
  if (mode == mode_name(Mode::w4a8_fp8)) {
    return fmt::format("{} {}", mode,
                       granularity_name(arguments.granularity().value_or(Granularity::token)));
  }
  return mode == "w4a8" || mode == "w4a4" ? fmt::format("{} {}", mode, arguments.activations)
                                          : mode;
}

nlohmann::json memory_json(const MemoryEstimate& memory) {
  return {{"weights", memory.weights},   {"head", memory.head},
          {"kv_cache", memory.kv_cache}, {"workspace", memory.workspace},
          {"total", memory.total()},     {"available", memory.available}};
}

Result<std::string> read_text_file(const std::string& path) {
  std::FILE* file = path == "-" ? stdin : std::fopen(path.c_str(), "rb");
  const auto failure = [&] {
    return Status(Code::io_error, fmt::format("cannot read {}: {}",
                                              path == "-" ? "standard input" : printable(path),
                                              std::strerror(errno)));
  };
  if (file == nullptr) return failure();
  std::string text;
  char buffer[1 << 16];
  size_t count = 0;
  while ((count = std::fread(buffer, 1, sizeof buffer, file)) > 0) text.append(buffer, count);
  const bool failed = std::ferror(file) != 0;
  const Status status = failed ? failure() : Status();
  if (file != stdin) std::fclose(file);
  if (failed) return status;
  return text;
}

}  // namespace nibble::cli
