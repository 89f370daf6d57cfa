// The thread pool. Named Thread*: these also run under ThreadSanitizer.
#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

namespace nibble {
namespace {

/// Every index of [0, count) once, whoever takes it.
void expect_each_once(int threads, int64_t count) {
  std::vector<std::atomic<int>> taken(static_cast<size_t>(count));
  parallel_for(threads, count, [&](int64_t i) { ++taken[static_cast<size_t>(i)]; });
  for (const auto& times : taken) ASSERT_EQ(times, 1) << threads << " threads, " << count;
}

TEST(ThreadPool, RunsEveryIndexOnce) {
  for (const int threads : {0, 1, 2, 3, 8}) {
    for (const int64_t count : {0, 1, 2, 3, 17, 1000}) expect_each_once(threads, count);
  }
}

TEST(ThreadPool, ManyShortLoopsInARowLoseNothing) {
  std::vector<int64_t> values(64);
  for (int64_t round = 0; round < 3000; ++round) {
    const int64_t count = 1 + round % 64;
    parallel_for(4, count, [&](int64_t i) { values[static_cast<size_t>(i)] = round + i; });
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], round + i);
  }
}

TEST(ThreadPool, WhatTasksWroteIsVisibleToTheCallerAndTheNextLoop) {
  std::vector<int64_t> values(100, 1);
  for (int round = 0; round < 200; ++round) {
    parallel_for(3, 100, [&](int64_t i) { values[static_cast<size_t>(i)] *= 3; });
    parallel_for(3, 100, [&](int64_t i) { values[static_cast<size_t>(i)] %= 1000003; });
  }
  for (const int64_t value : values) EXPECT_EQ(value, values.front());
}

TEST(ThreadPool, SleepingHelpersWakeForALaterLoop) {
  for (int round = 0; round < 3; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    expect_each_once(4, 100);
  }
}

TEST(ThreadPool, ALoopInsideATaskRunsOnItsOwnThread) {
  std::atomic<int64_t> total = 0;
  parallel_for(3, 10, [&](int64_t) {
    const auto self = std::this_thread::get_id();
    parallel_for(3, 10, [&](int64_t i) {
      EXPECT_EQ(std::this_thread::get_id(), self);
      total += i;
    });
  });
  EXPECT_EQ(total, 450);
}

TEST(ThreadPool, CallersFromSeveralThreadsAllFinish) {
  std::atomic<int64_t> total = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        parallel_for(3, 8, [&](int64_t i) { total += i; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 4 * 200 * 28);
}

// Not under ThreadSanitizer, which does not support threads after a fork: hence the name.
TEST(PoolAfterFork, AChildStartsItsOwnHelpers) {
  expect_each_once(3, 100);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int64_t> total = 0;
    parallel_for(3, 1000, [&](int64_t i) { total += i; });
    _exit(total == 499500 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace nibble
