// nibble plan: which layer and slot runs in which mode, so that a model passes accuracy gates
// against itself in W4A16 at the least cost; written to config.json under the key
// quantization_config.nibble.
//   1. one chunk of the text: noise of every way to run every slot, time of its product, and what
//      the model makes of each slot alone in the fastest mode
//   2. promotions in the order of loss saved per added cost (model/planner.h)
//   3. the shortest prefix of them that passes on some chunks of the rest of the text, made longer
//      until it passes on all of them
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>

#include "base/sha256.h"
#include "calibration_run.h"
#include "cli.h"
#include "format/output_file.h"
#include "model/cpu_runner.h"
#include "model/cuda/runner.h"
#include "model/plan_config.h"
#include "model_options.h"
#include "plan_measure.h"
#include "plan_measure_cuda.h"
#include "plan_report.h"
#include "text.h"
#include "text_eval.h"
#include "timing.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

struct Options {
  std::string directory, mode = "auto", file, calibration, rank = "kld", cost = "auto";
  std::string device = "cpu";
  std::optional<double> max_ppl_ratio, max_kld, min_same_top, min_share;
  int64_t context = 512, chunks = 32, search_chunks = 4, rank_tokens = 256;
  int max_evaluations = 40, threads = 0;
  bool dry_run = false, as_json = false;
  ProgressMode progress = ProgressMode::automatic;
};

/// Gates and the least share by mode; "auto" is held to those of w4a8.
struct ModeDefaults {
  Gates gates;
  double min_share = 0;  // percent of the multiply-adds that stay in the mode
};
const std::map<std::string, ModeDefaults> kDefaults = {
    {"w4a4", {{.max_ppl_ratio = 1.10, .max_kld = 0.10, .min_same_top = 88}, 25}},
    {"w4a8", {{.max_ppl_ratio = 1.01, .max_kld = 0.01, .min_same_top = 97}, 50}},
    {"auto", {{.max_ppl_ratio = 1.01, .max_kld = 0.01, .min_same_top = 97}, 0}}};

// a4 must be this much faster than a8 before it counts as faster. On a busy machine medians of the
// same product differ by several percent, and a start in w4a4 that gains nothing costs accuracy.
constexpr double kFaster = 0.9;
// For the same reason, of measured costs: differences below this part of a slot's own do not rank.
constexpr double kTimingTie = 0.05;

/// The text, cut in three: a chunk to rank by, some of the rest to search on, all the rest to
/// prove.
struct Texts {
  EvalText rank, search, held_out;
};

// ---- preparing ---------------------------------------------------------------------------------

Result<Texts> read_texts(const Options& options, PlanReport& report) {
  const Result<Tokenizer> tokenizer = Tokenizer::load(options.directory);
  if (!tokenizer.ok()) return tokenizer.status();
  const Result<std::string> text = read_text_file(options.file);
  if (!text.ok()) return text.status();
  const EvalOptions eval{.context = options.context,
                         .max_chunks = options.chunks == 0 ? 0 : options.chunks + 1};
  Result<EvalText> all = make_eval_text(*tokenizer, options.file, *text, eval);
  if (!all.ok()) return all.status();
  if (all->chunks.size() < 2) {
    return Status(Code::invalid_argument,
                  fmt::format("{}: expected at least 2 chunks of {} tokens, one to rank by and one "
                              "to prove the gates on, found {}",
                              printable(options.file), options.context, all->chunks.size()));
  }
  Texts texts;
  texts.rank.name = texts.search.name = texts.held_out.name = options.file;
  texts.rank.chunks = {all->chunks.front()};
  texts.held_out.chunks.assign(all->chunks.begin() + 1, all->chunks.end());
  const size_t held = texts.held_out.chunks.size();
  const auto wanted = std::min(held, static_cast<size_t>(options.search_chunks));
  for (size_t i = 0; i < wanted; ++i) {  // the middles of equal parts
    texts.search.chunks.push_back(texts.held_out.chunks[(2 * i + 1) * held / (2 * wanted)]);
  }
  report.text_name = options.file;
  report.text_digest = sha256_hex(*text);
  report.held_out_chunks = static_cast<int64_t>(held);
  report.search_chunks = static_cast<int64_t>(wanted);
  return texts;
}

