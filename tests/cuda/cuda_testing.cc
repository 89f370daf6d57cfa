#include "cuda_testing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm/cuda/ss_plan.h"

namespace nibble::cuda::testing {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr int kGuard = 0x5a;

double unit_roundoff(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return 0x1p-24;
    case Dtype::f16: return 0x1p-11;
    case Dtype::bf16: return 0x1p-8;
  }
  return 0;
}

double smallest_step(Dtype dtype) {
  return dtype == Dtype::f16 ? 0x1p-24 : dtype == Dtype::bf16 ? 0x1p-133 : 0x1p-149;
}

/// Parts that a kernel may sum on its own before it adds them: at most one a unit of its schedule.
int64_t parts_of(const Plan& plan) {
  if (keeps_the_order(plan)) return 1;
  return plan.padded_k / (plan.family == KernelFamily::ss ? kBlockDepth : kSlabDepth);
}

std::string compare_bits(const Plan& plan, const Expected& expected,
                         const std::vector<std::byte>& y, int64_t stride) {
  const Problem& p = plan.problem;
  const int bytes = dtype_bytes(p.y_dtype);
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    std::byte rounded[4] = {};
    store_from_float(rounded, 0, p.y_dtype, expected.y[i]);
    const int64_t row = i / p.n, column = i % p.n;
    if (std::memcmp(rounded, &y[(row * stride + column) * bytes], bytes) == 0) continue;
    return fmt::format("y of row {}, column {} is {}, expected the bits of {}", row, column,
                       load_as_float(y.data(), row * stride + column, p.y_dtype), expected.y[i]);
  }
  return "";
}

std::string compare_bounded(const Plan& plan, const Expected& expected,
                            const std::vector<std::byte>& y, int64_t stride) {
  const Problem& p = plan.problem;
  // docs/kernels.md, with one more rounding for each part
  const double steps = static_cast<double>(expected.terms + parts_of(plan) + 3);
  const double growth = std::expm1(steps * std::log1p(0x1p-24));
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    const int64_t row = i / p.n, column = i % p.n;
    const double found = load_as_float(y.data(), row * stride + column, p.y_dtype);
    const double bound = growth * expected.magnitude[i] +
                         unit_roundoff(p.y_dtype) * std::fabs(expected.exact[i]) * 1.01 +
                         smallest_step(p.y_dtype) + steps * 0x1p-149;
    if (std::fabs(found - expected.exact[i]) <= bound) continue;
    return fmt::format("y of row {}, column {} is {}, expected {} within {:.3g}", row, column,
                       found, expected.exact[i], bound);
  }
  return "";
}

/// Only y's own columns may have been written.
std::string check_padding(const Problem& p, const std::vector<std::byte>& y, int64_t stride) {
  const int bytes = dtype_bytes(p.y_dtype);
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t i = (row * stride + p.n) * bytes; i < (row + 1) * stride * bytes; ++i) {
      if (y[i] != std::byte{0xcc}) return fmt::format("written behind the end of row {}", row);
    }
  }
  return "";
}

/// Groups cut into what is promoted at once; k past K has codes equal to the zero point.
ref::Weights cut_into_blocks(const ref::Weights& w) {
  const int64_t depth = promoted_depth(w.group_size), blocks = (w.k + depth - 1) / depth;
  ref::Weights cut{blocks * depth, w.n, depth, blocks, {}, {}, {}};
  for (int64_t n = 0; n < w.n; ++n) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t group = n * w.groups + b * depth / w.group_size;
      cut.zeros.push_back(w.zeros[group]);
      cut.scales.push_back(w.scales[group]);
      for (int64_t k = b * depth; k < (b + 1) * depth; ++k) {
        cut.codes.push_back(k < w.k ? w.codes[n * w.k + k] : w.zeros[group]);
      }
    }
  }
  return cut;
}

}  // namespace

const Result<DeviceInfo>& gpu() {
  static const Result<DeviceInfo> info = device_info(0);
  return info;
}

void check_cuda(cudaError_t error, const char* what) {
  ASSERT_EQ(error, cudaSuccess) << what << ": " << cudaGetErrorString(error);
}

Buffer::Buffer(size_t bytes, int fill_byte) : bytes_(bytes) {
  NIBBLE_CHECK_CUDA(cudaMalloc(&data_, bytes + kGuardBytes));
  NIBBLE_CHECK_CUDA(cudaMemset(data_, fill_byte, bytes));
  NIBBLE_CHECK_CUDA(cudaMemset(as<std::byte>() + bytes, kGuard, kGuardBytes));
}

Buffer::~Buffer() { (void)cudaFree(data_); }

void Buffer::upload(const void* from) {
  NIBBLE_CHECK_CUDA(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice));
}

