// nibble verify --device cuda: each layer through the kernel that is planned for it on GPU 0. All
// rows are compared with the oracle within what rounding can do; the error of quantizing the
// activations is measured against fp64. Not here: FP16 models, which the CPU side has.
#include "verify_cuda.h"

#include <fmt/format.h>

#include <cmath>

#include "cli.h"
#include "cuda_bench.h"
#include "cuda_oracle.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

struct CudaResult {
  std::string layer, kernel, activation, plan, failure;
  Mode mode = Mode::w4a8;
  int64_t k = 0, n = 0, group_size = 0;
  double snr_vs_exact = 0, us = 0;
};

/// What `--act mix` means: as on the CPU (layer_check.h).
Granularity granularity_of(const std::string& layer, Mode mode, const ActivationChoice& choice) {
  if (!choice.mix) return choice.granularity;
  const bool rough = layer.ends_with("down_proj") || layer.ends_with("o_proj");
  return mode == Mode::w4a4 || rough ? Granularity::group : Granularity::token;
}

Problem problem_of(const LayerToCheck& layer, Mode mode, const CheckOptions& options) {
  Problem p;
  p.m = options.rows;
  p.n = layer.matrix->n;
  p.k = layer.matrix->k;
  p.group_size = layer.matrix->group_size;
  p.mode = mode;
  p.x_dtype = Dtype::f16;
  p.y_dtype = Dtype::f32;
  if (mode != Mode::w4a16) p.granularity = granularity_of(layer.name, mode, options.activations);
  if (mode == Mode::w4a8_fp8 && options.activations.mix) p.granularity = Granularity::token;
  p.symmetric = mode != Mode::w4a4;
  return p;
}

/// One layer on the host and on the device.
struct CudaLayer {
  const LayerToCheck& layer;
  ref::Weights reference;
  cuda::DeviceWeights weights;
  std::vector<uint16_t> x16;
  std::vector<double> exact;
};

double microseconds_of(const cuda::Plan& plan, const cuda::DeviceInput& input,
                       const cuda::DeviceWeights& weights, void* y, void* workspace) {
  std::vector<DeviceContender> contenders;
  contenders.push_back({"layer", [&](int64_t, cudaStream_t stream) {
                          (void)cuda::run_gemm(plan, input, weights, y, plan.problem.n, workspace,
                                               stream);
                        }});
  time_on_device(contenders, {.seconds = 0.01}, [] {});
  return contenders[0].samples.median();
}

