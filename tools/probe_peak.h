// How fast this CPU multiplies when nothing has to be fetched, and at which clock: the loops of
// gemm/cpu/peak.h, timed.
#pragma once

#include <optional>

#include "gemm/cpu/peak.h"

namespace nibble {

/// One short run (about a millisecond) of a loop on `threads` threads at once.
class PeakProbe {
 public:
  PeakProbe(const PeakLoop& loop, int threads);  // finds how many iterations take a millisecond
  void run() const;
  double ops() const;  // of one run()
  const PeakLoop& loop() const { return *loop_; }

 private:
  const PeakLoop* loop_;
  int threads_;
  int64_t iterations_;
};

/// Loops that this CPU executes.
std::vector<const PeakLoop*> peak_loops_here();

/// GHz of the calling thread's core during about a millisecond.
std::optional<double> measure_clock_ghz();

}  // namespace nibble
