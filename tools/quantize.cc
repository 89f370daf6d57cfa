// `nibble quantize DIR OUT`: a 16/32-bit checkpoint to AutoAWQ's 4-bit layout, by AWQ or by
// rounding to nearest: the command, what it says before and after. Everything that can be refused
// is refused before the first byte is written. Not here: which layers, sizes and room
// (quantize_plan.h); the two methods (quantize_run.h).
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory.h"
#include "cli.h"
#include "format/checkpoint.h"
#include "format/linear_format.h"
#include "quantize_plan.h"
#include "quantize_run.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

// ---- what is said ------------------------------------------------------------------------------

std::string method_text(const QuantizeArguments& options, const AwqJob* job) {
  const std::string grid =
      fmt::format("group size {}, {}, {} scales", options.group_size,
                  options.symmetric ? "symmetric" : "zero points", options.scale_dtype);
  if (job == nullptr) return "round to nearest, " + grid;
  return fmt::format("AWQ{}{}, {} rounding, {}", options.scale ? "" : " without scales",
                     options.clip ? "" : " without clipping", options.rounding, grid);
}

void print_plan(const Checkpoint& checkpoint, const QuantizePlan& plan,
                const QuantizeArguments& options, const AwqJob* job) {
  const auto disk = free_disk(options.out);
  const uint64_t memory = available_memory_bytes();  // 0: unknown
  std::vector<std::string> left;
  for (const DenseLinear& linear : plan.left) left.push_back(linear.name);
  Table table("<<");
  table.add(
      {"input", fmt::format("{}, {}, {}", printable(options.directory),
                            printable(checkpoint.architecture()), bytes_text(plan.input_bytes))});
  table.add({"method", method_text(options, job)});
  if (job != nullptr) table.add({"calibration", job->text_summary()});
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
                         memory > 0 ? bytes_text(memory) : "unknown")});
  table.print(stdout);
  for (const std::string& note : notes_on(plan)) fmt::print("note: {}\n", note);
  fmt::print("\n");
  std::fflush(stdout);
}

/// One row per kind of layer: "q_proj".
void print_results(const QuantizePlan& plan, const std::vector<LayerResult>& results) {
  struct Kind {
    size_t layers = 0, worst = 0;
    double sum = 0, rtn_sum = 0;
    uint64_t bytes = 0;
  };
  std::map<std::string, Kind> kinds;
  for (size_t i = 0; i < results.size(); ++i) {
    Kind& kind = kinds[components(plan.linears[i].name).back()];
    if (kind.layers++ == 0 || results[i].snr_db < results[kind.worst].snr_db) kind.worst = i;
    kind.sum += results[i].snr_db;
    kind.rtn_sum += results[i].rtn_snr_db.value_or(0);
    kind.bytes += results[i].bytes;
  }
  const bool awq = !results.empty() && results[0].rtn_snr_db.has_value();
  Table table(awq ? "<>>>><" : "<>>><");
  std::vector<std::string> head = {"kind", "layers", "size", "mean SNR", "lowest SNR"};
  if (awq) head.insert(head.begin() + 4, "with RTN");
  table.add(head);
  for (const auto& [name, kind] : kinds) {
    const auto layers = static_cast<double>(kind.layers);
    std::vector<std::string> row = {printable(name), fmt::format("{}", kind.layers),
                                    bytes_text(kind.bytes),
                                    fmt::format("{:.1f} dB", kind.sum / layers),
                                    fmt::format("{:.1f} dB in {}", results[kind.worst].snr_db,
                                                printable(plan.linears[kind.worst].name))};
    if (awq) row.insert(row.begin() + 4, fmt::format("{:.1f} dB", kind.rtn_sum / layers));
    table.add(row);
  }
  table.print(stdout);
}

double bits_per_weight(const QuantizePlan& plan) {
  return 8 * static_cast<double>(plan.quantized_bytes) / static_cast<double>(plan.parameters);
}

