// Scores of pages from centroids of their keys (SCORING 3): the log of the mass that a page's parts would have if each
// were so many times its mean key. pkvsim.selection.centroids says what parts are and how they are coded.
//
// The 8 centroids of two pages are the 16 rows of a product, the group's query heads its columns. A code n of 4 bits
// stands for scale * (n - 8). Left where it is in a word, under a mask, it is the FP16 number n / 2^24, or n / 2^20
// from bit 4 on, which the tensor cores multiply exactly: so a pair of codes costs one instruction. The query's
// elements are brought to magnitudes below 2 by a power of two and divided by 16 where the codes are 16 times too
// large; what the 8 takes off is the same for all pages, and is known before.
#pragma once
#include "page_scores.cuh"

namespace pkv {

constexpr int PAGE_CENTROIDS = 8, CENTROID_ZERO = 8;
constexpr int CENTROID_BYTES = HEAD_DIM / 2;    // of one centroid's codes
constexpr int CENTROID_WORDS = HEAD_DIM / 32;   // of 8 codes, that a lane reads of a centroid
constexpr int CENTROID_PAIRS = 4;               // pairs of pages that a warp has on their way
constexpr int CENTROID_PAGES = 2 * CENTROID_PAIRS;
constexpr float CODE_STEPS = 16777216.0f;       // 2^24

static_assert(SUMMARY_CODES, "centroids are codes");

// The log2 of the sum of 2^a and 2^b, the same in whatever order they come.
__device__ __forceinline__ float log2_of_sum(float a, float b) {
  const float top = fmaxf(a, b);
  return top + log2_fast(1.0f + exp2_fast(fminf(a, b) - top));
}

// What a lane holds of 8 query heads: head lane / 4, elements HEAD_DIM / 4 * (lane % 4) and on, in the pairs that a
// word of codes is taken apart into: elements k and k + 4 of each 8.
struct CentroidQuery {
  unsigned own[SCORE_BLOCKS][CENTROID_WORDS][4];
  // Of the lane's columns, 2 (lane % 4) and the next: what sums are multiplied by, and what the zero takes off before.
  float units[SCORE_BLOCKS][2], zeros[SCORE_BLOCKS][2];

  // q: [GROUP_SIZE, HEAD_DIM] of the row and KV head.
  __device__ __forceinline__ void load(const half_type* q, int lane) {
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) {
      const int head = b * 8 + lane / 4;
      float x[CENTROID_WORDS][8], largest = 0.0f, sum = 0.0f;
      #pragma unroll
      for (int j = 0; j < CENTROID_WORDS; ++j) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (head < GROUP_SIZE)
          v = __ldg(reinterpret_cast<const uint4*>(q + head * HEAD_DIM + lane % 4 * (HEAD_DIM / 4) + j * 8));
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = unpack(words[i]);
          x[j][2 * i] = pair.x, x[j][2 * i + 1] = pair.y;
          largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
        }
      }
      #pragma unroll
      for (int hop = 1; hop < 4; hop <<= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, hop));
      // The power of two at or below it, which is never 0, so that the other way is finite.
      const unsigned power = max(__float_as_uint(largest) & 0x7f800000u, 0x00800000u);
      const float down = __uint_as_float(0x7f000000u - power);
      #pragma unroll
      for (int j = 0; j < CENTROID_WORDS; ++j)
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float less = k % 2 ? down / 16.0f : down;
          own[b][j][k] = pack_operands(x[j][k] * less, x[j][k + 4] * less);
          const float2 rounded = unpack_operands(own[b][j][k]);
          sum += (rounded.x + rounded.y) * (k % 2 ? 16.0f : 1.0f);
        }
      #pragma unroll
      for (int hop = 1; hop < 4; hop <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, hop);
      #pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int from = (lane % 4 * 2 + i) * 4;
        units[b][i] = LOG2_E * __shfl_sync(0xffffffffu, __uint_as_float(power), from);
        zeros[b][i] = CENTROID_ZERO * __shfl_sync(0xffffffffu, sum, from);
      }
    }
  }
};

