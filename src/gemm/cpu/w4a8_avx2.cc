// w4a8 with AVX2: a pair of products is at most 15 * 128 * 2 = 3840 in magnitude, so 8 of them are
// summed in int16 before they are widened to int32. The tile is in ymm_tile.h.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/ymm_tile.h"

namespace nibble {

void run_w4a8_avx2(const GemmBlock& b) { run_ymm<DotInt16<128>>(b); }

}  // namespace nibble
NIBBLE_TARGET_END
