// Weights in the layout of packed.h, made on the host: what pack.cu makes on a device, byte for
// byte, written independently from the comment in packed.h.
#pragma once

#include <cstdint>
#include <vector>

#include "format/quant_matrix.h"
#include "gemm/cuda/packed.h"

namespace nibble::cuda {

std::vector<uint8_t> pack_host(const QuantMatrix& matrix);

/// What lies in a slab: the inverse.
struct SlabValues {
  uint8_t codes[kSlabDepth][kSlabColumns];
  uint8_t zeros[kSlabDepth / 32][kSlabColumns];    // (slab_groups, columns)
  uint16_t scales[kSlabDepth / 32][kSlabColumns];  // the same
};
SlabValues unpack_slab(const PackedLayout& layout, const uint8_t* slab);

}  // namespace nibble::cuda
