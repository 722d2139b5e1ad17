// The k pages of the largest keys as an ascending list, by one CTA: pkvsim.selection.rules.top_pages says the same.
//
// Weights are within some octaves of the largest one. So the 16 octaves below that are divided into 2,048 parts, and
// keys are counted by part in shared memory: hardly two threads then count the same one, and the k-th largest key
// shares its part with few others. These are told apart by ranks, each compared with all. Only where the key lies lower still,
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
  enum { DIGITS = 2048, OCTAVES_BITS = 27, PART_BITS = 16, MOST_TIED = 512 };  // 2^27 neighbouring keys are 16 octaves
  union {
    int counts[DIGITS];     // of keys by digit,
    uint2 tied[MOST_TIED];  // then (key, page) of those of the k-th one's part
  };
  int warp_total[WARPS];
  unsigned warp_largest[WARPS];
  unsigned known;  // the digits that are known, in their places
  int left;        // pages that are still wanted of those digits, 0 where there are too few
  int num_tied;

  // Whoever calls list() calls this before, and threads may do anything between but meet.
  __device__ __forceinline__ void clear() {
    clear_counts();
    if (threadIdx.x == 0) left = num_tied = 0;
  }

  // keys: [count] in shared memory, `pinned` of them PINNED, of which k (1 <= k < count < 2^16) are taken. bits: [2,
  // ceil(count / 32)] in shared memory. largest: of those of this thread's keys that are not PINNED. to: [k] in global
  // memory.
  __device__ __forceinline__ void list(const unsigned* keys, unsigned* bits, int count, int pinned, unsigned largest,
                                       int k, int* to) {
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) largest = max(largest, __shfl_xor_sync(EVERY_LANE, largest, hop));
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
    __syncthreads();  // the keys are written, too
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) largest = max(largest, warp_largest[w]);
    const int words = divide(count + 31, 32);
    unsigned *taken = bits, *equal = bits + words, threshold = PINNED;
    int wanted = k;
    bool marked = false;
    if (k > pinned) {
      wanted = k - pinned;
      constexpr unsigned REACH = (1u << OCTAVES_BITS) - 1;
      const unsigned base = largest > REACH ? largest - REACH : 0;
      marked = take_near(keys, taken, equal, count, base, wanted);
      if (!marked && left > 0) find(keys, count, base, PART_BITS, 5, 0, wanted, threshold);
      else if (!marked) find(keys, count, 0, 21, 10, 0, wanted, threshold);
    }
    if (!marked) mark(keys, taken, equal, count, threshold);
    write(taken, equal, words, wanted, to);
  }

 private:
  __device__ __forceinline__ void clear_counts() {
    uint4* all = reinterpret_cast<uint4*>(counts);
    for (int i = threadIdx.x; i < DIGITS / 4; i += WARPS * 32) all[i] = make_uint4(0, 0, 0, 0);
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

  // Marks the pinned pages and the `wanted` largest others, where these are within REACH of the largest one (left > 0
  // says so) and few are of one part; else false.
  __device__ __forceinline__ bool take_near(const unsigned* keys, unsigned* taken, unsigned* equal, int count,
                                            unsigned base, int wanted) {
    const int lane = threadIdx.x % 32;
    each_page(keys, count, [&](int, unsigned key, bool there) {
      if (there && key != PINNED && key >= base) atomicAdd(&counts[(key - base) >> PART_BITS], 1);
    });
    __syncthreads();
    find_digit(wanted, PART_BITS, 0);
    __syncthreads();
    if (left == 0) return false;
    const unsigned first = base + known, last = first + ((1u << PART_BITS) - 1);
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

  // The wanted-th largest of the keys that are not PINNED, of which so many are at `base` or above, by three digits of
  // what they are above it, at these shifts; `wanted` is then how many of that very key.
  __device__ __forceinline__ void find(const unsigned* keys, int count, unsigned base, int first, int second, int third,
                                       int& wanted, unsigned& threshold) {
    const int shifts[3] = {first, second, third};
    unsigned upper = 0;
    #pragma unroll
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = shifts[pass], before = pass > 0 ? shifts[pass - 1] : 0;
      __syncthreads();
      clear_counts();
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += WARPS * 32) {
        const unsigned key = keys[i], above = key - base;
        if (key == PINNED || key < base || (pass > 0 && above >> before != upper >> before)) continue;
        atomicAdd(&counts[(pass > 0 ? above & ((1u << before) - 1) : above) >> shift], 1);
      }
      __syncthreads();
      find_digit(wanted, shift, upper);
      __syncthreads();
      upper = known, wanted = left;
    }
    threshold = base + upper;
  }
  // The digit at `shift` of the wanted-th largest key, among those that have the digits of `upper`.
  __device__ __forceinline__ void find_digit(int wanted, int shift, unsigned upper) {
    constexpr int EACH = DIGITS / (WARPS * 32);
    static_assert(EACH * WARPS * 32 == DIGITS && EACH % 4 == 0, "every thread has as many digits, in whole vectors");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int least = DIGITS - (threadIdx.x + 1) * EACH;  // of this thread's: thread 0 has the largest ones
    int of_digit[EACH], own = 0;
    #pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(counts + least + i);
      of_digit[i] = v.x, of_digit[i + 1] = v.y, of_digit[i + 2] = v.z, of_digit[i + 3] = v.w;
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
