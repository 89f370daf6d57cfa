// `bench gemm --device cuda` of a build without CUDA.
#include "bench_gemm_cuda.h"
#include "cli.h"
#include "gemm/cuda/gemm_cuda.h"

namespace nibble::cli {

int run_cuda_gemm_bench(const GemmBenchOptions&) { return fail(cuda::device_count().status()); }

}  // namespace nibble::cli
