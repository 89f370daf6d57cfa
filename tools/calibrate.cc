// nibble calibrate: what the inputs of a model's 4-bit linears look like on texts, saved as one
// safetensors file. The file is written every so often and when interrupted; the same command then
// continues where it stopped. Files of other texts can be merged in, with the result of one run.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "base/sha256.h"
#include "calibration_run.h"
#include "cli.h"
#include "model_options.h"
#include "text.h"
#include "text_eval.h"
#include "timing.h"

namespace nibble::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct Options {
  std::string directory, out = "stats.safetensors";
  std::vector<std::string> files, merge;
  int64_t context = 512, max_chunks = 0;
  int threads = 0;
  double save_seconds = 30;
  bool restart = false, as_json = false;
  ProgressMode progress = ProgressMode::automatic;
};

/// A text that is to be counted, or the rest of it.
struct Job {
  EvalText text;
  std::string digest;
};

// ---- preparing ---------------------------------------------------------------------------------

/// A second .safetensors file in a model directory would be read as weights by other programs.
Status check_out(const Options& options) {
  std::error_code error;
  const fs::path directory = fs::weakly_canonical(options.directory, error);
  const fs::path parent =
      fs::weakly_canonical(fs::absolute(options.out, error), error).parent_path();
  if (!directory.empty() && parent == directory) {
    return Status(Code::invalid_argument,
                  fmt::format("-o {}: lies in the model directory, where other programs read every "
                              ".safetensors file as weights",
                              quote_name(options.out)));
  }
  if (options.files.empty() && options.merge.empty() && !fs::exists(options.out, error)) {
    return Status(
        Code::invalid_argument,
        fmt::format("nothing to do: no text (-f), nothing to merge (--merge), and {} does "
                    "not exist",
                    quote_name(options.out)));
  }
  return {};
}

Result<std::vector<Job>> read_jobs(const Options& options) {
  std::vector<Job> jobs;
  if (options.files.empty()) return jobs;
  const Result<Tokenizer> tokenizer = Tokenizer::load(options.directory);
  if (!tokenizer.ok()) return tokenizer.status();
  const EvalOptions eval{.context = options.context, .max_chunks = options.max_chunks};
  for (const std::string& file : options.files) {
    const Result<std::string> text = read_text_file(file);
    if (!text.ok()) return text.status();
    Result<EvalText> chunks = make_eval_text(*tokenizer, file, *text, eval);
    if (!chunks.ok()) return chunks.status();
    jobs.push_back({std::move(*chunks), sha256_hex(*text)});
    for (size_t i = 0; i + 1 < jobs.size(); ++i) {
      if (jobs[i].digest != jobs.back().digest) continue;
      return Status(Code::invalid_argument,
                    fmt::format("{} and {} hold the same text, which would count twice",
                                quote_name(jobs[i].text.name), quote_name(file)));
    }
  }
  return jobs;
}

/// Statistics of a file, which must be of this model.
Result<Calibration> load_statistics(const std::string& path, const std::string& digest) {
  Result<Calibration> loaded = Calibration::load(path);
  if (!loaded.ok() || loaded->model_digest() == digest) return loaded;
  return Status(
      Code::invalid_argument,
      fmt::format("{}: these are statistics of another model (digest {}..., expected "
                  "{}...); give another -o or --restart",
                  quote_name(path), loaded->model_digest().substr(0, 16), digest.substr(0, 16)));
}

/// What is there already: the output of an earlier run and what is to be merged. Nothing if
/// neither.
Result<std::optional<Calibration>> load_earlier(const Options& options, const std::string& digest) {
  std::optional<Calibration> earlier;
  std::error_code ignored;
  std::vector<std::string> paths;
  if (!options.restart && fs::exists(options.out, ignored)) paths.push_back(options.out);
  paths.insert(paths.end(), options.merge.begin(), options.merge.end());
  for (const std::string& path : paths) {
    Result<Calibration> loaded = load_statistics(path, digest);
    if (!loaded.ok()) return loaded.status();
    if (!earlier) {
      earlier.emplace(std::move(*loaded));
    } else if (const Status status = earlier->merge(*loaded); !status.ok()) {
      return Status(status.code(), fmt::format("{}: {}", quote_name(path), status.message()));
    }
  }
  return earlier;
}

// ---- running -----------------------------------------------------------------------------------

