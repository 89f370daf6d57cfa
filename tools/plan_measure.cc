#include "plan_measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "base/cpu_features.h"
#include "calibration_run.h"
#include "gemm/cpu/packed_weights.h"
#include "timing.h"

namespace nibble::cli {
namespace {

constexpr int64_t kGroupRows = 8;        // for the share of each K-group in the noise of 4 bits
constexpr double kTimingSeconds = 0.25;  // per shape and number of rows, all candidates together
constexpr size_t kSubjects = 4;  // slots per evaluation: they share the run of the reference

size_t at_index(int64_t index) { return static_cast<size_t>(index); }

// ---- products ----------------------------------------------------------------------------------

Problem problem_of(const LinearSpec& spec, const PackedWeights& weights, int64_t rows) {
  Problem problem;
  problem.m = rows;
  problem.n = weights.n;
  problem.k = weights.k;
  problem.group_size = weights.group_size;
  problem.mode = spec.mode;
  problem.granularity = spec.granularity;
  problem.symmetric = spec.mode == Mode::w4a16 || spec.symmetric;
  problem.mixed_groups = !spec.wide_groups.empty();
  return problem;
}

/// x - (x as `spec` quantizes it), for weights of one group size: (rows, k).
Result<std::vector<float>> quantization_error(const LinearSpec& spec, const PackedWeights& weights,
                                              const std::vector<float>& x, int threads) {
  std::vector<float> error(x.size(), 0.0f);
  if (spec.mode == Mode::w4a16) return error;
  const auto rows = static_cast<int64_t>(x.size()) / weights.k;
  const Result<Plan> plan = plan_gemm(problem_of(spec, weights, rows), nullptr, threads);
  if (!plan.ok()) return plan.status();
  GemmInput input;
  input.x = x.data();
  input.x_stride = weights.k;
  input.clip = spec.clip;
  input.static_scales = spec.static_scales.data();
  input.wide_groups = spec.wide_groups.data();
  const bool by_group = scales_per_group(spec.granularity);
  std::vector<int8_t> codes(x.size());
  std::vector<float> scales(at_index(rows * (by_group ? weights.groups : 1)));
  NIBBLE_TRY(quantize_activations(*plan, input, codes.data(), scales.data(), nullptr));
  const auto per_scale = at_index(by_group ? weights.group_size : weights.k);
  for (size_t i = 0; i < x.size(); ++i) {
    error[i] = x[i] - static_cast<float>(codes[i]) * scales[i / per_scale];
  }
  return error;
}

/// Energy of blocks of `block` rows of x W, W in its own 4 bits, without the bias: one number a
/// block. The product is linear, so that of an activation's error is the error of the product.
Result<std::vector<double>> output_energy(const PackedWeights& weights, const std::vector<float>& x,
                                          int64_t block, int threads) {
  const auto rows = static_cast<int64_t>(x.size()) / weights.k;
  const Result<Plan> plan = plan_gemm(problem_of({}, weights, rows), nullptr, threads);
  if (!plan.ok()) return plan.status();
  Result<AlignedBuffer> workspace = AlignedBuffer::zeroed(plan->workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  std::vector<float> y(at_index(rows * weights.n));
  GemmInput input;
  input.x = x.data();
  input.x_stride = weights.k;
  const GemmTarget target{&weights, y.data(), weights.n, nullptr};
  NIBBLE_TRY(run_gemm(*plan, input, {&target, 1}, workspace->data()));
  std::vector<double> energy(at_index(rows / block));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < weights.n; ++c) {
      const double bias = weights.bias.empty() ? 0 : weights.bias[at_index(c)];
      const double value = y[at_index(r * weights.n + c)] - bias;
      energy[at_index(r / block)] += value * value;
    }
  }
  return energy;
}

// ---- noise -------------------------------------------------------------------------------------

LinearSpec spec_of(Choice choice, float clip) {
  LinearSpec spec;
  switch (choice) {
    case Choice::a16: return spec;
    case Choice::a8_token:
    case Choice::a8_group:
      spec.mode = Mode::w4a8;
      spec.granularity = choice == Choice::a8_token ? Granularity::token : Granularity::group;
      return spec;
    default:
      spec.mode = Mode::w4a4;
      spec.granularity = Granularity::group;
      spec.symmetric = false;
      spec.clip = clip;
      return spec;
  }
}

/// K-groups by their share in the output noise of `spec`, largest first.
Result<std::vector<int64_t>> groups_by_noise(std::span<const PackedWeights* const> linears,
                                             const LinearSpec& spec, const std::vector<float>& x,
                                             int threads) {
  const PackedWeights& first = *linears.front();
  const int64_t k = first.k, groups = first.groups, size = first.group_size;
  const auto rows = std::min<int64_t>(kGroupRows, static_cast<int64_t>(x.size()) / k);
  const std::vector<float> sample(x.begin(), x.begin() + rows * k);
  const auto error = quantization_error(spec, first, sample, threads);
  if (!error.ok()) return error.status();
  // The error of one group at a time: block g has it in its own columns and zeros elsewhere.
  std::vector<float> parts(at_index(groups * rows * k), 0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto from = error->begin() + r * k + g * size;
      std::copy(from, from + size, parts.begin() + (g * rows + r) * k + g * size);
    }
  }
  std::vector<double> total(at_index(groups));
  for (const PackedWeights* linear : linears) {
    const auto energy = output_energy(*linear, parts, rows, threads);
    if (!energy.ok()) return energy.status();
    for (size_t g = 0; g < total.size(); ++g) total[g] += (*energy)[g];
  }
  std::vector<int64_t> order(at_index(groups));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return total[at_index(a)] > total[at_index(b)]; });
  return order;
}

