// Problems and devices that tests of plans make up.
#pragma once

#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda::testing {

inline DeviceInfo made_up_device(int capability = 90) {
  DeviceInfo device;
  device.name = "made up";
  device.capability = capability;
  device.multiprocessors = 132;
  device.shared_bytes = capability == 90 ? 232448 : 99 << 10;
  return device;
}

inline Problem made_up_problem(int64_t m, int64_t n, int64_t k, Mode mode = Mode::w4a8) {
  Problem p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.group_size = 128;
  p.mode = mode;
  p.x_dtype = p.y_dtype = Dtype::bf16;
  return p;
}

}  // namespace nibble::cuda::testing
