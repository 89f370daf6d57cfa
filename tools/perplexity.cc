// nibble perplexity: how well a model predicts texts, and against a reference how much of that a
// mode costs. Protocol, names and order of the output are those of llama.cpp's perplexity tool; the
// reference is run here, beside what it is compared with, instead of being read from a file.
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <memory>

#include "cli.h"
#include "format/output_file.h"
#include "model_options.h"
#include "text.h"
#include "text_eval.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

struct Options {
  ModelArguments model;
  std::vector<std::string> files;
  std::string reference;  // a mode or a directory
  EvalOptions eval;
  std::optional<double> max_ppl_ratio, max_kld;
  bool as_json = false;
  std::string json_file;
  ProgressMode progress = ProgressMode::automatic;
};

/// One mode on one text, or on all of them together.
struct Row {
  const EvalSubject* subject = nullptr;
  std::string text;
  bool pooled = false;
  EvalResult result;
};

/// Everything that is run.
struct Setup {
  std::unique_ptr<LoadedModel> model, reference_model;  // the latter only if it is another one
  std::vector<EvalSubject> subjects;
  std::optional<EvalSubject> reference;
  std::vector<EvalText> texts;
};

bool is_mode(const std::string& name) {
  return modes_by_name().contains(name) || name == "auto" || name == kMode16Bit;
}

Status open_reference(const Options& options, Setup& setup) {
  if (options.reference.empty()) return {};
  if (is_mode(options.reference)) {
    NIBBLE_TRY(check_mode(options.reference, options.model));
    Result<ModelPlan> plan = setup.model->plan(options.reference, options.model.granularity());
    if (!plan.ok()) return plan.status();
    setup.reference = EvalSubject{nullptr, std::move(*plan), options.reference};
    return {};
  }
  Result<std::unique_ptr<LoadedModel>> opened = LoadedModel::open(options.reference);
  if (!opened.ok()) return opened.status();
  setup.reference_model = std::move(*opened);
  // Another quantized checkpoint is a reference in its most exact mode.
  const std::string mode = setup.reference_model->quantized() ? "w4a16" : kMode16Bit;
  Result<ModelPlan> plan = setup.reference_model->plan(mode, std::nullopt);
  if (!plan.ok()) return plan.status();
  setup.reference =
      EvalSubject{nullptr, std::move(*plan), fmt::format("{} ({})", options.reference, mode)};
  if (setup.reference_model->config().vocab == setup.model->config().vocab) return {};
  return Status(Code::unsupported,
                fmt::format("{} and {} have different vocabularies ({} and {} tokens)",
                            options.model.directory, options.reference, setup.model->config().vocab,
                            setup.reference_model->config().vocab));
}

/// Scores are of tokens: the reference must cut the text into the same ones.
Status check_reference_tokens(const LoadedModel& reference, const Tokenizer& tokenizer,
                              const std::string& text) {
  const Result<Tokenizer> other = Tokenizer::load(reference.directory());
  if (other.status().code() == Code::io_error) return {};  // it has none: taken to be the same
  if (!other.ok()) return other.status();
  if (other->encode(text, true) == tokenizer.encode(text, true)) return {};
  return Status(Code::unsupported, fmt::format("{} has another tokenizer: its probabilities are of "
                                               "other tokens",
                                               printable(reference.directory())));
}

Status read_texts(const Options& options, Setup& setup) {
  Result<Tokenizer> tokenizer = Tokenizer::load(options.model.directory);
  if (!tokenizer.ok()) return tokenizer.status();
  for (const std::string& file : options.files) {
    const Result<std::string> text = read_text_file(file);
    if (!text.ok()) return text.status();
    Result<EvalText> chunks = make_eval_text(*tokenizer, file, *text, options.eval);
    if (!chunks.ok()) return chunks.status();
    setup.texts.push_back(std::move(*chunks));
    if (setup.reference_model == nullptr) continue;
    NIBBLE_TRY(check_reference_tokens(*setup.reference_model, *tokenizer, *text));
  }
  return {};
}

