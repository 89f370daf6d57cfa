#include "probe_peak.h"

#include <algorithm>

#include "base/thread_pool.h"
#include "gemm/cpu/kernel.h"
#include "timing.h"

namespace nibble {
namespace {

constexpr double kRunSeconds = 1e-3;

/// Iterations that take about kRunSeconds on one thread.
template <class Run>
int64_t iterations_of_a_run(const Run& run) {
  int64_t iterations = 1000;
  for (;;) {
    const double start = now_seconds();
    run(iterations);
    const double seconds = now_seconds() - start;
    if (seconds > kRunSeconds / 4) {
      return std::max<int64_t>(1, static_cast<int64_t>(iterations * kRunSeconds / seconds));
    }
    iterations *= 2;
  }
}

}  // namespace

PeakProbe::PeakProbe(const PeakLoop& loop, int threads)
    : loop_(&loop), threads_(threads), iterations_(iterations_of_a_run(loop.run)) {}

void PeakProbe::run() const {
  // Each index is a thread's share; a thread that comes late finds its share taken by another, and
  // the sample is slow, as a product's would be.
  parallel_for(threads_, threads_, [&](int64_t) { loop_->run(iterations_); });
}

double PeakProbe::ops() const {
  return loop_->ops_per_iteration * static_cast<double>(iterations_) * threads_;
}

std::vector<const PeakLoop*> peak_loops_here() {
  std::vector<const PeakLoop*> loops;
  for (const PeakLoop& loop : peak_loops()) {
    if (isa_missing_reason(loop.isa) == nullptr) loops.push_back(&loop);
  }
  return loops;
}

std::optional<double> measure_clock_ghz() {
  if (!run_clock_adds(1)) return std::nullopt;
  const int64_t iterations = iterations_of_a_run(run_clock_adds);
  const double start = now_seconds();
  run_clock_adds(iterations);
  return static_cast<double>(iterations * kClockAdds) / (now_seconds() - start) * 1e-9;
}

}  // namespace nibble