void Buffer::fill(int byte) { NIBBLE_CHECK_CUDA(cudaMemset(data_, byte, bytes_)); }

void Buffer::copy_to(void* to) const {
  NIBBLE_CHECK_CUDA(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost));
}

bool Buffer::guard_is_intact() const {
  std::vector<std::byte> guard(kGuardBytes);
  NIBBLE_CHECK_CUDA(
      cudaMemcpy(guard.data(), as<std::byte>() + bytes_, kGuardBytes, cudaMemcpyDeviceToHost));
  for (const std::byte byte : guard) {
    if (byte != static_cast<std::byte>(kGuard)) return false;
  }
  return true;
}

std::vector<Variant> kernels(const Problem& problem) {
  std::vector<Variant> found;
  for (const KernelRow& row : kernel_table()) {
    const Result<Plan> plan = plan_gemm(problem, *gpu(), row.name);
    if (plan.ok()) found.push_back({row.name, *plan});
  }
  EXPECT_FALSE(found.empty());
  return found;
}

std::vector<Variant> variants(const Problem& problem) {
  // Three workers have whole tiles and then split ones, where a whole GPU has only one kind.
  struct Sharing {
    bool split;
    int multiprocessors;
    const char* name;
  };
  constexpr Sharing kSharings[] = {
      {false, 132, ""}, {true, 132, " split"}, {true, 6, " split, three workers"}};
  std::vector<Variant> found;
  const auto add = [&](Variant& variant, const std::string& name) {
    variant.plan.workspace_bytes = workspace_layout(variant.plan).total;
    variant.name += name;
    found.push_back(variant);
  };
  const int64_t problem_slices = packed_layout(problem.n, problem.k, problem.group_size).slices;
  for (const Variant& kernel : kernels(problem)) {
    if (kernel.plan.family == KernelFamily::ss) {
      for (const Sharing& sharing : kSharings) {
        Variant variant = kernel;
        variant.plan.ss.split_tail = sharing.split;
        variant.plan.ss.multiprocessors = sharing.multiprocessors;
        add(variant, sharing.name);
      }
      for (const int tile : ss_token_tiles(kernel.plan.ss)) {
        if (tile == kernel.plan.ss.token_tile) continue;
        Variant variant = kernel;
        variant.plan.ss.token_tile = tile;
        variant.plan.ss.split_tail = true;
        variant.plan.ss.multiprocessors = 6;
        add(variant, fmt::format(" tile of {}, split, three workers", tile));
      }
      continue;
    }
    if (kernel.plan.family == KernelFamily::slab) {
      found.push_back(kernel);
      for (const int held : {1, 3}) {  // deep K's form, as few blocks as make it come round again
        Variant variant = kernel;
        variant.plan.slab.form = SlabForm::streamed;
        variant.plan.slab.k_warps = static_cast<int>(std::min<int64_t>(2, problem_slices));
        variant.plan.slab.tile_warps = 1;
        variant.plan.slab.stages = held;
        variant.plan.slab.held_tiles = held;
        variant.plan.slab.blocks = 2;
        add(variant, fmt::format(" streamed {}", held));
      }
      continue;
    }
    if (kernel.plan.family != KernelFamily::rs) {
      found.push_back(kernel);
      continue;
    }
    const PackedLayout layout = packed_layout(problem.n, problem.k, problem.group_size);
    for (const RsTile& tile : rs_tiles(layout, rs_activations(kernel.plan))) {
      for (const Sharing& sharing : kSharings) {
        Variant variant = kernel;
        variant.plan.rs.token_tile = tile.tokens;
        variant.plan.rs.math_groups = tile.math_groups;
        variant.plan.rs.blocks = tile.blocks;
        variant.plan.rs.split_tail = sharing.split;
        variant.plan.rs.parts = 1;
        variant.plan.rs.multiprocessors = sharing.multiprocessors;
        add(variant,
            fmt::format(" tile {}x{}{}", tile.tokens, 64 * tile.math_groups, sharing.name));
      }
      for (const RsConfig& config : rs_configs(layout, tile, kernel.plan.rs.multiprocessors)) {
        if (config.parts == 1) continue;
        Variant variant = kernel;
        variant.plan.rs = config;
        add(variant,
            fmt::format(" tile {}x{} {} parts", tile.tokens, 64 * tile.math_groups, config.parts));
      }
    }
  }
  return found;
}

bool keeps_the_order(const Plan& plan) {
  switch (plan.family) {
    case KernelFamily::slab:
    case KernelFamily::slab_rows:
    case KernelFamily::slab_handed:  // one or two rows: groups of a slice are summed side by side
      return plan.padded_k == kSlabDepth && plan.problem.m > 2;
    case KernelFamily::rs: return !plan.rs.split_tail && plan.rs.parts == 1;
    case KernelFamily::ss: return !plan.ss.split_tail;
    case KernelFamily::mma:
    case KernelFamily::mma_int4: return true;
  }
  return false;
}