/// Every candidate of a slot, the last a16. Wide groups need linears of one group size, and rungs
/// that would be equal are left out.
Result<std::vector<Candidate>> make_candidates(std::span<const PackedWeights* const> linears,
                                               bool wide_groups, float clip,
                                               const std::vector<float>& x, int threads) {
  std::vector<Candidate> candidates;
  const auto add = [&](Choice choice, LinearSpec spec) {
    Candidate candidate;
    candidate.choice = choice;
    candidate.spec = std::move(spec);
    candidates.push_back(std::move(candidate));
  };
  const LinearSpec narrow = spec_of(Choice::a4, clip);
  add(Choice::a4, narrow);
  const int64_t groups = linears.front()->groups;
  if (wide_groups && groups > 1) {
    const auto order = groups_by_noise(linears, narrow, x, threads);
    if (!order.ok()) return order.status();
    int64_t before = 0;
    for (const auto& [choice, part] :
         {std::pair{Choice::a4_wide_eighth, 8}, std::pair{Choice::a4_wide_quarter, 4},
          std::pair{Choice::a4_wide_half, 2}}) {
      const int64_t wide = (groups + part - 1) / part;
      if (wide <= before || wide >= groups) continue;
      before = wide;
      LinearSpec spec = narrow;
      spec.wide_groups.assign(at_index(groups), 0);
      for (int64_t i = 0; i < wide; ++i) spec.wide_groups[at_index((*order)[at_index(i)])] = 1;
      add(choice, std::move(spec));
    }
  }
  for (const Choice choice : {Choice::a8_token, Choice::a8_group, Choice::a16}) {
    add(choice, spec_of(choice, 1));
  }
  return candidates;
}

/// Rows of x spread over the chunk, the middles of equal parts.
std::vector<float> sample_rows(const float* x, int64_t rows, int64_t k, int64_t wanted) {
  const int64_t picked = std::min(rows, wanted);
  std::vector<float> sample;
  for (int64_t i = 0; i < picked; ++i) {
    const float* const row = x + (2 * i + 1) * rows / (2 * picked) * k;
    sample.insert(sample.end(), row, row + k);
  }
  return sample;
}

std::vector<const PackedWeights*> quantized_linears(const Model& model, int64_t layer, Slot slot) {
  std::vector<const PackedWeights*> linears;
  for (const Linear& linear : model.layer(layer).groups[static_cast<int>(slot)].linears) {
    if (linear.quantized != nullptr) linears.push_back(linear.quantized.get());
  }
  return linears;
}

Status fill_noise(std::span<const PackedWeights* const> linears, const std::vector<float>& x,
                  int threads, SlotMeasure& measure) {
  const auto rows = static_cast<int64_t>(x.size()) / measure.k;
  for (const PackedWeights* linear : linears) {
    std::vector<float> stacked = x;  // then the errors of all candidates
    for (const Candidate& candidate : measure.candidates) {
      const auto error = quantization_error(candidate.spec, *linear, x, threads);
      if (!error.ok()) return error.status();
      stacked.insert(stacked.end(), error->begin(), error->end());
    }
    const auto energy = output_energy(*linear, stacked, rows, threads);
    if (!energy.ok()) return energy.status();
    measure.signal += (*energy)[0];
    for (size_t i = 0; i < measure.candidates.size(); ++i) {
      measure.candidates[i].noise += (*energy)[i + 1];
    }
  }
  return {};
}

