// See plan_measure_cuda.h.
#include "plan_measure_cuda.h"

#include <fmt/format.h>

#include "cuda_bench.h"
#include "cuda_probe.h"
#include "cuda_weights.h"

namespace nibble::cli {
namespace {

constexpr double kTimingSeconds = 0.25;  // all candidates of a slot together
constexpr uint64_t kSeed = 1;

/// One candidate's product, ready to be launched again and again.
struct TimedProduct {
  cuda::Plan plan;
  DeviceMemory workspace;
};

Result<std::vector<double>> time_slot(const cuda::DeviceInfo& device, Dtype type,
                                      const SlotMeasure& slot, int64_t rows) {
  if (slot.group_size == 0) {
    return Status(Code::unsupported,
                  fmt::format("layer {}, {}: linears of different group sizes are not one product "
                              "on a GPU; plan on the CPU",
                              slot.layer, slot_name(slot.slot)));
  }
  const Result<ColdWeights> weights = make_cold_weights(device, slot.n, slot.k, slot.group_size);
  if (!weights.ok()) return weights.status();
  const DeviceMemory x(static_cast<size_t>(rows * slot.k * 2));
  const DeviceMemory y(static_cast<size_t>(rows * slot.n * 2));
  check_cuda(launch_fill_normal(x.as<>(), rows * slot.k, kSeed, type == Dtype::bf16, nullptr), "x");
  std::vector<TimedProduct> products;
  products.reserve(slot.candidates.size());
  std::vector<DeviceContender> contenders;
  const auto copies = static_cast<int64_t>(weights->copies.size());
  for (const Candidate& candidate : slot.candidates) {
    Problem problem;
    problem.m = rows;
    problem.n = slot.n;
    problem.k = slot.k;
    problem.group_size = slot.group_size;
    problem.mode = candidate.spec.mode;
    problem.granularity = candidate.spec.granularity;
    problem.symmetric = problem.mode == Mode::w4a16 || candidate.spec.symmetric;
    problem.x_dtype = problem.y_dtype = type;
    const Result<cuda::Plan> plan = cuda::plan_gemm(problem, device);
    if (!plan.ok()) return plan.status();
    products.push_back({*plan, DeviceMemory(plan->workspace_bytes)});
    const TimedProduct& product = products.back();
    contenders.push_back(
        {candidate.spec.describe(),
         [&product, &weights, &x, &y, &slot, copies](int64_t i, cudaStream_t stream) {
           const Status status = cuda::run_gemm(product.plan, {.x = x.as<>(), .x_stride = slot.k},
                                                weights->copies[i % copies], y.as<>(), slot.n,
                                                product.workspace.as<>(), stream);
           if (!status.ok()) throw std::runtime_error(status.message());
         },
         copies});
  }
  time_on_device(contenders, {.seconds = kTimingSeconds}, [] {});
  std::vector<double> medians;
  for (const DeviceContender& contender : contenders) {
    medians.push_back(contender.samples.median());
  }
  return medians;
}

}  // namespace

Result<SlotTimer> cuda_slot_timer(Dtype type) {
  const Result<cuda::DeviceInfo> device = cuda::device_info(0);
  if (!device.ok()) return device.status();
  return SlotTimer([info = *device, type](const SlotMeasure& slot, int64_t rows) {
    return time_slot(info, type, slot, rows);
  });
}

}  // namespace nibble::cli
