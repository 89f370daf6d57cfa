// See cuda_kernel_run.h.
#include "cuda_kernel_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "base/half.h"
#include "cuda_oracle.h"
#include "cuda_probe.h"

namespace nibble::cli {
namespace {

using cuda::DeviceWeights;

constexpr uint64_t kSeed = 1;

template <class T>
std::vector<T> download(const DeviceMemory& from, int64_t offset, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  check_cuda(cudaMemcpy(values.data(), from.as<T>() + offset, values.size() * sizeof(T),
                        cudaMemcpyDeviceToHost),
             "cudaMemcpy");
  return values;
}

}  // namespace

void check_status(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

SampledColumns sample_columns(const AwqTensors& all) {
  SampledColumns sample;
  const int64_t words = all.n / 8, count = std::min<int64_t>(words, 16);
  std::vector<int64_t> chosen;  // words of 8 columns
  for (int64_t i = 0; i < count; ++i) {
    chosen.push_back(count == 1 ? 0 : i * (words - 1) / (count - 1));
    for (int64_t c = 0; c < 8; ++c) sample.columns.push_back(chosen.back() * 8 + c);
  }
  AwqTensors& t = sample.tensors;
  t.k = all.k;
  t.n = 8 * count;
  t.group_size = all.group_size;
  t.scale_dtype = all.scale_dtype;
  for (int64_t k = 0; k < all.k; ++k) {
    for (const int64_t word : chosen) t.qweight.push_back(all.qweight[k * words + word]);
  }
  for (int64_t g = 0; g < all.k / all.group_size; ++g) {
    for (const int64_t word : chosen) t.qzeros.push_back(all.qzeros[g * words + word]);
    for (const int64_t column : sample.columns) t.scales.push_back(all.scales[g * all.n + column]);
  }
  sample.weights = ref::unpack(t.view());
  return sample;
}

CudaKernelRun::CudaKernelRun(const cuda::Plan& p)
    : plan(p),
      x(static_cast<size_t>(p.problem.m * p.problem.k * 2)),
      y(static_cast<size_t>(p.problem.m * p.problem.n * 2)),
      workspace(p.workspace_bytes) {
  check_cuda(launch_fill_normal(x.as<>(), p.problem.m * p.problem.k, kSeed, true, nullptr), "x");
  check_cuda(cudaDeviceSynchronize(), "x");
}

Status CudaKernelRun::whole(const DeviceWeights& weights, cudaStream_t stream) const {
  return cuda::run_gemm(plan, {x.as<>(), plan.problem.k}, weights, y.as<>(), plan.problem.n,
                        workspace.as<>(), stream);
}

Status CudaKernelRun::product(const DeviceWeights& weights, cudaStream_t stream) const {
  return cuda::run_gemm_quantized(plan, cuda::workspace_operand(plan, workspace.as<>()), weights,
                                  y.as<>(), plan.problem.n, workspace.as<>(), stream);
}

Result<std::string> CudaKernelRun::check(const DeviceWeights& weights,
                                         const SampledColumns& sample) const {
  NIBBLE_TRY(whole(weights, nullptr));
  const std::string wrong = compare(sample);
  const bool has_product = plan.family == cuda::KernelFamily::slab;
  if (!wrong.empty() || !plan.is_one_launch() || !has_product) return wrong;
  // One launch leaves no operand behind for product(), and is another kernel.
  const cuda::Operand operand = cuda::workspace_operand(plan, workspace.as<>());
  NIBBLE_TRY(cuda::quantize_activations(plan, {x.as<>(), plan.problem.k}, operand, nullptr));
  NIBBLE_TRY(product(weights, nullptr));
  return compare(sample);
}

std::string CudaKernelRun::compare(const SampledColumns& sample) const {
  check_cuda(cudaDeviceSynchronize(), plan.kernel_name());
  const Problem& p = plan.problem;
  const int64_t count = std::min<int64_t>(p.m, 4);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = count == 1 ? 0 : i * (p.m - 1) / (count - 1);
    const auto x_row = download<uint16_t>(x, row * p.k, p.k);
    const auto y_row = download<uint16_t>(y, row * p.n, p.n);
    const std::string text = compare_cuda_row(plan, sample.weights, x_row.data(), y_row.data(),
                                              sample.columns, nullptr, row);
    if (!text.empty()) return fmt::format("{}: {}", plan.describe(), text);
  }
  return std::string();
}

std::vector<float> CudaKernelRun::input() const {
  const auto bits = download<uint16_t>(x, 0, plan.problem.m * plan.problem.k);
  std::vector<float> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), float_from_bf16);
  return values;
}

}  // namespace nibble::cli
