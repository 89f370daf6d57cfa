// plan_measure_cuda.h in a build without CUDA.
#include "plan_measure_cuda.h"

namespace nibble::cli {

Result<SlotTimer> cuda_slot_timer(Dtype) {
  return Status(Code::unsupported, "this build has no CUDA (NIBBLE_CUDA=OFF)");
}

}  // namespace nibble::cli
