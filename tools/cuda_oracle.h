// A result of a CUDA kernel against the oracle of gemm/ref.h: what rounding may do and no more. The
// integer sums are checked with it: one that is off by one is off by more than that bound, unless
// its scale is far below those of the other groups.
#pragma once

#include <string>
#include <vector>

#include "gemm/cuda/gemm_cuda.h"
#include "gemm/ref.h"

namespace nibble {

/// y of one row (n values of type y_dtype of the plan's problem, those of `columns` if that is not
/// empty) for the row x (k values of x_dtype). weights: those columns. bias: (n) or null. Empty, or
/// where y is off.
std::string compare_cuda_row(const cuda::Plan& plan, const ref::Weights& weights, const void* x,
                             const void* y, const std::vector<int64_t>& columns, const float* bias,
                             int64_t row);

}  // namespace nibble
