// runner.h in a build without CUDA.
#include "model/cuda/runner.h"

namespace nibble::cuda {
namespace {

Status without_cuda() {
  return Status(Code::unsupported,
                "this build has no CUDA: models run on the CPU (configure with NIBBLE_CUDA=ON)");
}

}  // namespace

Result<MemoryEstimate> estimate_runner(const Checkpoint&, const ModelOptions&, WeightForm) {
  return without_cuda();
}

Result<std::unique_ptr<Runner>> make_runner(const Checkpoint&, const ModelOptions&, WeightForm) {
  return without_cuda();
}

}  // namespace nibble::cuda
