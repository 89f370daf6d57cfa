// Synthetic weights and activations: the shapes and oddities of real models without their files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/linear_format.h"

namespace nibble {

struct SyntheticWeight {
  std::string name;
  int64_t k = 0, n = 0;
  int64_t group_size = 128;  // -1: k
  bool symmetric = false;
  Dtype scale_dtype = Dtype::f16;
  bool bias = false;
  bool negative_scales = false;  // every third scale is negated, its codes mirrored
};

/// Round-to-nearest weights of normally distributed values; the same for the same seed and name.
AwqTensors make_synthetic_weight(const SyntheticWeight& spec, uint64_t seed);

/// The layers that `nibble verify` checks when it is given no directory.
std::vector<SyntheticWeight> synthetic_model();

enum class InputKind {
  normal,    // N(0, 1)
  outliers,  // N(0, 1) with 8 channels times 60 and one value of 400 in each row
};

/// (rows, k) row-major; a pure function of its arguments.
std::vector<float> make_input(InputKind kind, int64_t rows, int64_t k, uint64_t seed);

}  // namespace nibble
