// One way to launch a kernel: its own error is returned, whatever the thread's last error was.
#pragma once

#include <cuda_runtime.h>

namespace nibble::cuda {

struct Launch {
  dim3 grid = 1;
  int threads = 1;
  int shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool programmatic = false;  // with programmatic stream serialization
  int cluster = 0;            // blocks of a cluster; 0: as the kernel was compiled
};

template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& how,
                          const Parameters&... arguments) {
  if (how.shared_bytes > 48 * 1024) {  // more has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = how.stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (how.programmatic) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 0) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace nibble::cuda
