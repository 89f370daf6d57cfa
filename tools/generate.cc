// nibble generate: text from a prompt. The text goes to stdout as it is made, only whole characters
// at a time; everything about it goes to stderr. Not here: the loop itself (generation.h).
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "cli.h"
#include "generation.h"
#include "model/tokenizer.h"
#include "model_options.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

struct Options {
  ModelArguments model;
  std::vector<std::string> prompts, files;
  int64_t count = 128, batch = 0;
  SamplerOptions sampler;
  bool ignore_eos = false, as_json = false;
  std::string compare;
};

/// A prompt, its tokens, and the text that has come of it.
struct Answer {
  std::string prompt, text;
  std::unique_ptr<StreamDecoder> stream;
  std::optional<Divergence> divergence;
};

/// Everything that is run.
struct Setup {
  std::unique_ptr<LoadedModel> model;
  std::unique_ptr<Tokenizer> tokenizer;
  NamedPlan plan;
  std::optional<NamedPlan> compare;
  std::vector<Answer> answers;
  std::vector<Sequence> sequences;  // as answers
  GenerateTimes times;
};

void note(const std::string& text) {
  std::fputs(fmt::format("nibble: note: {}\n", text).c_str(), stderr);
}

// ---- prompts -----------------------------------------------------------------------------------

/// The model was tuned for a dialogue format that a bare prompt lacks: said, not guessed at.
void note_chat_template(const LoadedModel& model) {
  const std::filesystem::path directory(model.directory());
  std::error_code ignored;
  bool present = std::filesystem::exists(directory / "chat_template.jinja", ignored);
  const std::filesystem::path config = directory / "tokenizer_config.json";
  if (!present && std::filesystem::exists(config, ignored)) {
    const Result<std::string> text = read_text_file(config.string());
    if (!text.ok()) return;
    const Result<json> document = parse_json(*text, "tokenizer_config.json");
    present = document.ok() && document->is_object() && document->contains("chat_template");
  }
  if (present) {
    note(
        "the model has a chat template; the prompt is taken as it is, without it. "
        "scripts/render_chat.py renders one.");
  }
}

/// Tokens with what the tokenizer adds; a BOS that the text spells out already is not doubled.
Result<std::vector<int32_t>> encode_prompt(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int32_t> tokens = tokenizer.encode(text, true);
  if (tokens.empty()) {
    return Status(Code::invalid_argument, "the prompt is empty, and this tokenizer adds no token");
  }
  const std::optional<int32_t> bos = tokenizer.bos_id();
  if (bos.has_value() && tokens.size() > 1 && tokens[0] == *bos && tokens[1] == *bos) {
    note("the prompt begins with the token that begins a text; a second one is not added");
    tokens.erase(tokens.begin());
  }
  return tokens;
}

Status read_prompts(const Options& options, Setup& setup) {
  std::vector<std::string> texts = options.prompts;
  for (const std::string& file : options.files) {
    Result<std::string> text = read_text_file(file);
    if (!text.ok()) return text.status();
    texts.push_back(std::move(*text));
  }
  const ModelConfig& config = setup.model->config();
  const int64_t most = options.model.context > 0
                           ? std::min(options.model.context, config.max_positions)
                           : config.max_positions;
  for (std::string& text : texts) {
    Result<std::vector<int32_t>> tokens = encode_prompt(*setup.tokenizer, text);
    if (!tokens.ok()) return tokens.status();
    Sequence sequence;
    sequence.prompt = std::move(*tokens);
    // The last token that is chosen is not read again.
    sequence.limit =
        std::min(options.count, most - static_cast<int64_t>(sequence.prompt.size()) + 1);
    if (sequence.limit <= 0 && options.count > 0) {
      return Status(Code::invalid_argument, fmt::format("the prompt's {} tokens fill the context "
                                                        "of {}",
                                                        sequence.prompt.size(), most));
    }
    if (sequence.limit < options.count) {
      note(fmt::format("the context of {} ends after {} tokens, -n asks for {}", most,
                       sequence.limit, options.count));
    }
    Answer answer;
    answer.prompt = std::move(text);
    setup.sequences.push_back(std::move(sequence));
    setup.answers.push_back(std::move(answer));
  }
  return {};
}

// ---- setup -------------------------------------------------------------------------------------

