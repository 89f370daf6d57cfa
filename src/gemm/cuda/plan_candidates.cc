// See plan_candidates.h.
#include "gemm/cuda/plan_candidates.h"

#include <algorithm>
#include <limits>
#include <string>

#include "gemm/cuda/plan.h"
#include "gemm/cuda/ss_plan.h"

namespace nibble::cuda {
namespace {

/// Plans of one problem, told apart by how they describe themselves.
class Candidates {
 public:
  explicit Candidates(const DeviceInfo& device) : device_(device) {}

  void add(Plan plan) {
    plan.workspace_bytes = workspace_layout(plan).total;
    std::string text = plan.describe();
    if (std::find(known_.begin(), known_.end(), text) != known_.end()) return;
    known_.push_back(std::move(text));
    plans_.push_back(std::move(plan));
  }
  void add_tiles(const Plan& plan);
  void add_splits(const Plan& plan);
  void add_slabs(const Plan& plan);
  std::vector<Plan> take() { return std::move(plans_); }

 private:
  static PackedLayout layout(const Plan& plan) {
    return packed_layout(plan.problem.n, plan.problem.k, plan.problem.group_size);
  }
  bool fits(const Plan& plan) const;
  void add_registers(const Plan& plan);
  void add_streamed(const Plan& plan);

  const DeviceInfo& device_;
  std::vector<Plan> plans_;
  std::vector<std::string> known_;
};

/// rs: each shape of tile, whole, with the last ones shared, or cut into parts of a cluster.
void Candidates::add_tiles(const Plan& plan) {
  for (const RsTile& tile : rs_tiles(layout(plan), rs_activations(plan))) {
    for (const RsConfig& config : rs_configs(layout(plan), tile, device_.multiprocessors)) {
      Plan other = plan;
      other.rs = config;
      add(other);
    }
  }
}

/// ss: each tile, whole and shared, with all weights expanded beforehand and with as few.
void Candidates::add_splits(const Plan& plan) {
  constexpr int kAll = std::numeric_limits<int>::max();
  for (const int tile : ss_token_tiles(plan.ss)) {
    for (const bool split : {false, true}) {
      Plan other = plan;
      other.ss.token_tile = tile;
      other.ss.split_tail = split;
      const int fewest = fewest_first_pairs(other.ss, layout(plan), plan.problem.m);
      for (const int first_pairs : {fewest, kAll}) {
        other.ss.first_pairs = first_pairs;
        add(other);
      }
    }
  }
}

bool Candidates::fits(const Plan& plan) const {
  const SlabConfig& slab = plan.slab;
  const int columns = slab_token_columns(plan.problem.m, slab.halves);
  const int most = slab.halves                       ? slab_halves_warps(columns, slab.form)
                   : slab.form == SlabForm::streamed ? slab_streamed_warps(columns)
                                                     : kSlabWarps;
  return slab.warps() <= most &&
         slab_shared_bytes(layout(plan), plan.problem.m, has_group_scales(plan.problem), slab) <=
             device_.shared_bytes;
}

/// One slice a warp for good; tiles side by side; as many blocks as have warps on the device.
void Candidates::add_registers(const Plan& plan) {
  if (layout(plan).slices > kSlabWarps) return;
  for (const int tile_warps : {1, 2, 4}) {
    for (int stages = 1; stages <= kSlabStages; ++stages) {
      Plan other = plan;
      other.slab.form = SlabForm::registers;
      other.slab.k_warps = static_cast<int>(layout(plan).slices);
      other.slab.tile_warps = tile_warps;
      other.slab.stages = stages;
      other.slab.held_tiles = 1;
      other.slab.blocks = device_.multiprocessors * std::max(1, kSlabWarps / other.slab.warps());
      if (fits(other)) add(other);
    }
  }
}

void Candidates::add_streamed(const Plan& plan) {
  const int64_t slices = layout(plan).slices;
  for (int warps = 7; warps <= std::min<int64_t>(slices, kSlabWarps); ++warps) {
    for (int held = 1; held <= 4; ++held) {
      for (int stages = 1; stages <= kSlabStages; ++stages) {
        Plan other = plan;
        other.slab.form = SlabForm::streamed;
        other.slab.k_warps = warps;
        other.slab.tile_warps = 1;
        other.slab.held_tiles = held;
        other.slab.stages = stages;
        other.slab.blocks = device_.multiprocessors;
        if (fits(other)) add(other);
      }
    }
  }
}

void Candidates::add_slabs(const Plan& plan) {
  add_registers(plan);
  if (plan.slab.form == SlabForm::streamed) add_streamed(plan);
}

}  // namespace

std::vector<Plan> plan_candidates(const Problem& problem, const DeviceInfo& device) {
  const Result<Plan> chosen = plan_gemm(problem, device);
  if (!chosen.ok()) return {};
  Candidates candidates(device);
  candidates.add(*chosen);
  for (const KernelRow& kernel : kernel_table()) {
    const Result<Plan> plan = plan_gemm(problem, device, kernel.name);
    if (!plan.ok()) continue;  // not for this problem
    switch (plan->family) {
      case KernelFamily::slab: {
        Plan of_slab = *plan;
        of_slab.fused = chosen->fused;  // what run_gemm does tells no products apart
        candidates.add_slabs(of_slab);
        break;
      }
      case KernelFamily::slab_rows:
      case KernelFamily::slab_handed: break;  // their products alone are slab's
      case KernelFamily::rs: candidates.add_tiles(*plan); break;
      case KernelFamily::ss: candidates.add_splits(*plan); break;
      case KernelFamily::mma:
      case KernelFamily::mma_int4: candidates.add(*plan); break;
    }
  }
  return candidates.take();
}

}  // namespace nibble::cuda