// What a lane holds of two pages' centroids: of centroid lane / 4 of each the codes that belong to its elements.
struct CentroidRows {
  unsigned low[CENTROID_WORDS], high[CENTROID_WORDS];
  unsigned low_scale, high_scale;  // pairs of FP16: the step, and the log2 of the count

  __device__ __forceinline__ void load(const SelectArguments& given, int head, int low_id, int high_id, int lane) {
    load_page(low, low_scale, given, summary_at(given, head, low_id), lane);
    load_page(high, high_scale, given, summary_at(given, head, high_id), lane);
  }
  // The logits in base 2 of the centroids of both pages, by blocks of heads, as the product has them.
  __device__ __forceinline__ void multiply(float (&logits)[SCORE_BLOCKS][4], const CentroidQuery& q,
                                           float scale) const {
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 4; ++i) logits[b][i] = 0.0f;
    #pragma unroll
    for (int j = 0; j < CENTROID_WORDS; ++j)
      #pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned lower = low[j] >> 8 * half, upper = high[j] >> 8 * half;
        const unsigned a[4] = {lower & 0x000f000fu, upper & 0x000f000fu, lower & 0x00f000f0u, upper & 0x00f000f0u};
        #pragma unroll
        for (int b = 0; b < SCORE_BLOCKS; ++b)
          multiply_add(logits[b], a, q.own[b][j][2 * half], q.own[b][j][2 * half + 1]);
      }
    const float2 of_low = unpack_operands(low_scale), of_high = unpack_operands(high_scale);
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 row = i < 2 ? of_low : of_high;
        logits[b][i] = (CODE_STEPS * logits[b][i] - q.zeros[b][i % 2]) * (scale * q.units[b][i % 2] * row.x) + row.y;
      }
  }
  // The log2 of the sum over a page's centroids: of the page and the column that are this lane's then, which
  // place_page() and place_column() say; lanes from 16 on have what those below have.
  __device__ __forceinline__ static float over_centroids(const float (&logits)[4], int lane) {
    float of_page[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool second = place_page(lane);
      const float kept = second ? logits[2 + i] : logits[i], given = second ? logits[i] : logits[2 + i];
      of_page[i] = log2_of_sum(kept, __shfl_xor_sync(0xffffffffu, given, 4));
    }
    const bool next = place_column(lane);
    const float kept = next ? of_page[1] : of_page[0], given = next ? of_page[0] : of_page[1];
    const float own = log2_of_sum(kept, __shfl_xor_sync(0xffffffffu, given, 8));
    return log2_of_sum(own, __shfl_xor_sync(0xffffffffu, own, 16));
  }
  __device__ __forceinline__ static int place_page(int lane) { return lane / 4 % 2; }    // of the two
  __device__ __forceinline__ static int place_column(int lane) { return lane / 8 % 2; }  // of 2 (lane % 4) and the next

 private:
  __device__ __forceinline__ static void load_page(unsigned (&codes)[CENTROID_WORDS], unsigned& scale,
                                                   const SelectArguments& given, long long at, int lane) {
    const long long row = at * PAGE_CENTROIDS + lane / 4;
    const unsigned char* from = given.summaries + row * CENTROID_BYTES + lane % 4 * (CENTROID_BYTES / 4);
    if constexpr (CENTROID_WORDS == 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      codes[0] = v.x, codes[1] = v.y;
    } else {
      #pragma unroll
      for (int j = 0; j < CENTROID_WORDS; j += 4) {
        const uint4 v = load_constant(reinterpret_cast<const half_type*>(from + j * 4));
        codes[j] = v.x, codes[j + 1] = v.y, codes[j + 2] = v.z, codes[j + 3] = v.w;
      }
    }
    scale = __ldg(reinterpret_cast<const unsigned*>(given.summary_scales) + row);
  }
};

}  // namespace pkv
