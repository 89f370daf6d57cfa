// Names, what is a problem at all, the kernel table as callers see it, and the choice of a kernel.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "gemm/cpu/plan.h"
#include "gemm/gemm.h"

namespace nibble {

const char* mode_name(Mode mode) {
  switch (mode) {
    case Mode::w4a16: return "w4a16";
    case Mode::w4a8: return "w4a8";
    case Mode::w4a4: return "w4a4";
    case Mode::w4a8_fp8: return "w4a8-fp8";
  }
  return "?";
}

const char* granularity_name(Granularity granularity) {
  switch (granularity) {
    case Granularity::tensor: return "tensor";
    case Granularity::token: return "token";
    case Granularity::group: return "group";
    case Granularity::static_tensor: return "static-tensor";
    case Granularity::static_group: return "static-group";
  }
  return "?";
}

bool scales_per_group(Granularity granularity) {
  return granularity == Granularity::group || granularity == Granularity::static_group;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx_vnni: return "avxvnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vnni: return "avx512vnni";
    case Isa::amx_int8: return "amx";
  }
  return "?";
}

Status check_problem(const Problem& p) {
  const auto invalid = [](std::string text) { return Status(Code::invalid_argument, text); };
  if (p.m < 0 || p.n <= 0 || p.k <= 0) {
    return invalid(
        fmt::format("M, N, K = {}, {}, {}: expected M >= 0, N > 0, K > 0", p.m, p.n, p.k));
  }
  constexpr int64_t kMaxDimension = INT32_MAX;  // as in weights; keeps byte counts in int64
  if (p.n > kMaxDimension || p.k > kMaxDimension) {
    return invalid(fmt::format("N, K = {}, {}: expected at most {}", p.n, p.k, kMaxDimension));
  }
  if (p.group_size <= 0 || p.k % p.group_size != 0) {
    return invalid(fmt::format("group size {} does not divide K = {}", p.group_size, p.k));
  }
  if (p.n % 8 != 0) return invalid(fmt::format("N = {} is not a multiple of 8", p.n));
  // int32 sums: 15 * 128 * group_size must stay below 2^31
  constexpr int64_t kMaxGroup = int64_t{1} << 20;
  if (p.group_size > kMaxGroup) {
    return invalid(fmt::format("group size {} is above {}: int32 sums could overflow", p.group_size,
                               kMaxGroup));
  }
  if (!p.symmetric && p.mode != Mode::w4a4) {
    return invalid(
        fmt::format("asymmetric activations are for w4a4 only, not for {}", mode_name(p.mode)));
  }
  const bool is_static =
      p.granularity == Granularity::static_tensor || p.granularity == Granularity::static_group;
  if (p.mixed_groups && (p.mode != Mode::w4a4 || p.granularity != Granularity::group)) {
    return invalid("mixed groups are for w4a4 with granularity group");
  }
  if (!p.symmetric && is_static) return invalid("static activation scales are symmetric");
  return {};
}

std::vector<KernelInfo> kernel_table() {
  std::vector<KernelInfo> rows;
  for (const CpuKernel& kernel : cpu_kernels()) {
    const char* reason = isa_missing_reason(kernel.isa);
    rows.push_back(
        {kernel.name, kernel.mode, kernel.isa, reason == nullptr, reason == nullptr ? "" : reason});
  }
  return rows;
}

