// The door to the CUDA kernels: y = x * W (+ bias) on one device. Plain C++; no CUDA header is
// needed to use it, and none of src/gemm/cpu is seen by it. Problem, modes and granularities are
// those of gemm/gemm.h.
//
// Rules
//   - Streams, workspaces and all operands belong to the caller. Nothing here allocates or waits
//     except where a function says so; launches may be captured into a CUDA graph. A null stream is
//     the default stream of the plan's device.
//   - Integer sums are exact: the S of gemm/gemm.h, except that a group longer than 128 is summed
//     to float every 128 k. The order of the float operations is fixed by the plan, so the same
//     plan gives the same bits; a kernel that does not split K gives those of the CPU.
//   - x and y begin at multiples of 16 bytes, and so do all their rows.
//   - A row of x with a NaN or infinity becomes a row of NaN in y: nothing is reported, because
//     that would need a wait. w4a16 quantizes nothing: there they go the way of IEEE arithmetic,
//     and x has 16 bits. Its products q - z times x are exact, their sums floats of tensor cores.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"
#include "format/quant_matrix.h"
#include "gemm/cuda/packed.h"
#include "gemm/cuda/rs_schedule.h"
#include "gemm/cuda/slab_plan.h"
#include "gemm/gemm.h"

namespace nibble::cuda {

using Stream = void*;  // a cudaStream_t

/// What plans need to know of a GPU; filled by device_info(), or made up by a test.
struct DeviceInfo {
  int ordinal = 0;
  std::string name;     // "NVIDIA H200"
  int capability = 90;  // 10 * major + minor
  int multiprocessors = 132;
  int64_t l2_bytes = 0;
  int64_t memory_bytes = 0;
  int64_t shared_bytes = 0;  // largest dynamic shared memory of a block

  /// Whether a kernel may be launched while the one in front of it still runs.
  bool programmatic() const { return capability >= 90; }
};

/// Number of CUDA devices; unsupported, with the driver's words, if there is no driver or this
/// build has no CUDA.
Result<int> device_count();
Result<DeviceInfo> device_info(int ordinal);

/// One of the weights that are to lie side by side (q, k, v; gate, up).
struct WeightPart {
  QuantMatrix matrix;          // host memory
  const void* bias = nullptr;  // (n) of bias_dtype in host memory, or null: zeros
  Dtype bias_dtype = Dtype::f32;
};

/// One weight in device memory, packed as packed.h draws it. Moves, is freed on destruction.
class DeviceWeights {
 public:
  /// Copies the tensors of `matrix` (host memory) to `device` and packs them there. bias: (n) of
  /// bias_dtype in host memory, or null. Allocates; waits until done. Refuses group sizes other
  /// than 32, 64, multiples of 128 and K.
  static Result<DeviceWeights> create(const DeviceInfo& device, const QuantMatrix& matrix,
                                      const void* bias = nullptr, Dtype bias_dtype = Dtype::f32);
  /// Several as one, of the sum of their n. Refuses those of different K, group size or type of
  /// scales, and an n, but the last one's, that is not a multiple of 16.
  static Result<DeviceWeights> create(const DeviceInfo& device, std::span<const WeightPart> parts);

  /// The same into `memory` of `device`, 256-byte aligned, of weight_block(...).bytes, which the
  /// caller owns. Waits until done.
  static Status pack(const DeviceInfo& device, const QuantMatrix& matrix, const void* bias,
                     Dtype bias_dtype, void* memory, size_t bytes);
  /// Such memory as weights of a plan's problem: owns nothing, touches no device.
  static Result<DeviceWeights> view(const Problem& problem, int device, const void* memory,
                                    size_t bytes);

  DeviceWeights() = default;
  DeviceWeights(DeviceWeights&& other) noexcept { *this = static_cast<DeviceWeights&&>(other); }
  DeviceWeights& operator=(DeviceWeights&& other) noexcept;
  ~DeviceWeights();

  /// Beside what is packed, every weight in 8 bits, for plans with SsConfig::expanded:
  /// kKeptImage (ss_image.h) more, of int8 or of e4m3 numbers, instead of one that is there.
  /// Allocates; waits until done. Refuses groups of less than 128. On an error there is none.
  Status expand(const DeviceInfo& device, bool e4m3);
  /// What expand() has made of that type, or null.
  const uint8_t* image(bool e4m3) const {
    return image_e4m3_ == e4m3 ? static_cast<const uint8_t*>(image_) : nullptr;
  }

  const PackedLayout& layout() const { return layout_; }
  const uint8_t* slabs() const { return slabs_; }
  const float* bias() const { return bias_; }  // (n) in device memory, or null
  bool bf16_scales() const { return bf16_scales_; }
  int device() const { return device_; }
  /// Bytes of device memory, bias included, an image not.
  int64_t bytes() const;

