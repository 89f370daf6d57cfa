// What warpgroups of a block may ask for by setmaxnreg. A block starts with as many registers a
// thread as ptxas takes; a warpgroup that asks for more than others have given back waits forever.
#pragma once

namespace nibble::cuda {

/// blocks: that are to be on a multiprocessor at once. Registers of a thread: multiples of 8.
constexpr bool registers_suffice(int blocks, int math_threads, int math_registers,
                                 int producer_threads, int producer_registers) {
  constexpr int kRegisters = 65536, kMostOfThread = 248;
  const int threads = math_threads + producer_threads;
  const int share = kRegisters / (blocks * threads) / 8 * 8;
  const int at_launch = (share < kMostOfThread ? share : kMostOfThread) * threads;
  return math_registers % 8 == 0 && producer_registers % 8 == 0 &&
         math_registers * math_threads + producer_registers * producer_threads <= at_launch;
}

}  // namespace nibble::cuda
