// How much memory this process can still have.
#pragma once

#include <cstdint>

namespace nibble {

/// MemAvailable of the system, or what the process's control group (v1 or v2) leaves, whichever is
/// less; 0 if the system tells neither.
uint64_t available_memory_bytes();

/// Peak resident set of this process so far, mapped files included; 0 if unknown.
uint64_t peak_memory_bytes();

}  // namespace nibble
