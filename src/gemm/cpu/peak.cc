#include "gemm/cpu/peak.h"

#include "gemm/cpu/unroll.h"

namespace nibble {

// One function per row, in peak_<instruction set>.cc.
void run_peak_amx(int64_t iterations);
void run_peak_vnni_zmm(int64_t iterations);
void run_peak_vnni_ymm(int64_t iterations);
void run_peak_maddubs(int64_t iterations);
void run_peak_maddubs_2(int64_t iterations);
void run_peak_maddubs_8(int64_t iterations);
void run_peak_fma_zmm(int64_t iterations);
void run_peak_fma_ymm(int64_t iterations);

namespace {

// Operations: multiply-adds of one instruction, times two, times instructions an iteration.
#if NIBBLE_SIMD
constexpr PeakLoop kLoops[] = {
    {"tdpbssd, 2x2 tiles", Isa::amx_int8, false, 16.0 * 16 * 64 * 2 * 4, run_peak_amx},
    {"vpdpbusd zmm", Isa::avx512_vnni, false, 64.0 * 2 * 16, run_peak_vnni_zmm},
    {"vpdpbusd ymm", Isa::avx_vnni, false, 32.0 * 2 * 12, run_peak_vnni_ymm},
    {"vpmaddubsw, vpmaddwd, vpaddd", Isa::avx2, false, 32.0 * 2 * 8, run_peak_maddubs},
    {"2 vpmaddubsw a vpmaddwd", Isa::avx2, false, 32.0 * 2 * 16, run_peak_maddubs_2},
    {"8 vpmaddubsw a vpmaddwd", Isa::avx2, false, 32.0 * 2 * 32, run_peak_maddubs_8},
    {"vfmadd231ps zmm", Isa::avx512, true, 16.0 * 2 * 16, run_peak_fma_zmm},
    {"vfmadd231ps ymm", Isa::avx2, true, 8.0 * 2 * 12, run_peak_fma_ymm},
};
#endif

}  // namespace

std::span<const PeakLoop> peak_loops() {
#if NIBBLE_SIMD
  return kLoops;
#else
  return {};
#endif
}

#if defined(__x86_64__) || defined(__aarch64__)
namespace {
// A function of its own: clang takes no captured variable as an operand in a generic lambda.
[[gnu::always_inline]] inline void dependent_add(uint64_t& sum, uint64_t one) {
#if defined(__x86_64__)
  __asm__ volatile("add %1, %0" : "+r"(sum) : "r"(one));  // not a constant: those may be free
#else
  __asm__ volatile("add %0, %0, %1" : "+r"(sum) : "r"(one));
#endif
}
}  // namespace

bool run_clock_adds(int64_t iterations) {
  uint64_t sum = 0;
  const uint64_t one = 1;
  for (int64_t i = 0; i < iterations; ++i) {
    unroll<static_cast<int>(kClockAdds)>([&](auto) NIBBLE_INLINE { dependent_add(sum, one); });
  }
  return true;
}
#else
bool run_clock_adds(int64_t) { return false; }
#endif

}  // namespace nibble
