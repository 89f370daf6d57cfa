// What an instruction set can do at most: loops of its multiply-add on registers, no memory. They
// compute nothing; `nibble doctor --measure` and `nibble bench gemm` time them, so that a kernel's
// speed can be given as a share of what this CPU does at this moment.
#pragma once

#include <cstdint>
#include <span>

#include "gemm/gemm.h"

namespace nibble {

struct PeakLoop {
  const char* name;  // "vpdpbusd zmm"
  Isa isa;
  bool floats;               // fp32 multiply-adds, else 8-bit ones summed in int32
  double ops_per_iteration;  // a multiply-add is two
  void (*run)(int64_t iterations);
};

/// All of this build. Several rows of one instruction set are several ways to use it; the fastest
/// counts. Run only those whose `isa` this CPU has.
std::span<const PeakLoop> peak_loops();

/// A chain of iterations * kClockAdds dependent additions, a cycle each: what gives the clock.
/// False, having done nothing, on a CPU for which there is none.
inline constexpr int64_t kClockAdds = 64;
bool run_clock_adds(int64_t iterations);

}  // namespace nibble
