// Scores of pages for a query, from summaries of their keys, by tensor-core products.
//
// A warp scores 16 pages at a time: their summaries are the M of the product, the group's query heads its N. A lane
// reads 16 bytes of a row at a time, as they lie: which elements a step of the product sums is the same for both
// operands, so their order does not matter. With c the key's summary and q the query head:
//   MEAN_STD  scale * (q . mean + DEVIATIONS * sqrt(sum over d of (q_d std_d)^2)), so many standard deviations above the
//             mean logit where the elements of a key vary on their own. Squares are products of BF16, which has their
//             range.
//   MIN_MAX   scale * sum over d of max(q_d min_d, q_d max_d), which no key of the page exceeds (Quest)
// CENTROIDS are other summaries: centroid_scores.cuh has them.
#pragma once
#include "arguments.cuh"

namespace pkv {

enum Scoring { GIVEN = 0, MEAN_STD = 1, MIN_MAX = 2, CENTROIDS = 3 };

constexpr int SCORED_PAGES = 16;                      // of a warp at a time
constexpr int ROW_VECTORS = HEAD_DIM / 32;            // that a lane reads of each half of a summary
constexpr int SCORE_BLOCKS = (GROUP_SIZE + 7) / 8;    // of 8 query heads
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LEAST_SCORE = -1e30f;

// Where a page's summary is among those of [num_pages, num_kv_heads].
__device__ __forceinline__ long long summary_at(const SelectArguments& given, int head, int id) {
  return static_cast<long long>(id) * given.num_kv_heads + head;
}

// Asks for summaries as a whole, ahead of their halves: DRAM is quicker with what lies together than with twice the
// half of it. What all CTAs ask for at a time has to have room in L2, as it has where kernels overlap (sm_90).
__device__ __forceinline__ void ask_summaries(const summary_type* low_at, const summary_type* high_at, int lane) {
  if constexpr (!KERNELS_OVERLAP) return;
  constexpr int LINE = 128 / sizeof(summary_type);
  #pragma unroll
  for (int i = 0; i < 2 * HEAD_DIM; i += 4 * LINE) {
    const int at = i + lane % 4 * LINE;
    if (at < 2 * HEAD_DIM) prefetch_l2(low_at + at), prefetch_l2(high_at + at);
  }
}

#if !SUMMARY_CODES
// What a lane holds of 8 query heads: head lane / 4, elements 8 (lane % 4) to + 7 of each 32. Of MIN_MAX the negative
// elements, and then the positive ones; of MEAN_STD the elements alone, whose squares are worked out anew each time,
// since the registers are the summaries'.
struct ScoreQuery {
  static constexpr int PARTS = SCORING == MEAN_STD ? 1 : 2;
  uint4 own[PARTS][SCORE_BLOCKS][ROW_VECTORS];

  // q: [GROUP_SIZE, HEAD_DIM] of the row and KV head.
  __device__ __forceinline__ void load(const half_type* q, int lane) {
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      #pragma unroll
      for (int j = 0; j < ROW_VECTORS; ++j) {
        const int head = b * 8 + lane / 4;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (head < GROUP_SIZE)
          v = __ldg(reinterpret_cast<const uint4*>(q + head * HEAD_DIM + j * 32 + lane % 4 * 8));
        #pragma unroll
        for (int i = 0; i < PARTS; ++i)
          own[i][b][j] = PARTS == 1 ? v : make_uint4(part(v.x, i), part(v.y, i), part(v.z, i), part(v.w, i));
      }
  }
  // What the logits of head 2 (lane % 4) + i of block b are multiplied by.
  __device__ __forceinline__ float unit(int, int, float scale) const { return scale * LOG2_E; }
  // The operands for one half of the summaries.
  template <int HALF>
  __device__ __forceinline__ uint4 of_half(int b, int j) const {
    if constexpr (SCORING == MEAN_STD && HALF == 1) return squares(here_and_now(own[0][b][j]));
    else return own[HALF % PARTS][b][j];
  }
  __device__ __forceinline__ static uint4 squares(const uint4& v) {
    return make_uint4(square(v.x), square(v.y), square(v.z), square(v.w));
  }

