// unroll<N>(f): calls f(0) .. f(N - 1) with compile-time indexes. Register tiles are arrays, and
// g++ keeps an array in registers only if every index is a constant before its scalar replacement
// pass: loops that are unrolled later leave a load and a store around each multiply
// (docs/notes.md). Include inside a target region.
#pragma once

#include <type_traits>
#include <utility>

namespace nibble {
namespace {

template <class F, int... i>
[[gnu::always_inline]] inline void unroll_indexes(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}

template <int n, class F>
[[gnu::always_inline]] inline void unroll(const F& f) {
  unroll_indexes(f, std::make_integer_sequence<int, n>{});
}

}  // namespace
}  // namespace nibble

/// A lambda body that is always inlined: `unroll<4>([&](auto i) NIBBLE_INLINE { ... })`.
#define NIBBLE_INLINE __attribute__((always_inline))