// ---- cost --------------------------------------------------------------------------------------

/// What decides how long a slot's product takes.
using ShapeKey = std::vector<int64_t>;

ShapeKey shape_of(const SlotMeasure& slot) {
  ShapeKey key = {slot.k, slot.group_size};
  key.insert(key.end(), slot.columns.begin(), slot.columns.end());
  for (const Candidate& candidate : slot.candidates) {
    key.push_back(static_cast<int>(candidate.choice));
  }
  return key;
}

/// One candidate's product, ready to be run again and again.
struct TimedProduct {
  Plan plan;
  AlignedBuffer workspace;
  std::vector<float> y;
  std::vector<GemmTarget> targets;
  GemmInput input;
  Status status;
};

Result<std::unique_ptr<TimedProduct>> make_product(const LinearSpec& spec,
                                                   std::span<const PackedWeights* const> linears,
                                                   const std::vector<float>& x, int64_t rows,
                                                   int threads) {
  auto product = std::make_unique<TimedProduct>();
  int64_t n = 0;
  for (const PackedWeights* linear : linears) n += linear->n;
  Problem problem = problem_of(spec, *linears.front(), rows);
  problem.n = n;
  const Result<Plan> plan = plan_gemm(problem, nullptr, threads);
  if (!plan.ok()) return plan.status();
  product->plan = *plan;
  Result<AlignedBuffer> workspace = AlignedBuffer::zeroed(plan->workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  product->workspace = std::move(*workspace);
  product->y.resize(at_index(rows * n));
  int64_t column = 0;
  for (const PackedWeights* linear : linears) {
    product->targets.push_back({linear, product->y.data() + column, n, nullptr});
    column += linear->n;
  }
  product->input.x = x.data();
  product->input.x_stride = linears.front()->k;
  product->input.clip = spec.clip;
  product->input.wide_groups = spec.wide_groups.data();
  return product;
}

/// See cpu_slot_timer().
Result<std::vector<double>> time_slot(const Model& model, const SlotMeasure& slot, int64_t rows,
                                      int threads) {
  // Linears of another group size than the first would be a call of their own: few models have
  // them, and their cost is left out.
  std::vector<const PackedWeights*> linears = quantized_linears(model, slot.layer, slot.slot);
  std::erase_if(linears, [&, size = linears.front()->group_size](const PackedWeights* linear) {
    return linear->group_size != size;
  });
  std::vector<float> x(at_index(rows * slot.k));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 37) - 18;
  std::vector<std::unique_ptr<TimedProduct>> products;
  std::vector<Contender> contenders;
  for (const Candidate& candidate : slot.candidates) {
    auto product = make_product(candidate.spec, linears, x, rows, threads);
    if (!product.ok()) return product.status();
    products.push_back(std::move(*product));
    TimedProduct* const timed = products.back().get();
    contenders.push_back({fmt::format("{}", static_cast<int>(candidate.choice)),
                          [linears] {
                            for (const PackedWeights* linear : linears) {
                              flush_from_caches(linear->storage.data(), linear->storage.bytes());
                            }
                          },
                          [timed] {
                            timed->status = run_gemm(timed->plan, timed->input, timed->targets,
                                                     timed->workspace.data());
                          },
                          {}});
  }
  time_interleaved(contenders, {.threads = threads, .seconds = kTimingSeconds}, interrupted);
  std::vector<double> medians;
  for (size_t i = 0; i < contenders.size(); ++i) {
    NIBBLE_TRY(products[i]->status);
    medians.push_back(contenders[i].samples.median());
  }
  return medians;
}

}  // namespace

const Candidate* SlotMeasure::find(Choice choice) const {
  for (const Candidate& candidate : candidates) {
    if (candidate.choice == choice) return &candidate;
  }
  return nullptr;
}

double snr_db(const SlotMeasure& slot, const Candidate& candidate) {
  if (candidate.noise <= 0) return HUGE_VAL;
  return 10 * std::log10(slot.signal / candidate.noise);
}