Result<std::optional<Calibration>> load_calibration(const Options& options, PlanReport& report) {
  if (options.calibration.empty()) return std::optional<Calibration>();
  Result<Calibration> loaded = Calibration::load(options.calibration);
  if (!loaded.ok()) return loaded.status();
  if (loaded->model_digest() != report.model_digest) {
    return Status(
        Code::invalid_argument,
        fmt::format("--calibration {}: statistics of another model (digest {}..., expected "
                    "{}...)",
                    printable(options.calibration), loaded->model_digest().substr(0, 16),
                    report.model_digest.substr(0, 16)));
  }
  const Result<std::string> bytes = read_text_file(options.calibration);
  if (!bytes.ok()) return bytes.status();
  report.calibration_digest = sha256_hex(*bytes);
  report.calibration_tokens = loaded->tokens();
  for (const CalibrationText& text : loaded->texts()) {
    if (text.digest == report.text_digest) {
      report.notes.push_back("the calibration saw the text that the gates are proven on");
    }
  }
  return std::optional<Calibration>(std::move(*loaded));
}

// ---- ladders -----------------------------------------------------------------------------------

/// Multiply-adds times bits, for machines on which the product that a mode is meant for does not
/// exist: a4 1, a8 2, a16 4.
double modelled_cost(const SlotMeasure& slot, const Candidate& candidate) {
  return slot.work() *
         (share_of(candidate, 4) + 2 * share_of(candidate, 8) + 4 * share_of(candidate, 16));
}

Ladder make_ladder(const SlotMeasure& slot, Choice first, bool by_kld, CostBasis basis) {
  const Candidate& start = *slot.find(first);
  // KLD goes with the energy of the noise; a slot whose own KLD is lost in rounding counts little.
  const double start_noise = std::max(start.noise, 1e-300);
  const double scale = by_kld ? std::max(slot.kld, 1e-9) / start_noise : 1 / slot.signal;
  Ladder ladder;
  ladder.layer = slot.layer;
  ladder.slot = slot.slot;
  const int bits = start.spec.mode == Mode::w4a4 ? 4 : 8;
  for (const Candidate& candidate : slot.candidates) {
    if (candidate.choice < first) continue;
    Rung rung;
    rung.spec = candidate.spec;
    rung.loss = candidate.noise * (slot.signal > 0 ? scale : 0);
    rung.cost = basis == CostBasis::measured ? request_us(candidate)
                                             : modelled_cost(slot, candidate) * 1e-6;
    rung.kept = slot.work() * share_of(candidate, bits);
    ladder.rungs.push_back(std::move(rung));
  }
  return ladder;
}

/// Which mode is started in, and what a cost is: by the times that were measured.
void decide_basis(const Options& options, PlanReport& report) {
  for (const SlotMeasure& slot : report.slots) {
    report.us_a4 += request_us(*slot.find(Choice::a4));
    report.us_a8 += request_us(*slot.find(Choice::a8_token));
  }
  report.a4_is_faster = report.us_a4 < kFaster * report.us_a8;
  const bool narrow = options.mode == "w4a4" || (options.mode == "auto" && report.a4_is_faster);
  report.started_as = narrow ? "w4a4" : "w4a8";
  // Where a4 costs as much as a8, time would call every promotion out of it free.
  const bool by_model =
      options.cost == "model" || (options.cost == "auto" && narrow && !report.a4_is_faster);
  report.basis = by_model ? CostBasis::model : CostBasis::measured;
}

// ---- the run -----------------------------------------------------------------------------------