/// All that can be refused is refused before weights are read.
Status prepare(const Options& options, Setup& setup) {
  Result<std::unique_ptr<LoadedModel>> opened = LoadedModel::open(options.model.directory);
  if (!opened.ok()) return opened.status();
  setup.model = std::move(*opened);
  Result<std::vector<NamedPlan>> plans = plans_of(*setup.model, options.model);
  if (!plans.ok()) return plans.status();
  for (NamedPlan& plan : *plans) {
    setup.subjects.push_back({nullptr, std::move(plan.plan), plan.mode});
  }
  NIBBLE_TRY(open_reference(options, setup));
  NIBBLE_TRY(read_texts(options, setup));

  const ModelOptions load_options = options.model.model_options(options.eval.context, 1);
  NIBBLE_TRY(setup.model->load(load_options, options.model.device));
  if (setup.reference_model != nullptr) {
    NIBBLE_TRY(setup.reference_model->load(load_options, options.model.device));
  }
  for (EvalSubject& subject : setup.subjects) subject.model = &setup.model->runner();
  if (setup.reference.has_value()) {
    setup.reference->model = setup.reference_model != nullptr ? &setup.reference_model->runner()
                                                              : &setup.model->runner();
  }
  return {};
}

Result<std::vector<Row>> run_texts(const Options& options, Setup& setup) {
  int64_t chunks = 0;
  for (const EvalText& text : setup.texts) chunks += static_cast<int64_t>(text.chunks.size());
  Progress progress(options.progress, "chunk", chunks);
  std::vector<Row> rows;
  for (const EvalText& text : setup.texts) {
    Result<std::vector<EvalResult>> results = evaluate(
        text, setup.reference.has_value() ? &*setup.reference : nullptr, setup.subjects,
        options.eval, interrupted, [&](int64_t) { progress.advance(printable(text.name)); });
    if (!results.ok()) return results.status();
    for (size_t i = 0; i < results->size(); ++i) {
      rows.push_back({&setup.subjects[i], text.name, false, std::move((*results)[i])});
    }
  }
  const size_t single = rows.size();
  for (const EvalSubject& subject : setup.subjects) {
    std::vector<const EvalResult*> results;
    for (size_t i = 0; i < single; ++i) {
      if (rows[i].subject == &subject) results.push_back(&rows[i].result);
    }
    Row row{&subject, "", true, pool(results)};  // before `rows` moves what it points to
    rows.push_back(std::move(row));
  }
  return rows;
}

void print_paired(const EvalResult& r) {
  fmt::print("====== Perplexity statistics ======\n");
  fmt::print("Mean PPL(Q)                   : {:10.6f} ± {:10.6f}\n", r.ppl, r.ppl_err);
  fmt::print("Mean PPL(base)                : {:10.6f} ± {:10.6f}\n", r.reference_ppl,
             r.reference_ppl_err);
  fmt::print("Cor(ln(PPL(Q)), ln(PPL(base))): {:6.2f}%\n", r.correlation);
  fmt::print("Mean ln(PPL(Q)/PPL(base))     : {:10.6f} ± {:10.6f}\n", r.log_ratio, r.log_ratio_err);
  fmt::print("Mean PPL(Q)/PPL(base)         : {:10.6f} ± {:10.6f}\n", r.ppl_ratio, r.ppl_ratio_err);
  fmt::print("Mean PPL(Q)-PPL(base)         : {:10.6f} ± {:10.6f}\n\n", r.ppl_diff, r.ppl_diff_err);

  fmt::print("====== KL divergence statistics ======\n");
  fmt::print("Mean    KLD: {:10.6f} ± {:10.6f}\n", r.kld_mean, r.kld_err);
  const auto kld = [](const char* name, double value) {
    fmt::print("{:<7} KLD: {:10.6f}\n", name, value);
  };
  kld("Maximum", r.kld_max);
  kld("99.9%", r.kld_p999);
  kld("99.0%", r.kld_p99);
  kld("95.0%", r.kld_p95);
  kld("90.0%", r.kld_p90);
  kld("Median", r.kld_median);
  kld("10.0%", r.kld_p10);
  kld(" 5.0%", r.kld_p05);
  kld(" 1.0%", r.kld_p01);
  kld(" 0.1%", r.kld_p001);
  kld("Minimum", r.kld_min);

  fmt::print("\n====== Token probability statistics ======\n");
  fmt::print("Mean    Δp: {:6.3f} ± {:5.3f} %\n", r.mean_dp, r.mean_dp_err);
  const auto dp = [](const char* name, double value) {
    fmt::print("{:<7} Δp: {:6.3f}%\n", name, value);
  };
  dp("Maximum", r.dp_max);
  dp("99.9%", r.dp_p999);
  dp("99.0%", r.dp_p99);
  dp("95.0%", r.dp_p95);
  dp("90.0%", r.dp_p90);
  dp("75.0%", r.dp_p75);
  dp("Median", r.dp_median);
  dp("25.0%", r.dp_p25);
  dp("10.0%", r.dp_p10);
  dp(" 5.0%", r.dp_p05);
  dp(" 1.0%", r.dp_p01);
  dp(" 0.1%", r.dp_p001);
  dp("Minimum", r.dp_min);
  fmt::print("RMS Δp    : {:6.3f} ± {:5.3f} %\n", r.rms_dp, r.rms_dp_err);
  fmt::print("Same top p: {:6.3f} ± {:5.3f} %\n\n", r.same_top, r.same_top_err);
}