Status prepare(const Options& options, Setup& setup) {
  Result<std::unique_ptr<LoadedModel>> opened = LoadedModel::open(options.model.directory);
  if (!opened.ok()) return opened.status();
  setup.model = std::move(*opened);
  LoadedModel& model = *setup.model;
  Result<std::vector<NamedPlan>> plans = plans_of(model, options.model);
  if (!plans.ok()) return plans.status();
  setup.plan = std::move(plans->front());
  if (!options.compare.empty()) {
    NIBBLE_TRY(check_mode(options.compare, options.model));
    Result<ModelPlan> plan = model.plan(options.compare, options.model.granularity());
    if (!plan.ok()) return plan.status();
    const auto by_batch = [](const LinearSpec& spec) {
      return spec.mode != Mode::w4a16 && spec.granularity == Granularity::tensor;
    };
    if (std::any_of(plan->specs.begin(), plan->specs.end(), by_batch) ||
        std::any_of(setup.plan.plan.specs.begin(), setup.plan.plan.specs.end(), by_batch)) {
      return Status(Code::invalid_argument,
                    "--compare runs the finished text at once, and with one activation scale per "
                    "tensor that is not what token by token gives");
    }
    setup.compare = NamedPlan{options.compare, std::move(*plan)};
  }
  Result<Tokenizer> tokenizer = Tokenizer::load(options.model.directory);
  if (!tokenizer.ok()) return tokenizer.status();
  setup.tokenizer = std::make_unique<Tokenizer>(std::move(*tokenizer));
  note_chat_template(model);
  NIBBLE_TRY(read_prompts(options, setup));

  int64_t longest = 0;
  for (const Sequence& sequence : setup.sequences) {
    longest = std::max(longest, static_cast<int64_t>(sequence.prompt.size()) + sequence.limit);
  }
  ModelOptions load_options = options.model.model_options(0, 1);
  load_options.context = std::max<int64_t>(1, std::min(longest, model.config().max_positions));
  load_options.sequences = static_cast<int64_t>(setup.sequences.size());
  if (options.batch > 0) {
    load_options.sequences = std::min(load_options.sequences, options.batch);
  }
  NIBBLE_TRY(model.load(load_options, options.model.device));
  if (model.quantized()) return model.runner().set_plan(setup.plan.plan);
  return {};
}

std::vector<int32_t> stop_tokens(const Options& options, const Setup& setup) {
  if (options.ignore_eos) return {};
  std::vector<int32_t> tokens = setup.tokenizer->eos_ids();
  if (tokens.empty()) tokens = setup.model->config().eos_tokens;
  std::sort(tokens.begin(), tokens.end());
  return tokens;
}

// ---- text --------------------------------------------------------------------------------------

constexpr const char* kSeparator = "\n--------\n";

/// Writes the answers to stdout in their order: the first unfinished one as it grows, later ones
/// when it is their turn.
class Printer {
 public:
  explicit Printer(const Setup& setup) : setup_(setup) {}

  /// False if stdout takes no more.
  bool update() {
    while (at_ < setup_.answers.size()) {
      const std::string& text = setup_.answers[at_].text;
      std::fwrite(text.data() + written_, 1, text.size() - written_, stdout);
      written_ = text.size();
      if (setup_.sequences[at_].finish == Finish::running) break;
      const bool last = at_ + 1 == setup_.answers.size();
      if (!last) std::fputs(kSeparator, stdout);
      if (last && !text.ends_with('\n')) std::fputc('\n', stdout);
      ++at_;
      written_ = 0;
    }
    return std::fflush(stdout) == 0 && std::ferror(stdout) == 0;
  }

 private:
  const Setup& setup_;
  size_t at_ = 0, written_ = 0;
};

std::string token_text(const Setup& setup, int32_t token) {
  return json(setup.tokenizer->decode({&token, 1}, false))
      .dump(-1, ' ', false, json::error_handler_t::replace);
}

// ---- reports -----------------------------------------------------------------------------------

