// data/calibration.txt inside the library, so that a copied binary needs no data directory. The
// assembler includes the file: a string literal of its length would slow the compiler down.
#include "awq/calibration_text.h"

__asm__(
    ".pushsection .rodata\n"
    ".balign 16\n"
    "nibble_calibration_text:\n"
    ".incbin \"" NIBBLE_CALIBRATION_TEXT
    "\"\n"
    "nibble_calibration_text_end:\n"
    ".popsection\n");

extern "C" {
extern const char nibble_calibration_text[] __attribute__((visibility("hidden")));
extern const char nibble_calibration_text_end[] __attribute__((visibility("hidden")));
}

namespace nibble::awq {

std::string_view bundled_calibration_text() {
  return {nibble_calibration_text,
          static_cast<size_t>(nibble_calibration_text_end - nibble_calibration_text)};
}

}  // namespace nibble::awq
