// What the launches of host_device.h share: rows before they are quantized or rounded.
#pragma once

#include <vector>

#include "gemm/cuda/kernels.h"

namespace nibble::cuda::host {

/// The operand of rows x (to.m, to.k), as `to` wants it.
void write_codes(const QuantizeArgs& to, const std::vector<float>& x);

/// row / rms(row) * weight
void normalize(std::vector<float>& row, const float* weight, float eps);

/// hidden + delta of one row; delta normalized first if post_norm; null: 0.
std::vector<float> residual_row(const float* hidden, const void* delta, Element type,
                                const float* post_norm, int64_t row, int64_t k, float eps);

}  // namespace nibble::cuda::host
