// nibble bench model: reading a prompt and decoding, in llama-bench's terms and names, every mode
// in turn within one run. Decoding is also set against what the memory could at best deliver.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <random>

#include "base/cpu_features.h"
#include "bench_model_cuda.h"
#include "cli.h"
#include "model_options.h"
#include "probe_memory.h"
#include "text.h"
#include "timing.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

constexpr size_t kProbeBytes = size_t{1} << 30, kProbeSliceBytes = size_t{16} << 20;
constexpr int kProbeSlices = 4;  // timed after every run; short ones, to fit between interruptions

struct Options {
  ModelArguments model;
  std::vector<int64_t> prompts = {512}, generated = {128}, batches = {1};
  int repetitions = 5;
  std::string output = "md";
  ProgressMode progress = ProgressMode::automatic;
};

/// "pp512": a prompt of 512 tokens. "tg128": 128 tokens decoded one by one; "tg128@b8": by 8
/// sequences together.
struct Test {
  int64_t n_prompt = 0, n_gen = 0, batch = 1;

  std::string name() const {
    if (n_gen == 0) return fmt::format("pp{}", n_prompt);
    return batch == 1 ? fmt::format("tg{}", n_gen) : fmt::format("tg{}@b{}", n_gen, batch);
  }
  int64_t tokens() const { return (n_prompt + n_gen) * batch; }
};

/// One mode on one test.
struct Row {
  Test test;
  const NamedPlan* plan = nullptr;
  bool batch_invariant = false;
  Samples samples = {};
  std::vector<OperationTime> operations = {};  // of one pass; on a GPU

  double avg(double (*value)(const Row&, double us)) const {
    double sum = 0;
    for (const double us : samples.microseconds) sum += value(*this, us);
    return sum / static_cast<double>(samples.microseconds.size());
  }
  double stddev(double (*value)(const Row&, double us)) const {
    if (samples.microseconds.size() < 2) return 0;
    const double mean = avg(value);
    double sum = 0;
    for (const double us : samples.microseconds) {
      sum += (value(*this, us) - mean) * (value(*this, us) - mean);
    }
    return std::sqrt(sum / static_cast<double>(samples.microseconds.size() - 1));
  }
  static double tokens_per_second(const Row& row, double us) {
    return static_cast<double>(row.test.tokens()) / us * 1e6;
  }
  static double nanoseconds(const Row&, double us) { return us * 1e3; }
};

std::vector<Test> tests_of(const Options& options) {
  std::vector<Test> tests;
  for (const int64_t n : options.prompts) {
    if (n > 0) tests.push_back({.n_prompt = n});
  }
  for (const int64_t batch : options.batches) {
    for (const int64_t n : options.generated) {
      if (n > 0) tests.push_back({.n_gen = n, .batch = batch});
    }
  }
  return tests;
}

/// Bytes of weights, head, keys and values that decoding must read at least once.
double decode_bytes(const Runner& model, const Test& test, Dtype kv_dtype) {
  const ModelConfig& config = model.config();
  const double position_bytes =
      2.0 * static_cast<double>(config.kv_heads * config.head_dim * dtype_bytes(kv_dtype));
  double positions = 0;  // that queries see, over all layers and steps
  for (int64_t step = 1; step <= test.n_gen; ++step) {
    for (const int64_t window : config.window) {
      positions += static_cast<double>(window > 0 ? std::min(window, step) : step);
    }
  }
  return static_cast<double>(test.n_gen) *
             static_cast<double>(model.weight_bytes() + model.head_bytes()) +
         static_cast<double>(test.batch) * positions * position_bytes;
}

uint64_t parameters(const ModelConfig& c) {
  const int64_t attention = (2 * c.heads + 2 * c.kv_heads) * c.head_dim * c.hidden;
  return static_cast<uint64_t>(c.vocab * c.hidden * (c.tied_head ? 1 : 2) +
                               c.layers * (attention + 3 * c.hidden * c.intermediate));
}

class Bench {
 public:
  Bench(LoadedModel& loaded, int64_t pass_tokens) : loaded_(loaded), pass_tokens_(pass_tokens) {}