/// What the plan is for: it runs the model and its products.
struct Device {
  std::unique_ptr<Runner> runner;
  SlotTimer timer;
};

Result<Device> open_gpu(const Checkpoint& checkpoint, const ModelOptions& options) {
  Result<SlotTimer> timer = cuda_slot_timer(options.kv_dtype);  // the type of the model's rows
  if (!timer.ok()) return timer.status();
  Result<std::unique_ptr<Runner>> runner = cuda::make_runner(checkpoint, options);
  if (!runner.ok()) return runner.status();
  return Device{std::move(*runner), std::move(*timer)};
}

/// The noise of activations is measured on the CPU, whatever the plan is for: it is the same.
Status measure(const Options& options, const Texts& texts, Model& model, const Device& device,
               const std::optional<Calibration>& calibration, PlanReport& report) {
  {
    Progress progress(options.progress, "slot", model.config().layers * kSlots);
    MeasureOptions how;
    how.threads = options.threads;
    if (calibration) how.statistics = &*calibration;
    how.wide_groups = options.device == "cpu";
    auto slots =
        measure_noise(model, texts.rank.chunks.front(), how, [&] { progress.advance("noise"); });
    if (!slots.ok()) return slots.status();
    report.slots = std::move(*slots);
  }
  {
    Progress progress(options.progress, "shape",
                      static_cast<int64_t>(distinct_shapes(report.slots)));
    NIBBLE_TRY(measure_costs(device.timer, report.slots, [&] { progress.advance("timing"); }));
  }
  decide_basis(options, report);
  const bool narrow = report.started_as == "w4a4";
  const Choice first = narrow ? Choice::a4 : Choice::a8_token;
  if (options.rank == "kld") {
    Progress progress(options.progress, "slot", static_cast<int64_t>(report.slots.size()));
    EvalText text = texts.rank;
    const auto tokens = static_cast<size_t>(options.rank_tokens);
    if (text.chunks.front().size() > tokens) text.chunks.front().resize(tokens);
    NIBBLE_TRY(measure_sensitivity(*device.runner, text, first, options.threads, report.slots,
                                   [&] { progress.advance("sensitivity"); }));
  }
  for (const SlotMeasure& slot : report.slots) {
    report.ladders.push_back(make_ladder(slot, first, options.rank == "kld", report.basis));
  }
  report.order = rank_promotions(report.ladders, kTimingTie);
  return {};
}

Status search(const Options& options, const Texts& texts, Runner& runner, PlanReport& report) {
  const ModelPlan plain = uniform_plan(runner.config().layers, Mode::w4a16);
  const EvalSubject reference{&runner, plain, "w4a16"};
  EvalOptions eval;
  eval.context = options.context;
  eval.threads = options.threads;
  int evaluations = 0;
  const auto oracle = [&](const ModelPlan& plan, bool thorough) -> Result<Quality> {
    const EvalSubject subject{&runner, plan, "plan"};
    const EvalText& text = thorough ? texts.held_out : texts.search;
    // How many plans will be tried is not known beforehand, so each has its own progress.
    Progress progress(options.progress, "chunk", static_cast<int64_t>(text.chunks.size()));
    const std::string note =
        fmt::format("plan {}, {}", ++evaluations, thorough ? "proving" : "searching");
    auto results = evaluate(text, &reference, {&subject, 1}, eval, interrupted,
                            [&](int64_t) { progress.advance(note); });
    if (!results.ok()) return results.status();
    const EvalResult& result = results->front();
    if (thorough) report.quality = result;
    return Quality{result.ppl_ratio, result.kld_mean, result.same_top};
  };
  SearchLimits limits;
  limits.max_evaluations = options.max_evaluations;
  for (const Ladder& ladder : report.ladders) {
    limits.min_kept += ladder.rungs.front().kept * report.min_share / 100;
  }
  auto found = search_plan(report.ladders, report.order, plain, report.gates, limits, oracle);
  if (!found.ok()) return found.status();
  report.search = std::move(*found);
  return {};
}

