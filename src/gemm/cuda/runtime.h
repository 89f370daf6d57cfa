// What host code shares of the CUDA runtime: its errors as Status, and the current device of a
// thread.
#pragma once

#include <cuda_runtime_api.h>

#include "base/status.h"

namespace nibble::cuda {

/// Ok, or `what` and the runtime's words. Out of memory and missing devices have codes of their
/// own; whatever else a device reports is an io_error.
Status to_status(cudaError_t error, const char* what);

/// Makes `device` current for this thread, and the one before it on destruction.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  const Status& status() const { return status_; }

 private:
  int before_ = -1;  // -1: nothing to go back to
  Status status_;
};

}  // namespace nibble::cuda
