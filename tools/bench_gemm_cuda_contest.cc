// See bench_gemm_cuda_contest.h. Weights are random and rotate through more copies than L2 holds;
// each sample is a CUDA graph of many launches; results are compared with the oracle on sampled
// rows and columns before anything is timed.
#include "bench_gemm_cuda_contest.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "cli.h"
#include "cuda_probe.h"

namespace nibble::cli {
namespace {

using cuda::Cublas;
using cuda::DeviceInfo;

constexpr uint64_t kSeed = 1;
constexpr const char* kRead = "read";

GemmVersus versus_of(const CudaRow& ours, const CudaRow& theirs) {
  GemmVersus versus;
  versus.kernel = ours.kernel;
  versus.mode = ours.mode;
  versus.peer = theirs.mode;
  versus.type = theirs.type;
  versus.candidate = theirs.plan;
  versus.m = ours.m, versus.n = ours.n, versus.k = ours.k;
  versus.our_us = ours.samples.median();
  versus.peer_us = theirs.samples.median();
  versus.ratios = ratios_by_round(theirs.samples, ours.samples);
  return versus;
}

/// Each of our products against the type of each peer with the same activations; and against the
/// fastest of all of a peer's types, if that is another.
void compare(const std::vector<CudaRow>& rows, std::vector<GemmVersus>& to) {
  const auto faster = [](const CudaRow* a, const CudaRow& b) {
    return a == nullptr || b.samples.median() < a->samples.median() ? &b : a;
  };
  std::vector<std::string> labels;
  for (const CudaRow& row : rows) {
    const bool known = std::find(labels.begin(), labels.end(), row.mode) != labels.end();
    if (row.side == Side::peer && !known) labels.push_back(row.mode);
  }
  for (const CudaRow& ours : rows) {
    if (ours.side != Side::ours || !ours.product_alone) continue;
    for (const std::string& label : labels) {
      const CudaRow *alike = nullptr, *best = nullptr;
      for (const CudaRow& row : rows) {
        if (row.side != Side::peer || row.mode != label) continue;
        best = faster(best, row);
        if (mode_of_activations(row.activations) == ours.mode) alike = faster(alike, row);
      }
      if (alike != nullptr) to.push_back(versus_of(ours, *alike));
      if (best != alike) to.push_back(versus_of(ours, *best));
    }
  }
}

}  // namespace

CudaBaselines::CudaBaselines(const GemmBenchOptions& o, const DeviceInfo& device) {
  const auto keep = [](auto opened, auto& to) {
    if (opened.ok()) {
      to = std::move(*opened);
    } else {
      fmt::print(stderr, "nibble: without a baseline: {}\n", opened.status().message());
    }
  };
  if (o.no_baseline) return;
  keep(Cublas::open(device, o.cublas), cublas);
  if (device.capability >= 89) keep(CublasFp8::open(o.cublas), fp8);  // which has e4m3
}

Problem bench_problem(const GemmBenchOptions& o, Mode mode, int64_t m, const AwqTensors& weight) {
  return {.m = m,
          .n = weight.n,
          .k = weight.k,
          .group_size = weight.group_size,
          .mode = mode,
          .x_dtype = Dtype::bf16,
          .y_dtype = Dtype::bf16,
          .granularity =
              mode == Mode::w4a16 ? Granularity::token : granularities_by_name().at(o.activations),
          .symmetric = mode != Mode::w4a4 || o.symmetric};
}

CudaRow CudaContest::row(const std::string& kernel, const std::string& mode, Side side) const {
  CudaRow row;
  row.kernel = kernel;
  row.mode = mode;
  row.side = side;
  row.m = m_;
  row.n = weights_.tensors.n;
  row.k = weights_.tensors.k;
  row.group_size = weights_.tensors.group_size;
  const int64_t x_bytes = mode == mode_name(Mode::w4a16) ? 2 : 1;  // of an element
  row.bytes =
      static_cast<double>(weights_.copies[0].bytes() + x_bytes * m_ * row.k + 2 * m_ * row.n);
  return row;
}

void CudaContest::add(CudaRow row, int64_t copies, Launch launch) {
  DeviceContender contender;
  contender.name = row.kernel;
  contender.launch = std::move(launch);
  contender.copies = copies;
  contenders_.push_back(std::move(contender));
  rows_.push_back(std::move(row));
}

/// The product alone, and with quantizing x, if the mode does that; or both in one launch.
void CudaContest::add_kernel(const CudaKernelRun& run) {
  const Mode mode = run.plan.problem.mode;
  const auto& weights = weights_.copies;
  const auto copies = static_cast<int64_t>(weights.size());
  CudaRow line = row(run.plan.kernel_name(), mode_name(mode), Side::ours);
  line.plan = run.plan.describe();
  const Launch whole = [&run, &weights, copies](int64_t i, cudaStream_t stream) {
    check_status(run.whole(weights[i % copies], stream));
  };
  if (mode == Mode::w4a16) return add(line, copies, whole);
  if (run.plan.is_one_launch() && run.plan.family != cuda::KernelFamily::slab) {
    // Its product alone is another kernel's.
    line.kernel = "one launch: " + line.kernel;
    line.product_alone = false;
    return add(line, copies, whole);
  }
  add(line, copies, [&run, &weights, copies](int64_t i, cudaStream_t stream) {
    check_status(run.product(weights[i % copies], stream));
  });
  line.kernel =
      (run.plan.is_one_launch() ? "one launch: quantize + " : "quantize + ") + line.kernel;
  line.product_alone = false;
  add(line, copies, whole);
}

Status CudaContest::add_kernels(const SampledColumns& sample, std::string& mismatch) {
  std::vector<std::pair<Mode, const char*>> wanted;
  for (const std::string& mode : o_.modes) {
    const Mode value = modes_by_name().at(mode);
    for (const std::string& name : o_.kernels) wanted.emplace_back(value, name.c_str());
    if (o_.kernels.empty()) wanted.emplace_back(value, nullptr);
  }
  for (const auto& [mode, name] : wanted) {
    const Result<cuda::Plan> plan =
        cuda::plan_gemm(bench_problem(o_, mode, m_, weights_.tensors), device_, name);
    if (!plan.ok() && wanted.size() > 1 && plan.status().code() == Code::unsupported) {
      fmt::print(stderr, "nibble: left out: {}\n", plan.status().message());
      continue;
    }
    if (!plan.ok()) return plan.status();
    if (o_.explain) fmt::print(stderr, "{}\n", plan->describe());
    runs_.push_back(std::make_unique<CudaKernelRun>(*plan));
    const Result<std::string> checked = runs_.back()->check(weights_.copies[0], sample);
    if (!checked.ok()) return checked.status();
    mismatch = *checked;
    if (!mismatch.empty()) return {};
    add_kernel(*runs_.back());
  }
  const auto copies = static_cast<int64_t>(weights_.copies.size());
  const int64_t bytes = weights_.copies[0].layout().bytes();
  add(row(kRead, kRead, Side::baseline), copies,
      [this, bytes, copies](int64_t i, cudaStream_t stream) {
        check_cuda(launch_read(weights_.copies[i % copies].slabs(), bytes, sink_.as<uint32_t>(),
                               device_.multiprocessors, stream),
                   kRead);
      });
  return {};
}

Status CudaContest::add_peers(PeerTeam& peers, CudaBench& bench) {
  if (peers.offered().empty() || runs_.empty()) return {};
  const std::vector<float> x = runs_[0]->input();
  Result<std::vector<PeerEntry>> entries = peers.enter(x, m_, o_.peer_types);
  if (!entries.ok()) return entries.status();
  Result<std::string> path = peers.input_path(x, m_);
  if (!path.ok()) return path.status();
  x_path_ = *path;
  entries_ = std::move(*entries);
  for (const PeerEntry& entry : entries_) {
    const std::string& label = entry.peer->label();
    bench.looks.push_back({label, entry.type->name, m_, weights_.tensors.n, weights_.tensors.k,
                           entry.first_look_us, entry.after});
    if (entry.after != AfterLook::in_rounds) continue;
    CudaRow line = row(fmt::format("{} {}", label, entry.type->name), label, Side::peer);
    line.type = entry.type->name;
    line.plan = entry.type->candidate;
    line.activations = entry.type->activations;
    line.bits_per_weight = entry.type->bits_per_weight;
    line.product_error = entry.type->product_error;
    add(std::move(line), 1, {});
    contenders_.back().run_and_time = [this, &peers, &entry] {
      return peers.run(entry, m_, x_path_);
    };
  }
  return {};
}

void CudaContest::add_dense(Cublas& cublas, Cublas::Type type, const char* name) {
  const int64_t n = weights_.tensors.n, k = weights_.tensors.k;
  const int64_t element = type == Cublas::Type::f16 ? 2 : 1, bytes = n * k * element;
  const int64_t copies = (kColdBytes + bytes - 1) / bytes;
  dense_.emplace_back(static_cast<size_t>(bytes * copies));
  const auto* w = dense_.back().as<const std::byte>();
  dense_.emplace_back(static_cast<size_t>(m_ * k * element));
  void* x = dense_.back().as<>();
  dense_.emplace_back(static_cast<size_t>(m_ * n * 4));
  void* y = dense_.back().as<>();
  if (type == Cublas::Type::f16) {
    check_cuda(launch_fill_normal(const_cast<std::byte*>(w), n * k * copies, kSeed, false, nullptr),
               name);
    check_cuda(launch_fill_normal(x, m_ * k, kSeed, false, nullptr), name);
  } else {
    check_cuda(launch_fill_words(const_cast<std::byte*>(w), bytes * copies, kSeed, nullptr), name);
    check_cuda(launch_fill_words(x, m_ * k, kSeed, nullptr), name);
  }
  const bool works = cublas.multiply(type, x, w, y, n, m_, n, k, nullptr).ok();
  check_cuda(cudaDeviceSynchronize(), name);
  if (!works) return;  // int8 wants M in multiples of 4
  add(row(name, "matmul only", Side::baseline), copies,
      [&cublas, type, x, w, y, n, k, bytes, copies, this](int64_t i, cudaStream_t stream) {
        const Status status =
            cublas.multiply(type, x, w + i % copies * bytes, y, n, m_, n, k, stream);
        if (!status.ok()) throw std::runtime_error(status.message());
      });
}

void CudaContest::add_baselines(const CudaBaselines& baselines) {
  dense_.reserve(9);
  if (baselines.cublas != nullptr) {
    add_dense(*baselines.cublas, Cublas::Type::f16, "cublas-f16");
    add_dense(*baselines.cublas, Cublas::Type::int8, "cublas-int8");
  }
  if (baselines.fp8 != nullptr) add_fp8(*baselines.fp8);
}

void CudaContest::add_fp8(CublasFp8& cublas) {
  constexpr uint32_t kBelow2 = 0xbfbfbfbfu;  // e4m3 without the exponent's first bit: no NaN
  const int64_t n = weights_.tensors.n, k = weights_.tensors.k, bytes = n * k;
  const int64_t copies = (kColdBytes + bytes - 1) / bytes;
  Result<std::unique_ptr<CublasFp8::Product>> product = cublas.plan(m_, n, k);
  if (!product.ok()) {
    fmt::print(stderr, "nibble: left out: {}\n", product.status().message());
    return;
  }
  fp8_ = std::move(*product);
  dense_.emplace_back(static_cast<size_t>(bytes * copies));
  auto* w = dense_.back().as<std::byte>();
  dense_.emplace_back(static_cast<size_t>(m_ * k));
  void* x = dense_.back().as<>();
  dense_.emplace_back(static_cast<size_t>(m_ * n * 2));
  void* y = dense_.back().as<>();
  check_cuda(launch_fill_words(w, bytes * copies, kSeed, nullptr, kBelow2), "cublas-fp8");
  check_cuda(launch_fill_words(x, m_ * k, kSeed, nullptr, kBelow2), "cublas-fp8");
  add(row("cublas-fp8", "matmul only", Side::baseline), copies,
      [this, x, w, y, bytes, copies](int64_t i, cudaStream_t stream) {
        check_status(fp8_->multiply(x, w + i % copies * bytes, y, stream));
      });
}

void CudaContest::measure(const DeviceMonitor& monitor, CudaBench& bench) {
  Samples watts, clock;
  time_on_device(contenders_, {.seconds = o_.seconds}, [&] {
    const DeviceMonitor::Reading now = monitor.read();
    watts.microseconds.push_back(now.watts);
    clock.microseconds.push_back(now.sm_mhz);
  });
  double read_us = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i].mode == kRead) read_us = contenders_[i].samples.median();
  }
  std::vector<CudaRow> finished;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (contenders_[i].failed || contenders_[i].samples.microseconds.empty()) continue;
    rows_[i].samples = contenders_[i].samples;
    rows_[i].read_us = read_us;
    rows_[i].watts = watts.median();
    rows_[i].sm_mhz = clock.median();
    finished.push_back(std::move(rows_[i]));
  }
  compare(finished, bench.versus);
  bench.rows.insert(bench.rows.end(), finished.begin(), finished.end());
}

}  // namespace nibble::cli
