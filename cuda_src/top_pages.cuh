// The k pages of the largest keys as an ascending list, by one CTA: pkvsim.selection.rules.top_pages says the same.
//
// The k-th largest key is found digit by digit, the highest first, by counts of each digit in shared memory. Of pages
// with that very key the first ones are taken. Then each warp lists what is taken of a run of pages, behind what the
// warps before it take.
#pragma once
#include "warp_plan.cuh"

namespace pkv {

constexpr unsigned EVERY_LANE = 0xffffffffu;
constexpr unsigned PINNED = 0xffffffffu;  // the key of a page that is taken whatever its score

// A float's bits in an order that is the floats'. No float gives PINNED; a NaN comes just below it.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return min(bits & 0x80000000u ? ~bits : bits | 0x80000000u, PINNED - 1);
}

struct TopPages {
  enum { DIGITS = 2048, DIGIT_BITS = 11, PASSES = 3 };
  int counts[DIGITS];
  int warp_above[WARPS], warp_equal[WARPS];  // of a warp's share
  unsigned threshold;  // the digits that are known, in their places
  int left;            // pages that are still wanted of those digits

  // keys: [count] in shared memory, k of which (1 <= k < count) are taken; the CTA has met since they were written.
  // to: [k] in global memory.
  __device__ __forceinline__ void list(const unsigned* keys, int count, int k, int* to) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned known = 0;  // of the threshold
    int wanted = k;
    #pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass < 2 ? DIGIT_BITS : 10;
      for (int i = threadIdx.x; i < DIGITS; i += WARPS * 32) counts[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += WARPS * 32)
        if (pass == 0 || keys[i] >> (shift + bits) == known >> (shift + bits))
          atomicAdd(&counts[keys[i] >> shift & ((1u << bits) - 1)], 1);
      __syncthreads();
      find_digit(wanted, shift, known);
      __syncthreads();
      known = threshold, wanted = left;
    }
    // Each warp's share of the pages, whole words of 32.
    const int share = divide(count + WARPS * 32 - 1, WARPS * 32) * 32, begin = warp * share;
    const int end = min(begin + share, count);
    int above = 0, equal = 0;
    for (int i = begin + lane; i - lane < end; i += 32) {
      const unsigned key = i < end ? keys[i] : 0;
      above += __popc(__ballot_sync(EVERY_LANE, i < end && key > known));
      equal += __popc(__ballot_sync(EVERY_LANE, i < end && key == known));
    }
    if (lane == 0) warp_above[warp] = above, warp_equal[warp] = equal;
    __syncthreads();
    above = equal = 0;
    for (int w = 0; w < warp; ++w) above += warp_above[w], equal += warp_equal[w];
    const unsigned lower = (1u << lane) - 1;
    for (int i = begin + lane; i - lane < end; i += 32) {
      const unsigned key = i < end ? keys[i] : 0;
      const unsigned of_above = __ballot_sync(EVERY_LANE, i < end && key > known);
      const unsigned of_equal = __ballot_sync(EVERY_LANE, i < end && key == known);
      const int equal_before = equal + __popc(of_equal & lower);
      const bool taken = of_above >> lane & 1 || (of_equal >> lane & 1 && equal_before < wanted);
      if (taken) to[above + __popc(of_above & lower) + min(equal_before, wanted)] = i;
      above += __popc(of_above), equal += __popc(of_equal);
    }
  }

 private:
  // The digit at `shift` of the wanted-th largest key, among those that have the known digits.
  __device__ __forceinline__ void find_digit(int wanted, int shift, unsigned known) {
    constexpr int EACH = DIGITS / (WARPS * 32);
    static_assert(EACH * WARPS * 32 == DIGITS, "every thread has as many digits");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = DIGITS - 1 - threadIdx.x * EACH;  // this thread's largest
    int own = 0;
    #pragma unroll
    for (int i = 0; i < EACH; ++i) own += counts[first - i];
    const int through = scan(own, lane);
    if (lane == 31) warp_above[warp] = through;
    __syncthreads();
    int before = through - own;
    for (int w = 0; w < warp; ++w) before += warp_above[w];
    if (before >= wanted || before + own < wanted) return;
    int digit = first;
    while (before + counts[digit] < wanted) before += counts[digit--];
    threshold = known | static_cast<unsigned>(digit) << shift, left = wanted - before;
  }
};

}  // namespace pkv
