// The kernel table of the CPU, and what this CPU can execute of it.
#include "gemm/cpu/kernel.h"

namespace nibble {

// One per file of the same name.
void run_w4a8_scalar(const GemmBlock& block);
void run_w4a16_scalar(const GemmBlock& block);
#if NIBBLE_SIMD
void run_w4a8_avx2(const GemmBlock& block);
void run_w4a4_avx2(const GemmBlock& block);
void run_w4a8_avxvnni(const GemmBlock& block);
void run_w4a8_avx512vnni(const GemmBlock& block);
void run_w4a8_amx(const GemmBlock& block);
void run_w4a16_avx2(const GemmBlock& block);
void run_w4a16_avx512(const GemmBlock& block);
#endif

namespace {

using enum ActivationLayout;

// Priority order within a mode. w4a4 shares the code of w4a8 wherever the instruction set has no
// dot product narrower than 8 bits; its own row states that, instead of a quiet fallback.
constexpr CpuKernel kTable[] = {
#if NIBBLE_SIMD
    {"w4a8_amx", Mode::w4a8, Isa::amx_int8, tiles, run_w4a8_amx},
    {"w4a8_avx512vnni", Mode::w4a8, Isa::avx512_vnni, rows, run_w4a8_avx512vnni},
    {"w4a8_avxvnni", Mode::w4a8, Isa::avx_vnni, rows, run_w4a8_avxvnni},
    {"w4a8_avx2", Mode::w4a8, Isa::avx2, rows, run_w4a8_avx2},
#endif
    {"w4a8_scalar", Mode::w4a8, Isa::scalar, rows, run_w4a8_scalar},
#if NIBBLE_SIMD
    {"w4a4_amx", Mode::w4a4, Isa::amx_int8, tiles, run_w4a8_amx},
    {"w4a4_avx512vnni", Mode::w4a4, Isa::avx512_vnni, rows, run_w4a8_avx512vnni},
    {"w4a4_avxvnni", Mode::w4a4, Isa::avx_vnni, rows, run_w4a8_avxvnni},
    {"w4a4_avx2", Mode::w4a4, Isa::avx2, rows, run_w4a4_avx2},
#endif
    {"w4a4_scalar", Mode::w4a4, Isa::scalar, rows, run_w4a8_scalar},
#if NIBBLE_SIMD
    {"w4a16_avx512", Mode::w4a16, Isa::avx512, floats, run_w4a16_avx512},
    {"w4a16_avx2", Mode::w4a16, Isa::avx2, floats, run_w4a16_avx2},
#endif
    {"w4a16_scalar", Mode::w4a16, Isa::scalar, floats, run_w4a16_scalar},
};

}  // namespace

std::span<const CpuKernel> cpu_kernels() { return kTable; }

const char* isa_missing_reason(Isa isa) {
  const CpuFeatures& f = cpu_features();
  switch (isa) {
    case Isa::scalar: return nullptr;
    case Isa::avx2: return f.avx2 ? nullptr : "this CPU has no AVX2 with FMA and F16C";
    case Isa::avx_vnni: return f.avx_vnni ? nullptr : "this CPU has no AVX-VNNI";
    case Isa::avx512: return f.avx512 ? nullptr : "this CPU has no AVX-512 F, BW, DQ, VL";
    case Isa::avx512_vnni: return f.avx512_vnni ? nullptr : "this CPU has no AVX-512 VNNI";
    case Isa::amx_int8:
      if (f.amx_int8) return nullptr;
      return f.amx_note.empty() ? "this CPU has no AMX-INT8" : f.amx_note.c_str();
  }
  return "unknown instruction set";
}

const QuantizerOps& quantizer_ops_for(Isa isa) {
#if NIBBLE_SIMD
  const bool wide = isa == Isa::avx512 || isa == Isa::avx512_vnni || isa == Isa::amx_int8;
  if (wide && isa_missing_reason(Isa::avx512) == nullptr) return quantizer_ops_avx512();
  if (isa != Isa::scalar && isa_missing_reason(Isa::avx2) == nullptr) return quantizer_ops_avx2();
#endif
  (void)isa;
  return quantizer_ops_scalar();
}

}  // namespace nibble