/// Chunks of the job that are counted already; refuses other cuts of the same text.
Result<int64_t> chunks_done(const Calibration& calibration, const Job& job, int64_t context) {
  for (const CalibrationText& text : calibration.texts()) {
    if (text.digest != job.digest) continue;
    if (text.context == context) return text.chunks_done;
    return Status(
        Code::invalid_argument,
        fmt::format("{} was counted in chunks of {} tokens; continuing with {} would count "
                    "it twice (--context {}, or --restart)",
                    quote_name(job.text.name), text.context, context, text.context));
  }
  return int64_t{0};
}

Status run_jobs(const Options& options, const std::vector<Job>& jobs, Model& model,
                Calibration& calibration) {
  int64_t left = 0;
  std::vector<int64_t> first;
  for (const Job& job : jobs) {
    const Result<int64_t> done = chunks_done(calibration, job, options.context);
    if (!done.ok()) return done.status();
    first.push_back(*done);
    left += std::max<int64_t>(0, static_cast<int64_t>(job.text.chunks.size()) - *done);
  }
  Progress progress(options.progress, "chunk", left);
  double last_save = now_seconds();
  for (size_t i = 0; i < jobs.size(); ++i) {
    const auto total = static_cast<int64_t>(jobs[i].text.chunks.size());
    for (int64_t chunk = first[i]; chunk < total; ++chunk) {
      if (interrupted()) {
        NIBBLE_TRY(calibration.save(options.out));
        return Status(Code::interrupted,
                      fmt::format("interrupted; {} holds what is done, the same command continues",
                                  options.out));
      }
      NIBBLE_TRY(count_chunk(model, jobs[i].text.chunks[static_cast<size_t>(chunk)],
                             options.threads, calibration));
      calibration.text(jobs[i].digest) = {jobs[i].text.name, jobs[i].digest, options.context,
                                          chunk + 1, total};
      progress.advance(printable(jobs[i].text.name));
      if (now_seconds() - last_save < options.save_seconds) continue;
      NIBBLE_TRY(calibration.save(options.out));
      last_save = now_seconds();
    }
  }
  return {};
}

// ---- reporting ---------------------------------------------------------------------------------

void print_summary(const Calibration& calibration) {
  Table table("><>>>>>>>>");
  table.add({"layer", "slot", "K", "groups", "amax", "token p50", "token p99", "max/median channel",
             "kurtosis", "clip"});
  for (int64_t layer = 0; layer < calibration.layers(); ++layer) {
    for (int s = 0; s < kSlots; ++s) {
      const SlotStatistics& slot = calibration.at(layer, static_cast<Slot>(s));
      const SlotSummary summary = summarize(slot);
      table.add({fmt::format("{}", layer), slot_name(static_cast<Slot>(s)),
                 fmt::format("{}", slot.channels), fmt::format("{}", slot.groups()),
                 fmt::format("{:.3g}", summary.amax), fmt::format("{:.3g}", summary.token_median),
                 fmt::format("{:.3g}", summary.token_p99),
                 fmt::format("{:.1f}", summary.channel_ratio),
                 fmt::format("{:.1f}", summary.kurtosis), fmt::format("{:.2f}", summary.clip)});
    }
  }
  table.print(stdout);
}

json slot_json(int64_t layer, Slot slot, const SlotStatistics& s) {
  const SlotSummary summary = summarize(s);
  json group_amax = json::array(), group_mean = json::array();
  for (int64_t g = 0; g < s.groups(); ++g) {
    const auto first = s.max_abs.begin() + g * s.group_size;
    group_amax.push_back(*std::max_element(first, first + s.group_size));
    group_mean.push_back(s.sum_group_amax[static_cast<size_t>(g)].value() /
                         std::max(1.0, static_cast<double>(s.tokens)));
  }
  return {{"layer", layer},
          {"slot", slot_name(slot)},
          {"k", s.channels},
          {"group_size", s.group_size},
          {"amax", summary.amax},
          {"token_amax_p50", summary.token_median},
          {"token_amax_p99", summary.token_p99},
          {"channel_max_over_median", summary.channel_ratio},
          {"kurtosis", summary.kurtosis},
          {"w4a4_clip", summary.clip},
          {"group_amax", std::move(group_amax)},
          {"group_amax_mean", std::move(group_mean)}};
}

json texts_json(const Calibration& calibration) {
  json texts = json::array();
  for (const CalibrationText& text : calibration.texts()) {
    texts.push_back({{"name", text.name},
                     {"sha256", text.digest},
                     {"context", text.context},
                     {"chunks_done", text.chunks_done},
                     {"chunks_total", text.chunks_total}});
  }
  return texts;
}