void refresh(GpuWeight& weight) {
  weight.host.reference = ref::unpack(weight.host.tensors.view());
  weight.blocks = cut_into_blocks(weight.host.reference);
  Result<DeviceWeights> device =
      DeviceWeights::create(*gpu(), weight.host.tensors.view(), weight.host.bias_or_null());
  ASSERT_TRUE(device.ok()) << device.status().message();
  weight.device = std::move(*device);
}

GpuWeight make_gpu_weight(const WeightSpec& spec, std::mt19937& random) {
  GpuWeight weight;
  weight.host = nibble::testing::make_weight(spec, random);
  refresh(weight);
  return weight;
}

Quantized random_quantized(const Problem& problem, std::mt19937& random) {
  Quantized q;
  if (problem.mode == Mode::w4a16) {  // x is made of integers: sums of a group are exact
    q.codes = nibble::testing::random_codes(Mode::w4a8, problem.m * problem.k, random);
    q.scales.assign(static_cast<size_t>(problem.m), 1.0f);
    return q;
  }
  q.codes = nibble::testing::random_codes(Mode::w4a8, problem.m * problem.k, random);
  const int64_t per_row =
      scales_per_group(problem.granularity) ? problem.k / problem.group_size : 1;
  if (problem.mode == Mode::w4a4) {  // asymmetric: 0..15 less the zero point of the scale
    const int64_t span = problem.k / per_row;
    int zero = 8;
    for (int64_t i = 0; i < problem.m * problem.k; ++i) {
      if (!problem.symmetric && i % span == 0) zero = static_cast<int>(random() % 16);
      q.codes[i] = static_cast<int8_t>(static_cast<int>(random() % 16) - zero);
    }
  }
  q.scales.resize(static_cast<size_t>(problem.m * per_row));
  for (float& t : q.scales) t = std::uniform_real_distribution<float>(0.001f, 0.1f)(random);
  return q;
}

Expected expected_of(const Problem& problem, const GpuWeight& weight, const Quantized& input) {
  const ref::Weights& w = weight.blocks;
  std::vector<int8_t> codes(static_cast<size_t>(problem.m * w.k));
  for (int64_t i = 0; i < problem.m * problem.k; ++i) {
    codes[i / problem.k * w.k + i % problem.k] = input.codes[i];
  }
  // a scale for each block instead of each group
  std::vector<float> scales = input.scales;
  const bool by_group = scales_per_group(problem.granularity);
  if (by_group) {
    const int64_t groups = problem.k / problem.group_size;
    scales.clear();
    for (int64_t row = 0; row < problem.m; ++row) {
      for (int64_t b = 0; b < w.groups; ++b) {
        scales.push_back(input.scales[row * groups + b * w.group_size / problem.group_size]);
      }
    }
  }
  const float* bias = weight.host.bias_or_null();
  const std::vector<int32_t> sums = ref::partial_sums(w, codes.data(), problem.m);
  Expected e;
  e.terms = w.groups;
  e.y = ref::epilogue(problem, w, sums, scales.data(), bias);
  for (int64_t row = 0; row < problem.m; ++row) {
    for (int64_t n = 0; n < w.n; ++n) {
      double exact = bias != nullptr ? bias[n] : 0.0, magnitude = std::fabs(exact);
      for (int64_t b = 0; b < w.groups; ++b) {
        const double t = scales[by_group ? row * w.groups + b : row];
        const double term = t * sums[(row * w.groups + b) * w.n + n] * w.scales[n * w.groups + b];
        exact += term;
        magnitude += std::fabs(term);
      }
      e.exact.push_back(exact);
      e.magnitude.push_back(magnitude);
    }
  }
  return e;
}

int64_t natural_index(OperandOrder order, int64_t index) {
  if (order == OperandOrder::natural) return index;
  constexpr int64_t kWords[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of each 32 k, as they are stored
  return index / 32 * 32 + kWords[index % 32 / 4] * 4 + index % 4;
}

int8_t stored_code(const Plan& plan, int8_t code) {
  if (!plan.e4m3 || code == 0) return code;
  const int magnitude = std::abs(code), exponent = std::ilogb(static_cast<float>(magnitude));
  const int mantissa = (magnitude << 3 >> exponent) & 7;
  return static_cast<int8_t>((code < 0 ? 0x80 : 0) | (exponent + 7) << 3 | mantissa);
}

DeviceOperand upload(const Plan& plan, const Quantized& input) {
  const Problem& p = plan.problem;
  const int64_t promoted = promoted_depth(p.group_size), blocks = plan.padded_k / promoted;
  std::vector<int8_t> codes(static_cast<size_t>(p.m * plan.padded_k));
  std::vector<int32_t> sums(static_cast<size_t>(p.m * blocks));
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t i = 0; i < plan.padded_k; ++i) {
      const int64_t k = natural_index(plan.order, i);
      if (k >= p.k) continue;
      codes[row * plan.padded_k + i] = stored_code(plan, input.codes[row * p.k + k]);
      sums[row * blocks + k / promoted] += input.codes[row * p.k + k];
    }
  }
  return {Buffer(codes), Buffer(input.scales), Buffer(sums), Buffer(16)};
}