double rate(int64_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

void print_times(const Options& options, const Setup& setup,
                 const std::vector<std::string>& kernels) {
  const GenerateTimes& t = setup.times;
  const LoadedModel& model = *setup.model;
  Table table("<<");
  table.add({"mode", mode_text(setup.plan.mode, options.model)});
  table.add({"load", fmt::format("{:.2f} s", model.load_seconds())});
  table.add({"prompt", fmt::format("{} tokens, {:.1f} tok/s", t.prompt_tokens,
                                   rate(t.prompt_tokens, t.prompt_seconds))});
  table.add({"first token", fmt::format("{:.3f} s after loading", t.prompt_seconds)});
  const size_t sequences = setup.sequences.size();
  table.add(
      {"decode", fmt::format("{} tokens, {:.1f} tok/s{}", t.decode_tokens,
                             rate(t.decode_tokens, t.decode_seconds),
                             sequences > 1 ? fmt::format(" over {} sequences", sequences) : "")});
  table.add({"kernels", fmt::format("{}", fmt::join(kernels, ", "))});
  table.add({"peak memory", bytes_text(peak_memory_bytes())});
  table.print(stderr);
}

void print_divergence(const Setup& setup, size_t i) {
  const Sequence& sequence = setup.sequences[i];
  const std::string which =
      setup.sequences.size() > 1 ? fmt::format("prompt {}: ", i + 1) : std::string();
  if (!setup.answers[i].divergence.has_value()) {
    fmt::print(stderr, "{}{} chooses the same {} tokens\n", which, setup.compare->mode,
               sequence.tokens.size());
    return;
  }
  const Divergence& d = *setup.answers[i].divergence;
  fmt::print(stderr,
             "{}{} first differs at token {} (position {}): {} chose {}, logit margin {:.4f}; {} "
             "chooses {}, margin {:.4f}\n",
             which, setup.compare->mode, d.index + 1,
             sequence.prompt.size() + static_cast<size_t>(d.index), setup.plan.mode,
             token_text(setup, d.token), d.margin, setup.compare->mode,
             token_text(setup, d.other_token), d.other_margin);
}

json divergence_json(const Setup& setup, const Sequence& sequence, const Divergence& d) {
  return {{"index", d.index},
          {"position", static_cast<int64_t>(sequence.prompt.size()) + d.index},
          {"token", d.token},
          {"text", setup.tokenizer->decode({&d.token, 1}, false)},
          {"margin", d.margin},
          {"other_token", d.other_token},
          {"other_text", setup.tokenizer->decode({&d.other_token, 1}, false)},
          {"other_margin", d.other_margin}};
}

void print_json(const Options& options, const Setup& setup,
                const std::vector<std::string>& kernels) {
  const GenerateTimes& t = setup.times;
  json document = report_header();
  document["device"] = setup.model->device();
  document["directory"] = options.model.directory;
  document["mode"] = setup.plan.mode;
  document["act"] = options.model.activations;
  document["kv"] = options.model.kv;
  document["head"] = setup.model->runner().head_name();
  document["memory"] = memory_json(setup.model->memory());
  document["peak_mem_bytes"] = peak_memory_bytes();
  document["kernels"] = kernels;
  document["timings"] = {{"load_s", setup.model->load_seconds()},
                         {"prompt_tokens", t.prompt_tokens},
                         {"prompt_s", t.prompt_seconds},
                         {"prompt_ts", rate(t.prompt_tokens, t.prompt_seconds)},
                         {"first_token_s", t.prompt_seconds},
                         {"decode_tokens", t.decode_tokens},
                         {"decode_s", t.decode_seconds},
                         {"decode_ts", rate(t.decode_tokens, t.decode_seconds)}};
  document["compare"] = setup.compare ? json(setup.compare->mode) : json(nullptr);
  document["results"] = json::array();
  for (size_t i = 0; i < setup.sequences.size(); ++i) {
    const Sequence& sequence = setup.sequences[i];
    json result = {{"prompt", setup.answers[i].prompt},
                   {"prompt_tokens", sequence.prompt},
                   {"text", setup.answers[i].text},
                   {"tokens", sequence.tokens},
                   {"finish", finish_name(sequence.finish)}};
    if (setup.compare) {
      const auto& divergence = setup.answers[i].divergence;
      result["divergence"] =
          divergence ? divergence_json(setup, sequence, *divergence) : json(nullptr);
    }
    document["results"].push_back(std::move(result));
  }
  fmt::print("{}\n", document.dump(1, ' ', false, json::error_handler_t::replace));
}

// ---- the command -------------------------------------------------------------------------------

Status compare(const Options& options, Setup& setup) {
  for (size_t i = 0; i < setup.sequences.size(); ++i) {
    SamplerOptions sampler = options.sampler;
    sampler.seed += i;  // as generate() does
    Result<std::optional<Divergence>> divergence =
        first_divergence(setup.model->runner(), setup.plan.plan, setup.compare->plan,
                         setup.sequences[i], sampler, interrupted);
    if (!divergence.ok()) return divergence.status();
    setup.answers[i].divergence = *divergence;
  }
  return {};
}

Status run(const Options& options, Setup& setup) {
  for (size_t i = 0; i < setup.answers.size(); ++i) {
    // The prompt goes first, unprinted: how a token reads can depend on those before it.
    auto stream = std::make_unique<StreamDecoder>(*setup.tokenizer, true);
    for (const int32_t token : setup.sequences[i].prompt) (void)stream->push(token);
    setup.answers[i].stream = std::move(stream);
  }
  Printer printer(setup);
  GenerateOptions generation;
  generation.sampler = options.sampler;
  generation.stop_tokens = stop_tokens(options, setup);
  generation.stop = interrupted;
  generation.pass_tokens = options.model.pass_tokens();
  generation.batch = options.batch;
  generation.on_token = [&](size_t i, int32_t token) {
    setup.answers[i].text += setup.answers[i].stream->push(token);
    return options.as_json || printer.update();
  };
  const Status status = generate(setup.model->runner(), setup.sequences, generation, setup.times);
  for (Answer& answer : setup.answers) answer.text += answer.stream->finish();
  if (!options.as_json) printer.update();
  return status;
}

int run_generate(const Options& options) {
  if (options.prompts.empty() && options.files.empty()) {
    return fail(Status(Code::invalid_argument,
                       "a prompt is needed: -p TEXT or -f FILE.\nSee 'nibble generate --help'."));
  }
  Setup setup;
  if (const Status status = prepare(options, setup); !status.ok()) return fail(status);
  if (const Status status = run(options, setup); !status.ok()) return fail(status);
  const std::vector<std::string> kernels = setup.model->runner().kernels();  // before --compare
  if (!interrupted() && setup.compare.has_value()) {
    const Status status = compare(options, setup);
    if (!status.ok() && status.code() != Code::interrupted) return fail(status);
  }
  if (options.as_json) print_json(options, setup, kernels);
  print_times(options, setup, kernels);
  if (setup.compare.has_value() && !interrupted()) {
    for (size_t i = 0; i < setup.sequences.size(); ++i) print_divergence(setup, i);
  }
  return interrupted() ? kExitInterrupted : kExitOk;
}

void add_sampling_options(CLI::App& command, Options& options) {
  command.add_option("-n,--n-predict", options.count, "tokens to generate at most")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 30))
      ->capture_default_str()
      ->group("Sampling");
  command.add_option("--temp", options.sampler.temperature, "temperature; 0: the most probable")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str()
      ->group("Sampling");
  command.add_option("--top-k", options.sampler.top_k, "of this many tokens; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Sampling");
  command
      .add_option("--top-p", options.sampler.top_p,
                  "of the most probable tokens that sum up to this")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->group("Sampling");
  command
      .add_option("--seed", options.sampler.seed, "of the random choice; prompt i uses seed + i")
      ->capture_default_str()
      ->group("Sampling");
  command.add_flag("--ignore-eos", options.ignore_eos, "go on after end-of-text tokens")
      ->group("Sampling");
}

}  // namespace