void print_row(const Options& options, const Setup& setup, const Row& row) {
  fmt::print(
      "{} on {}: {} tokens scored, chunks of {}", mode_text(row.subject->name, options.model),
      row.pooled ? "all texts" : printable(row.text), row.result.tokens, options.eval.context);
  if (setup.reference.has_value()) fmt::print("; base: {}", printable(setup.reference->name));
  fmt::print("\n");
  if (row.result.paired) {
    print_paired(row.result);
  } else {
    fmt::print("Final estimate: PPL = {:.4f} +/- {:.5f}\n\n", row.result.ppl, row.result.ppl_err);
  }
}

/// JSON has no NaN or infinity.
json number(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }

json to_json(const Options& options, const Setup& setup, const Row& row) {
  const EvalResult& r = row.result;
  json document = {{"mode", row.subject->name},
                   {"act", options.model.activations},
                   {"reference", setup.reference ? json(setup.reference->name) : json(nullptr)},
                   {"text", row.pooled ? json(nullptr) : json(row.text)},
                   {"tokens", r.tokens},
                   {"ppl", number(r.ppl)},
                   {"ppl_err", number(r.ppl_err)}};
  document["kernels"] = setup.model->runner().kernels(&row.subject->plan);
  const std::pair<const char*, double> paired[] = {{"reference_ppl", r.reference_ppl},
                                                   {"reference_ppl_err", r.reference_ppl_err},
                                                   {"correlation", r.correlation},
                                                   {"log_ratio", r.log_ratio},
                                                   {"log_ratio_err", r.log_ratio_err},
                                                   {"ppl_ratio", r.ppl_ratio},
                                                   {"ppl_ratio_err", r.ppl_ratio_err},
                                                   {"ppl_diff", r.ppl_diff},
                                                   {"ppl_diff_err", r.ppl_diff_err},
                                                   {"kld_mean", r.kld_mean},
                                                   {"kld_err", r.kld_err},
                                                   {"kld_median", r.kld_median},
                                                   {"kld_min", r.kld_min},
                                                   {"kld_p001", r.kld_p001},
                                                   {"kld_p01", r.kld_p01},
                                                   {"kld_p05", r.kld_p05},
                                                   {"kld_p10", r.kld_p10},
                                                   {"kld_p90", r.kld_p90},
                                                   {"kld_p95", r.kld_p95},
                                                   {"kld_p99", r.kld_p99},
                                                   {"kld_p999", r.kld_p999},
                                                   {"kld_max", r.kld_max},
                                                   {"same_top", r.same_top},
                                                   {"same_top_err", r.same_top_err},
                                                   {"mean_dp", r.mean_dp},
                                                   {"mean_dp_err", r.mean_dp_err},
                                                   {"rms_dp", r.rms_dp},
                                                   {"rms_dp_err", r.rms_dp_err},
                                                   {"dp_median", r.dp_median},
                                                   {"dp_min", r.dp_min},
                                                   {"dp_max", r.dp_max}};
  for (const auto& [name, value] : paired)
    document[name] = r.paired ? number(value) : json(nullptr);
  return document;
}

/// One line per gate that fails, naming it and the figure. NaN fails every gate.
std::vector<std::string> failed_gates(const Options& options, const std::vector<Row>& rows) {
  std::vector<std::string> failures;
  for (const Row& row : rows) {
    if (row.pooled && options.files.size() == 1) continue;  // the same once more
    const auto check = [&](const char* gate, const char* figure, double value,
                           const std::optional<double>& limit) {
      if (!limit.has_value() || value <= *limit) return;
      failures.push_back(fmt::format("{}: {} on {}: {} {:.6f} is above {}", gate, row.subject->name,
                                     row.pooled ? "all texts" : printable(row.text), figure, value,
                                     *limit));
    };
    check("--max-ppl-ratio", "PPL ratio", row.result.ppl_ratio, options.max_ppl_ratio);
    check("--max-kld", "mean KLD", row.result.kld_mean, options.max_kld);
  }
  return failures;
}

