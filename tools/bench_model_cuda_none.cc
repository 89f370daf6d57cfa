// bench_model_cuda.h in a build without CUDA.
#include "bench_model_cuda.h"

namespace nibble::cli {

std::unique_ptr<DeviceReadProbe> make_device_read_probe() { return nullptr; }

TensorPeak device_tensor_peak() { return {}; }

}  // namespace nibble::cli
