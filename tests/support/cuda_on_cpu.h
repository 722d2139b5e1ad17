// What a kernel takes for granted of CUDA, on a CPU: a CTA of WARPS warps whose threads are fibers, which meet where
// lanes do, at shuffles, votes and barriers. Warps take turns in any order and go on as far as they can or just a step.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda_types_on_cpu.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
using std::max;
using std::min;

static float __int_as_float(int x) { return bits<float>(x); }
static int __ffs(unsigned x) { return __builtin_ffs(x); }
[[maybe_unused]] static int __popc(unsigned x) { return __builtin_popcount(x); }
[[maybe_unused]] static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
template <class T>
static T __ldg(const T* at) { return *at; }

// What a GPU would not have said, or only by hanging or by being slow.
static const char* complaint = nullptr;
static void complain(const char* words) { complaint = complaint ? complaint : words; }

// Fibers.
constexpr int CTA_THREADS = WARPS * 32;
static int3 threadIdx, blockIdx, gridDim;
unsigned char memory[256 << 10] __align__(128);  // the CTA's shared memory

static long progress;  // meetings and ends so far
extern "C" {
unsigned turn_order = 1;  // random bits, of whose turn it is and how long; a test may set them before a run
}

struct Warp {
  int arrived = 0, meetings = 0;
  uint64_t brought[32][8];
};
static Warp warps[WARPS];
static ucontext_t scheduler, fibers[CTA_THREADS];
static std::vector<char> stacks[CTA_THREADS];
static bool ended[CTA_THREADS];
static void (*body)();
static int cta_arrived = 0, cta_meetings = 0;
static int votes[2], vote_meeting = 0;  // of this meeting and the next

// Forgets what lanes were in the middle of that will not go on, so that the next CTA begins as if there had been none.
static void (*forget_more)() = nullptr;
static void forget() {
  for (Warp& warp : warps) warp.arrived = 0;
  cta_arrived = votes[0] = votes[1] = 0;
  if (forget_more) forget_more();
}

static void yield() {
  const int mine = threadIdx.x;
  swapcontext(&fibers[mine], &scheduler);
}
static void start() {
  body();
  ended[threadIdx.x] = true, ++progress;
}
static void run_cta() {
  std::memset(memory, 0xff, sizeof memory);
  for (int i = 0; i < CTA_THREADS; ++i) {
    stacks[i].resize(256 << 10);
    ended[i] = false;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].data(), fibers[i].uc_stack.ss_size = stacks[i].size();
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], start, 0);
  }
#if RANKS  // CTAs of several ranks wait for each other, in threads that the system may keep from running for a while
  constexpr long MOST = 1'000'000'000, LONGEST_IDLE = 1'000'000;
#else
  constexpr long MOST = 1'000'000, LONGEST_IDLE = 0;
#endif
  long rounds = 0, idle = 0;
  const unsigned patience = turn_order >> 16 & 3;  // how often, in quarters, a turn lasts while it can
  while (!std::all_of(ended, ended + CTA_THREADS, [](bool end) { return end; })) {
    const long before = progress;
    turn_order = turn_order * 1664525u + 1013904223u;
    const long longest = (turn_order >> 24 & 3) < patience ? MOST : 1;
    const bool backwards = turn_order >> 20 & 1;  // what a lane reads before another has written it shows in one order
    for (int turn = 0; turn < WARPS; ++turn) {
      const int first = (turn + (turn_order >> 16)) % WARPS * 32;
      for (long seen = -1, end = rounds + longest; seen != progress && rounds < end; ++rounds) {
        seen = progress;
        for (int lane = 0; lane < 32; ++lane) {
          const int i = first + (backwards ? 31 - lane : lane);
          if (!ended[i]) threadIdx.x = i, swapcontext(&scheduler, &fibers[i]);
        }
      }
    }
    idle = progress == before ? idle + 1 : 0;
    if (idle > LONGEST_IDLE || rounds >= MOST) return complain("the CTA hangs"), forget();
  }
}

