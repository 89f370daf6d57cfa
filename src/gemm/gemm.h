// The one door to matrix products with 4-bit weights: y = x * W (+ bias).
//
//   Problem  what is asked        plan_gemm()  picks a kernel and sizes, or says why not
//   Plan     a plain value        run_gemm()   quantizes x, multiplies, dequantizes
//
// Glossary
//   M, N, K      rows of x; output channels; input channels
//   group        group_size consecutive input channels that share one scale s and zero point z
//   codes        q in 0..15 (weights); a in -128..127 (activations, zero point already taken off)
//   S            sum over one group of (q - z) * a: an int32, the same in every kernel
//   t            activation scale: x ~ a * t
//   partials     all S of a product, (M, groups, N) int32
//   token, group activation granularity: one t per row; one t per (row, K-group)
//
// Exactness. S is exact. The float epilogue is a fixed sequence of IEEE operations per output, so
// every kernel gives the same bits for the same input, whatever M, the threads and the blocking:
//   w4a8, w4a4, token:  acc = fma(float(S), s, acc) for each group in order;  y = acc * t
//   w4a8, w4a4, group:  acc = fma(float(S) * t, s, acc) for each group;        y = acc
//   w4a8-fp8 (CUDA devices only): a is an e4m3 number, t = max |x| / 448; sums are floats
//   w4a16:              p = fma(x, float(q - z), p) along the group from 0,
//                       acc = fma(p, s, acc) for each group;                   y = acc
// with bias fma(acc, t, bias) or acc + bias; then rounded once, half to even, to y's type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"

namespace nibble {

struct PackedWeights;  // gemm/cpu/packed_weights.h

/// More than this is refused.
inline constexpr int kMaxThreads = 1024;

/// Values equal nibble_mode in include/nibble.h.
enum class Mode : int { w4a16 = 0, w4a8 = 1, w4a4 = 2, w4a8_fp8 = 3 };

/// How many elements of x share one activation scale, and whether it is known beforehand.
/// Values equal nibble_granularity in include/nibble.h.
enum class Granularity : int {
  tensor = 0,         // one t from all of x; the only one whose result depends on the batch
  token = 1,          // one t per row
  group = 2,          // one t per (row, K-group); the K-groups are the weight's groups
  static_tensor = 3,  // one given t
  static_group = 4,   // K / group_size given t: exactly a factor of s[g], without rounding s
};

const char* mode_name(Mode mode);                       // "w4a8"
const char* granularity_name(Granularity granularity);  // "token", "static-group", ...
bool scales_per_group(Granularity granularity);

struct Problem {
  int64_t m = 0, n = 0, k = 0;
  int64_t group_size = 0;  // 1..k
  Mode mode = Mode::w4a8;
  Dtype x_dtype = Dtype::f32;
  Dtype y_dtype = Dtype::f32;
  Granularity granularity = Granularity::token;  // ignored by w4a16
  bool symmetric = true;  // activations; false (zero point per scale, dynamic only): w4a4 only
  // w4a4, granularity group: some groups have 8-bit activations (GemmInput::wide_groups). The
  // product is exact as ever; it needs a kernel of mode w4a8.
  bool mixed_groups = false;

  /// The mode whose kernels run this problem.
  Mode kernel_mode() const { return mixed_groups ? Mode::w4a8 : mode; }
};

/// Limits shared by all kernels of all devices: ok, or what is refused and why. Per-kernel choice
/// (which M a kernel is good for) is policy of the plans.
Status check_problem(const Problem& problem);

enum class Isa : int { scalar, avx2, avx_vnni, avx512, avx512_vnni, amx_int8 };
const char* isa_name(Isa isa);

/// One row of the kernel table. Definitions: src/gemm/cpu/kernels.cc.
struct CpuKernel;

struct KernelInfo {
  const char* name;  // "w4a8_amx": also its file and its row in docs/kernels.md
  Mode mode;
  Isa isa;
  bool runs_here;      // this build has it and this CPU executes it
  std::string reason;  // why not, if not
};

/// The whole table, priority order within a mode.
std::vector<KernelInfo> kernel_table();

/// Everything decided before the first byte is touched. A plain value: cheap to copy, printable,
/// valid for its problem's shape and any buffers.
struct Plan {
  Problem problem;
  const CpuKernel* kernel = nullptr;
  int threads = 1;
  int64_t block_rows = 0;       // rows of x that are quantized, then multiplied, together
  int64_t blocks_per_task = 0;  // 32-column weight blocks one thread walks at once
  size_t workspace_bytes = 0;

