#include "gemm/cuda/tensor_map.h"

namespace nibble::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, looked up once: the library links no driver.
Encode find_encode(cudaError_t& error) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result);
  if (error == cudaSuccess && result != cudaDriverEntryPointSuccess) {
    error = cudaErrorInsufficientDriver;
  }
  return reinterpret_cast<Encode>(found);
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap* map, const void* data, TensorElement element,
                            int64_t columns, int64_t rows, int64_t stride, int box_columns,
                            int box_rows) {
  static cudaError_t error = cudaSuccess;
  static const Encode encode = find_encode(error);
  if (error != cudaSuccess) return error;
  const int bytes = element == TensorElement::u8 ? 1 : 2;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (element == TensorElement::f16) type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (element == TensorElement::bf16) type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride * bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult result = encode(
      map, type, 2, const_cast<void*>(data), size, pitch, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
