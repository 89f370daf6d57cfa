// What the host side of the CUDA path and the .cu files share: plain argument structs and launch
// functions. No kernel chooses, allocates or waits. Included by .cu files and by driver.cc only.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm/cuda/packed.h"
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/slab_plan.h"

namespace nibble::cuda {

enum class Element : int { f32 = 0, f16 = 1, bf16 = 2 };  // equals Dtype

/// Where y goes and what the epilogue needs: y[m][n] = round(acc * t[m] + bias[n]).
struct Output {
  void* y = nullptr;
  int64_t stride = 0;  // elements
  Element type = Element::bf16;
  const float* bias = nullptr;  // (n) or null
};

struct QuantizeArgs;

/// int8 activations times packed weights; or, of w4a16, x itself times them. Then scales may be
/// null, and are not if x is made of codes (Codes::halves).
struct GemmArgs {
  const uint8_t* slabs = nullptr;
  PackedLayout layout;
  bool bf16_scales = false;
  const uint8_t* image = nullptr;  // for SsConfig::expanded: of the products' type
  const int8_t* codes = nullptr;   // (m, layout.padded_k()), natural order or wgmma order
  const float* scales = nullptr;   // (m), or (m, groups) if group_scales
  bool group_scales = false;
  // w4a16, instead of codes and scales: (m, k) of f16 or bf16, rows 16-byte aligned, k % 8 == 0
  const void* x = nullptr;
  int64_t x_stride = 0;   // elements
  int64_t x_columns = 0;  // k, or of codes padded_k; a multiple of 8
  Element x_type = Element::f16;
  int64_t m = 0;
  Output out;
};

/// slab_sm90.cu: M <= 16. codes in natural order, or x.
cudaError_t launch_w4a8_slab_sm90(const GemmArgs& args, const SlabConfig& config,
                                  cudaStream_t stream);
cudaError_t launch_w4a16_slab_sm90(const GemmArgs& args, const SlabConfig& config,
                                   cudaStream_t stream);

/// w4a8_rs_sm90.cu: any M. codes in wgmma order. scratch: rs_scratch_bytes().
cudaError_t launch_w4a8_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                cudaStream_t stream);

/// w4a8_fp8_rs_sm90.cu: the same of e4m3 bytes, with scales per token.
cudaError_t launch_w4a8_fp8_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                    cudaStream_t stream);

/// w4a16_rs_sm90.cu: any M. x goes to `reordered` first, (m, padded_k) of 16 bits, 16-byte aligned,
/// by a launch of its own. scratch: rs_scratch_bytes().
cudaError_t launch_w4a16_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                 void* reordered, cudaStream_t stream);

/// reorder_sm90.cu: args.x to `to`, (m, padded_k), in the order of the products of w4a16_rs_sm90.
cudaError_t launch_reorder(const GemmArgs& args, void* to, cudaStream_t stream);

/// w4a8_ss_sm90.cu: any M, groups of at least 128. codes in natural order; e4m3 bytes if
/// config.e4m3. scratch: ss_scratch(). Two launches.
cudaError_t launch_w4a8_ss_sm90(const GemmArgs& args, const SsConfig& config, void* scratch,
                                cudaStream_t stream);

/// w4a16_ss_sm90.cu: any M, groups of at least 128. x where it is; config.halves. scratch:
/// ss_scratch(). Two launches.
cudaError_t launch_w4a16_ss_sm90(const GemmArgs& args, const SsConfig& config, void* scratch,
                                 cudaStream_t stream);

/// expand_sm90.cu, the first of the two: makes all parts of ss_scratch() but `parts`; none there
/// are, no launch.
cudaError_t launch_expand(const GemmArgs& args, const SsConfig& config, void* scratch,
                          cudaStream_t stream);
/// The image alone, kKeptImage, of args.slabs, layout and bf16_scales.
cudaError_t launch_expand_weights(const GemmArgs& args, bool e4m3, uint8_t* image,
                                  cudaStream_t stream);

/// w4a8_mma_sm80.cu: any M, any device from sm_80 on. codes in natural order.
cudaError_t launch_w4a8_mma_sm80(const GemmArgs& args, cudaStream_t stream);

/// w4a16_mma_sm80.cu: the same for x of 16 bits.
cudaError_t launch_w4a16_mma_sm80(const GemmArgs& args, cudaStream_t stream);

/// pack.cu: AWQ tensors in device memory to slabs. q, zeros, scales as in format/quant_matrix.h,
/// awq_gemm layout, all of it in device memory; zeros may be null (8 everywhere).
struct PackArgs {
  const uint32_t* q = nullptr;       // (k, n / 8)
  const uint32_t* zeros = nullptr;   // (groups, n / 8)
  const uint16_t* scales = nullptr;  // (groups, n)
  PackedLayout layout;
  uint8_t* slabs = nullptr;
};
cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream);

/// quantize.cu: the activation quantizers of gemm/cpu/quantize.h, bit for bit.
enum class Scaling : int { tensor, token, group, static_tensor, static_group };
/// What codes are, and are stored as: integers as bytes, integers as e4m3 bytes (limit 7), e4m3
/// numbers as bytes, or e4m3 numbers as f16.
enum class Codes : int { int8, int_as_e4m3, e4m3, halves };
struct QuantizeArgs {
  const void* x = nullptr;
  int64_t x_stride = 0;
  Element type = Element::bf16;
  int64_t m = 0, k = 0, padded_k = 0;
  int64_t group_size = 0;  // of scales
  int promoted = 128;      // of sums
  Scaling scaling = Scaling::token;
  int limit = 127;  // 127 or 7; e4m3: 448
  Codes kind = Codes::int8;
  bool symmetric = true;  // false: limit 15, zero point taken off
  float clip = 1.0f;
  const float* static_scales = nullptr;
  bool wgmma_order = false;  // of bytes
  int8_t* codes = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;           // or null; of Codes::int8
  uint32_t* tensor_range = nullptr;  // Scaling::tensor: scratch of 4 words
  bool programmatic = false;
};
cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream);

}  // namespace nibble::cuda
