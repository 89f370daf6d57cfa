// Times of the operations of a pass, by events between them. For a captured pass: an event is a
// node of the graph, and keeps the kernels around it from overlapping.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "base/status.h"
#include "model/runner.h"

namespace nibble::cuda {

class Profile {
 public:
  Profile() = default;
  ~Profile();
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  /// What was enqueued since the last mark was an operation `name`; the first mark starts.
  Status mark(const char* name, cudaStream_t stream);
  /// Sums by name, in order of first use. The stream has been waited for.
  Result<std::vector<OperationTime>> times() const;

 private:
  struct Mark {
    const char* name;
    cudaEvent_t event;
  };
  std::vector<Mark> marks_;
};

}  // namespace nibble::cuda