  /// Runs the test once, greedily: random prompts, as llama-bench; what is decoded follows itself.
  Status run(const NamedPlan& plan, const Test& test, bool batch_invariant, double* microseconds) {
    Runner& model = loaded_.runner_of(plan.mode);
    model.set_batch_invariant(batch_invariant);
    if (model.quantized() && set_ != &plan) NIBBLE_TRY(model.set_plan(plan.plan));
    if (model.quantized()) set_ = &plan;
    caches_.clear();
    for (int64_t i = 0; i < test.batch; ++i) caches_.push_back(model.make_cache());
    std::mt19937 random(1);
    std::vector<int32_t> tokens(static_cast<size_t>(std::max(test.n_prompt, test.batch)));
    for (int32_t& token : tokens) {
      token = static_cast<int32_t>(random() % static_cast<uint64_t>(model.config().vocab));
    }
    if (test.n_gen > 0) {  // what a device makes for the first steps of a batch is not timed
      Test step = test;
      step.n_gen = std::min<int64_t>(3, test.n_gen);
      NIBBLE_TRY(decode(model, step, tokens));
      for (auto& cache : caches_) cache->set_length(0);
      NIBBLE_TRY(model.settle());
    }
    const double start = now_seconds();
    NIBBLE_TRY(test.n_gen > 0 ? decode(model, test, tokens) : read_prompt(model, test, tokens));
    *microseconds = (now_seconds() - start) * 1e6;
    return model.settle();  // not in the time of what comes next
  }

  /// Where the time of one pass of the test goes: its first one of a prompt, its last one of
  /// decoding.
  Result<std::vector<OperationTime>> profile(const NamedPlan& plan, const Test& test,
                                             bool batch_invariant) {
    double ignored = 0;
    Test before = test;
    before.n_gen = std::max<int64_t>(0, test.n_gen - 1);
    before.n_prompt = test.n_gen > 0 ? 0 : std::min(pass_tokens_, test.n_prompt);
    NIBBLE_TRY(run(plan, before, batch_invariant, &ignored));
    std::vector<int32_t> tokens(static_cast<size_t>(std::max(before.n_prompt, test.batch)), 1);
    std::vector<SequenceItem> items;
    if (test.n_gen == 0) {
      caches_[0]->set_length(0);
      items.push_back({caches_[0].get(), tokens});
    } else {
      for (auto& cache : caches_) items.push_back({cache.get(), {tokens.data(), 1}});
    }
    return loaded_.runner_of(plan.mode).profile(items);
  }

 private:
  Status read_prompt(Runner& model, const Test& test, const std::vector<int32_t>& tokens) {
    int32_t next = 0;
    for (int64_t at = 0; at < test.n_prompt; at += pass_tokens_) {
      const int64_t count = std::min(pass_tokens_, test.n_prompt - at);
      const SequenceItem item{caches_[0].get(), {tokens.data() + at, static_cast<size_t>(count)}};
      const bool last = at + count == test.n_prompt;
      NIBBLE_TRY(last ? model.greedy({&item, 1}, {&next, 1})
                      : model.forward({&item, 1}, HiddenRows::none, nullptr));
    }
    return {};
  }

  Status decode(Runner& model, const Test& test, std::vector<int32_t> tokens) {
    std::vector<SequenceItem> items(static_cast<size_t>(test.batch));
    for (size_t i = 0; i < items.size(); ++i) items[i] = {caches_[i].get(), {&tokens[i], 1}};
    for (int64_t step = 0; step < test.n_gen; ++step) {
      if (interrupted()) return Status(Code::interrupted, "interrupted");
      NIBBLE_TRY(model.greedy(items, tokens));
    }
    return {};
  }

  LoadedModel& loaded_;
  int64_t pass_tokens_;
  const NamedPlan* set_ = nullptr;  // a plan that is set again would void what was prepared for it
  std::vector<std::unique_ptr<SequenceCache>> caches_;
};

/// What holds for all rows of one run.
struct Run {
  const Options* options = nullptr;
  LoadedModel* loaded = nullptr;
  int threads = 0;
  uint64_t peak_memory = 0;  // of model and tests, not of the bandwidth probe
  double read_gb_per_s = 0;  // measured in the same rounds
  TensorPeak peak;           // of a GPU