std::string compare(const Plan& plan, const Expected& expected, const std::vector<std::byte>& y,
                    int64_t stride) {
  return keeps_the_order(plan) ? compare_bits(plan, expected, y, stride)
                               : compare_bounded(plan, expected, y, stride);
}

/// The codes as x of a w4a16 product; rows 8 elements longer, which nobody may read: NaN.
Buffer upload_x(const Problem& p, const Quantized& input) {
  std::vector<uint16_t> x(static_cast<size_t>(p.m * (p.k + 8)), 0xffff);
  for (int64_t i = 0; i < p.m * p.k; ++i) {
    store_from_float(x.data(), i / p.k * (p.k + 8) + i % p.k, p.x_dtype, input.codes[i]);
  }
  return Buffer(x);
}

Status launch(const Plan& plan, const GpuWeight& weight, const Quantized& input, void* y,
              int64_t stride, void* workspace) {
  if (plan.problem.mode == Mode::w4a16) {
    const Buffer x = upload_x(plan.problem, input);
    const Status status = run_gemm(plan, {x.as<>(), plan.problem.k + 8}, weight.device, y, stride,
                                   workspace, nullptr);
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    return status;
  }
  const DeviceOperand operand = upload(plan, input);
  const Status status =
      run_gemm_quantized(plan, operand.operand(), weight.device, y, stride, workspace, nullptr);
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  return status;
}

bool flags_are_zero(const Plan& plan, const Buffer& workspace) {
  if (plan.workspace_bytes < kFlagBytes) return true;
  const auto bytes = workspace.download<std::byte>();
  return std::all_of(bytes.begin(), bytes.begin() + kFlagBytes,
                     [](std::byte b) { return b == std::byte{0}; });
}

std::string run_and_compare(const Plan& plan, const GpuWeight& weight, const Quantized& input,
                            const Expected& expected, int times) {
  const Problem& p = plan.problem;
  const int64_t stride = p.n + 8;
  const Buffer workspace(plan.workspace_bytes, 0);
  for (int i = 0; i < times; ++i) {
    const Buffer y(static_cast<size_t>(p.m * stride * dtype_bytes(p.y_dtype)));
    const Status status = launch(plan, weight, input, y.as<>(), stride, workspace.as<>());
    if (!status.ok()) return status.message();
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
      return cudaGetErrorString(error);
    }
    const auto found = y.download<std::byte>();
    if (!y.guard_is_intact()) return "written behind the end of y";
    if (!workspace.guard_is_intact()) return "written behind the end of the workspace";
    if (!flags_are_zero(plan, workspace)) return "flags in the workspace are not left zero";
    if (std::string text = check_padding(p, found, stride); !text.empty()) return text;
    if (std::string text = compare(plan, expected, found, stride); !text.empty()) return text;
  }
  return "";
}

namespace {

void expect_mode_right(Problem problem, const GpuWeight& weight, std::mt19937& random) {
  problem.n = weight.host.reference.n;
  problem.k = weight.host.reference.k;
  problem.group_size = weight.host.reference.group_size;
  const Quantized input = random_quantized(problem, random);
  const Expected expected = expected_of(problem, weight, input);
  const auto check = [&](const Problem& of) {
    for (const Variant& variant : variants(of)) {
      const std::string wrong = run_and_compare(variant.plan, weight, input, expected);
      ASSERT_EQ(wrong, "") << variant.name << " [" << variant.plan.describe() << "]";
    }
  };
  if (problem.mode != Mode::w4a16) return check(problem);
  for (const Dtype x_dtype : {Dtype::f16, Dtype::bf16}) {
    problem.x_dtype = x_dtype;
    check(problem);
  }
}

}  // namespace

void expect_all_variants_right(const Problem& problem, const GpuWeight& weight,
                               std::mt19937& random) {
  expect_mode_right(problem, weight, random);
  const bool plain = problem.mode == Mode::w4a8 && problem.granularity == Granularity::token;
  if (!plain || ::testing::Test::HasFatalFailure()) return;
  Problem floats = problem;
  floats.mode = Mode::w4a16;
  expect_mode_right(floats, weight, random);
}

}  // namespace nibble::cuda::testing
