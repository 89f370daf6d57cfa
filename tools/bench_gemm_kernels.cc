#include "bench_gemm_kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "cli.h"

namespace nibble::cli {
namespace {

/// A null kernel: the plan chooses.
using Choice = std::pair<Mode, const char*>;

/// The preferred kernel of a mode among those that use no wider instruction set than `isa`.
Result<const char*> widest_within(const std::string& isa, Mode mode) {
  using enum Isa;
  // AVX-VNNI is an extension of AVX2 that CPUs with AVX-512 may lack, VNNI among it or not
  static const std::map<std::string, std::vector<Isa>> allowed = {
      {"avx2", {scalar, avx2}},
      {"avxvnni", {scalar, avx2, avx_vnni}},
      {"avx512", {scalar, avx2, avx512}},
      {"avx512vnni", {scalar, avx2, avx512, avx512_vnni}}};
  const std::vector<Isa>& within = allowed.at(isa);
  for (const KernelInfo& info : kernel_table()) {
    const bool fits = std::find(within.begin(), within.end(), info.isa) != within.end();
    if (info.mode == mode && info.runs_here && fits) return info.name;
  }
  return Status(Code::unsupported,
                fmt::format("no kernel of {} within {} runs here", mode_name(mode), isa));
}

Result<std::vector<Choice>> choices(const GemmBenchOptions& o) {
  std::vector<Choice> chosen;
  for (const std::string& name : o.kernels) {
    const size_t before = chosen.size();
    for (const KernelInfo& info : kernel_table()) {
      if (name == info.name) chosen.emplace_back(info.mode, info.name);
    }
    if (chosen.size() == before) {
      return Status(Code::invalid_argument,
                    fmt::format("no kernel is named '{}' (see nibble doctor)", name));
    }
  }
  if (!o.kernels.empty()) return chosen;
  for (const std::string& mode : o.modes) {
    const char* kernel = nullptr;
    if (!o.isa.empty() && o.isa != "amx") {  // AMX is no limit: the plan chooses it where it pays
      Result<const char*> widest = widest_within(o.isa, modes_by_name().at(mode));
      if (!widest.ok()) return widest.status();
      kernel = *widest;
    }
    chosen.emplace_back(modes_by_name().at(mode), kernel);
  }
  return chosen;
}

Status prepare(const GemmBenchOptions& o, const GemmShape& shape, const Choice& choice,
               const std::vector<float>& x, int64_t m, KernelRun& run) {
  const Problem p{.m = m,
                  .n = shape.packed.n,
                  .k = shape.packed.k,
                  .group_size = shape.packed.group_size,
                  .mode = choice.first,
                  .granularity = granularities_by_name().at(o.activations),
                  .symmetric = choice.first != Mode::w4a4 || o.symmetric};
  Result<Plan> plan = plan_gemm(p, choice.second, o.threads);
  if (!plan.ok()) return plan.status();
  run.plan = *plan;
  for (const KernelInfo& info : kernel_table()) {
    if (run.plan.kernel_name() == std::string_view(info.name)) run.isa = info.isa;
  }
  Result<AlignedBuffer> workspace = AlignedBuffer::zeroed(plan->workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  run.workspace = std::move(*workspace);
  run.y.resize(static_cast<size_t>(m * p.n));
  run.input.x = x.data();
  run.input.x_stride = p.k;
  run.target = {&shape.packed, run.y.data(), p.n, nullptr};
  return {};
}

}  // namespace

Result<std::vector<KernelRun>> our_kernels(const GemmBenchOptions& options, const GemmShape& shape,
                                           const std::vector<float>& x, int64_t m) {
  Result<std::vector<Choice>> chosen = choices(options);
  if (!chosen.ok()) return chosen.status();
  std::vector<KernelRun> runs(chosen->size());
  for (size_t i = 0; i < runs.size(); ++i) {
    NIBBLE_TRY(prepare(options, shape, (*chosen)[i], x, m, runs[i]));
  }
  return runs;
}

}  // namespace nibble::cli
