// A kernel's results against the oracle of src/gemm/ref.h, bit for bit: what `verify` and `bench`
// call before they believe or time anything.
#pragma once

#include <string>

#include "gemm/gemm.h"
#include "gemm/ref.h"

namespace nibble {

/// One finished run: what went in and what came out.
struct FinishedRun {
  Problem problem;                    // y_dtype f32
  GemmInput input;                    // x still as it was
  const float* y = nullptr;           // (m, n)
  const int32_t* partials = nullptr;  // (m, groups, n), or null: not compared
};

/// Compares `num_rows` rows, spread from the first to the last, with the oracle: outputs, and
/// integer sums where they are given. Empty if all bits agree, else where they first differ.
/// bias: (n) or null.
std::string first_difference(const FinishedRun& run, const ref::Weights& weights, const float* bias,
                             int64_t num_rows);

}  // namespace nibble
