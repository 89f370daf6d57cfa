// A CUDA graph, captured once and launched many times.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {

/// A graph that is launched instead of its kernels one by one.
class Graph {
 public:
  ~Graph() {
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
  }
  Graph() = default;
  Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}

  template <class Function>
  Status capture(cudaStream_t stream, const Function& enqueue) {
    NIBBLE_TRY(to_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed),
                         "cudaStreamBeginCapture"));
    const Status status = enqueue();
    cudaGraph_t captured = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
    if (!status.ok() || ended != cudaSuccess) {
      if (captured != nullptr) (void)cudaGraphDestroy(captured);
      (void)cudaGetLastError();
      return status.ok() ? to_status(ended, "cudaStreamEndCapture") : status;
    }
    const cudaError_t error = cudaGraphInstantiate(&graph_, captured, 0);
    (void)cudaGraphDestroy(captured);
    return to_status(error, "cudaGraphInstantiate");
  }
  Status launch(cudaStream_t stream) const {
    return to_status(cudaGraphLaunch(graph_, stream), "cudaGraphLaunch");
  }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace nibble::cuda