 private:
  PackedLayout layout_;
  const uint8_t* slabs_ = nullptr;
  const float* bias_ = nullptr;
  void* owned_ = nullptr;  // freed on destruction, as image_
  void* image_ = nullptr;
  bool image_e4m3_ = false;
  bool bf16_scales_ = false;
  int device_ = 0;
};

/// Order of the int8 activations in memory. `natural`: as they are. `wgmma`: of each 32 k, the
/// eight 4-byte words 0 1 2 3 4 5 6 7 are stored as 0 2 4 6 1 3 5 7, the order in which wgmma meets
/// the k of the weights in packed.h.
enum class OperandOrder : int { natural = 0, wgmma = 1 };

enum class KernelFamily : int {
  slab,  // M <= 16: mma.sync over slabs streamed by bulk copies, K split over the warps of a block
  slab_rows,    // M <= 2: run_gemm is one launch, every block quantizes x; its halves are slab's
  slab_handed,  // M <= 16: the same, and the first blocks quantize x for all
  rs,           // wgmma, weights expanded in registers, tokens as the N side
  ss,           // wgmma, weights expanded in scratch first: for many rows
  mma,          // mma.sync, any device from sm_80 on
  mma_int4,     // mma.sync on 4-bit operands: native from 8.0 to 8.9, emulated later
};

/// Everything decided before a launch. A plain value, valid for its problem and device.
struct Plan {
  Problem problem;
  int device = 0;  // ordinal
  KernelFamily family = KernelFamily::rs;
  OperandOrder order = OperandOrder::natural;
  SlabConfig slab;            // of families slab, slab_rows and slab_handed
  SlabConfig fused;           // of one launch from x to y, if run_gemm is that
  RsConfig rs;                // of family rs
  SsConfig ss;                // of family ss
  bool e4m3 = false;          // of rs and ss: products in fp8, activations as e4m3 bytes
  bool programmatic = false;  // how activations are quantized: see DeviceInfo
  int64_t padded_k = 0;
  size_t workspace_bytes = 0;  // of run_gemm; begins with flags that are zeroed once

  /// Whether the kernel reads these flags: those whose blocks wait for each other.
  bool reads_flags() const {
    return family == KernelFamily::slab_handed || family == KernelFamily::rs ||
           family == KernelFamily::ss;
  }
  /// Whether run_gemm quantizes in the launch that multiplies.
  bool is_one_launch() const { return fused.quantizes || fused.handed; }
  const char* kernel_name() const;  // "w4a8_slab_sm90", "w4a8_rs_sm90", ...
  std::string describe() const;     // one line
};

/// Pure: no device is touched. `force`: a kernel_name(), or null. `expanded`: the weights will come
/// with the image that the plan wants (DeviceWeights::expand), so kernels that start from one need
/// not make it. Refuses what no kernel handles, naming it.
Result<Plan> plan_gemm(const Problem& problem, const DeviceInfo& device,
                       const char* force = nullptr, bool expanded = false);

/// Names of all kernels of this build, with their mode and least capability.
struct KernelRow {
  const char* name;
  Mode mode;
  int capability;
};
std::vector<KernelRow> kernel_table();

/// Quantized activations in device memory, as a kernel reads them: codes 16-byte aligned; of w4a4
/// in -8..7 if symmetric, else 0..15 less a zero point of 0..15 that all with one scale share. With
/// Plan::e4m3: e4m3 bytes, of w4a4 those of the same integers. Of w4a8-fp8 else: the same numbers
/// as f16, twice the bytes. Neither has sums.
struct Operand {
  int8_t* codes = nullptr;    // (m, padded_k) in the plan's order; k beyond K is 0
  float* scales = nullptr;    // (m) or (m, groups)
  int32_t* sums = nullptr;    // (m, padded_k / promoted): sums of the codes, which no kernel
                              // reads; null if not wanted
  uint32_t* range = nullptr;  // Granularity::tensor: scratch of 4 words
};

/// x and how it is scaled; the fields of GemmInput that exist on a device.
struct DeviceInput {
  const void* x = nullptr;  // (m, k) of problem.x_dtype
  int64_t x_stride = 0;     // elements
  float clip = 1.0f;
  const float* static_scales = nullptr;  // device memory; static_tensor: (1), static_group: (G)
};

/// Quantize + GEMM + dequantize; w4a16: GEMM of x where it is. workspace: plan.workspace_bytes,
/// 256-byte aligned, zeroed once before its first use (the kernels leave its counters at zero).
Status run_gemm(const Plan& plan, const DeviceInput& input, const DeviceWeights& weights, void* y,
                int64_t y_stride, void* workspace, Stream stream);

/// The two halves of run_gemm; w4a16 has none.
Status quantize_activations(const Plan& plan, const DeviceInput& input, const Operand& to,
                            Stream stream);
Status run_gemm_quantized(const Plan& plan, const Operand& operand, const DeviceWeights& weights,
                          void* y, int64_t y_stride, void* workspace, Stream stream);

/// Where an Operand lies inside a plan's workspace; no sums.
Operand workspace_operand(const Plan& plan, void* workspace);

}  // namespace nibble::cuda