Result<PlanReport> make_plan(const Options& options) {
  const double start = now_seconds();
  PlanReport report;
  report.directory = options.directory;
  report.mode = options.mode;
  report.context = options.context;
  const ModeDefaults& defaults = kDefaults.at(options.mode);
  report.gates = {options.max_ppl_ratio.value_or(defaults.gates.max_ppl_ratio),
                  options.max_kld.value_or(defaults.gates.max_kld),
                  options.min_same_top.value_or(defaults.gates.min_same_top)};
  report.min_share = options.min_share.value_or(defaults.min_share);

  Result<std::unique_ptr<LoadedModel>> opened = LoadedModel::open(options.directory);
  if (!opened.ok()) return opened.status();
  LoadedModel& loaded = **opened;
  if (!loaded.quantized()) {
    return Status(Code::unsupported,
                  fmt::format("{} has no 4-bit linears: there is nothing to plan (nibble quantize "
                              "makes a 4-bit checkpoint)",
                              printable(options.directory)));
  }
  if (!options.dry_run && !can_hold_plan(loaded.checkpoint().config())) {
    return Status(Code::unsupported,
                  fmt::format("{}: config.json has no quantization_config to put a plan in; "
                              "--dry-run prints one",
                              printable(options.directory)));
  }
  if (!options.dry_run && ::access(options.directory.c_str(), W_OK) != 0) {
    return system_error("write to", options.directory);
  }
  const Result<Texts> texts = read_texts(options, report);
  if (!texts.ok()) return texts.status();
  report.model_digest = model_digest(loaded.checkpoint());
  const Result<std::optional<Calibration>> calibration = load_calibration(options, report);
  if (!calibration.ok()) return calibration.status();
  const ModelOptions model_options{.threads = options.threads, .context = options.context};
  Device device;
  if (options.device == "cuda") {
    Result<Device> gpu = open_gpu(loaded.checkpoint(), model_options);
    if (!gpu.ok()) return gpu.status();
    device = std::move(*gpu);
  }
  NIBBLE_TRY(loaded.load(model_options));
  Model& model = loaded.model();
  if (options.device == "cpu") {
    device = {std::make_unique<CpuRunner>(model), cpu_slot_timer(model, options.threads)};
  }
  report.device = options.device == "cpu" ? device_summary() : device.runner->device_name();
  report.layers = model.config().layers;
  if (calibration->has_value()) {  // of these shapes?
    Calibration shapes = empty_calibration(model, report.model_digest);
    NIBBLE_TRY(shapes.merge(**calibration));
  }
  NIBBLE_TRY(measure(options, *texts, model, device, *calibration, report));
  NIBBLE_TRY(search(options, *texts, *device.runner, report));
  report.seconds = now_seconds() - start;
  return report;
}

int run_plan(const Options& options) {
  const Result<PlanReport> report = make_plan(options);
  if (!report.ok()) return fail(report.status());
  if (options.as_json) {
    fmt::print("{}\n", report_json(*report).dump(2, ' ', false, json::error_handler_t::replace));
  } else {
    print_plan(*report);
  }
  std::fflush(stdout);
  if (!report->search.met) {
    std::fputs(fmt::format("nibble: {}\n", refusal_text(*report)).c_str(), stderr);
    return kExitFailed;
  }
  if (options.dry_run) {
    if (!options.as_json) fmt::print("\ndry run: nothing was written\n");
    return kExitOk;
  }
  if (const Status status = store_plan(options.directory, config_block(*report)); !status.ok()) {
    return fail(status);
  }
  if (!options.as_json) {
    fmt::print("\nwritten to {}/config.json in {:.0f} s; --mode auto runs it\n",
               printable(options.directory), report->seconds);
  }
  return kExitOk;
}

}  // namespace

