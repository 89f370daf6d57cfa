// w4a4 with AVX2: int4 activations lie in -15..15 (asymmetric ones with their zero point taken
// off), so a pair of products is at most 450 and 72 of them fit int16: a whole group of up to 288.
// The tile is in ymm_tile.h.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/ymm_tile.h"

namespace nibble {

void run_w4a4_avx2(const GemmBlock& b) { run_ymm<DotInt16<15>>(b); }

}  // namespace nibble
NIBBLE_TARGET_END