// What a run has to complain of, or null: a run returns it, and the next one begins without.
static const char* complained() { return std::exchange(complaint, nullptr); }

// The grid's CTAs one after the other, where any may be the last in any order; around: is called before and after each.
[[maybe_unused]] static void run_ctas(int x, int y = 1, bool any_is_last = false, void (*around)(bool ends) = nullptr) {
  gridDim = {x, y, 1};
  for (int row = 0; row < y; ++row) {
    const int first = any_is_last ? static_cast<int>(turn_order >> 8) % x : 0;
    for (int i = 0; i < x; ++i) {
      blockIdx = {(first + i) % x, row, 0};
      if (around) around(false);
      run_cta();
      if (around) around(true);
    }
  }
}

// All lanes of a warp bring `mine`; `look` then sees what each brought.
static Warp& my_warp() { return warps[threadIdx.x / 32]; }
static int my_lane() { return threadIdx.x % 32; }
static void meet() {
  Warp& warp = my_warp();
  const int meeting = warp.meetings;
  if (++warp.arrived == 32) warp.arrived = 0, ++warp.meetings, ++progress;
  do yield(); while (warp.meetings == meeting);  // the last one too: no other warp runs while lanes go to their next
}
template <class T, class Look>
static auto together(const T& mine, Look look) {
  static_assert(sizeof(T) <= sizeof(Warp::brought[0]));
  Warp& warp = my_warp();
  std::memcpy(warp.brought[my_lane()], &mine, sizeof mine);
  meet();
  const auto result = look([&](int lane) {
    T theirs;
    std::memcpy(&theirs, warp.brought[lane], sizeof theirs);
    return theirs;
  });
  meet();
  return result;
}
static void __syncwarp() { meet(); }
static void __syncthreads() {
  const int meeting = cta_meetings;
  if (++cta_arrived == CTA_THREADS) cta_arrived = 0, ++cta_meetings, ++progress;
  else while (cta_meetings == meeting) yield();
}
[[maybe_unused]] static int __syncthreads_or(bool vote) {
  const int mine = vote_meeting;
  votes[mine % 2] |= vote;
  __syncthreads();
  const int result = votes[mine % 2];
  __syncthreads();
  vote_meeting = mine + 1, votes[mine % 2] = 0;
  __syncthreads();
  return result;
}
[[maybe_unused]] static bool __syncthreads_and(bool vote) { return !__syncthreads_or(!vote); }
template <class T>
static T __shfl_sync(unsigned, T value, int from) { return together(value, [&](auto of) { return of(from % 32); }); }
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
  return together(value, [&](auto of) { return of(my_lane() ^ mask); });
}
template <class T>
static T __shfl_up_sync(unsigned, T value, int by) {
  return together(value, [&](auto of) { return of(max(0, my_lane() - by)); });
}
static unsigned __ballot_sync(unsigned, bool vote) {
  return together(vote, [](auto of) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(of(lane)) << lane;
    return votes;
  });
}
static bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
static bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
[[maybe_unused]] static unsigned __match_any_sync(unsigned, int value) {
  return together(value, [&](auto of) {
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= static_cast<unsigned>(of(lane) == value) << lane;
    return same;
  });
}
template <class Fold>
static int folded(int value, Fold fold) {
  return together(value, [&](auto of) {
    int all = of(0);
    for (int lane = 1; lane < 32; ++lane) all = fold(all, of(lane));
    return all;
  });
}
inline int __reduce_add_sync(unsigned, int x) { return folded(x, [](int a, int b) { return a + b; }); }
inline int __reduce_max_sync(unsigned, int x) { return folded(x, [](int a, int b) { return max(a, b); }); }
inline int __reduce_min_sync(unsigned, int x) { return folded(x, [](int a, int b) { return min(a, b); }); }
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  return folded(static_cast<int>(x), [](int a, int b) { return a | b; });
}