void print_results(const Options& options, const Calibration& calibration) {
  if (options.as_json) {
    json document = report_header();
    document["model"] = options.directory;
    document["output"] = options.out;
    document["model_digest"] = calibration.model_digest();
    document["tokens"] = calibration.tokens();
    document["texts"] = texts_json(calibration);
    document["slots"] = json::array();
    for (int64_t layer = 0; layer < calibration.layers(); ++layer) {
      for (int s = 0; s < kSlots; ++s) {
        const auto slot = static_cast<Slot>(s);
        document["slots"].push_back(slot_json(layer, slot, calibration.at(layer, slot)));
      }
    }
    fmt::print("{}\n", document.dump(2, ' ', false, json::error_handler_t::replace));
    return;
  }
  print_summary(calibration);
  fmt::print("\n");
  for (const CalibrationText& text : calibration.texts()) {
    fmt::print("{}: {} of {} chunks of {} tokens, SHA-256 {}\n", printable(text.name),
               text.chunks_done, text.chunks_total, text.context, text.digest);
  }
  fmt::print("{}: {} tokens\n", printable(options.out), calibration.tokens());
}

// ---- the command -------------------------------------------------------------------------------

Result<Calibration> calibrate(const Options& options) {
  NIBBLE_TRY(check_out(options));
  Result<std::unique_ptr<LoadedModel>> opened = LoadedModel::open(options.directory);
  if (!opened.ok()) return opened.status();
  LoadedModel& loaded = **opened;
  if (!loaded.quantized()) {
    return Status(Code::unsupported,
                  fmt::format("{} has no 4-bit linears: there are no K-groups to count by (nibble "
                              "quantize makes a 4-bit checkpoint)",
                              printable(options.directory)));
  }
  const Result<std::vector<Job>> jobs = read_jobs(options);
  if (!jobs.ok()) return jobs.status();
  const std::string digest = model_digest(loaded.checkpoint());
  Result<std::optional<Calibration>> earlier = load_earlier(options, digest);
  if (!earlier.ok()) return earlier.status();
  if (jobs->empty()) {  // only a merge, or a look: no model is needed
    if (!options.merge.empty()) NIBBLE_TRY((*earlier)->save(options.out));
    return std::move(**earlier);
  }
  NIBBLE_TRY(loaded.load({.threads = options.threads, .context = options.context}));
  Calibration calibration = empty_calibration(loaded.model(), digest);
  if (earlier->has_value()) NIBBLE_TRY(calibration.merge(**earlier));
  NIBBLE_TRY(run_jobs(options, *jobs, loaded.model(), calibration));
  NIBBLE_TRY(calibration.save(options.out));
  return calibration;
}

int run_calibrate(const Options& options) {
  const Result<Calibration> calibration = calibrate(options);
  if (!calibration.ok()) return fail(calibration.status());
  print_results(options, *calibration);
  return kExitOk;
}

}  // namespace

void add_calibrate_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("calibrate", "Count what a model's activations look like on texts");
  command->add_option("DIR", options->directory, "model directory with 4-bit weights")->required();
  command->add_option("-f,--file", options->files, "text to count; may be repeated; - is stdin")
      ->allow_extra_args(false)
      ->type_name("TEXT")
      ->group("Input");
  command
      ->add_option("--merge", options->merge, "add the statistics of another run; may be repeated")
      ->allow_extra_args(false)
      ->type_name("FILE")
      ->group("Input");
  command->add_option("-c,--context", options->context, "tokens per chunk")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str()
      ->group("Input");
  command->add_option("--chunks", options->max_chunks, "at most this many per text; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Input");
  command
      ->add_option("-o,--output", options->out,
                   "statistics; if it exists, the run continues from it")
      ->capture_default_str()
      ->group("Output");
  command->add_flag("--restart", options->restart, "replace the output instead of continuing")
      ->group("Output");
  command->add_option("--save-every", options->save_seconds, "seconds between saves")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Output");
  command->add_flag("--json", options->as_json, "JSON on stdout instead of the table")
      ->group("Output");
  command->add_option("--threads", options->threads, "threads; 0: all CPUs")
      ->check(CLI::Range(0, kMaxThreads))
      ->capture_default_str();
  add_progress_option(*command, options->progress);
  command->footer(
      "Counted per layer and slot (input of q,k,v; of o; of gate,up; of down) in W4A16: channels,\n"
      "K-groups and tokens by size, and the clip ratio that suits 4 bits. Sums are exact: a merge\n"
      "has the same bits as one run over both texts. Ctrl-C keeps what is done; the same command\n"
      "continues.\n"
      "\nExample:\n"
      "  nibble calibrate build/models/SmolLM2-135M-Instruct-AWQ -f TEXT -o stats.safetensors");
  command->callback([options, &exit_code] { exit_code = run_calibrate(*options); });
}

}  // namespace nibble::cli
