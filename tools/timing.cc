#include "timing.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "base/thread_pool.h"

namespace nibble {

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void flush_from_caches(const void* data, size_t bytes) {
#if defined(__SSE2__)
  const auto* from = static_cast<const char*>(data);
  for (size_t i = 0; i < bytes; i += 64) _mm_clflush(from + i);
  _mm_mfence();
#else
  (void)data;
  (void)bytes;
#endif
}

double Samples::quantile(double share) const {
  if (microseconds.empty()) return 0;
  std::vector<double> sorted = microseconds;
  std::sort(sorted.begin(), sorted.end());
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

Samples ratios_by_round(const Samples& a, const Samples& b) {
  Samples ratios;
  const size_t rounds = std::min(a.microseconds.size(), b.microseconds.size());
  for (size_t i = 0; i < rounds; ++i) {
    ratios.microseconds.push_back(a.microseconds[i] / b.microseconds[i]);
  }
  return ratios;
}

namespace {

/// Flushing runs on one thread; this wakes the others, so that a sample does not start with theirs
/// asleep. Each waits for all, or a millisecond.
void wake_threads(int threads) {
  std::atomic<int> awake = 0;
  const double end = now_seconds() + 1e-3;
  parallel_for(threads, threads, [&](int64_t) {
    ++awake;
    while (awake < threads && now_seconds() < end) {
    }
  });
}

/// One sample of one contender.
void take_turn(Contender& contender, int threads) {
  if (contender.failed) return;
  if (contender.run_and_time) {
    const std::optional<double> us = contender.run_and_time();
    contender.failed = !us;
    if (us) contender.samples.microseconds.push_back(*us);
    return;
  }
  if (contender.prepare) contender.prepare();
  wake_threads(threads);
  const double start = now_seconds();
  contender.run();
  contender.samples.microseconds.push_back((now_seconds() - start) * 1e6);
}

}  // namespace

void time_interleaved(std::vector<Contender>& contenders, const TimingBudget& budget,
                      const std::function<bool()>& stop) {
  for (Contender& contender : contenders) {
    if (contender.run) contender.run();
  }
  const size_t count = contenders.size();
  const double end = now_seconds() + budget.seconds;
  for (int round = 0; round < budget.max_rounds; ++round) {
    if (round >= budget.min_rounds && now_seconds() > end) break;
    for (size_t turn = 0; turn < count; ++turn) {
      if (stop && stop()) return;
      const size_t first = budget.rotate ? static_cast<size_t>(round) % count : 0;
      take_turn(contenders[(first + turn) % count], budget.threads);
    }
  }
}

}  // namespace nibble
