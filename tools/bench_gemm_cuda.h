// `bench gemm --device cuda`.
#pragma once

#include "bench_gemm.h"

namespace nibble::cli {

/// Exit code. Without a GPU, or in a build without CUDA, says why and gives kExitUnsupported.
int run_cuda_gemm_bench(const GemmBenchOptions& options);

}  // namespace nibble::cli