void add_plan_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("plan", "Choose the mode of every layer under accuracy gates");
  command->add_option("DIR", options->directory, "model directory with 4-bit weights")->required();
  command->add_option("-f,--file", options->file, "text: its first chunk ranks, the rest proves")
      ->required()
      ->type_name("TEXT");
  command
      ->add_option("--mode", options->mode,
                   "what to start from; auto: w4a4 where that is faster than w4a8, else w4a8")
      ->check(CLI::IsMember({"w4a8", "w4a4", "auto"}))
      ->capture_default_str();
  command
      ->add_option("--calibration", options->calibration,
                   "statistics of nibble calibrate, for clip ratios; else of the first chunk")
      ->type_name("FILE");
  command
      ->add_option("--max-ppl-ratio", options->max_ppl_ratio,
                   "perplexity over that of w4a16 [w4a4: 1.10, else 1.01]")
      ->check(CLI::PositiveNumber)
      ->group("Gates");
  command->add_option("--max-kld", options->max_kld, "mean KL divergence [w4a4: 0.10, else 0.01]")
      ->check(CLI::NonNegativeNumber)
      ->group("Gates");
  command
      ->add_option("--min-same-top", options->min_same_top,
                   "percent of tokens with the same best guess [w4a4: 88, else 97]")
      ->check(CLI::Range(0.0, 100.0))
      ->group("Gates");
  command
      ->add_option("--min-share", options->min_share,
                   "percent of multiply-adds that stay in the mode [w4a4: 25, w4a8: 50, auto: 0]")
      ->check(CLI::Range(0.0, 100.0))
      ->group("Gates");
  command->add_option("-c,--context", options->context, "tokens per chunk")
      ->check(CLI::Range(16, 1 << 20))
      ->capture_default_str()
      ->group("Search");
  command->add_option("--chunks", options->chunks, "chunks that prove the gates; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Search");
  command->add_option("--search-chunks", options->search_chunks, "of them, chunks to search on")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group("Search");
  command
      ->add_option("--rank", options->rank,
                   "loss of a slot: KLD with it alone quantized, or (quicker) output noise")
      ->check(CLI::IsMember({"kld", "snr"}))
      ->capture_default_str()
      ->group("Search");
  command
      ->add_option(
          "--cost", options->cost,
          "measured times, or multiply-adds times bits; auto: the latter for w4a4 where it "
          "is not faster")
      ->check(CLI::IsMember({"auto", "measured", "model"}))
      ->capture_default_str()
      ->group("Search");
  command->add_option("--max-evaluations", options->max_evaluations, "plans to try at most")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str()
      ->group("Search");
  command->add_flag("--dry-run", options->dry_run, "print the plan, write nothing")
      ->group("Output");
  command->add_flag("--json", options->as_json, "JSON on stdout instead of the table")
      ->group("Output");
  command
      ->add_option("--device", options->device,
                   "what the plan is for: its times, and what runs the plans that are tried; cuda: "
                   "the first GPU, without groups of 8 bits in w4a4")
      ->check(one_device())
      ->capture_default_str();
  command->add_option("--threads", options->threads, "threads; 0: all CPUs")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str();
  add_progress_option(*command, options->progress);
  command->footer(
      "A slot (the input of q,k,v; of o; of gate,up; of down) climbs: 4-bit activations per\n"
      "K-group, some groups in 8 bits, 8 bits per token, 8 bits per group, 16 bits. The plan is\n"
      "a short list of promotions, best first, that passes the gates (means, not their errors);\n"
      "without one the exit code is 1 and nothing is written. Otherwise config.json gets the key\n"
      "quantization_config.nibble and keeps all others; other readers ignore it.\n"
      "\nExample:\n"
      "  nibble plan build/models/SmolLM2-135M-Instruct-AWQ -f TEXT --mode w4a4 --dry-run");
  command->callback([options, &exit_code] { exit_code = run_plan(*options); });
}

}  // namespace nibble::cli
