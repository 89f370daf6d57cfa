// AMX: four products of two A and two B tiles, as in a kernel whose tiles are all loaded already.
#include <cstdint>

#include "gemm/cpu/target.h"

NIBBLE_TARGET_BEGIN("amx-tile,amx-int8")
#include "gemm/cpu/amx.h"

namespace nibble {

void run_peak_amx(int64_t iterations) {
  amx::configure();  // which zeroes all tiles
  for (int64_t i = 0; i < iterations; ++i) {
    amx::dot_s8s8<0, 4, 6>();
    amx::dot_s8s8<1, 4, 7>();
    amx::dot_s8s8<2, 5, 6>();
    amx::dot_s8s8<3, 5, 7>();
  }
  amx::release();
}

}  // namespace nibble
NIBBLE_TARGET_END
