// Descriptors of matrices in device memory for the tensor copies of sm_90.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace nibble::cuda {

enum class TensorElement { u8, f16, bf16 };

/// A row-major (rows, columns) matrix, rows `stride` elements apart (a multiple of 16 bytes),
/// copied in boxes of box_rows x box_columns; box_columns elements are 128 bytes, swizzled as wgmma
/// wants them. Outside the matrix, loads give zeros and stores do nothing. Host code; no wait.
cudaError_t make_tensor_map(CUtensorMap* map, const void* data, TensorElement element,
                            int64_t columns, int64_t rows, int64_t stride, int box_columns,
                            int box_rows);

}  // namespace nibble::cuda