  const Runner& runner_of(const Row& row) const { return loaded->runner_of(row.plan->mode); }
  bool on_gpu() const { return options->model.device == "cuda"; }
  const char* backend() const { return on_gpu() ? "CUDA" : "CPU"; }

  /// Share of what tensor cores could at best deliver that reading a prompt made use of, counting
  /// products with weights alone; 0 where it has no meaning.
  double tensor_share(const Row& row) const {
    const bool integers = row.plan->mode != kMode16Bit && row.plan->mode != "w4a16";
    const double tops = integers ? peak.int8_tops : peak.half_tops;
    const double us = row.samples.median();
    if (row.test.n_gen > 0 || tops <= 0 || us <= 0) return 0;
    const ModelConfig& config = loaded->config();
    const uint64_t head = static_cast<uint64_t>(config.vocab * config.hidden);
    const uint64_t weights = parameters(config) - head * (config.tied_head ? 1 : 2);
    return 2 * static_cast<double>(weights) * static_cast<double>(row.test.n_prompt) / us * 1e-6 /
           tops;
  }

  /// Share of the read bandwidth that decoding made use of; 0 where it has no meaning.
  double byte_limit_share(const Row& row) const {
    const double us = row.samples.median();
    if (row.test.n_gen == 0 || read_gb_per_s <= 0 || us <= 0) return 0;
    const Dtype kv = options->model.model_options(0, 1).kv_dtype;
    return decode_bytes(runner_of(row), row.test, kv) / us * 1e-3 / read_gb_per_s;
  }
  std::string model_name() const {
    const std::filesystem::path path(loaded->directory());
    return printable((path.has_filename() ? path : path.parent_path()).filename().string());
  }
  std::vector<std::string> kernels_of_row(const Row& row) const {
    return runner_of(row).kernels(&row.plan->plan);
  }
};

json operations_json(const Row& row) {
  json list = json::array();
  for (const OperationTime& time : row.operations) {
    list.push_back({{"name", time.name}, {"us", time.microseconds}, {"launches", time.launches}});
  }
  return list;
}

json to_json(const Run& run, const Row& row) {
  std::vector<int64_t> samples_ns;
  std::vector<double> samples_ts;
  for (const double us : row.samples.microseconds) {
    samples_ns.push_back(std::llround(us * 1e3));
    samples_ts.push_back(Row::tokens_per_second(row, us));
  }
  const double share = run.byte_limit_share(row);
  return {{"test", row.test.name()},
          {"mode", row.plan->mode},
          {"act", run.options->model.activations},
          {"n_prompt", row.test.n_prompt},
          {"n_gen", row.test.n_gen},
          {"batch", row.test.batch},
          {"batch_invariant", row.batch_invariant || !run.on_gpu()},
          {"avg_ns", std::llround(row.avg(Row::nanoseconds))},
          {"stddev_ns", std::llround(row.stddev(Row::nanoseconds))},
          {"avg_ts", row.avg(Row::tokens_per_second)},
          {"stddev_ts", row.stddev(Row::tokens_per_second)},
          {"median_ts", Row::tokens_per_second(row, row.samples.median())},
          {"samples_ns", samples_ns},
          {"samples_ts", samples_ts},
          {"byte_limit_share", share > 0 ? json(share) : json(nullptr)},
          {"tensor_share", run.tensor_share(row) > 0 ? json(run.tensor_share(row)) : json(nullptr)},
          {"operations", operations_json(row)},
          {"read_gb_per_s", run.read_gb_per_s > 0 ? json(run.read_gb_per_s) : json(nullptr)},
          {"kernels", run.kernels_of_row(row)},
          {"peak_mem_bytes", run.peak_memory},
          {"threads", run.threads},
          {"device", run.loaded->device()},
          {"model_filename", run.loaded->directory()},
          {"model_type", architecture_name(run.loaded->config().architecture)},
          {"model_size", run.loaded->checkpoint().bytes()},
          {"model_n_params", parameters(run.loaded->config())},
          {"weight_bytes", run.runner_of(row).weight_bytes()},
          {"head_bytes", run.runner_of(row).head_bytes()},
          {"head", run.runner_of(row).head_name()},
          {"type_k", run.options->model.kv},
          {"type_v", run.options->model.kv}};
}

