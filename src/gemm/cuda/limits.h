// What a weight and a problem must be like for the packed layout of packed.h. Shared by plans and
// by DeviceWeights; pure.
#pragma once

#include <fmt/format.h>

#include "base/status.h"
#include "gemm/cuda/packed.h"

namespace nibble::cuda {

/// Groups must be whole blocks of 32, 64 or 128 k; only one that is all of K may end inside one.
inline Status check_group_size(int64_t group_size, int64_t k) {
  const bool whole = group_size == 32 || group_size == 64 || group_size % kBlockDepth == 0;
  if (whole || (group_size == k && k > kBlockDepth)) return {};
  return Status(Code::unsupported,
                fmt::format("group size {} with K = {}: the CUDA kernels take 32, 64, multiples of "
                            "128, and K above 128",
                            group_size, k));
}

}  // namespace nibble::cuda