json results_json(const QuantizePlan& plan, const QuantizeArguments& options,
                  const std::vector<LayerResult>& results, const AwqJob* job, double seconds) {
  json document = report_header();
  document["input"] = options.directory;
  document["output"] = options.out;
  document["method"] = options.method;
  document["group_size"] = options.group_size;
  document["symmetric"] = options.symmetric;
  document["scale_dtype"] = options.scale_dtype;
  if (job != nullptr) {
    document["calibration"] = job->text_summary();
    document["calibration_tokens"] = job->tokens();
    document["rounding"] = options.rounding;
    document["scale_search"] = options.scale;
    document["clip_search"] = options.clip;
  }
  document["notes"] = notes_on(plan);
  document["layers"] = json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    const DenseLinear& linear = plan.linears[i];
    const double snr = results[i].snr_db;
    const auto number = [](double db) { return std::isfinite(db) ? json(db) : json(nullptr); };
    json layer = {{"name", linear.name},
                  {"k", linear.k},
                  {"n", linear.n},
                  {"bytes", results[i].bytes},
                  {"snr_db", number(snr)}};
    if (results[i].rtn_snr_db) layer["rtn_snr_db"] = number(*results[i].rtn_snr_db);
    document["layers"].push_back(std::move(layer));
  }
  document["input_bytes"] = plan.input_bytes;
  document["bytes"] = plan.output_bytes;
  document["bits_per_weight"] = bits_per_weight(plan);
  document["seconds"] = seconds;
  return document;
}

int run_quantize(const QuantizeArguments& options) {
  const auto start = std::chrono::steady_clock::now();
  const Result<Checkpoint> checkpoint = Checkpoint::open(options.directory);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  if (const Status status = check_directories(options.directory, options.out); !status.ok())
    return fail(status);
  Result<QuantizePlan> plan = make_quantize_plan(*checkpoint, options.group_size, options.skip);
  if (!plan.ok()) return fail(plan.status());
  std::optional<AwqJob> job;
  if (options.method == "awq") {
    Result<AwqJob> prepared = AwqJob::prepare(*checkpoint, options, *plan);
    if (!prepared.ok()) return fail(prepared.status());
    job.emplace(std::move(*prepared));
  }
  if (!options.as_json) print_plan(*checkpoint, *plan, options, job ? &*job : nullptr);
  if (const Status status = check_room(*plan, options.out); !status.ok()) return fail(status);

  const auto results = job ? job->run(*plan, options) : run_rtn(*checkpoint, *plan, options);
  if (!results.ok()) return fail(results.status());
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (options.as_json) {
    // A path may hold any byte.
    fmt::print("{}\n", results_json(*plan, options, *results, job ? &*job : nullptr, seconds)
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
  auto options = std::make_shared<QuantizeArguments>();
  CLI::App* command =
      app.add_subcommand("quantize", "Quantize a 16-bit checkpoint to AutoAWQ's 4-bit layout");
  command->add_option("DIR", options->directory, "checkpoint in F16, BF16 or F32")->required();
  command->add_option("OUT", options->out, "directory to make; must not exist or be empty")
      ->required();
  command
      ->add_option("--method", options->method,
                   "awq: scales and ranges searched on a text; rtn: round to nearest, no text")
      ->check(CLI::IsMember({"awq", "rtn"}))
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
  command
      ->add_option("-f,--file", options->texts,
                   "text like what the model will meet; may be repeated; default: a bundled one")
      ->allow_extra_args(false)
      ->type_name("FILE")
      ->group("AWQ");
  command
      ->add_option("--sequences", options->sequences,
                   "token sequences taken from the text, at most")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str()
      ->group("AWQ");
  command->add_option("--length", options->sequence_length, "tokens of a sequence")
      ->check(CLI::Range(int64_t{16}, int64_t{1} << 20))
      ->capture_default_str()
      ->group("AWQ");
  command
      ->add_option("--rounding", options->rounding,
                   "nearest, or compensated: later channels make up for the errors of earlier ones")
      ->check(CLI::IsMember({"compensated", "nearest"}))
      ->capture_default_str()
      ->group("AWQ");
  command->add_flag("!--no-scale", options->scale, "do not search scales")->group("AWQ");
  command->add_flag("!--no-clip", options->clip, "do not search ranges")->group("AWQ");
  command->add_option("--threads", options->threads, "threads; 0: all CPUs")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str()
      ->group("AWQ");
  command->add_flag("--json", options->as_json, "print one JSON document at the end")
      ->group("Output");
  add_progress_option(*command, options->progress);
  command->footer(
      "Every linear inside the decoder layers is quantized; lm_head, embeddings, expert routers\n"
      "and encoders for images or audio are copied, like all other tensors and side files.\n"
      "OUT appears when it is complete. AWQ keeps finished layers in OUT.nibble-partial: after\n"
      "Ctrl-C the same command goes on from there, and with other options it starts anew.\n"
      "\nExample:\n"
      "  nibble quantize build/models/SmolLM2-135M-Instruct SmolLM2-AWQ --group-size 64");
  command->callback([options, &exit_code] { exit_code = run_quantize(*options); });
}

}  // namespace nibble::cli
