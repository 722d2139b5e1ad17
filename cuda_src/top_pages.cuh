// The k pages of the largest keys as an ascending list, by one CTA: pkvsim.selection.rules.top_pages says the same.
//
// Weights are within some octaves of the largest one. So the 32 octaves below that are divided into 4,096 parts, and
// keys are counted by part in shared memory: hardly two threads then count the same one, and the k-th largest key
// shares its part with few others. These are told apart by ranks, each compared with all. A part's number is that of
// the upper bits of its keys, the same for keys 32 octaves apart: so keys may be counted before the largest one is
// known, and are counted again only where the smallest lies too far below it. Only where the k-th key lies lower still,
// or its part has too many, it is found digit by digit. What is taken is noted as a bit of each page, and the list is
// written by the sums of these bits. Of pages with the k-th key the first ones are taken.
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

struct __align__(16) TopPages {
  enum { DIGITS = 4096, PART_BITS = 16, MOST_TIED = 512 };  // 2^28 neighbouring keys are 32 octaves
  static constexpr int EACH = DIGITS / (WARPS * 32);        // of a thread
  static_assert(EACH * WARPS * 32 == DIGITS && EACH % 4 == 0, "every thread has as many digits, in whole vectors");
  union {
    unsigned counts[DIGITS / 2];  // of keys by digit, in a half of a word: another half than that of 16 octaves away,
    uint2 tied[MOST_TIED];        // then (key, page) of those of the k-th one's part
  };
  int warp_total[WARPS];
  unsigned warp_largest[WARPS], warp_smallest[WARPS];
  unsigned known;  // the digits that are known, in their places
  int left;        // pages that are still wanted of those digits, 0 where there are too few
  int num_tied;

  // Whoever calls list() calls this before, and threads may do anything between but meet. Those that count() have met.
  __device__ __forceinline__ void clear() {
    clear_counts();
    if (threadIdx.x == 0) left = num_tied = 0;
  }

  // One more key of a page, of no more than 2^16 - 1; not counted where it is no page's or a pinned one's, without a
  // branch.
  __device__ __forceinline__ void count(unsigned key, bool counted) { count_digit(key >> PART_BITS, counted); }