Status check_mode(const CudaLayer& l, const cuda::Plan& plan, bool timing, CudaResult& result) {
  const Problem& p = plan.problem;
  const DeviceMemory x(l.x16.size() * 2), y(static_cast<size_t>(p.m * p.n * 4));
  const DeviceMemory workspace(plan.workspace_bytes);
  check_cuda(cudaMemcpy(x.as<>(), l.x16.data(), x.bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  const cuda::DeviceInput input{x.as<>(), p.k};
  NIBBLE_TRY(cuda::run_gemm(plan, input, l.weights, y.as<>(), p.n, workspace.as<>(), nullptr));
  std::vector<float> found(static_cast<size_t>(p.m * p.n));
  check_cuda(cudaMemcpy(found.data(), y.as<>(), y.bytes(), cudaMemcpyDeviceToHost),
             plan.kernel_name());
  const float* bias = l.layer.bias.empty() ? nullptr : l.layer.bias.data();
  for (int64_t row = 0; row < p.m && result.failure.empty(); ++row) {
    result.failure =
        compare_cuda_row(plan, l.reference, &l.x16[row * p.k], &found[row * p.n], {}, bias, row);
  }
  result.snr_vs_exact = snr_db(l.exact, {found.begin(), found.end()});
  if (timing) result.us = microseconds_of(plan, input, l.weights, y.as<>(), workspace.as<>());
  return {};
}

Status check_layer_on(const cuda::DeviceInfo& device, const LayerToCheck& layer,
                      const CheckOptions& options, std::vector<CudaResult>& results,
                      std::vector<std::string>& skipped) {
  const float* bias = layer.bias.empty() ? nullptr : layer.bias.data();
  Result<cuda::DeviceWeights> weights =
      cuda::DeviceWeights::create(device, *layer.matrix, bias, Dtype::f32);
  if (!weights.ok()) return weights.status();
  CudaLayer l{layer, ref::unpack(*layer.matrix), std::move(*weights), {}, {}};
  std::vector<float> x;
  for (const float value : make_input(options.input, options.rows, layer.matrix->k, options.seed)) {
    l.x16.push_back(f16_from_float(value));
    x.push_back(float_from_f16(l.x16.back()));
  }
  l.exact = ref::multiply_fp64(l.reference, x.data(), options.rows, bias);
  for (const Mode mode : options.modes) {
    const Problem problem = problem_of(layer, mode, options);
    const Result<cuda::Plan> plan = cuda::plan_gemm(problem, device);
    if (!plan.ok() && plan.status().code() == Code::unsupported && options.modes.size() > 1) {
      skipped.push_back(
          fmt::format("{}, {}: {}", layer.name, mode_name(mode), plan.status().message()));
      continue;
    }
    if (!plan.ok()) return plan.status();
    CudaResult result;
    result.layer = layer.name;
    result.kernel = plan->kernel_name();
    result.activation = mode == Mode::w4a16
                            ? dtype_name(problem.x_dtype)
                            : fmt::format("{}{}", granularity_name(problem.granularity),
                                          problem.symmetric ? "" : "-asym");
    result.plan = plan->describe();
    result.mode = mode;
    result.k = problem.k;
    result.n = problem.n;
    result.group_size = problem.group_size;
    NIBBLE_TRY(check_mode(l, *plan, options.timing, result));
    results.push_back(std::move(result));
  }
  return {};
}

json to_json(const CudaResult& r) {
  return {{"name", r.layer},
          {"k", r.k},
          {"n", r.n},
          {"group_size", r.group_size},
          {"mode", mode_name(r.mode)},
          {"kernel", r.kernel},
          {"plan", r.plan},
          {"activation", r.activation},
          {"snr_db_vs_exact", std::isfinite(r.snr_vs_exact) ? json(r.snr_vs_exact) : json(nullptr)},
          {"us_median", r.us},
          {"passed", r.failure.empty()},
          {"failure", r.failure}};
}

void print_result(const CudaResult& r) {
  fmt::print("{:<34}{:>6}{:>6}{:>6}  {:<6}{:<16}{:<11}{:>7}{:>9.1f}  {}\n", r.layer, r.k, r.n,
             r.group_size, mode_name(r.mode), r.kernel, r.activation, decibels(r.snr_vs_exact),
             r.us, r.failure.empty() ? "ok" : "FAILED: " + r.failure);
  std::fflush(stdout);
}

}  // namespace

int verify_on_cuda(const std::vector<LayerToCheck>& layers,
                   const std::vector<std::string>& model_failures, const CheckOptions& options,
                   bool as_json) {
  const Granularity chosen = options.activations.granularity;
  const bool given = chosen == Granularity::static_tensor || chosen == Granularity::static_group;
  if (!options.activations.mix && given) {
    return fail(Status(Code::unsupported,
                       "verify --device cuda does not measure static scales: leave out --device, "
                       "or choose another --act"));
  }
  const Result<cuda::DeviceInfo> device = cuda::device_info(0);
  if (!device.ok()) return fail(device.status());
  if (!as_json) {
    fmt::print("{}, M={} rows in f16, seed {}; all rows are compared with the oracle\n\n",
               device->name, options.rows, options.seed);
    fmt::print("{:<34}{:>6}{:>6}{:>6}  {:<6}{:<16}{:<11}{:>7}{:>9}\n", "layer", "K", "N", "g",
               "mode", "kernel", "activation", "vs fp64", "us");
  }
  std::vector<CudaResult> results;
  std::vector<std::string> skipped;
  for (const LayerToCheck& layer : layers) {
    if (interrupted()) return kExitInterrupted;
    const size_t before = results.size();
    if (const Status s = check_layer_on(*device, layer, options, results, skipped); !s.ok()) {
      return fail(s);
    }
    for (size_t i = before; i < results.size() && !as_json; ++i) print_result(results[i]);
  }
  auto failed = static_cast<int>(model_failures.size());
  json document = report_header();
  document["device"] = device->name;
  document["layers"] = json::array();
  for (const CudaResult& result : results) {
    failed += result.failure.empty() ? 0 : 1;
    document["layers"].push_back(to_json(result));
  }
  const int passed = static_cast<int>(results.size() + model_failures.size()) - failed;
  document["passed"] = passed;
  document["failed"] = failed;
  document["failures"] = model_failures;
  document["skipped"] = skipped;
  if (as_json) {
    fmt::print("{}\n", document.dump(1));
  } else {
    for (const std::string& failure : model_failures) fmt::print("FAILED: {}\n", failure);
    for (const std::string& why : skipped) fmt::print("skipped: {}\n", why);
    fmt::print("\n{} passed, {} failed, {} skipped\n", passed, failed, skipped.size());
  }
  return failed == 0 && passed > 0 ? kExitOk : kExitFailed;
}

}  // namespace nibble::cli
