// `bench gemm --device cuda --plans`: how good the plans are that plan_gemm() chooses.
#pragma once

#include "bench_gemm.h"
#include "cuda_bench.h"
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cli {

/// Over the grid of the options, every plan of plan_candidates() is checked against the oracle and
/// timed in turn with the others. Prints for each point the chosen plan and the fastest, and in how
/// many the first is within 5 % of the second. Exit code.
int run_cuda_plan_sweep(const GemmBenchOptions& options, const cuda::DeviceInfo& device,
                        const DeviceMonitor& monitor);

}  // namespace nibble::cli