Result<std::vector<SlotMeasure>> measure_noise(Model& model, std::span<const int32_t> chunk,
                                               const MeasureOptions& options,
                                               const std::function<void()>& progress) {
  const int threads = options.threads > 0 ? options.threads : available_cpus();
  Calibration own = empty_calibration(model, "");
  const Calibration& statistics = options.statistics != nullptr ? *options.statistics : own;
  std::vector<SlotMeasure> measures;
  const auto visit = [&](int64_t layer, Slot slot, const float* x, int64_t rows,
                         int64_t k) -> Status {
    if (interrupted()) return Status(Code::interrupted, "interrupted; nothing was written");
    if (options.statistics == nullptr) NIBBLE_TRY(own.add(layer, slot, x, rows, k, threads));
    const std::vector<const PackedWeights*> linears = quantized_linears(model, layer, slot);
    if (linears.empty()) return {};
    SlotMeasure measure;
    measure.layer = layer;
    measure.slot = slot;
    measure.k = k;
    measure.group_size = linears.front()->group_size;
    for (const PackedWeights* linear : linears) {
      measure.n += linear->n;
      measure.columns.push_back(linear->n);
      if (linear->group_size != linears.front()->group_size) measure.group_size = 0;
    }
    const std::vector<float> sample = sample_rows(x, rows, k, options.rows);
    auto candidates = make_candidates(linears, options.wide_groups && measure.group_size != 0,
                                      best_clip(statistics.at(layer, slot)), sample, threads);
    if (!candidates.ok()) return candidates.status();
    measure.candidates = std::move(*candidates);
    NIBBLE_TRY(fill_noise(linears, sample, threads, measure));
    measures.push_back(std::move(measure));
    progress();
    return {};
  };
  NIBBLE_TRY(visit_chunk(model, chunk, visit));
  return measures;
}

size_t distinct_shapes(const std::vector<SlotMeasure>& slots) {
  std::set<ShapeKey> shapes;
  for (const SlotMeasure& slot : slots) shapes.insert(shape_of(slot));
  return shapes.size();
}

SlotTimer cpu_slot_timer(const Model& model, int threads) {
  const int used = threads > 0 ? threads : available_cpus();
  return [&model, used](const SlotMeasure& slot, int64_t rows) {
    return time_slot(model, slot, rows, used);
  };
}

Status measure_costs(const SlotTimer& timer, std::vector<SlotMeasure>& slots,
                     const std::function<void()>& progress) {
  std::map<ShapeKey, const SlotMeasure*> timed;
  for (SlotMeasure& slot : slots) {
    if (interrupted()) return Status(Code::interrupted, "interrupted; nothing was written");
    const auto [at, is_new] = timed.try_emplace(shape_of(slot), &slot);
    if (!is_new) {
      for (size_t i = 0; i < slot.candidates.size(); ++i) {
        slot.candidates[i].us_decode = at->second->candidates[i].us_decode;
        slot.candidates[i].us_prefill = at->second->candidates[i].us_prefill;
      }
      continue;
    }
    const auto decode = timer(slot, 1);
    if (!decode.ok()) return decode.status();
    const auto prefill = timer(slot, kPrefillRows);
    if (!prefill.ok()) return prefill.status();
    for (size_t i = 0; i < slot.candidates.size(); ++i) {
      slot.candidates[i].us_decode = (*decode)[i];
      slot.candidates[i].us_prefill = (*prefill)[i];
    }
    progress();
  }
  return {};
}

Status measure_sensitivity(Runner& runner, const EvalText& text, Choice first, int threads,
                           std::vector<SlotMeasure>& slots, const std::function<void()>& progress) {
  const ModelPlan plain = uniform_plan(runner.config().layers, Mode::w4a16);
  const EvalSubject reference{&runner, plain, "w4a16"};
  EvalOptions options;
  options.context = static_cast<int64_t>(text.chunks.front().size());
  options.score_all = true;
  options.threads = threads;
  for (size_t from = 0; from < slots.size(); from += kSubjects) {
    const size_t to = std::min(slots.size(), from + kSubjects);
    std::vector<EvalSubject> subjects;
    for (size_t i = from; i < to; ++i) {
      subjects.push_back({&runner, plain, ""});
      subjects.back().plan.at(slots[i].layer, slots[i].slot) = slots[i].find(first)->spec;
    }
    const auto results = evaluate(text, &reference, subjects, options, interrupted);
    if (!results.ok()) return results.status();
    for (size_t i = from; i < to; ++i) {
      slots[i].kld = (*results)[i - from].kld_mean;
      progress();
    }
  }
  return {};
}

}  // namespace nibble::cli
