#include "base/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "base/check.h"

namespace nibble {
namespace {

constexpr int64_t kMaxTasks = int64_t{1} << 31;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A pause takes 40 to 140 cycles: this is some tens of microseconds, longer than the serial work
// between two loops of a decoded token and far shorter than a time slice of the scheduler.
constexpr int kSpins = 1000;

/// The loop that is running. A claim is one step of `ticket`, whose high half is the number of the
/// loop and whose low half counts the tasks that are left: a helper that wakes late finds no task
/// left or another loop's number, and its compare-and-swap fails.
class Pool {
 public:
  void run(int threads, int64_t count, void (*task)(void*, int64_t), void* context);

 private:
  static uint32_t left_of(uint64_t ticket) { return static_cast<uint32_t>(ticket); }
  static uint32_t loop_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

  void grow(int helpers);
  void help(int index);
  bool claim_and_run(int helper) noexcept;

  std::mutex caller_;     // held for the length of a loop
  int helpers_ = 0;       // started
  bool no_more_ = false;  // the system refused one

  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<void (*)(void*, int64_t)> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> count_{0};
  std::atomic<int> allowed_{0};  // helpers with a smaller index take part
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};  // what sleeping helpers wait on: the loop's number
  std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};  // what a waiting caller sleeps on
  std::atomic<bool> caller_sleeps_{false};
};

thread_local bool inside_task = false;

/// Takes one task of the loop that is running and runs it; false if none is left for this helper
/// (-1: the caller).
bool Pool::claim_and_run(int helper) noexcept {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    if (left_of(ticket) == 0) return false;
    if (helper >= allowed_.load(std::memory_order_relaxed)) return false;
    // These belong to the ticket's loop if the exchange succeeds: they change only between loops.
    auto* task = task_.load(std::memory_order_relaxed);
    void* context = context_.load(std::memory_order_relaxed);
    const int64_t count = count_.load(std::memory_order_relaxed);
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire)) {
      continue;
    }
    task(context, count - left_of(ticket));
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count && helper >= 0) {
      finished_.store(loop_of(ticket), std::memory_order_seq_cst);
      if (caller_sleeps_.load(std::memory_order_seq_cst)) finished_.notify_one();
    }
    return true;
  }
}

void Pool::help(int index) {
  inside_task = true;
  uint32_t seen = wake_.load(std::memory_order_acquire);
  for (;;) {
    while (claim_and_run(index)) {
    }
    int spins = 0;
    while (wake_.load(std::memory_order_acquire) == seen && spins < kSpins) {
      pause();
      ++spins;
    }
    if (wake_.load(std::memory_order_acquire) == seen) {
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(seen, std::memory_order_seq_cst);
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = wake_.load(std::memory_order_acquire);
  }
}

void Pool::grow(int helpers) {
  // Signals are for the threads of the program, but for those that say what this thread did wrong.
  sigset_t all, before;
  sigfillset(&all);
  for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, own);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (helpers_ < helpers && !no_more_) {
    try {
      // Detached: they live as long as the process, and touch nothing but this pool, which is never
      // destroyed.
      std::thread([this, index = helpers_] { help(index); }).detach();
      ++helpers_;
    } catch (const std::exception&) {  // no thread or no memory for one
      no_more_ = true;                 // fewer threads, the same result
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Pool::run(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
  std::unique_lock lock(caller_, std::try_to_lock);
  if (!lock.owns_lock()) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
  grow(helpers);
  inside_task = true;
  task_.store(task, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  count_.store(count, std::memory_order_relaxed);
  allowed_.store(helpers, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  caller_sleeps_.store(false, std::memory_order_relaxed);
  const uint32_t loop = loop_of(ticket_.load(std::memory_order_relaxed)) + 1;
  ticket_.store((uint64_t{loop} << 32) | static_cast<uint32_t>(count), std::memory_order_release);
  wake_.store(loop, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
  while (claim_and_run(-1)) {
  }
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    if (spins < kSpins) {
      pause();
      continue;
    }
    // A helper was taken off its CPU within a task. Sleeping leaves this CPU to it.
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    const uint32_t finished = finished_.load(std::memory_order_seq_cst);
    if (done_.load(std::memory_order_acquire) != count && finished != loop) {
      finished_.wait(finished, std::memory_order_seq_cst);
    }
  }
  inside_task = false;
}

std::atomic<Pool*> the_pool{nullptr};

/// The helpers of the parent do not exist in a child: it starts with a new pool.
void forget_pool() { the_pool.store(nullptr, std::memory_order_relaxed); }

Pool& pool() {
  Pool* pool = the_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  auto* made = new Pool;
  if (the_pool.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *pool;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
  NIBBLE_CHECK(count < kMaxTasks);
  if (threads <= 1 || count <= 1 || inside_task) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  pool().run(threads, count, task, context);
}

}  // namespace nibble
