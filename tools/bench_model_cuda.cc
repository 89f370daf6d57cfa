// See bench_model_cuda.h.
#include "bench_model_cuda.h"

#include <cuda_runtime_api.h>

#include "cuda_bench.h"
#include "cuda_probe.h"

namespace nibble::cli {
namespace {

constexpr int64_t kProbeBytes = int64_t{2} << 30;

int attribute(cudaDeviceAttr name) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, 0) == cudaSuccess ? value : 0;
}

class ReadProbe : public DeviceReadProbe {
 public:
  ReadProbe() : memory_(kProbeBytes), sink_(16) {
    check_cuda(cudaEventCreate(&begin_), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~ReadProbe() override {
    (void)cudaEventDestroy(begin_);
    (void)cudaEventDestroy(end_);
  }

  double gb_per_s() override {
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    check_cuda(cudaEventRecord(begin_), "cudaEventRecord");
    check_cuda(
        launch_read(memory_.as<>(), kProbeBytes, sink_.as<uint32_t>(), multiprocessors, nullptr),
        "reading");
    check_cuda(cudaEventRecord(end_), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end_), "reading");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return static_cast<double>(kProbeBytes) / static_cast<double>(ms) * 1e-6;
  }

 private:
  DeviceMemory memory_, sink_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace

std::unique_ptr<DeviceReadProbe> make_device_read_probe() {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess || free < 2 * size_t{kProbeBytes}) {
    return nullptr;
  }
  return std::make_unique<ReadProbe>();
}

TensorPeak device_tensor_peak() {
  // int8 operations a clock and multiprocessor: NVIDIA's data sheets, dense
  double int8 = 0;
  switch (10 * attribute(cudaDevAttrComputeCapabilityMajor) +
          attribute(cudaDevAttrComputeCapabilityMinor)) {
    case 80: int8 = 4096; break;
    case 86:
    case 89: int8 = 2048; break;
    case 90: int8 = 8192; break;
    default: return {};
  }
  const double clocks = attribute(cudaDevAttrMultiProcessorCount) *
                        static_cast<double>(attribute(cudaDevAttrClockRate)) * 1e3;
  return {int8 * clocks * 1e-12, int8 / 2 * clocks * 1e-12};
}

}  // namespace nibble::cli
