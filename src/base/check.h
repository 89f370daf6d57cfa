// NIBBLE_CHECK: our own bugs, and only those. User and file errors are Status (base/status.h).
#pragma once

#include <cstdio>
#include <cstdlib>

#define NIBBLE_CHECK(condition)                                                            \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      std::fprintf(stderr, "%s:%d: internal error: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                        \
    }                                                                                      \
  } while (0)
