// The functions of gemm_cuda.h that need a device, for a build without CUDA.
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda {
namespace {

Status no_cuda() {
  return Status(Code::unsupported,
                "this build has no CUDA kernels (it was made with "
                "NIBBLE_CUDA=OFF)");
}

}  // namespace

Result<int> device_count() { return no_cuda(); }

Result<DeviceInfo> device_info(int) { return no_cuda(); }

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo&, const QuantMatrix&, const void*,
                                            Dtype) {
  return no_cuda();
}

Result<DeviceWeights> DeviceWeights::create(const DeviceInfo&, std::span<const WeightPart>) {
  return no_cuda();
}

Status DeviceWeights::pack(const DeviceInfo&, const QuantMatrix&, const void*, Dtype, void*,
                           size_t) {
  return no_cuda();
}

Result<DeviceWeights> DeviceWeights::view(const Problem&, int, const void*, size_t) {
  return no_cuda();
}

DeviceWeights& DeviceWeights::operator=(DeviceWeights&&) noexcept { return *this; }

DeviceWeights::~DeviceWeights() = default;

int64_t DeviceWeights::bytes() const { return 0; }

Status run_gemm(const Plan&, const DeviceInput&, const DeviceWeights&, void*, int64_t, void*,
                Stream) {
  return no_cuda();
}

Status quantize_activations(const Plan&, const DeviceInput&, const Operand&, Stream) {
  return no_cuda();
}

Status run_gemm_quantized(const Plan&, const Operand&, const DeviceWeights&, void*, int64_t, void*,
                          Stream) {
  return no_cuda();
}

}  // namespace nibble::cuda
