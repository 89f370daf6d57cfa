// `verify --device cuda` of a build without CUDA.
#include "cli.h"
#include "gemm/cuda/gemm_cuda.h"
#include "verify_cuda.h"

namespace nibble::cli {

int verify_on_cuda(const std::vector<LayerToCheck>&, const std::vector<std::string>&,
                   const CheckOptions&, bool) {
  return fail(cuda::device_count().status());
}

}  // namespace nibble::cli