namespace {

bool runs_here(Isa isa) { return isa_missing_reason(isa) == nullptr; }

const CpuKernel* find_kernel(std::string_view name) {
  for (const CpuKernel& kernel : cpu_kernels()) {
    if (name == kernel.name) return &kernel;
  }
  return nullptr;
}

/// The kernel that `list` (names separated by commas) forces for `mode`: null if none of them is of
/// this mode. Every name must exist.
Result<const CpuKernel*> forced_from_list(std::string_view list, Mode mode) {
  const CpuKernel* found = nullptr;
  for (bool more = true; more;) {
    const size_t comma = list.find(',');
    const std::string_view name = list.substr(0, comma);
    more = comma != std::string_view::npos;
    if (more) list.remove_prefix(comma + 1);
    const CpuKernel* kernel = find_kernel(name);
    if (kernel == nullptr) {
      return Status(
          Code::invalid_argument,
          fmt::format("NIBBLE_KERNEL: no kernel is named '{}' (see nibble doctor)", name));
    }
    if (kernel->mode == mode && found != nullptr) {
      return Status(Code::invalid_argument,
                    fmt::format("NIBBLE_KERNEL: both {} and {} are of mode {}", found->name,
                                kernel->name, mode_name(mode)));
    }
    if (kernel->mode == mode) found = kernel;
  }
  return found;
}

Result<const CpuKernel*> choose_kernel(const Problem& problem, const char* force) {
  const CpuKernel* kernel = nullptr;
  if (force != nullptr) {
    kernel = find_kernel(force);
    if (kernel == nullptr) {
      return Status(Code::invalid_argument,
                    fmt::format("no kernel is named '{}' (see nibble doctor)", force));
    }
    if (kernel->mode != problem.kernel_mode()) {
      return Status(Code::invalid_argument,
                    fmt::format("kernel {} is of mode {}, the problem of mode {}", kernel->name,
                                mode_name(kernel->mode), mode_name(problem.kernel_mode())));
    }
  } else if (const char* list = std::getenv("NIBBLE_KERNEL"); list != nullptr && *list != '\0') {
    Result<const CpuKernel*> forced = forced_from_list(list, problem.kernel_mode());
    if (!forced.ok()) return forced.status();
    kernel = *forced;
  }
  if (kernel == nullptr) return preferred_kernel(problem, runs_here);
  if (const char* reason = isa_missing_reason(kernel->isa)) {
    return Status(Code::unsupported, fmt::format("kernel {}: {}", kernel->name, reason));
  }
  return kernel;
}

}  // namespace

const char* Plan::kernel_name() const { return kernel->name; }

std::string Plan::describe() const {
  std::string activations = problem.mode == Mode::w4a16
                                ? std::string(dtype_name(problem.x_dtype))
                                : fmt::format("{}{}{}", granularity_name(problem.granularity),
                                              problem.symmetric ? "" : " asymmetric",
                                              problem.mixed_groups ? " mixed" : "");
  return fmt::format(
      "{}: M={} N={} K={} g={} x={} y={} act={} threads={} block_rows={} blocks_per_task={} "
      "workspace={} B",
      kernel->name, problem.m, problem.n, problem.k, problem.group_size,
      dtype_name(problem.x_dtype), dtype_name(problem.y_dtype), activations, threads, block_rows,
      blocks_per_task, workspace_bytes);
}

Result<Plan> plan_gemm(const Problem& problem, const char* force, int threads) {
  NIBBLE_TRY(check_problem(problem));
  if (threads > kMaxThreads) {
    return Status(Code::invalid_argument,
                  fmt::format("{} threads are above {}", threads, kMaxThreads));
  }
  if (problem.mode == Mode::w4a8_fp8) {
    return Status(Code::unsupported,
                  "w4a8-fp8 runs on CUDA devices only: CPUs have no products of "
                  "8-bit floats, and w4a8 is as fast and finer");
  }
  Result<const CpuKernel*> kernel = choose_kernel(problem, force);
  if (!kernel.ok()) return kernel.status();
  Plan plan;
  plan.problem = problem;
  plan.kernel = *kernel;
  plan.threads = threads > 0 ? threads : std::min(available_cpus(), kMaxThreads);
  CacheSizes caches;
  const CpuFeatures& features = cpu_features();
  if (features.l2_bytes > 0) caches.l2_bytes = features.l2_bytes;
  size_plan(plan, caches);
  return plan;
}

std::string explain_plan(const Problem& problem, const char* force, int threads) {
  std::string text;
  const Result<Plan> plan = plan_gemm(problem, force, threads);
  for (const KernelInfo& info : kernel_table()) {
    if (info.mode != problem.kernel_mode()) continue;
    const bool chosen = plan.ok() && plan->kernel->name == std::string_view(info.name);
    text += fmt::format("  {:<18} {}\n", info.name,
                        chosen            ? "chosen"
                        : !info.runs_here ? info.reason
                                          : "could run; another is preferred or forced");
  }
  text += plan.ok() ? "  " + plan->describe() + "\n" : "  " + plan.status().message() + "\n";
  return text;
}

}  // namespace nibble
