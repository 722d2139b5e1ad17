// Centroids of a page's keys, as pkvsim.selection.centroids says them: its tokens in eight parts that are alike, found
// by farthest-first traversal, of each part the mean key in 4-bit codes, the scale and the log2 of the count.
//
// A warp makes those of one page and head. Its lanes read whole tokens, 16 bytes each, some tokens at a time; which
// centroid a token is nearest to waits in shared memory, whatever the page's size. Pages of no more than 16 tokens are
// made by centroid_teams.cuh instead.
#pragma once
#include "centroid_scores.cuh"

namespace pkv {

constexpr float CENTROID_STEPS = 7.5f;          // that a centroid's largest magnitude is divided into
constexpr float LARGEST_SCALE = 65504.0f;       // FP16's
constexpr float NO_TOKENS = -60000.0f;          // in place of the log2 of no tokens

// What the sum of so many tokens' keys is multiplied by.
__device__ __forceinline__ float share_of(float count) { return __fdividef(1.0f, fmaxf(count, 1.0f)); }

// What is kept beside the codes of a centroid whose largest magnitude is `largest`.
__device__ __forceinline__ unsigned centroid_scale(float largest, float count) {
  return pack_operands(fminf(largest * (1.0f / CENTROID_STEPS), LARGEST_SCALE), fmaxf(log2_fast(count), NO_TOKENS));
}

// Codes of neighbouring elements, the first in the lowest bits.
template <int COUNT>
__device__ __forceinline__ unsigned centroid_codes(const float (&mean)[COUNT], unsigned scale) {
  const float step = unpack_operands(scale).x, inverse = step > 0.0f ? __fdividef(1.0f, step) : 0.0f;
  unsigned codes = 0;
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float code = rintf(mean[i] * inverse) + CENTROID_ZERO;
    codes |= static_cast<unsigned>(fminf(fmaxf(code, 0.0f), 15.0f)) << 4 * i;
  }
  return codes;
}

// A warp's notes of a page's tokens.
struct TokenParts {
  float distance[PAGE_SIZE];  // squared, to the nearest seed
  int part[PAGE_SIZE];        // that seed's
};

// LANES: that a token's key takes, of 8 elements each. read(token, x): this lane's elements of a token.
template <int LANES, class Read>
struct CentroidMaker {
  static constexpr int TOKENS = 32 / LANES, EACH = PAGE_CENTROIDS / TOKENS;  // centroids of a group of LANES lanes
  Read read;
  int tokens, lane;
  TokenParts& notes;

  // The part of every token.
  __device__ __forceinline__ void split() const {
    int seed = 0;
    #pragma unroll 1
    for (int part = 0; part < PAGE_CENTROIDS; ++part) {
      float of_seed[8], farthest = -1.0f;
      int next = 0;
      read(seed, of_seed);
      #pragma unroll 2
      for (int first = 0; first < tokens; first += TOKENS) {
        const bool there = first + lane / LANES < tokens;
        const int token = there ? first + lane / LANES : tokens - 1;
        const float before = part ? notes.distance[token] : 3e38f;
        float x[8], distance = 0.0f;
        read(token, x);
        #pragma unroll
        for (int i = 0; i < 8; ++i) distance += (x[i] - of_seed[i]) * (x[i] - of_seed[i]);
        #pragma unroll
        for (int hop = 1; hop < LANES; hop <<= 1) distance += __shfl_xor_sync(0xffffffffu, distance, hop);
        if (there && distance < before && lane % LANES == 0) notes.distance[token] = distance, notes.part[token] = part;
        distance = fminf(distance, before);
        if (there && distance > farthest) farthest = distance, next = token;
      }
      #pragma unroll
      for (int hop = LANES; hop < 32; hop <<= 1) {  // of equally far ones the first
        const float other = __shfl_xor_sync(0xffffffffu, farthest, hop);
        const int of_other = __shfl_xor_sync(0xffffffffu, next, hop);
        if (other > farthest || (other == farthest && of_other < next)) farthest = other, next = of_other;
      }
      seed = next;
      __syncwarp();
    }
  }

  // to: [PAGE_CENTROIDS, CENTROID_BYTES]; scales: [PAGE_CENTROIDS] pairs of FP16. Each group of LANES lanes has EACH of
  // the centroids, and looks at all tokens for them.
  __device__ __forceinline__ void write(unsigned char* to, unsigned* scales) const {
    const int group = lane / LANES, at = lane % LANES;
    float sum[EACH][8], count[EACH];
    #pragma unroll
    for (int j = 0; j < EACH; ++j) {
      count[j] = 0.0f;
      #pragma unroll
      for (int i = 0; i < 8; ++i) sum[j][i] = 0.0f;
    }
    #pragma unroll 2
    for (int token = 0; token < tokens; ++token) {
      const int part = notes.part[token] - group;
      float x[8];
      read(token, x);
      #pragma unroll
      for (int j = 0; j < EACH; ++j) {
        const float own = part == j * TOKENS ? 1.0f : 0.0f;
        count[j] += own;
        #pragma unroll
        for (int i = 0; i < 8; ++i) sum[j][i] += own * x[i];
      }
    }
    #pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const float share = share_of(count[j]);
      float largest = 0.0f;
      #pragma unroll
      for (int i = 0; i < 8; ++i) sum[j][i] *= share, largest = fmaxf(largest, fabsf(sum[j][i]));
      #pragma unroll
      for (int hop = 1; hop < LANES; hop <<= 1)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, hop));
      const unsigned scale = centroid_scale(largest, count[j]);
      const int centroid = group + j * TOKENS;
      reinterpret_cast<unsigned*>(to + centroid * CENTROID_BYTES)[at] = centroid_codes(sum[j], scale);
      if (at == 0) scales[centroid] = scale;
    }
  }
};

}  // namespace pkv
