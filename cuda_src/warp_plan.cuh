// How a warp finds its CTA's range: sums and scans over seq_lens, 32 rows at a time, every warp for itself.
#pragma once
#include "plan.cuh"

namespace pkv {

__device__ __forceinline__ int total_cost(const int* seq_lens, int batch_size, int num_kv_heads, int segment_cost, int lane) {
  int sum = 0;
  for (int row = lane; row < batch_size; row += 32) sum += row_cost(seq_lens[row], num_kv_heads, segment_cost);
  #pragma unroll
  for (int hop = 16; hop > 0; hop >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, hop);
  return sum;
}

// Points `walk` at range i. Called by whole warps; cut.total > 0 and i < cut.num_ranges.
__device__ __forceinline__ void start_range(BalancedWalk& walk, const Cut& cut, int i, const int* seq_lens, int batch_size, int num_kv_heads, int segment_cost, int lane) {
  const int x_begin = cut.begin(i), x_end = cut.begin(i + 1);
  int before = 0;  // cost of the rows ahead of this block of 32
  for (int base = 0;; base += 32) {
    const int row = base + lane;
    const int cost = row < batch_size ? row_cost(seq_lens[row], num_kv_heads, segment_cost) : 0;
    int through = cost;
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) {
      const int lower = __shfl_up_sync(0xffffffffu, through, hop);
      if (lane >= hop) through += lower;
    }
    const unsigned reached = __ballot_sync(0xffffffffu, before + through > x_begin);
    if (reached) {
      const int owner = __ffs(reached) - 1;
      const int row_begin = __shfl_sync(0xffffffffu, before + through - cost, owner);
      walk.start(seq_lens, num_kv_heads, segment_cost, base + owner, row_begin, x_begin, x_end);
      return;
    }
    before += __shfl_sync(0xffffffffu, through, 31);
  }
}

}  // namespace pkv
