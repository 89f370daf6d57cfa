// Logits of a model, for scripts/check_logits.py: reads token ids from standard input, writes one
// row of raw little-endian float32 logits per token to standard output, or, with --greedy N, the N
// token ids that greedy decoding appends and their logit margins.
//
//   model_logits DIR 16bit|w4a16|w4a8|w4a4 [--greedy N] [--kv f32|bf16|f16] [--threads N]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>

#include "model/model.h"
#include "model/sampler.h"

namespace nibble {
namespace {

[[noreturn]] void fail(const std::string& message, int code = 1) {
  std::fprintf(stderr, "model_logits: %s\n", message.c_str());
  std::exit(code);
}

void check(const Status& status) {
  if (!status.ok()) fail(status.message());
}

struct Arguments {
  std::string directory, mode;
  int64_t greedy = 0;
  ModelOptions options;
};

Arguments parse_arguments(int argc, char** argv) {
  const std::map<std::string, Dtype> kv = {
      {"f32", Dtype::f32}, {"bf16", Dtype::bf16}, {"f16", Dtype::f16}};
  if (argc < 3 || argc % 2 == 0) fail("usage: model_logits DIR MODE [--greedy N] [...]", 2);
  Arguments arguments;
  arguments.directory = argv[1];
  arguments.mode = argv[2];
  arguments.options.kv_dtype = Dtype::f32;
  for (int i = 3; i < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--greedy") {
      arguments.greedy = std::atoll(value.c_str());
    } else if (name == "--threads") {
      arguments.options.threads = std::atoi(value.c_str());
    } else if (name == "--kv" && kv.contains(value)) {
      arguments.options.kv_dtype = kv.at(value);
    } else {
      fail("unknown option " + name + " " + value, 2);
    }
  }
  return arguments;
}

void set_mode(Model& model, const std::string& mode) {
  if ((mode == "16bit") == model.quantized()) {
    fail(mode + (model.quantized() ? ": the model is quantized" : ": the model is not quantized"));
  }
  for (const Mode m : {Mode::w4a16, Mode::w4a8, Mode::w4a4}) {
    if (mode == mode_name(m)) return check(model.set_plan(uniform_plan(model.config().layers, m)));
  }
  if (mode != "16bit") fail("unknown mode " + mode, 2);
}

/// Appends `tokens` to the sequence; logits of the last `rows` of them.
std::vector<float> logits_of(Model& model, KvCache& cache, std::span<const int32_t> tokens,
                             size_t rows) {
  const auto width = static_cast<size_t>(model.config().hidden);
  std::vector<float> hidden(tokens.size() * width);
  const BatchItem item{&cache, tokens};
  check(model.forward({&item, 1}, hidden.data()));
  std::vector<float> logits(rows * static_cast<size_t>(model.config().vocab));
  check(model.logits(&hidden[(tokens.size() - rows) * width], static_cast<int64_t>(rows),
                     logits.data()));
  return logits;
}

void print_greedy(Model& model, std::span<const int32_t> prompt, int64_t count) {
  KvCache cache = model.make_cache();
  std::vector<float> logits = logits_of(model, cache, prompt, 1);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t token = argmax(logits);
    const float best = logits[static_cast<size_t>(token)];
    logits[static_cast<size_t>(token)] = -INFINITY;
    const float margin = best - *std::max_element(logits.begin(), logits.end());
    std::printf("%d %.6g\n", token, static_cast<double>(margin));
    if (i + 1 < count) logits = logits_of(model, cache, {&token, 1}, 1);
  }
}

int run(int argc, char** argv) {
  const Arguments arguments = parse_arguments(argc, argv);
  std::vector<int32_t> tokens;
  for (int32_t token; std::cin >> token;) tokens.push_back(token);
  if (tokens.empty()) fail("no token ids on standard input", 2);

  const Result<Checkpoint> checkpoint = Checkpoint::open(arguments.directory);
  check(checkpoint.status());
  Result<Model> model = Model::load(*checkpoint, arguments.options);
  check(model.status());
  set_mode(*model, arguments.mode);
  if (arguments.greedy > 0) {
    print_greedy(*model, tokens, arguments.greedy);
  } else {
    KvCache cache = model->make_cache();
    const std::vector<float> logits = logits_of(*model, cache, tokens, tokens.size());
    if (std::fwrite(logits.data(), sizeof(float), logits.size(), stdout) != logits.size()) {
      fail("cannot write the logits");
    }
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace
}  // namespace nibble

int main(int argc, char** argv) { return nibble::run(argc, argv); }