  // keys: [count] in shared memory, `pinned` of them PINNED, of which k (1 <= k < count < 2^16) are taken. bits: [2,
  // ceil(count / 32)] in shared memory. largest, smallest: of those of this thread's keys that are not PINNED. COUNTED:
  // whether count() was told of these. to: [k] in global memory.
  template <bool COUNTED>
  __device__ __forceinline__ void list(const unsigned* keys, unsigned* bits, int count, int pinned, unsigned largest,
                                       unsigned smallest, int k, int* to) {
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) {
      largest = max(largest, __shfl_xor_sync(EVERY_LANE, largest, hop));
      smallest = min(smallest, __shfl_xor_sync(EVERY_LANE, smallest, hop));
    }
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest, warp_smallest[threadIdx.x / 32] = smallest;
    __syncthreads();  // the keys are written, too
    #pragma unroll
    for (int w = 0; w < WARPS; ++w)
      largest = max(largest, warp_largest[w]), smallest = min(smallest, warp_smallest[w]);
    const int words = divide(count + 31, 32);
    unsigned *taken = bits, *equal = bits + words, threshold = PINNED;
    int wanted = k;
    bool marked = false;
    if (k > pinned) {
      wanted = k - pinned;
      const int top = (largest >> PART_BITS) / EACH;  // of all runs of EACH digits the one of the largest key
      const unsigned base = static_cast<unsigned>(max(0, (top + 1) * EACH - DIGITS)) << PART_BITS;
      if (!COUNTED || smallest < base) {
        if (COUNTED) {
          clear_counts();
          __syncthreads();
        }
        each_page(keys, count, [&](int, unsigned key, bool there) {
          if (there && key != PINNED && key >= base) this->count(key, true);
        });
        __syncthreads();
      }
      marked = take_near(keys, taken, equal, count, top, wanted);
      if (!marked) find(keys, count, wanted, threshold);
    }
    if (!marked) mark(keys, taken, equal, count, threshold);
    write(taken, equal, words, wanted, to);
  }

 private:
  __device__ __forceinline__ void clear_counts() {
    uint4* all = reinterpret_cast<uint4*>(counts);
    for (int i = threadIdx.x; i < DIGITS / 8; i += WARPS * 32) all[i] = make_uint4(0, 0, 0, 0);
  }
  // The bit from which on a digit's count is in its word.
  __device__ __forceinline__ static int half_of(unsigned digit) { return digit / (DIGITS / 2) % 2 * 16; }
  __device__ __forceinline__ void count_digit(unsigned digit, unsigned more = 1) {
    atomicAdd(&counts[digit % (DIGITS / 2)], more << half_of(digit));
  }

  // Calls see(page, key, whether there is such a page) for each page of this thread: a warp's lanes have those of a
  // word of bits at a time. Keys are read some at once, since none is read past what `see` writes.
  template <class See>
  __device__ __forceinline__ static void each_page(const unsigned* keys, int count, See see) {
    constexpr int AT_ONCE = 8, THREADS_HERE = WARPS * 32;
    const int lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int i = threadIdx.x; i - lane < count; i += AT_ONCE * THREADS_HERE) {
      unsigned own[AT_ONCE];
      #pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int page = i + j * THREADS_HERE;
        own[j] = page < count ? keys[page] : 0u;
      }
      #pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int page = i + j * THREADS_HERE;
        if (page - lane < count) see(page, own[j], page < count);
      }
    }
  }

  // Marks the pinned pages and the `wanted` largest others, where these have been counted (left > 0 says so) and few
  // are of one part; else false. top: the run of digits of the largest one.
  __device__ __forceinline__ bool take_near(const unsigned* keys, unsigned* taken, unsigned* equal, int count, int top,
                                            int wanted) {
    const int lane = threadIdx.x % 32;
    find_digit(wanted, top, PART_BITS, 0);
    __syncthreads();
    if (left == 0) return false;
    const unsigned first = known, last = first + ((1u << PART_BITS) - 1);
    each_page(keys, count, [&](int page, unsigned key, bool there) {
      const unsigned above = __ballot_sync(EVERY_LANE, there && key > last);
      const unsigned within = __ballot_sync(EVERY_LANE, there && key >= first && key <= last);
      if (lane == 0) taken[page / 32] = above, equal[page / 32] = 0;
      if (within == 0) return;
      int at = 0;
      if (lane == 0) at = atomicAdd(&num_tied, __popc(within));
      at = __shfl_sync(EVERY_LANE, at, 0) + __popc(within & ((1u << lane) - 1));
      if (within >> lane & 1 && at < MOST_TIED) tied[at] = make_uint2(key, page);
    });
    __syncthreads();
    const int ties = num_tied;
    if (ties > MOST_TIED) return false;
    for (int i = threadIdx.x; i < ties; i += WARPS * 32) {
      const uint2 own = tied[i];
      int rank = 0;
      #pragma unroll 4
      for (int j = 0; j < ties; ++j) {
        const uint2 other = tied[j];
        rank += other.x > own.x || (other.x == own.x && other.y < own.y);
      }
      if (rank < left) atomicOr(&taken[own.y / 32], 1u << own.y % 32);
    }
    __syncthreads();
    return true;
  }

  // Marks what is above the threshold as taken, and what is equal to it.
  __device__ __forceinline__ void mark(const unsigned* keys, unsigned* taken, unsigned* equal, int count,
                                       unsigned threshold) {
    each_page(keys, count, [&](int page, unsigned key, bool there) {
      const unsigned above = __ballot_sync(EVERY_LANE, there && key > threshold);
      const unsigned same = __ballot_sync(EVERY_LANE, there && key == threshold);
      if (threadIdx.x % 32 == 0) taken[page / 32] = above, equal[page / 32] = same;
    });
    __syncthreads();
  }

  // Writes the pages that are taken and the first `wanted` of those that are equal: each thread of as many neighbouring
  // words as the others. Both are counted at once, in the halves of a word.
  __device__ __forceinline__ void write(const unsigned* taken, const unsigned* equal, int words, int wanted, int* to) {
    const int each = divide(words + WARPS * 32 - 1, WARPS * 32), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int begin = threadIdx.x * each, end = min(begin + each, words);
    int own = 0;
    for (int i = begin; i < end; ++i) own += __popc(taken[i]) + (__popc(equal[i]) << 16);
    const int through = scan(own, lane);
    if (lane == 31) warp_total[warp] = through;
    __syncthreads();
    unsigned before = through - own;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) before += w < warp ? warp_total[w] : 0;
    int above = before & 0xffff, alike = before >> 16;
    for (int i = begin; i < end; ++i) {
      unsigned pages = taken[i], ends = equal[i];
      int* at = to + above + min(alike, wanted);
      above += __popc(pages);
      const int room = max(0, wanted - alike);
      alike += __popc(ends);
      while (__popc(ends) > room) ends ^= 0x80000000u >> __clz(ends);  // the last of them
      for (pages |= ends; pages != 0; pages &= pages - 1) *at++ = i * 32 + __ffs(pages) - 1;
    }
  }

  // The wanted-th largest of the keys that are not PINNED, by three digits; `wanted` is then how many of that very key.
  __device__ __forceinline__ void find(const unsigned* keys, int count, int& wanted, unsigned& threshold) {
    constexpr int SHIFTS[3] = {20, 10, 0};
    unsigned upper = 0;
    #pragma unroll
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = SHIFTS[pass], before = pass > 0 ? SHIFTS[pass - 1] : 0;
      __syncthreads();
      clear_counts();
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += WARPS * 32) {
        const unsigned key = keys[i];
        if (key == PINNED || (pass > 0 && key >> before != upper >> before)) continue;
        count_digit((pass > 0 ? key & ((1u << before) - 1) : key) >> shift);
      }
      __syncthreads();
      find_digit(wanted, DIGITS / EACH - 1, shift, upper);
      __syncthreads();
      upper = known, wanted = left;
    }
    threshold = upper;
  }
  // The digit at `shift` of the wanted-th largest key, among those that have the digits of `upper`. top: the run of
  // EACH digits above which there are none.
  __device__ __forceinline__ void find_digit(int wanted, int top, int shift, unsigned upper) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int least = (top - static_cast<int>(threadIdx.x)) * EACH;  // of this thread's: thread 0 has the largest ones
    int of_digit[EACH], own = 0;
    #pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (least >= 0) v = *reinterpret_cast<const uint4*>(counts + least % (DIGITS / 2) + i);
      const unsigned words[4] = {v.x, v.y, v.z, v.w};
      #pragma unroll
      for (int j = 0; j < 4; ++j) of_digit[i + j] = words[j] >> half_of(least) & 0xffff;
    }
    #pragma unroll
    for (int i = 0; i < EACH; ++i) own += of_digit[i];
    const int through = scan(own, lane);
    if (lane == 31) warp_total[warp] = through;
    __syncthreads();
    int before = through - own;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) before += w < warp ? warp_total[w] : 0;
    if (before >= wanted || before + own < wanted) return;
    #pragma unroll
    for (int i = EACH - 1; i >= 0; --i) {
      if (before < wanted && wanted <= before + of_digit[i])
        known = upper | static_cast<unsigned>(least + i) << shift, left = wanted - before;
      before += of_digit[i];
    }
  }
};

}  // namespace pkv