std::string json_text(const Options& options, const Setup& setup, const std::vector<Row>& rows,
                      const std::vector<std::string>& failures) {
  json document = report_header();
  // The pooled figures of the first mode also stand at the top, for scripts that ask for one mode.
  for (const Row& row : rows) {
    if (!row.pooled || row.subject != &setup.subjects.front()) continue;
    document.update(to_json(options, setup, row));
    break;
  }
  document["device"] = setup.model->device();
  document["directory"] = options.model.directory;
  document["context"] = options.eval.context;
  document["kv"] = options.model.kv;
  document["head"] = options.model.head;
  document["memory"] = memory_json(setup.model->memory());
  document["peak_mem_bytes"] = peak_memory_bytes();
  document["failed_gates"] = failures;
  document["results"] = document["pooled"] = json::array();
  for (const Row& row : rows) {
    document[row.pooled ? "pooled" : "results"].push_back(to_json(options, setup, row));
  }
  return document.dump(1, ' ', false, json::error_handler_t::replace) + '\n';
}

int run_perplexity(Options options) {
  if ((options.max_ppl_ratio || options.max_kld) && options.reference.empty()) {
    return fail(Status(Code::invalid_argument,
                       "--max-ppl-ratio and --max-kld compare with a --reference, and none is "
                       "given.\nSee 'nibble perplexity --help'."));
  }
  if (options.model.context > 0) options.eval.context = options.model.context;
  options.eval.threads = options.model.threads;
  Setup setup;
  if (const Status status = prepare(options, setup); !status.ok()) return fail(status);
  const Result<std::vector<Row>> rows = run_texts(options, setup);
  if (!rows.ok()) return fail(rows.status());

  const std::vector<std::string> failures = failed_gates(options, *rows);
  const std::string document = json_text(options, setup, *rows, failures);
  if (options.as_json) {
    fmt::print("{}", document);
  } else {
    for (const Row& row : *rows) {
      if (!row.pooled || options.files.size() > 1) print_row(options, setup, row);
    }
  }
  if (!options.json_file.empty()) {  // after the tables: a full disk must not cost them
    const Status written = replace_file(options.json_file, [&](OutputFile& file) {
      return file.write(document.data(), document.size());
    });
    if (!written.ok()) return fail(written);
  }
  if (rows->front().result.tokens < 100) {
    fmt::print(stderr,
               "nibble: note: fewer than 100 tokens were scored; the figures mean little\n");
  }
  fmt::print(stderr, "kernels: {}; peak memory {}\n",
             fmt::join(setup.model->runner().kernels(), ", "), bytes_text(peak_memory_bytes()));
  for (const std::string& failure : failures) {
    fmt::print(stderr, "nibble: gate failed: {}\n", failure);
  }
  return failures.empty() ? kExitOk : kExitFailed;
}

}  // namespace

void add_perplexity_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  options->model.context = options->eval.context;
  CLI::App* command = app.add_subcommand(
      "perplexity", "Perplexity of texts, and what a mode costs against a reference");
  add_model_arguments(*command, options->model, true);
  command->add_option("-f,--file", options->files, "text to predict; - is standard input")
      ->required()
      ->allow_extra_args(false)
      ->type_name("TEXT")
      ->group("Text");
  command->add_option("-c,--context", options->model.context, "tokens per chunk")
      ->check(CLI::Range(4, 1 << 20))
      ->capture_default_str()
      ->group("Text");
  command->add_option("--chunks", options->eval.max_chunks, "at most this many per text; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Text");
  command
      ->add_option("--reference", options->reference,
                   "what to compare with: a mode of the same model, or a directory")
      ->type_name("MODE|DIR")
      ->group("Comparison");
  command
      ->add_option("--max-ppl-ratio", options->max_ppl_ratio,
                   "gate: exit 1 if PPL / reference PPL is above this")
      ->type_name("RATIO")
      ->group("Comparison");
  command
      ->add_option("--max-kld", options->max_kld,
                   "gate: exit 1 if the mean KL divergence is above this")
      ->type_name("KLD")
      ->group("Comparison");
  command->add_flag("--json", options->as_json, "print one JSON document")->group("Output");
  command->add_option("--json-file", options->json_file, "also write that document to a file")
      ->group("Output");
  add_progress_option(*command, options->progress);
  command->footer(
      "As llama.cpp does it: the text is cut into chunks, each run from an empty cache, its "
      "second\n"
      "half scored; BOS replaces the first token of a chunk if the tokenizer adds one.\n"
      "\nExit codes: 0 ok, 1 a gate failed, 3 the mode does not fit the model, 4 bad file.\n"
      "\nExample:\n  nibble perplexity DIR -f wiki.test.raw --mode w4a8,w4a4 --reference w4a16 "
      "--max-kld 0.01");
  command->callback([options, &exit_code] { exit_code = run_perplexity(*options); });
}

}  // namespace nibble::cli
