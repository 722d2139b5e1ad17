// Scores of pages for a query, from summaries of their keys, by tensor-core products.
//
// A warp scores 16 pages at a time: their summaries are the M of the product, the group's query heads its N. A lane
// reads 16 bytes of a row at a time, as they lie: which elements a step of the product sums is the same for both
// operands, so their order does not matter. With c the key's summary and q the query head:
//   MEAN_STD  scale * (q . mean + sqrt(sum over d of (q_d std_d)^2)), one standard deviation above the mean logit where
//             the elements of a key vary on their own. Squares are products of BF16, which has their range.
//   MIN_MAX   scale * sum over d of max(q_d min_d, q_d max_d), which no key of the page exceeds (Quest)
#pragma once
#include "table.cuh"

namespace pkv {

enum Scoring { GIVEN = 0, MEAN_STD = 1, MIN_MAX = 2 };

constexpr int SCORED_PAGES = 16;                      // of a warp at a time
constexpr int ROW_VECTORS = HEAD_DIM / 32;            // that a lane reads of each half of a summary
constexpr int SCORE_BLOCKS = (GROUP_SIZE + 7) / 8;    // of 8 query heads
constexpr float LOG2_E = 1.4426950408889634f;

// What a lane holds of 8 query heads: head lane / 4, elements 8 (lane % 4) to + 7 of each 32.
struct ScoreQuery {
  uint4 first[SCORE_BLOCKS][ROW_VECTORS], second[SCORE_BLOCKS][ROW_VECTORS];  // for the two halves of summaries

  // q: [GROUP_SIZE, HEAD_DIM] of the row and KV head.
  __device__ __forceinline__ void load(const half_type* q, int lane) {
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      #pragma unroll
      for (int j = 0; j < ROW_VECTORS; ++j) {
        const int head = b * 8 + lane / 4;
        uint4 own = make_uint4(0, 0, 0, 0);
        if (head < GROUP_SIZE)
          own = __ldg(reinterpret_cast<const uint4*>(q + head * HEAD_DIM + j * 32 + lane % 4 * 8));
        if constexpr (SCORING == MEAN_STD) {
          first[b][j] = own;
          second[b][j] = squares(own);
        } else {
          first[b][j] = make_uint4(part(own.x, false), part(own.y, false), part(own.z, false), part(own.w, false));
          second[b][j] = make_uint4(part(own.x, true), part(own.y, true), part(own.z, true), part(own.w, true));
        }
      }
  }
  __device__ __forceinline__ static unsigned square(unsigned pair) {
    const float2 x = unpack(pair);
    return pack_bf16(x.x * x.x, x.y * x.y);
  }
  __device__ __forceinline__ static uint4 squares(const uint4& v) {
    return make_uint4(square(v.x), square(v.y), square(v.z), square(v.w));
  }

 private:
  // The negative or positive elements of a pair, and 0 for the others.
  __device__ __forceinline__ static unsigned part(unsigned pair, bool positive) {
    const float2 x = unpack(pair);
    return positive ? pack(fmaxf(x.x, 0.0f), fmaxf(x.y, 0.0f)) : pack(fminf(x.x, 0.0f), fminf(x.y, 0.0f));
  }
};

// What a lane holds of 16 summaries: of pages lane / 4 and lane / 4 + 8 the elements as of the queries.
struct ScoreRows {
  uint4 low[2][ROW_VECTORS], high[2][ROW_VECTORS];  // by half

  // low_at, high_at: the two pages' summaries, [2, HEAD_DIM] each.
  __device__ __forceinline__ void load(const half_type* low_at, const half_type* high_at, int lane) {
    #pragma unroll
    for (int half = 0; half < 2; ++half)
      #pragma unroll
      for (int j = 0; j < ROW_VECTORS; ++j) {
        const int at = half * HEAD_DIM + j * 32 + lane % 4 * 8;
        low[half][j] = load_once(low_at + at), high[half][j] = load_once(high_at + at);
      }
  }
  // Logits in base 2: pages lane / 4 and + 8 by heads 2 (lane % 4) and the next, as the product has them.
  __device__ __forceinline__ void score(float (&logits)[SCORE_BLOCKS][4], const ScoreQuery& q, float scale) {
    if constexpr (SCORING == MEAN_STD) {
      #pragma unroll
      for (int j = 0; j < ROW_VECTORS; ++j)
        low[1][j] = ScoreQuery::squares(low[1][j]), high[1][j] = ScoreQuery::squares(high[1][j]);
    }
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) {
      float first[4] = {0.0f, 0.0f, 0.0f, 0.0f}, second[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      #pragma unroll
      for (int j = 0; j < ROW_VECTORS; ++j) {
        add<false>(first, low[0][j], high[0][j], q.first[b][j]);
        add<SCORING == MEAN_STD>(second, low[1][j], high[1][j], q.second[b][j]);
      }
      #pragma unroll
      for (int i = 0; i < 4; ++i)
        logits[b][i] = scale * LOG2_E * (first[i] + (SCORING == MEAN_STD ? sqrtf(second[i]) : second[i]));
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

}  // namespace pkv