  const char* kernel_name() const;
  std::string describe() const;  // one line
};

/// Chooses a kernel for `problem`. `force` (or, if null, the environment variable NIBBLE_KERNEL)
/// names one kernel; an unknown name, a kernel of another mode or one that refuses is an error.
/// NIBBLE_KERNEL may list several names by comma, at most one a mode: the one of this mode counts.
/// threads <= 0: all CPUs this process may use.
Result<Plan> plan_gemm(const Problem& problem, const char* force = nullptr, int threads = 0);

/// What every kernel of the problem's mode says to it: the text behind `--explain`.
std::string explain_plan(const Problem& problem, const char* force = nullptr, int threads = 0);

/// Makes one row of x on demand: (K) floats, at `scratch` (room for K, 64-byte aligned) or anywhere
/// else. Called once per row by whichever thread quantizes it: normalization and activation
/// functions are fused into the quantizer this way, with the row in the nearest cache.
struct RowSource {
  const float* (*make)(void* context, int64_t row, float* scratch) = nullptr;
  void* context = nullptr;
};

/// x and how it is scaled.
struct GemmInput {
  const void* x = nullptr;  // (M, K) of problem.x_dtype, rows x_stride elements apart
  int64_t x_stride = 0;     // elements, >= K
  float clip = 1.0f;        // dynamic granularities: the range is multiplied by it, in (0, 1]
  const float* static_scales = nullptr;  // static_tensor: (1); static_group: (K / group_size)
  // Problem::mixed_groups: (K / group_size), nonzero where a group has 8-bit symmetric activations
  const uint8_t* wide_groups = nullptr;
  // instead of x if `make` is set: x_dtype f32; not for Granularity::tensor
  RowSource rows = {};
};

/// One weight that is multiplied with the shared input.
struct GemmTarget {
  const PackedWeights* weights = nullptr;  // k, group_size as in the problem; any n
  void* y = nullptr;            // (M, n) of problem.y_dtype, rows y_stride elements apart
  int64_t y_stride = 0;         // elements, >= n
  int32_t* partials = nullptr;  // optional (M, groups, n): all S; not for w4a16
};

/// Quantize + GEMM + dequantize in one call. x is quantized once for all targets, block_rows rows
/// at a time: int8 activations of the whole batch are never written to memory.
/// workspace: plan.workspace_bytes, 64-byte aligned. Thread-safe for distinct workspaces and
/// outputs. NaN or infinity in x: non_finite, naming the first such row; y is then unspecified.
Status run_gemm(const Plan& plan, const GemmInput& input, std::span<const GemmTarget> targets,
                void* workspace);

/// The same for activations that are quantized already.
struct QuantizedInput {
  const int8_t* codes = nullptr;  // (M, K), rows code_stride apart; w4a4: in -15..15
  int64_t code_stride = 0;
  const float* scales = nullptr;  // (M), or (M, groups) when scales_per_group(granularity)
};
Status run_gemm_quantized(const Plan& plan, const QuantizedInput& input,
                          std::span<const GemmTarget> targets, void* workspace);

/// The activation quantizer alone, with the vector code that `plan`'s kernel would use.
/// codes (M, K) row-major; scales as in QuantizedInput; sums (M, groups) or null.
Status quantize_activations(const Plan& plan, const GemmInput& input, int8_t* codes, float* scales,
                            int32_t* sums);

}  // namespace nibble
