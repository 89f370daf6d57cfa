// One pool of threads for the whole process, made for short parallel loops: a product during decode
// lasts tens of microseconds. The caller always takes part and can finish alone: a helper that the
// system has not woken yet, or never starts, costs nothing. Two callers at once: the second runs
// its loop alone. Helpers spin briefly after a loop, then sleep.
// Not OpenMP, because its barriers wait for every thread of a team: with both CPUs busy elsewhere a
// 0.3 ms product took 12 ms (docs/notes.md).
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace nibble {

/// Calls task(context, index) once for every index in [0, count), in any order, on at most
/// `threads` threads, the caller's included; returns when all have returned. Tasks must not throw.
/// A task may call parallel_for again: the inner loop runs on its own thread.
void parallel_for(int threads, int64_t count, void (*task)(void* context, int64_t index),
                  void* context);

/// The same for a callable that takes an index.
template <class Task>
void parallel_for(int threads, int64_t count, Task&& task) {
  using Callable = std::remove_reference_t<Task>;
  parallel_for(
      threads, count,
      [](void* context, int64_t index) { (*static_cast<Callable*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(std::addressof(task))));
}

}  // namespace nibble