std::string dump(const json& document, int indent) {
  return document.dump(indent, ' ', false, json::error_handler_t::replace);  // a path: any byte
}

void print_csv(const Run& run, const std::vector<Row>& rows) {
  fmt::print(
      "model,model_size,model_n_params,backend,threads,mode,test,n_prompt,n_gen,batch,avg_ns,"
      "stddev_ns,avg_ts,stddev_ts,median_ts,byte_limit_share,peak_mem_bytes,kernels,"
      "batch_invariant\n");
  for (const Row& row : rows) {
    const json j = to_json(run, row);
    const double share = run.byte_limit_share(row);
    fmt::print("\"{}\",{},{},{},{},{},{},{},{},{},{},{},{:.3f},{:.3f},{:.3f},{},{},{},{}\n",
               run.model_name(), j["model_size"].get<uint64_t>(),
               j["model_n_params"].get<uint64_t>(), run.backend(), run.threads, row.plan->mode,
               row.test.name(), row.test.n_prompt, row.test.n_gen, row.test.batch,
               j["avg_ns"].get<int64_t>(), j["stddev_ns"].get<int64_t>(), j["avg_ts"].get<double>(),
               j["stddev_ts"].get<double>(), j["median_ts"].get<double>(),
               share > 0 ? fmt::format("{:.4f}", share) : "", run.peak_memory,
               fmt::join(run.kernels_of_row(row), " "), j["batch_invariant"].get<bool>());
  }
}

/// Where the time of one pass goes, mode by mode; timing keeps operations from overlapping.
void print_operations(const Run& run, const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    if (row.operations.empty()) continue;
    double sum = 0;
    for (const OperationTime& time : row.operations) sum += time.microseconds;
    const double share = run.tensor_share(row);
    fmt::print("{}{} {}: one pass by operations, {:.1f} us in all{}\n", row.plan->mode,
               row.batch_invariant ? ", batch-invariant," : "", row.test.name(), sum,
               share > 0 ? fmt::format("; {:.0f} % of the tensor cores' peak", 100 * share) : "");
    Table table("<>>>");
    table.add({"  operation", "launches", "us", "share"});
    for (const OperationTime& time : row.operations) {
      table.add({"  " + time.name, fmt::format("{}", time.launches),
                 fmt::format("{:.1f}", time.microseconds),
                 fmt::format("{:.1f} %", 100 * time.microseconds / sum)});
    }
    table.print(stdout);
    fmt::print("\n");
  }
}

/// What the same bits alone and beside others cost: rows of a test and mode come in pairs.
void print_invariance_cost(const std::vector<Row>& rows) {
  for (size_t i = 1; i < rows.size(); ++i) {
    if (!rows[i].batch_invariant || rows[i - 1].plan != rows[i].plan) continue;
    const double ratio = rows[i].samples.median() / rows[i - 1].samples.median();
    fmt::print("batch invariance of {} costs {} {:+.1f} % of its time\n", rows[i].plan->mode,
               rows[i].test.name(), 100 * (ratio - 1));
  }
}

