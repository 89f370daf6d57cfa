// Opens and closes a region whose functions are compiled for one instruction set, so that no wide
// instruction reaches code shared with older CPUs. Use it after every system include:
//   NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
//   namespace nibble::avx2 { ... }
//   NIBBLE_TARGET_END
#pragma once

#define NIBBLE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define NIBBLE_TARGET_BEGIN(isa) \
  NIBBLE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define NIBBLE_TARGET_END NIBBLE_PRAGMA(clang attribute pop)
#else
#define NIBBLE_TARGET_BEGIN(isa) NIBBLE_PRAGMA(GCC push_options) NIBBLE_PRAGMA(GCC target(isa))
#define NIBBLE_TARGET_END NIBBLE_PRAGMA(GCC pop_options)
#endif
