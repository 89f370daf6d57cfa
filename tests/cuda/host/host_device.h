// A GPU made of host memory, for tests of everything around the kernels on machines without one:
// host_runtime.cc are the functions of the CUDA runtime that the library calls, host_*_launches.cc
// the launch functions of gemm/cuda and model/cuda, as plain loops.
//
// A stream runs nothing before somebody waits for it, so what is changed too early shows. Memory
// comes filled with NaN and with guard bytes behind it, which are looked at when it is freed. Not
// here: how fast anything is, and what only real kernels can get wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "gemm/cuda/kernels.h"

namespace nibble::cuda::host {

/// Puts work at the end of a stream, or of what is captured from it.
void enqueue(cudaStream_t stream, std::function<void()> work);

float load(const void* from, Element type, int64_t index);
void store(void* to, Element type, int64_t index, float value);

}  // namespace nibble::cuda::host
