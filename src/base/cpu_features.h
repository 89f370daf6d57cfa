// What this CPU and this operating system let the process execute: CPUID, then XCR0 (are the
// registers saved?), then arch_prctl (may the process use AMX tiles?). Never the model number:
// hypervisors report wrong ones.
#pragma once

#include <cstdint>
#include <string>

namespace nibble {

struct CpuFeatures {
  bool avx2 = false;         // AVX2 + FMA + F16C
  bool avx_vnni = false;     // VEX-encoded 256-bit VPDPBUSD
  bool avx512 = false;       // AVX-512 F, BW, DQ, VL
  bool avx512_vnni = false;  // VPDPBUSD on 512 bits
  bool amx_int8 = false;     // AMX-TILE + AMX-INT8 and permission granted
  std::string amx_note;      // why AMX is off although the CPU has it; empty otherwise
  std::string vendor;        // "GenuineIntel", "AuthenticAMD"
  std::string brand;         // what the CPU calls itself; for reports only
  int64_t l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;  // of one core's view; 0: not reported
};

/// Detected once, thread-safe. Asks the kernel for AMX permission if the CPU has it.
const CpuFeatures& cpu_features();

/// CPUs this process may run on (its affinity mask), at least 1.
int available_cpus();

}  // namespace nibble
