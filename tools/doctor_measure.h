// What `nibble doctor --measure` adds: the machine's limits, measured now.
#pragma once

#include <nlohmann/json.hpp>

namespace nibble::cli {

/// clock_ghz, read_gb_per_s and the peak of every instruction set that this CPU has, on one thread
/// and on all; medians of interleaved rounds. Takes about two seconds and 1 GiB.
nlohmann::json measure_machine();
void print_measured(const nlohmann::json& measured);

}  // namespace nibble::cli
