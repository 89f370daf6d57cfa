#include "gemm/cuda/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string_view>

#include "gemm/cuda/int4_operand.h"
#include "gemm/cuda/limits.h"
#include "gemm/cuda/ss_plan.h"

namespace nibble::cuda {
namespace {

constexpr int kHopper = 90;  // sm_90a code runs there and nowhere else
constexpr int kAmpere = 80;

/// Policy of one kernel; the order is that of preference.
struct Candidate {
  KernelRow row;
  KernelFamily family;
  OperandOrder order;
  bool hopper_only;
  int64_t most_rows;   // 0: any
  int64_t worth_rows;  // see worth_rows()
};
/// From here on, expanding the weights first costs less than it gains (docs/notes.md): int8 and 16
/// bits against rs, int8 with scales per (token, group), and fp8.
constexpr int64_t kManyRows = 1536, kManyRowsOfGroups = 3072, kManyRowsOfE4m3 = 1024;
/// The same of int8 and of fp8 where tiles are few (not has_waves()) and K is short.
constexpr int64_t kManyRowsOfFewTiles = 3072, kManyE4m3RowsOfFewTiles = 2048, kDeepK = 8192;
/// The same of fp8 with scales per (token, group) and of 16 bits where tiles are many
/// (has_waves()), so that most weights are expanded beside the products.
constexpr int64_t kManyE4m3RowsOfGroupsInWaves = 768, kManyRowsOfHalvesInWaves = 1024;
/// The same where they are expanded already. At 512 rows, int8 in tiles of 192 is slower than rs.
constexpr int64_t kManyRowsOfExpanded = 640, kManyRowsOfExpandedE4m3 = 384;

/// From here on, int4 codes are multiplied faster in fp8 than as int8.
constexpr int64_t kInt4RowsInFp8 = 128;

/// Up to 64 rows, reading the weights takes as long as int8 products do, and packing codes two a
/// byte is a launch more. Reasoned from the data sheets of 8.0 and 8.9, not measured.
constexpr int64_t kRowsOfNativeInt4 = 65;

constexpr std::array<Candidate, 17> kCandidates = {{
    {{"w4a8_slab_sm90", Mode::w4a8, kHopper},
     KernelFamily::slab,
     OperandOrder::natural,
     true,
     kSlabTokens,
     0},
    {{"w4a8_slab_rows_sm90", Mode::w4a8, kHopper},
     KernelFamily::slab_rows,
     OperandOrder::natural,
     true,
     kSlabFusedTokens,
     0},
    {{"w4a8_slab_handed_sm90", Mode::w4a8, kHopper},
     KernelFamily::slab_handed,
     OperandOrder::natural,
     true,
     kSlabTokens,
     0},
    {{"w4a4_ss_sm90", Mode::w4a4, kHopper},
     KernelFamily::ss,
     OperandOrder::natural,
     true,
     0,
     kManyRows},
    {{"w4a4_rs_sm90", Mode::w4a4, kHopper},
     KernelFamily::rs,
     OperandOrder::wgmma,
     true,
     0,
     kInt4RowsInFp8},
    {{"w4a8_ss_sm90", Mode::w4a8, kHopper},
     KernelFamily::ss,
     OperandOrder::natural,
     true,
     0,
     kManyRows},
    {{"w4a4_mma_sm80", Mode::w4a4, kAmpere},
     KernelFamily::mma_int4,
     OperandOrder::natural,
     false,
     0,
     kRowsOfNativeInt4},
    {{"w4a8_rs_sm90", Mode::w4a8, kHopper}, KernelFamily::rs, OperandOrder::wgmma, true, 0, 0},
    {{"w4a8_mma_sm80", Mode::w4a8, kAmpere}, KernelFamily::mma, OperandOrder::natural, false, 0, 0},
    {{"w4a16_slab_sm90", Mode::w4a16, kHopper},
     KernelFamily::slab,
     OperandOrder::natural,
     true,
     kSlabTokens,
     0},
    {{"w4a16_ss_sm90", Mode::w4a16, kHopper},
     KernelFamily::ss,
     OperandOrder::natural,
     true,
     0,
     kManyRows},
    {{"w4a16_rs_sm90", Mode::w4a16, kHopper}, KernelFamily::rs, OperandOrder::wgmma, true, 0, 0},
    {{"w4a16_mma_sm80", Mode::w4a16, kAmpere},
     KernelFamily::mma,
     OperandOrder::natural,
     false,
     0,
     0},
    {{"w4a8_fp8_slab_sm90", Mode::w4a8_fp8, kHopper},
     KernelFamily::slab,
     OperandOrder::natural,
     true,
     kSlabTokens,
     0},
    {{"w4a8_fp8_ss_sm90", Mode::w4a8_fp8, kHopper},
     KernelFamily::ss,
     OperandOrder::natural,
     true,
     0,
     kManyRowsOfE4m3},
    {{"w4a8_fp8_rs_sm90", Mode::w4a8_fp8, kHopper},
     KernelFamily::rs,
     OperandOrder::wgmma,
     true,
     0,
     0},
    {{"w4a8_fp8_mma_sm80", Mode::w4a8_fp8, kAmpere},
     KernelFamily::mma,
     OperandOrder::natural,
     false,
     0,
     0},
}};

/// int8 kernels run w4a4 as well; floats are another matter.
bool is_of_mode(const Candidate& kernel, const Problem& p) {
  const auto kind = [](Mode mode) { return mode == Mode::w4a4 ? Mode::w4a8 : mode; };
  return kind(kernel.row.mode) == kind(p.mode);
}

PackedLayout layout_of(const Problem& p) { return packed_layout(p.n, p.k, p.group_size); }

std::optional<SlabConfig> rows_config(const Problem& p, const DeviceInfo& device) {
  return slab_quantizing_config(layout_of(p), p.m, has_group_scales(p), false,
                                device.multiprocessors, device.shared_bytes);
}

/// What a kernel that quantizes x in its own launch cannot quantize.
std::string refusal_to_quantize(KernelFamily family, const Problem& p, const DeviceInfo& device) {
  if (p.x_dtype == Dtype::f32 || p.k % 8 != 0) {
    return fmt::format("it takes f16 or bf16 x with K a multiple of 8, not {} with K = {}",
                       dtype_name(p.x_dtype), p.k);
  }
  if (!p.symmetric || p.granularity == Granularity::tensor) {
    return "it takes symmetric codes and no scale for the whole tensor that x must be read for";
  }
  if (has_group_scales(p) && p.group_size != promoted_depth(p.group_size)) {
    return fmt::format("it takes scales per (token, group) with groups of at most {}, not {}",
                       kBlockDepth, p.group_size);
  }
  if (family == KernelFamily::slab_rows && p.m > 0 && !rows_config(p, device)) {
    return fmt::format("no block holds {} rows of K = {} beside its weights", p.m, p.k);
  }
  return "";
}

/// Empty if the kernel runs the problem on the device, else why not.
std::string refusal(const Candidate& kernel, const Problem& p, const DeviceInfo& device) {
  const auto capability = [](int c) { return fmt::format("{}.{}", c / 10, c % 10); };
  if (!is_of_mode(kernel, p)) {
    return fmt::format("it is of mode {}, the problem of mode {}", mode_name(kernel.row.mode),
                       mode_name(p.mode));
  }
  if (kernel.hopper_only && device.capability != kHopper) {
    return fmt::format("it needs compute capability 9.0, {} has {}", device.name,
                       capability(device.capability));
  }
  if (device.capability < kernel.row.capability) {
    return fmt::format("it needs compute capability {}, {} has {}",
                       capability(kernel.row.capability), device.name,
                       capability(device.capability));
  }
  if (kernel.most_rows > 0 && p.m > kernel.most_rows) {
    return fmt::format("it takes at most {} rows, not {}", kernel.most_rows, p.m);
  }
  const bool by_group = has_group_scales(p);
  const bool short_groups = promoted_depth(p.group_size) < kBlockDepth;
  if (kernel.family == KernelFamily::mma_int4) {
    if (p.mode != Mode::w4a4) return "it takes int4 codes";
    if (promoted_depth(p.group_size) < 64) return "it takes groups of at least 64";
  } else if (kernel.row.mode == Mode::w4a4 && (p.mode != Mode::w4a4 || !p.symmetric)) {
    return "it takes symmetric int4 codes, whose sums are exact in its fp8 products";
  }
  if (kernel.family == KernelFamily::ss && short_groups) {
    return "it takes groups of at least 128";
  }
  if (kernel.family == KernelFamily::rs && by_group && kernel.row.mode == Mode::w4a4) {
    return "it takes one scale a token";  // with more, its large tiles do not fit the registers
  }
  if (kernel.family == KernelFamily::rs && by_group && short_groups) {
    return "it takes scales per (token, group) with groups of at least 128 only";
  }
  const bool quantizes =
      kernel.family == KernelFamily::slab_rows || kernel.family == KernelFamily::slab_handed;
  return quantizes ? refusal_to_quantize(kernel.family, p, device) : "";
}

/// Whether every multiprocessor multiplies some tiles one after another, of one row or more.
bool has_waves(const SsConfig& kind, const Problem& p, const DeviceInfo& device) {
  constexpr double kWaves = 2.8;
  SsConfig config = kind;
  config.token_tile = ss_token_tiles(kind).front();
  config.math_groups = kind.halves ? 3 : 2;
  const int tiles = ss_schedule_of(layout_of(p), p.m, config).tiles();
  return tiles >= kWaves * (device.multiprocessors / 2);
}

/// Fewer rows than this only by name.
int64_t worth_rows(const Candidate& kernel, const Problem& p, const DeviceInfo& device,
                   bool expanded) {
  if (kernel.family == KernelFamily::ss && expanded && p.mode != Mode::w4a16) {
    return kernel.row.mode == Mode::w4a8_fp8 ? kManyRowsOfExpandedE4m3 : kManyRowsOfExpanded;
  }
  if (kernel.family != KernelFamily::ss || p.m == 0) return kernel.worth_rows;
  const bool by_group = has_group_scales(p);
  const auto few_tiles = [&](const SsConfig& kind) {
    return p.k < kDeepK && !has_waves(kind, p, device);
  };
  if (kernel.row.mode == Mode::w4a8) {
    if (by_group) return kManyRowsOfGroups;
    return few_tiles({}) ? kManyRowsOfFewTiles : kernel.worth_rows;
  }
  if (kernel.row.mode == Mode::w4a8_fp8 || kernel.row.mode == Mode::w4a4) {
    const SsConfig kind = {.e4m3 = true, .group_scales = by_group};
    if (by_group) return has_waves(kind, p, device) ? kManyE4m3RowsOfGroupsInWaves : kManyRows;
    return few_tiles(kind) ? kManyE4m3RowsOfFewTiles : kManyRowsOfE4m3;
  }
  if (kernel.row.mode == Mode::w4a16 && has_waves({.halves = true}, p, device)) {
    return kManyRowsOfHalvesInWaves;
  }
  return kernel.worth_rows;
}

bool is_emulated(const Candidate& kernel, const DeviceInfo& device) {
  return kernel.family == KernelFamily::mma_int4 && device.capability >= kHopper;
}

/// Nine rows and more of 16 bits, deep K: eight warps, which read x again for every four tiles.
/// Past some K, or tiles a multiprocessor, rs is faster; of e4m3 numbers, which it multiplies as
/// bytes, always (docs/notes.md).
bool rereads_too_much(const Candidate& kernel, const Problem& p, const DeviceInfo& device) {
  constexpr int64_t kSlices = 8, kDeepSlices = 16, kTiles = 16;
  if (kernel.family != KernelFamily::slab || kernel.row.mode == Mode::w4a8 || p.m <= 8) {
    return false;
  }
  const PackedLayout layout = packed_layout(p.n, p.k, p.group_size);
  return kernel.row.mode == Mode::w4a8_fp8 || layout.slices > kDeepSlices ||
         (layout.slices > kSlices && layout.tiles > kTiles * device.multiprocessors);
}

Result<Candidate> choose(const Problem& problem, const DeviceInfo& device, const char* force,
                         bool expanded) {
  std::string reasons;
  bool known = force == nullptr;
  for (const Candidate& kernel : kCandidates) {
    if (force != nullptr ? kernel.row.name != std::string_view(force)
                         : !is_of_mode(kernel, problem)) {
      continue;
    }
    known = true;
    std::string reason = refusal(kernel, problem, device);
    const int64_t worth = worth_rows(kernel, problem, device, expanded);
    if (reason.empty() && force == nullptr && problem.m < worth) {
      reason = fmt::format("it is slower than others below {} rows", worth);
    }
    if (reason.empty() && force == nullptr && is_emulated(kernel, device)) {
      reason = "4-bit products are emulated from compute capability 9.0 on";
    }
    if (reason.empty() && force == nullptr && rereads_too_much(kernel, problem, device)) {
      reason = "it is slower than others for so many rows, columns and so deep a K";
    }
    if (reason.empty()) return kernel;
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", kernel.row.name, reason);
  }
  if (!known) {
    return Status(Code::invalid_argument,
                  fmt::format("no CUDA kernel is named '{}' (see nibble doctor)", force));
  }
  return Status(Code::unsupported, reasons);
}

Status check(const Problem& p) {
  NIBBLE_TRY(check_problem(p));
  if (p.mode == Mode::w4a16 && (p.x_dtype == Dtype::f32 || p.k % 8 != 0)) {
    return Status(Code::unsupported,
                  fmt::format("w4a16 with x of {} and K = {}: the CUDA kernels take f16 and bf16, "
                              "and K a multiple of 8",
                              dtype_name(p.x_dtype), p.k));
  }
  if (p.mode == Mode::w4a8_fp8 && scales_per_group(p.granularity)) {
    return Status(Code::unsupported,
                  fmt::format("w4a8-fp8 with granularity {}: the CUDA kernels take one scale a "
                              "token",
                              granularity_name(p.granularity)));
  }
  if (p.mixed_groups) {
    return Status(Code::unsupported, "w4a4 with some groups at 8 bits has no CUDA quantizer yet");
  }
  // what 32-bit arithmetic of schedules holds, and what 65535 blocks of a grid's y hold
  constexpr int64_t kMostRows = 1 << 24, kMostK = 1 << 22, kMostColumns = 1'000'000;
  if (p.m > kMostRows || p.k > kMostK || p.n > kMostColumns) {
    return Status(Code::unsupported,
                  fmt::format("M={} N={} K={}: the CUDA kernels take up to M={}, N={}, K={}", p.m,
                              p.n, p.k, kMostRows, kMostColumns, kMostK));
  }
  return check_group_size(p.group_size, p.k);
}

size_t aligned(size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

size_t scratch_bytes(const Plan& plan) {
  const Problem& p = plan.problem;
  if (p.m == 0) return 0;
  if (plan.family == KernelFamily::rs) return rs_scratch_bytes(layout_of(p), p.m, plan.rs);
  if (plan.family == KernelFamily::ss) return ss_scratch(layout_of(p), p.m, plan.ss).bytes;
  if (plan.family == KernelFamily::mma_int4) return int4_scratch(layout_of(p), p.m).bytes;
  return kFlagBytes;
}

/// Whether the kernel is one for codes of four bits.
bool multiplies_int4(const Plan& plan) {
  return plan.family == KernelFamily::mma_int4 || (plan.problem.mode == Mode::w4a4 && plan.e4m3);
}

const Candidate& candidate_of(const Plan& plan) {
  return *std::find_if(kCandidates.begin(), kCandidates.end(), [&](const Candidate& kernel) {
    return kernel.family == plan.family && is_of_mode(kernel, plan.problem) &&
           (kernel.row.mode == Mode::w4a4) == multiplies_int4(plan);
  });
}

const char* tail_text(bool split) { return split ? "split tail" : "whole tiles"; }

/// Which columns the weights are expanded of by a launch before the products.
std::string expansion_text(const Plan& plan) {
  if (plan.ss.expanded) return "expanded before, ";
  const PackedLayout layout = layout_of(plan.problem);
  const int64_t first = ss_first_pairs(layout, plan.ss) * 2 * plan.ss.image().columns;
  if (first >= layout.n) return "";
  return fmt::format("{} of {} columns expanded beside, ", layout.n - first, layout.n);
}

std::string family_text(const Plan& plan) {
  switch (plan.family) {
    case KernelFamily::slab:
      return plan.slab.describe() + (plan.fused.quantizes ? ", or one launch with x" : "");
    case KernelFamily::slab_rows:
    case KernelFamily::slab_handed: return "one launch, " + plan.fused.describe();
    case KernelFamily::rs:
      return fmt::format("tile={}x{}{} {}", plan.rs.token_tile, 64 * plan.rs.math_groups,
                         plan.rs.blocks > 1 ? " two a multiprocessor" : "",
                         plan.rs.parts > 1 ? fmt::format("K in {} parts", plan.rs.parts)
                                           : tail_text(plan.rs.split_tail));
    case KernelFamily::ss:
      return fmt::format("tile={}x{} {}{}{}", plan.ss.token_tile, 64 * plan.ss.math_groups,
                         plan.ss.e4m3 ? "fp8 " : "", expansion_text(plan),
                         tail_text(plan.ss.split_tail));
    case KernelFamily::mma: return "whole tiles";
    case KernelFamily::mma_int4: return "4-bit products, whole tiles";
  }
  return "";
}

// What the rs kernels are compiled for. Steps: with all multiprocessors at work, fitted together
// with the constants of rs_cost() to the times of docs/notes.md.
constexpr std::array<RsTile, 9> kRsTiles = {{{160, 2, 1, 690},
                                             {128, 2, 1, 570, 2},
                                             {96, 3, 1, 700},
                                             {64, 4, 1, 710},
                                             {64, 3, 1, 555, 4},
                                             {64, 2, 1, 430, 4},
                                             {64, 1, 1, 340, 4},
                                             {32, 3, 1, 460, 4},
                                             {32, 2, 2, 465, 4}}};
constexpr std::array<RsTile, 5> kRsTilesOfGroupScales = {
    {{96, 3, 1, 700}, {64, 3, 1, 555, 4}, {64, 2, 1, 430, 4}, {32, 3, 1, 460, 4}, {32, 2, 2, 465}}};
constexpr std::array<RsTile, 10> kRsTilesOfE4m3 = {{{192, 2, 1, 580},
                                                    {160, 2, 1, 535},
                                                    {128, 2, 1, 440, 2},
                                                    {96, 3, 1, 540},
                                                    {64, 4, 1, 645},
                                                    {64, 3, 1, 475, 4},
                                                    {64, 2, 1, 360, 4},
                                                    {64, 1, 1, 335, 4},
                                                    {32, 3, 1, 440, 4},
                                                    {32, 2, 2, 450, 4}}};
constexpr std::array<RsTile, 8> kRsTilesOfHalves = {{{160, 2, 1, 1010},
                                                     {128, 2, 1, 820, 2},
                                                     {96, 3, 1, 900},
                                                     {64, 3, 1, 660, 4},
                                                     {64, 2, 1, 560, 4},
                                                     {64, 1, 1, 400, 4},
                                                     {32, 3, 1, 560, 4},
                                                     {32, 2, 2, 600, 4}}};
constexpr std::array<RsTile, 1> kRsTilesOfShortGroups = {{{64, 2, 1, 430}}};

/// What the parts of a cluster take, all of them at work at once; none if they do not fit, since
/// not all multiprocessors lie so that a cluster has room. Fitted to the times of docs/notes.md.
std::optional<int64_t> cost_of_parts(const RsSchedule& schedule, const RsConfig& config, int step) {
  constexpr int64_t kSum = 1400, kSumOfPart = 300, kSumOfToken = 15, kAlone = 500, kBeside = 3300;
  const int clusters = config.multiprocessors * config.blocks * 9 / 10 / (2 * config.parts);
  if (schedule.tiles() > clusters) return std::nullopt;
  const int64_t slices = (schedule.slices + config.parts - 1) / config.parts;
  const int64_t blocks = int64_t{schedule.tiles()} * 2 * config.parts;
  const int64_t beside = std::max<int64_t>(0, blocks - config.multiprocessors);
  return slices * (kSlabDepth / kBlockDepth) * step + kSum + config.parts * kSumOfPart +
         config.token_tile * kSumOfToken + (config.blocks == 1 ? kAlone : 0) +
         beside * kBeside / config.multiprocessors;
}

/// What depends on the configuration of the time a launch takes, in nanoseconds. Steps follow one
/// another, so whole tiles cost what the worker with most of them does; shared ones cost the mean
/// (fits better than the longest worker's, because sums wait for less than that), and a sum: more
/// of it where more than two share, whose parts all go through L2.
std::optional<int64_t> rs_cost(const RsSchedule& schedule, const RsConfig& config, int step) {
  constexpr int64_t kSum = 4000, kWideSum = 2500, kLargeSum = 10000, kBytesOfNanosecond = 6667;
  constexpr int64_t kSteps = kSlabDepth / kBlockDepth;
  if (config.parts > 1) return cost_of_parts(schedule, config, step);
  const int64_t tiles = schedule.tiles(), workers = schedule.workers;
  if (schedule.whole == tiles) {
    return (tiles + workers - 1) / workers * schedule.slices * kSteps * step;
  }
  const int64_t work = tiles * schedule.slices * kSteps * step / workers;
  if (!schedule.shares_widely()) return work + kSum;
  // Parts of the largest tiles take longer to sum: it pays where K is deep.
  const bool large = config.token_tile >= 128 || config.math_groups == 4;
  const int64_t parts = workers * 2 * config.token_tile * 64 * config.math_groups;
  return work + kSum + kWideSum + (large ? kLargeSum : 0) +
         parts * int64_t{sizeof(float)} / kBytesOfNanosecond;
}

}  // namespace

bool multiplies_halves(const Plan& plan) {
  return plan.problem.mode == Mode::w4a16 || (plan.problem.mode == Mode::w4a8_fp8 && !plan.e4m3);
}

bool has_group_scales(const Problem& problem) {
  return problem.mode != Mode::w4a16 && scales_per_group(problem.granularity);
}

RsActivations rs_activations(const Plan& plan) {
  if (plan.problem.mode == Mode::w4a16) return RsActivations::halves;
  if (plan.e4m3) return RsActivations::e4m3;
  return has_group_scales(plan.problem) ? RsActivations::codes_with_group_scales
                                        : RsActivations::codes;
}

std::span<const RsTile> rs_tiles(const PackedLayout& layout, RsActivations activations) {
  const bool short_groups = layout.promoted < kBlockDepth;
  const bool group_scales = activations == RsActivations::codes_with_group_scales;
  if (short_groups && group_scales) return {};
  if (short_groups) return kRsTilesOfShortGroups;
  if (activations == RsActivations::halves) return kRsTilesOfHalves;
  if (activations == RsActivations::e4m3) return kRsTilesOfE4m3;
  if (group_scales) return kRsTilesOfGroupScales;
  return kRsTiles;
}

std::vector<RsConfig> rs_configs(const PackedLayout& layout, const RsTile& tile,
                                 int multiprocessors) {
  RsConfig config;
  config.token_tile = tile.tokens;
  config.math_groups = tile.math_groups;
  config.blocks = tile.blocks;
  config.multiprocessors = multiprocessors;
  config.programmatic = true;
  std::vector<RsConfig> all;
  for (const bool split : {false, true}) {
    config.split_tail = split;
    all.push_back(config);
  }
  config.split_tail = false;
  for (int parts = 2; parts <= tile.most_parts && parts <= layout.slices; ++parts) {
    config.parts = parts;
    all.push_back(config);
  }
  return all;
}

RsConfig rs_config(const PackedLayout& layout, int64_t m, RsActivations activations,
                   int multiprocessors) {
  RsConfig best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const RsTile& tile : rs_tiles(layout, activations)) {
    for (const RsConfig& config : rs_configs(layout, tile, multiprocessors)) {
      const std::optional<int64_t> cost =
          rs_cost(rs_schedule_of(layout, m, config), config, tile.step);
      if (!cost || *cost >= least) continue;
      least = *cost;
      best = config;
    }
  }
  return best;
}

const char* Plan::kernel_name() const { return candidate_of(*this).row.name; }

std::string Plan::describe() const {
  const Problem& p = problem;
  const bool floats = p.mode == Mode::w4a16;
  return fmt::format("{}: M={} N={} K={} g={} {}{} x={} y={} act={}{} device={} {} workspace={} B",
                     kernel_name(), p.m, p.n, p.k, p.group_size, mode_name(p.mode),
                     p.mode == Mode::w4a4 && !multiplies_int4(*this)
                         ? " (int4 codes in an int8 kernel: as fast as w4a8)"
                         : "",
                     dtype_name(p.x_dtype), dtype_name(p.y_dtype),
                     floats ? dtype_name(p.x_dtype) : granularity_name(p.granularity),
                     floats || p.symmetric ? "" : " asymmetric", device, family_text(*this),
                     workspace_bytes);
}

std::vector<KernelRow> kernel_table() {
  std::vector<KernelRow> rows;
  for (const Candidate& kernel : kCandidates) rows.push_back(kernel.row);
  return rows;
}

WorkspaceLayout workspace_layout(const Plan& plan) {
  const Problem& p = plan.problem;
  const auto m = static_cast<size_t>(p.m), depth = static_cast<size_t>(plan.padded_k);
  const auto groups = static_cast<size_t>(has_group_scales(p) ? p.k / p.group_size : 1);
  WorkspaceLayout w;
  if (p.mode == Mode::w4a16) {  // x is read where it is, or reordered
    w.codes = aligned(scratch_bytes(plan));
    const bool reordered = plan.order == OperandOrder::wgmma;
    w.scales = w.range = w.total = w.codes + (reordered ? aligned(m * depth * 2) : 0);
    return w;
  }
  // First, and in every plan, so that flags stay zero whatever plans share a workspace.
  w.codes = w.scratch + aligned(scratch_bytes(plan));
  w.scales = w.codes + aligned(m * depth * (multiplies_halves(plan) ? 2 : 1));
  w.range = w.scales + aligned(m * groups * sizeof(float));
  w.total = w.range + aligned(4 * sizeof(uint32_t));
  return w;
}

Result<Plan> plan_gemm(const Problem& problem, const DeviceInfo& device, const char* force,
                       bool expanded) {
  NIBBLE_TRY(check(problem));
  const Result<Candidate> kernel = choose(problem, device, force, expanded);
  if (!kernel.ok()) return kernel.status();
  Plan plan;
  plan.problem = problem;
  plan.device = device.ordinal;
  plan.programmatic = device.programmatic();
  plan.family = kernel->family;
  plan.order = kernel->order;
  plan.padded_k = layout_of(problem).padded_k();
  plan.e4m3 = (plan.family == KernelFamily::rs || plan.family == KernelFamily::ss) &&
              (kernel->row.mode == Mode::w4a4 || kernel->row.mode == Mode::w4a8_fp8);
  const PackedLayout layout = layout_of(problem);
  const bool rows = plan.family == KernelFamily::slab_rows;
  const bool handed = plan.family == KernelFamily::slab_handed;
  const bool slab = plan.family == KernelFamily::slab || rows || handed;
  if (slab && problem.m > 0) {
    plan.slab =
        multiplies_halves(plan)
            ? slab_halves_config(layout, problem.m, device.multiprocessors, device.shared_bytes)
            : slab_config(layout, problem.m, has_group_scales(problem), device.multiprocessors,
                          device.shared_bytes);
    plan.slab.programmatic = true;
    // Faster than two launches of one or two rows (docs/notes.md), with the same bits.
    const bool int8 = kernel->row.mode == Mode::w4a8;
    if (rows || (force == nullptr && int8 && problem.m <= kSlabFusedTokens &&
                 refusal_to_quantize(KernelFamily::slab_rows, problem, device).empty())) {
      plan.fused = *rows_config(problem, device);
    }
    if (handed) {
      plan.fused = slab_handed_config(layout, problem.m, has_group_scales(problem),
                                      device.multiprocessors, device.shared_bytes);
    }
    plan.fused.programmatic = true;
  } else if (plan.family == KernelFamily::rs && problem.m > 0) {
    plan.rs = rs_config(layout, problem.m, rs_activations(plan), device.multiprocessors);
  } else if (plan.family == KernelFamily::ss && problem.m > 0) {
    plan.ss.halves = kernel->row.mode == Mode::w4a16;
    plan.ss.e4m3 = plan.e4m3;
    plan.ss.group_scales = has_group_scales(problem);
    plan.ss.expanded = expanded && !plan.ss.halves;
    plan.ss.programmatic = true;
    plan.ss.multiprocessors = device.multiprocessors;
    set_ss_work(plan.ss, layout, problem.m);
  }
  plan.workspace_bytes = workspace_layout(plan).total;
  return plan;
}

Operand workspace_operand(const Plan& plan, void* workspace) {
  const WorkspaceLayout w = workspace_layout(plan);
  auto* base = static_cast<std::byte*>(workspace);
  return {reinterpret_cast<int8_t*>(base + w.codes), reinterpret_cast<float*>(base + w.scales),
          nullptr, reinterpret_cast<uint32_t*>(base + w.range)};
}

void* workspace_scratch(const Plan& plan, void* workspace) {
  return static_cast<std::byte*>(workspace) + workspace_layout(plan).scratch;
}

}  // namespace nibble::cuda
