// See profile.h.
#include "model/cuda/profile.h"

#include <algorithm>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {

Profile::~Profile() {
  for (const Mark& mark : marks_) (void)cudaEventDestroy(mark.event);
}

Status Profile::mark(const char* name, cudaStream_t stream) {
  cudaEvent_t event = nullptr;
  NIBBLE_TRY(to_status(cudaEventCreate(&event), "cudaEventCreate"));
  marks_.push_back({name, event});
  return to_status(cudaEventRecordWithFlags(event, stream, cudaEventRecordExternal),
                   "cudaEventRecord");
}

Result<std::vector<OperationTime>> Profile::times() const {
  std::vector<OperationTime> times;
  for (size_t i = 1; i < marks_.size(); ++i) {
    float ms = 0;
    NIBBLE_TRY(to_status(cudaEventElapsedTime(&ms, marks_[i - 1].event, marks_[i].event),
                         "cudaEventElapsedTime"));
    auto found = std::find_if(times.begin(), times.end(), [&](const OperationTime& time) {
      return time.name == marks_[i].name;
    });
    if (found == times.end()) found = times.insert(found, {marks_[i].name, 0, 0});
    found->microseconds += static_cast<double>(ms) * 1e3;
    ++found->launches;
  }
  return times;
}

}  // namespace nibble::cuda
