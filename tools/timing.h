// Timing that can be defended: contenders take turns in one run, weights are flushed from every
// cache before each sample, and what is reported is the median with its spread.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace nibble {

double now_seconds();

/// Writes back and drops [data, data + bytes) from all caches of all cores (x86; elsewhere no-op).
void flush_from_caches(const void* data, size_t bytes);

struct Samples {
  std::vector<double> microseconds;  // in the order taken

  double median() const { return quantile(0.5); }
  double quantile(double share) const;  // between neighbours by proportion; 0 if there are none
  double min() const { return quantile(0); }
};

/// Of each round that both were timed in: a's time over b's.
Samples ratios_by_round(const Samples& a, const Samples& b);

/// One thing that is timed. `prepare` is not timed: it makes the inputs cold.
struct Contender {
  std::string name;
  std::function<void()> prepare;
  std::function<void()> run;
  Samples samples;
  /// In place of both, if it is set: microseconds by a clock of its own; nothing if it has failed,
  /// which takes it out of the contest.
  std::function<std::optional<double>()> run_and_time = {};
  bool failed = false;
};

struct TimingBudget {
  int threads = 1;  // of the contenders: they are awake when a sample starts
  int min_rounds = 5;
  int max_rounds = 200;
  double seconds = 0.5;  // over all contenders; min_rounds has precedence
  bool rotate = false;   // each round begins with another contender: A B C, B C A, ...
};

/// Rounds of all contenders in turn: A B C, A B C, ... One untimed round first. Stops early, with
/// what it has, when `stop` (may be empty) returns true.
void time_interleaved(std::vector<Contender>& contenders, const TimingBudget& budget,
                      const std::function<bool()>& stop = {});

}  // namespace nibble