 private:
  __device__ __forceinline__ static unsigned square(unsigned pair) {
    const float2 x = unpack(pair);
    return pack_bf16(x.x * x.x, x.y * x.y);
  }
  // The negative or positive elements of a pair, and 0 for the others.
  __device__ __forceinline__ static unsigned part(unsigned pair, bool positive) {
    const float2 x = unpack(pair);
    return positive ? pack(fmaxf(x.x, 0.0f), fmaxf(x.y, 0.0f)) : pack(fminf(x.x, 0.0f), fminf(x.y, 0.0f));
  }
};

// What a lane holds of 16 summaries: of pages lane / 4 and lane / 4 + 8 the elements as of the queries. The halves are
// read and used in turn, so that one is on its way while the other is multiplied.
struct ScoreRows {
  uint4 low[2][ROW_VECTORS], high[2][ROW_VECTORS];  // by half

  // low_id, high_id: of the two pages.
  template <int HALF>
  __device__ __forceinline__ void load(const SelectArguments& given, int head, int low_id, int high_id, int lane) {
    const long long low_at = summary_at(given, head, low_id), high_at = summary_at(given, head, high_id);
    #pragma unroll
    for (int j = 0; j < ROW_VECTORS; ++j) {
      const int at = HALF * HEAD_DIM + j * 32 + lane % 4 * 8;
      low[HALF][j] = load_constant(given.summaries + low_at * (2 * HEAD_DIM) + at);
      high[HALF][j] = load_constant(given.summaries + high_at * (2 * HEAD_DIM) + at);
    }
  }
  __device__ __forceinline__ static void ask(const SelectArguments& given, int head, int low_id, int high_id,
                                             int lane) {
    const long long low_at = summary_at(given, head, low_id), high_at = summary_at(given, head, high_id);
    ask_summaries(given.summaries + low_at * (2 * HEAD_DIM), given.summaries + high_at * (2 * HEAD_DIM), lane);
  }
  // The sums of one half: pages lane / 4 and + 8 by heads 2 (lane % 4) and the next, as the product has them.
  template <int HALF>
  __device__ __forceinline__ void multiply(float (&sums)[SCORE_BLOCKS][4], const ScoreQuery& q) {
    constexpr bool SQUARES = HALF == 1 && SCORING == MEAN_STD;
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0.0f;
    #pragma unroll
    for (int j = 0; j < ROW_VECTORS; ++j) {
      const uint4 lower = SQUARES ? ScoreQuery::squares(low[HALF][j]) : low[HALF][j];
      const uint4 upper = SQUARES ? ScoreQuery::squares(high[HALF][j]) : high[HALF][j];
      #pragma unroll
      for (int b = 0; b < SCORE_BLOCKS; ++b)
        add<SQUARES>(sums[b], lower, upper, q.of_half<HALF>(b, j));
    }
  }

 private:
  template <bool SQUARES>
  __device__ __forceinline__ static void add(float (&sum)[4], const uint4& low, const uint4& high, const uint4& q) {
    const unsigned first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
    if constexpr (SQUARES) multiply_add_bf16(sum, first, q.x, q.y), multiply_add_bf16(sum, second, q.z, q.w);
    else multiply_add(sum, first, q.x, q.y), multiply_add(sum, second, q.z, q.w);
  }
};

#endif

// A logit in base 2 of the sums of both halves.
__device__ __forceinline__ float logit_of(float first, float second, float unit) {
  return unit * (first + (SCORING == MEAN_STD ? DEVIATIONS * sqrt_fast(second) : second));
}

// The largest of some scores of one head, and the sum of 2^(score - that).
struct ScoreSum {
  float top, sum;

  __device__ __forceinline__ void merge(float other_top, float other_sum) {
    const float before = top;
    top = fmaxf(before, other_top);
    sum = sum * exp2_fast(before - top) + other_sum * exp2_fast(other_top - top);
  }
  // With the lanes that differ in this bit.
  __device__ __forceinline__ void merge_lanes(int hop) {
    const float other_top = __shfl_xor_sync(0xffffffffu, top, hop), other_sum = __shfl_xor_sync(0xffffffffu, sum, hop);
    merge(other_top, other_sum);
  }
};

}  // namespace pkv
