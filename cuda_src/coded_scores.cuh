// Scores of pages from 8-bit summaries (SUMMARY_CODES): what page_scores.cuh does with those of 16 bits.
//
// A vector of a summary is scale * (code - zero), codes being unsigned bytes; pkvsim.selection.summaries says how they
// are made. FP16 holds every code, and the square of a standard deviation's as well as it holds anything. So the
// products are FP16's whatever the queries are: a query head is brought to magnitudes below 2 by a power of two, which
// its logits get back together with the scales.
#pragma once
#include "page_scores.cuh"

namespace pkv {

constexpr int CODE_VECTORS = HEAD_DIM / 64;  // of 16 codes, that a lane reads of each half of a summary

// What a lane holds of 8 query heads: head lane / 4, elements 16 (lane % 4) to + 15 of each 64, in pairs. The parts are
// ScoreQuery's, and what the logits of the lane's columns, 2 (lane % 4) and the next, are multiplied by.
struct CodedQuery {
  static constexpr int PARTS = SCORING == MEAN_STD ? 1 : 2;
  unsigned own[PARTS][SCORE_BLOCKS][CODE_VECTORS][8];
  float units[SCORE_BLOCKS][2];

  // q: [GROUP_SIZE, HEAD_DIM] of the row and KV head.
  __device__ __forceinline__ void load(const half_type* q, int lane) {
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) {
      const int head = b * 8 + lane / 4;
      float2 x[CODE_VECTORS][8];
      float largest = 0.0f;
      #pragma unroll
      for (int j = 0; j < CODE_VECTORS; ++j)
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (head < GROUP_SIZE)
            v = __ldg(reinterpret_cast<const uint4*>(q + head * HEAD_DIM + j * 64 + lane % 4 * 16 + i * 8));
          const unsigned words[4] = {v.x, v.y, v.z, v.w};
          #pragma unroll
          for (int k = 0; k < 4; ++k) {
            x[j][i * 4 + k] = unpack(words[k]);
            largest = fmaxf(largest, fmaxf(fabsf(x[j][i * 4 + k].x), fabsf(x[j][i * 4 + k].y)));
          }
        }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      // The power of two at or below it, which is never 0, so that the other way is finite.
      const unsigned power = max(__float_as_uint(largest) & 0x7f800000u, 0x00800000u);
      const float down = __uint_as_float(0x7f000000u - power);
      #pragma unroll
      for (int j = 0; j < CODE_VECTORS; ++j)
        #pragma unroll
        for (int i = 0; i < 8; ++i)
          #pragma unroll
          for (int p = 0; p < PARTS; ++p) own[p][b][j][i] = part(x[j][i].x * down, x[j][i].y * down, p);
      #pragma unroll
      for (int i = 0; i < 2; ++i)
        units[b][i] = LOG2_E * __shfl_sync(0xffffffffu, __uint_as_float(power), (lane % 4 * 2 + i) * 4);
    }
  }
  __device__ __forceinline__ float unit(int b, int i, float scale) const { return scale * units[b][i]; }

 private:
  __device__ __forceinline__ static unsigned part(float low, float high, int which) {
    if (PARTS == 1) return pack_operands(low, high);
    return which ? pack_operands(fmaxf(low, 0.0f), fmaxf(high, 0.0f))
                 : pack_operands(fminf(low, 0.0f), fminf(high, 0.0f));
  }
};

// What a lane holds of 16 summaries, of pages lane / 4 and lane / 4 + 8, as ScoreRows does.
struct CodedRows {
  uint4 low[2][CODE_VECTORS], high[2][CODE_VECTORS];  // by half
  float low_scale[2], high_scale[2];

  template <int HALF>
  __device__ __forceinline__ void load(const SelectArguments& given, int head, int low_id, int high_id, int lane) {
    const long long low_at = summary_at(given, head, low_id), high_at = summary_at(given, head, high_id);
    #pragma unroll
    for (int j = 0; j < CODE_VECTORS; ++j) {
      const int at = HALF * HEAD_DIM + j * 64 + lane % 4 * 16;
      low[HALF][j] = codes(given.summaries + low_at * (2 * HEAD_DIM) + at);
      high[HALF][j] = codes(given.summaries + high_at * (2 * HEAD_DIM) + at);
    }
    const float* scales = reinterpret_cast<const float*>(given.summary_scales);
    low_scale[HALF] = __ldg(scales + low_at * 2 + HALF), high_scale[HALF] = __ldg(scales + high_at * 2 + HALF);
  }
  __device__ __forceinline__ static void ask(const SelectArguments& given, int head, int low_id, int high_id,
                                             int lane) {
    const long long low_at = summary_at(given, head, low_id), high_at = summary_at(given, head, high_id);
    ask_summaries(given.summaries + low_at * (2 * HEAD_DIM), given.summaries + high_at * (2 * HEAD_DIM), lane);
  }
  template <int HALF>
  __device__ __forceinline__ void multiply(float (&sums)[SCORE_BLOCKS][4], const CodedQuery& q) {
    constexpr bool SQUARES = HALF == 1 && SCORING == MEAN_STD;
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0.0f;
    #pragma unroll
    for (int j = 0; j < CODE_VECTORS; ++j) {
      const unsigned lower[4] = {low[HALF][j].x, low[HALF][j].y, low[HALF][j].z, low[HALF][j].w};
      const unsigned upper[4] = {high[HALF][j].x, high[HALF][j].y, high[HALF][j].z, high[HALF][j].w};
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned a[4];
        widen<SQUARES>(a[0], a[2], lower[i]), widen<SQUARES>(a[1], a[3], upper[i]);
        #pragma unroll
        for (int b = 0; b < SCORE_BLOCKS; ++b) {
          unsigned first = q.own[HALF % CodedQuery::PARTS][b][j][2 * i];
          unsigned second = q.own[HALF % CodedQuery::PARTS][b][j][2 * i + 1];
          if (SQUARES) first = multiply_pair(first, first), second = multiply_pair(second, second);
          multiply_add(sums[b], a, first, second);
        }
      }
    }
    const float lower = SQUARES ? low_scale[HALF] * low_scale[HALF] : low_scale[HALF];
    const float upper = SQUARES ? high_scale[HALF] * high_scale[HALF] : high_scale[HALF];
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b)
      sums[b][0] *= lower, sums[b][1] *= lower, sums[b][2] *= upper, sums[b][3] *= upper;
  }

 private:
  __device__ __forceinline__ static uint4 codes(const unsigned char* from) {
    return load_constant(reinterpret_cast<const half_type*>(from));
  }
  // Four codes as two pairs of FP16, less their zero, squared or not: 0x6400 with a byte for its last one is 1024 and
  // that byte.
  template <bool SQUARES>
  __device__ __forceinline__ static void widen(unsigned& first, unsigned& second, unsigned word) {
    constexpr unsigned LESS = SQUARES ? 0xe400e400u : 0xe480e480u;  // -1024, and -1024 - CODE_ZERO
    first = add_pair(permute(word, 0x64646464u, 0x4140), LESS);
    second = add_pair(permute(word, 0x64646464u, 0x4342), LESS);
    if (SQUARES) first = multiply_pair(first, first), second = multiply_pair(second, second);
  }
};

}  // namespace pkv
