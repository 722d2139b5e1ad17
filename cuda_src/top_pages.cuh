// The k pages of the largest keys as an ascending list, by one CTA: pkvsim.selection.rules.top_pages says the same.
//
// The k-th largest key is found digit by digit, the highest first, by counts of each digit in shared memory. Weights are
// within some octaves of the largest one, so the first digit divides the 16 octaves below that into 2,048 parts: hardly
// two threads then count the same one. Only where the key lies lower still the digits are those of all numbers. Of pages
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
  enum { DIGITS = 2048, OCTAVES_BITS = 27 };  // 2^27 neighbouring keys are 16 octaves of floats
  int counts[DIGITS];
  int warp_above[WARPS], warp_equal[WARPS];  // of a warp's share
  unsigned warp_largest[WARPS];
  unsigned known;  // the digits that are known, in their places
  int left;        // pages that are still wanted of those digits, 0 where there are too few

  // keys: [count] in shared memory, `pinned` of them PINNED, of which k (1 <= k < count) are taken. largest: of those of
  // this thread's keys that are not PINNED. to: [k] in global memory.
  __device__ __forceinline__ void list(const unsigned* keys, int count, int pinned, unsigned largest, int k, int* to) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) largest = max(largest, __shfl_xor_sync(EVERY_LANE, largest, hop));
    if (lane == 0) warp_largest[warp] = largest;
    if (threadIdx.x == 0) left = 0;
    __syncthreads();  // the keys are written, too
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) largest = max(largest, warp_largest[w]);
    unsigned threshold = PINNED;
    int wanted = k;
    if (k > pinned) {
      wanted = k - pinned;
      constexpr unsigned REACH = (1u << OCTAVES_BITS) - 1;
      const unsigned base = largest > REACH ? largest - REACH : 0;
      if (!find(keys, count, base, 16, 5, 0, wanted, threshold)) find(keys, count, 0, 21, 10, 0, wanted, threshold);
    }
    // Each warp's share of the pages, whole words of 32.
    const int share = divide(count + WARPS * 32 - 1, WARPS * 32) * 32, begin = warp * share;
    const int end = min(begin + share, count);
    int above = 0, equal = 0;
    for (int i = begin + lane; i - lane < end; i += 32) {
      const unsigned key = i < end ? keys[i] : 0;
      above += __popc(__ballot_sync(EVERY_LANE, i < end && key > threshold));
      equal += __popc(__ballot_sync(EVERY_LANE, i < end && key == threshold));
    }
    if (lane == 0) warp_above[warp] = above, warp_equal[warp] = equal;
    __syncthreads();
    above = equal = 0;
    for (int w = 0; w < warp; ++w) above += warp_above[w], equal += warp_equal[w];
    const unsigned lower = (1u << lane) - 1;
    for (int i = begin + lane; i - lane < end; i += 32) {
      const unsigned key = i < end ? keys[i] : 0;
      const unsigned of_above = __ballot_sync(EVERY_LANE, i < end && key > threshold);
      const unsigned of_equal = __ballot_sync(EVERY_LANE, i < end && key == threshold);
      const int equal_before = equal + __popc(of_equal & lower);
      const bool taken = of_above >> lane & 1 || (of_equal >> lane & 1 && equal_before < wanted);
      if (taken) to[above + __popc(of_above & lower) + min(equal_before, wanted)] = i;
      above += __popc(of_above), equal += __popc(of_equal);
    }
  }

 private:
  // The wanted-th largest of the keys that are not PINNED, by three digits of what they are above `base`, at these
  // shifts; `wanted` is then how many of that very key. False where fewer are at base or above, and nothing is changed.
  __device__ __forceinline__ bool find(const unsigned* keys, int count, unsigned base, int first, int second, int third,
                                       int& wanted, unsigned& threshold) {
    const int shifts[3] = {first, second, third};
    unsigned upper = 0;
    int of_these = wanted;
    #pragma unroll
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = shifts[pass], before = pass > 0 ? shifts[pass - 1] : 0;
      for (int i = threadIdx.x; i < DIGITS; i += WARPS * 32) counts[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += WARPS * 32) {
        const unsigned key = keys[i], above = key - base;
        if (key == PINNED || key < base || (pass > 0 && above >> before != upper >> before)) continue;
        atomicAdd(&counts[(pass > 0 ? above & ((1u << before) - 1) : above) >> shift], 1);
      }
      __syncthreads();
      find_digit(of_these, shift, upper);
      __syncthreads();
      if (left == 0) return false;
      upper = known, of_these = left;
    }
    threshold = base + upper, wanted = of_these;
    return true;
  }
  // The digit at `shift` of the wanted-th largest key, among those that have the digits of `upper`.
  __device__ __forceinline__ void find_digit(int wanted, int shift, unsigned upper) {
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
    known = upper | static_cast<unsigned>(digit) << shift, left = wanted - before;
  }
};

}  // namespace pkv
