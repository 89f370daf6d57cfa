// Which of our kernels contend at one point of `bench gemm`, ready to run.
#pragma once

#include <vector>

#include "bench_gemm.h"

namespace nibble::cli {

struct KernelRun {
  Plan plan;
  Isa isa = Isa::scalar;
  AlignedBuffer workspace;
  std::vector<float> y;
  GemmInput input;
  GemmTarget target;

  Status operator()() { return run_gemm(plan, input, {&target, 1}, workspace.data()); }
  /// What bounds it: multiplications of floats or of integers.
  bool floats() const { return plan.problem.mode == Mode::w4a16; }
};

/// The kernels that options name, or the preferred one of each mode within options.isa. `x` (m, k)
/// and `shape` must outlive them.
Result<std::vector<KernelRun>> our_kernels(const GemmBenchOptions& options, const GemmShape& shape,
                                           const std::vector<float>& x, int64_t m);

}  // namespace nibble::cli