void print_markdown(const Run& run, const std::vector<Row>& rows) {
  fmt::print("{}\n", run.loaded->device());
  if (run.read_gb_per_s > 0) {
    fmt::print(
        "read bandwidth {:.1f} GB/s in the same rounds; limit: weights, head, keys and "
        "values read once per step\n",
        run.read_gb_per_s);
  }
  fmt::print(
      "\n| model | size | params | backend | threads | mode | test | t/s | median t/s | of byte "
      "limit |\n|---|---:|---:|---|---:|---|---:|---:|---:|---:|\n");
  for (const Row& row : rows) {
    const double share = run.byte_limit_share(row);
    fmt::print("| {} | {} | {} | {} | {} | {} | {} | {:.2f} ± {:.2f} | {:.2f} | {} |\n",
               run.model_name(), bytes_text(run.loaded->checkpoint().bytes()),
               count_text(parameters(run.loaded->config())), run.backend(), run.threads,
               mode_text(row.plan->mode, run.options->model) +
                   (row.batch_invariant ? ", batch-invariant" : ""),
               row.test.name(), row.avg(Row::tokens_per_second), row.stddev(Row::tokens_per_second),
               Row::tokens_per_second(row, row.samples.median()),
               share > 0 ? fmt::format("{:.0f} %", 100 * share) : "-");
  }
  fmt::print("\n");
  print_invariance_cost(rows);
  print_operations(run, rows);
  std::vector<const NamedPlan*> seen;
  for (const Row& row : rows) {
    if (std::find(seen.begin(), seen.end(), row.plan) != seen.end()) continue;
    seen.push_back(row.plan);
    fmt::print("kernels of {}: {}\n", row.plan->mode, fmt::join(run.kernels_of_row(row), ", "));
  }
  fmt::print("peak memory {}\n", bytes_text(run.peak_memory));
}

/// The read bandwidth of the memory that the model lies in.
class ReadBandwidth {
 public:
  ReadBandwidth(bool on_gpu, bool wanted, int threads) {
    if (!wanted) return;
    if (on_gpu) {
      device_ = make_device_read_probe();
    } else {
      host_ = std::make_unique<ReadBandwidthProbe>(threads, kProbeBytes, kProbeSliceBytes);
    }
  }

  void sample() {
    if (device_ != nullptr) samples_.microseconds.push_back(1 / device_->gb_per_s());
    if (host_ == nullptr || !host_->ok()) return;
    host_->read_slice();  // untimed: caches are full of dirty lines that must be written first
    for (int i = 0; i < kProbeSlices; ++i) {
      const double start = now_seconds();
      host_->read_slice();
      const double us = (now_seconds() - start) * 1e6;
      samples_.microseconds.push_back(us / (static_cast<double>(host_->slice_bytes()) * 1e-3));
    }
  }
  double gb_per_s() const { return samples_.microseconds.empty() ? 0 : 1 / samples_.median(); }

 private:
  std::unique_ptr<ReadBandwidthProbe> host_;
  std::unique_ptr<DeviceReadProbe> device_;
  Samples samples_;  // microseconds a kilobyte
};

/// All tests of all modes in turn, round after round.
Status measure(const Options& options, std::vector<Row>& rows, Run& run) {
  Bench bench(*run.loaded, options.model.pass_tokens());
  Progress progress(options.progress, "run",
                    static_cast<int64_t>(rows.size()) * (options.repetitions + 1));
  const auto run_row = [&](Row& row, double* us) -> Status {
    if (interrupted()) return Status(Code::interrupted, "interrupted");
    NIBBLE_TRY(bench.run(*row.plan, row.test, row.batch_invariant, us));
    progress.advance(fmt::format("{} {} {:.1f} tok/s", row.plan->mode, row.test.name(),
                                 Row::tokens_per_second(row, *us)));
    return {};
  };
  double us = 0;
  for (Row& row : rows) NIBBLE_TRY(run_row(row, &us));   // warm-up
  run.peak_memory = run.loaded->runner().peak_memory();  // of the second runner too

  // Only decoding is compared with the memory; on a CPU the probe takes a second and 1 GiB.
  const bool decodes =
      std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.test.n_gen > 0; });
  ReadBandwidth read(run.on_gpu(), decodes, run.threads);
  for (int repetition = 0; repetition < options.repetitions; ++repetition) {
    for (Row& row : rows) {
      NIBBLE_TRY(run_row(row, &us));
      row.samples.microseconds.push_back(us);
      read.sample();
    }
  }
  run.read_gb_per_s = read.gb_per_s();
  if (!run.on_gpu()) return {};
  run.peak = device_tensor_peak();
  for (Row& row : rows) {
    Result<std::vector<OperationTime>> times =
        bench.profile(*row.plan, row.test, row.batch_invariant);
    if (!times.ok()) return times.status();
    row.operations = std::move(*times);
  }
  return {};
}

