// How scored pages become weights: the softmax over a list's pages, whose chunks are scored by several CTAs.
//
// A chunk's logits stay in shared memory until it is scored. Then it leaves, for each page and query head, 2^(logit -
// the chunk's largest), and of each head that largest logit and the sum of these. When all chunks are there, the list's
// own maximum and sum make of each chunk and head one factor, which is noted for each block of pages. So the CTA that
// selects, which is alone with all pages of the list, has a multiplication for each value in place of an exponential.
#pragma once
#include "page_scores.cuh"

namespace pkv {

enum Aggregation { MAXIMUM = 0, SOFTMAX_MEAN = 1 };

constexpr int SELECT_THREADS = WARPS * 32;
constexpr int BLOCK_PAGES = WARPS * SCORED_PAGES;  // that a CTA scores at a time; chunks are whole blocks
constexpr bool WEIGHS = SCORING != GIVEN && AGGREGATION == SOFTMAX_MEAN;

__host__ __device__ constexpr int values_of(int heads) {
  int values = 1;
  while (values < heads) values *= 2;
  return values;
}
// Floats that are kept of a page: one of each query head, and zeros up to a power of two, or its score.
constexpr int PAGE_VALUES = WEIGHS ? values_of(GROUP_SIZE) : 1;

__device__ __forceinline__ void read_values(float (&x)[PAGE_VALUES], const float* from) {
  if constexpr (PAGE_VALUES == 1) {
    x[0] = load_past_l1(from);
  } else if constexpr (PAGE_VALUES == 2) {
    const float2 v = load_past_l1(reinterpret_cast<const float2*>(from));
    x[0] = v.x, x[1] = v.y;
  } else {
    #pragma unroll
    for (int i = 0; i < PAGE_VALUES; i += 4) {
      const float4 v = load_past_l1(reinterpret_cast<const float4*>(from + i));
      x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
  }
}

// The mean over the group of a page's weights, up to the group's size. factors: [PAGE_VALUES] of its block, in shared
// memory.
__device__ __forceinline__ float weight_of(const float (&x)[PAGE_VALUES], const float* factors) {
  float sum = 0.0f;
  if constexpr (PAGE_VALUES >= 4) {
    #pragma unroll
    for (int g = 0; g < PAGE_VALUES; g += 4) {
      const float4 f = *reinterpret_cast<const float4*>(factors + g);
      sum += x[g] * f.x + x[g + 1] * f.y + x[g + 2] * f.z + x[g + 3] * f.w;
    }
  } else {
    #pragma unroll
    for (int g = 0; g < PAGE_VALUES; ++g) sum += x[g] * factors[g];
  }
  return sum;
}

// What warps tell each other of a chunk.
struct ChunkSums {
  float largest[WARPS][PAGE_VALUES], sum[WARPS][PAGE_VALUES];
};

// Leaves the weights of a chunk of `count` pages and their sums. logits: [count, PAGE_VALUES] in shared memory, to:
// the same in global memory, sums: [GROUP_SIZE]; notes.largest has each warp's. kept: whether L2 has room for all of the
// step's.
__device__ __forceinline__ void leave_weights(const float* logits, int count, ChunkSums& notes, float* to, float2* sums,
                                              bool kept) {
  const int head = threadIdx.x % PAGE_VALUES, lane = threadIdx.x % 32;
  __syncthreads();
  float largest = LEAST_SCORE, sum = 0.0f;
  #pragma unroll
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, head < GROUP_SIZE ? notes.largest[w][head] : LEAST_SCORE);
  #pragma unroll 4
  for (int i = threadIdx.x; i < count * PAGE_VALUES; i += SELECT_THREADS) {
    const float weight = head < GROUP_SIZE ? exp2_fast(logits[i] - largest) : 0.0f;
    if (kept) store_kept(to + i, weight);
    else to[i] = weight;
    sum += weight;
  }
  #pragma unroll
  for (int hop = PAGE_VALUES; hop < 32; hop <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, hop);
  if (lane < PAGE_VALUES) notes.sum[threadIdx.x / 32][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= GROUP_SIZE) return;
  float all = 0.0f;
  #pragma unroll
  for (int w = 0; w < WARPS; ++w) all += notes.sum[w][threadIdx.x];
  sums[threadIdx.x] = make_float2(largest, all);
}

// The sums of a chunk and head, or of none where there is no such one.
__device__ __forceinline__ float2 read_sums(const float2* sums, int chunks, int chunk, int head) {
  return chunk < chunks && head < GROUP_SIZE ? receive(sums + chunk * GROUP_SIZE + head)
                                               : make_float2(LEAST_SCORE, 0.0f);
}

// The factors of each block of pages and head, [blocks, PAGE_VALUES] in shared memory, from sums [chunks, GROUP_SIZE]:
// a warp for each head, a lane for each chunk. first: read_sums() of chunk `lane` and head `warp`.
__device__ __forceinline__ void find_factors(const float2* sums, int chunks, int chunk_blocks, int blocks, float2 first,
                                             float* factors) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int head = warp; head < PAGE_VALUES; head += WARPS) {
    if (head != warp) first = read_sums(sums, chunks, lane, head);
    ScoreSum all{first.x, first.y};
    for (int chunk = lane + 32; chunk < chunks; chunk += 32) {
      const float2 own = read_sums(sums, chunks, chunk, head);
      all.merge(own.x, own.y);
    }
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) all.merge_lanes(hop);
    const float inverse = head < GROUP_SIZE ? __fdividef(1.0f, all.sum) : 0.0f;
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      const float top = chunk == lane ? first.x : read_sums(sums, chunks, chunk, head).x;
      const float factor = exp2_fast(top - all.top) * inverse;
      const int begin = chunk * chunk_blocks, end = min(begin + chunk_blocks, blocks);
      for (int block = begin; block < end; ++block) factors[block * PAGE_VALUES + head] = factor;
    }
  }
}

}  // namespace pkv