void add_generate_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text");
  add_model_arguments(*command, options->model, false);
  command
      ->add_option("-p,--prompt", options->prompts,
                   "prompt, taken as it is; several are decoded together")
      ->allow_extra_args(false)
      ->type_name("TEXT")
      ->group("Prompt");
  command->add_option("-f,--file", options->files, "the same from a file; - is standard input")
      ->allow_extra_args(false)
      ->type_name("FILE")
      ->group("Prompt");
  command
      ->add_option("-c,--context", options->model.context,
                   "longest text, prompt included; 0: what the prompt and -n need")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Model");
  command
      ->add_option("-b,--batch", options->batch,
                   "prompts that are decoded together at most, the others wait; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str()
      ->group("Model");
  add_sampling_options(*command, *options);
  command
      ->add_option("--compare", options->compare,
                   "say on stderr where this mode would first have chosen another token")
      ->check(CLI::IsMember({"w4a16", "w4a8", "w4a8-fp8", "w4a4", "auto"}))
      ->type_name("MODE")
      ->group("Output");
  command->add_flag("--json", options->as_json, "print one JSON document instead of the text")
      ->group("Output");
  command->footer(
      "Ctrl-C ends the text; what was printed stays, and the exit code is 130.\n"
      "\nExample:\n  nibble generate DIR -p \"The capital of France is\" -n 32 --compare w4a16");
  command->callback([options, &exit_code] { exit_code = run_generate(*options); });
}

}  // namespace nibble::cli