int run_bench(const Options& options) {
  const std::vector<Test> tests = tests_of(options);
  if (tests.empty()) {
    return fail(Status(Code::invalid_argument,
                       "-p 0 and -n 0 leave nothing to run.\nSee 'nibble bench model --help'."));
  }
  int64_t context = 0, sequences = 1;
  for (const Test& test : tests) {
    context = std::max({context, test.n_prompt, test.n_gen});
    sequences = std::max(sequences, test.batch);
  }
  Result<std::unique_ptr<LoadedModel>> loaded = LoadedModel::open(options.model.directory);
  if (!loaded.ok()) return fail(loaded.status());
  const bool on_gpu = options.model.device == "cuda";
  Result<std::vector<NamedPlan>> plans = plans_of(**loaded, options.model, on_gpu);
  if (!plans.ok()) return fail(plans.status());
  const ModelOptions model_options = options.model.model_options(context, sequences);
  if (const Status status = (*loaded)->load(model_options, options.model.device); !status.ok()) {
    return fail(status);
  }
  const auto is_16bit = [](const NamedPlan& plan) { return plan.mode == kMode16Bit; };
  if (on_gpu && (*loaded)->quantized() && std::any_of(plans->begin(), plans->end(), is_16bit)) {
    const Status status = (*loaded)->load_dequantized(model_options);
    if (!status.ok()) return fail(status);
  }

  std::vector<Row> rows;
  for (const Test& test : tests) {
    for (const NamedPlan& plan : *plans) {
      rows.push_back({test, &plan});
      if (on_gpu && options.model.batch_invariant && test.n_gen > 0) {
        rows.push_back({test, &plan, true});
      }
    }
  }
  Run run;
  run.options = &options;
  run.loaded = loaded->get();
  run.threads = options.model.threads > 0 ? options.model.threads : available_cpus();
  if (const Status measured = measure(options, rows, run); !measured.ok()) return fail(measured);

  if (options.output == "json") {
    json document = report_header();
    document["device"] = run.loaded->device();
    document["threads"] = run.threads;
    document["results"] = json::array();
    for (const Row& row : rows) document["results"].push_back(to_json(run, row));
    fmt::print("{}\n", dump(document, 1));
  } else if (options.output == "jsonl") {
    for (const Row& row : rows) fmt::print("{}\n", dump(to_json(run, row), -1));
  } else if (options.output == "csv") {
    print_csv(run, rows);
  } else {
    print_markdown(run, rows);
  }
  return kExitOk;
}

}  // namespace

void add_bench_model_command(CLI::App& bench, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command = bench.add_subcommand(
      "model", "A whole model: prompts and decoding in llama-bench's terms, modes interleaved");
  add_model_arguments(*command, options->model, true);
  const auto add_list = [&](const char* name, std::vector<int64_t>& values, int64_t least,
                            const char* text) {
    command->add_option(name, values, text)
        ->delimiter(',')
        ->allow_extra_args(false)
        ->check(CLI::Range(least, int64_t{1} << 20))
        ->capture_default_str()
        ->type_name("N,...")
        ->group("Tests");
  };
  add_list("-p,--n-prompt", options->prompts, 0, "prompt lengths (pp); 0: none");
  add_list("-n,--n-gen", options->generated, 0, "tokens to decode (tg); 0: none");
  add_list("-b,--batch", options->batches, 1, "sequences decoded together");
  command->add_option("-r,--repetitions", options->repetitions, "samples of every test and mode")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str()
      ->group("Tests");
  command->add_option("--output", options->output, "format")
      ->check(CLI::IsMember({"md", "csv", "json", "jsonl"}))
      ->capture_default_str()
      ->group("Output");
  add_progress_option(*command, options->progress);
  command->footer(
      "t/s counts the tokens of all sequences. One run of everything comes first, untimed.\n"
      "Of byte limit: the bytes that decoding must read, over the time and the read bandwidth; a\n"
      "model that stays in the caches can be above 100 %.\n"
      "\nExample:\n  nibble bench model DIR --mode w4a16,w4a8 -p 512 -n 128 -b 1,8");
  command->callback([options, &exit_code] { exit_code = run_bench(*options); });
}

}  // namespace nibble::cli
