// Every plan that there is for a problem, to be timed against the one that plan_gemm() chooses. Not
// a policy: nothing here is preferred. Pure host arithmetic, tested without a GPU.
#pragma once

#include <vector>

#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cuda {

/// Kernels by name, each with the tiles, splits and slab configurations that it is compiled for and
/// that fit the device. First the plan that plan_gemm() chooses; none twice; empty if it refuses.
/// Without the kernel that quantizes as well: its product alone is that of another.
std::vector<Plan> plan_candidates(const Problem& problem, const DeviceInfo& device);

}  // namespace nibble::cuda
