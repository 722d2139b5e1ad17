// How a warp finds its CTA's range: sums and scans over seq_lens, 32 rows at a time, every warp for itself.
#pragma once
#include "plan.cuh"

namespace pkv {

// Inclusive sum over the warp's lanes.
__device__ __forceinline__ int scan(int value, int lane) {
  #pragma unroll
  for (int hop = 1; hop < 32; hop <<= 1) {
    const int lower = __shfl_up_sync(0xffffffffu, value, hop);
    if (lane >= hop) value += lower;
  }
  return value;
}

// The costs of one step's rows, as seen by one warp. Rows 0 to 31 stay in registers.
struct Rows {
  const int* seq_lens;  // [batch_size]
  int batch_size, num_kv_heads, segment_cost;
  int cost, through, total;  // of row `lane`: its cost, and that of rows 0..lane; of all rows
  int num_heads;             // non-empty (row, KV head) pairs

  __device__ __forceinline__ Rows(const int* lens, int batch, int kv_heads, int seg_cost, int lane)
      : seq_lens(lens), batch_size(batch), num_kv_heads(kv_heads), segment_cost(seg_cost) {
    cost = cost_of(lane);
    int more = 0, live = cost > 0;
    for (int row = lane + 32; row < batch_size; row += 32) {
      const int next = cost_of(row);
      more += next, live += next > 0;
    }
    through = scan(cost, lane);
    total = __shfl_sync(0xffffffffu, through, 31);
    if (batch_size > 32) total += __reduce_add_sync(0xffffffffu, more);
    num_heads = __reduce_add_sync(0xffffffffu, live) * num_kv_heads;
  }
  __device__ __forceinline__ int cost_of(int row) const {
    return row < batch_size ? row_cost(seq_lens[row], num_kv_heads, segment_cost) : 0;
  }
  // Points `walk` at the range [x_begin, x_end). Called by whole warps; x_begin < total.
  __device__ __forceinline__ void start(BalancedWalk& walk, int x_begin, int x_end, int lane) const {
    int before = 0, own = cost, upto = through;  // of the block of 32 rows at `base`
    for (int base = 0;; base += 32) {
      const unsigned reached = __ballot_sync(0xffffffffu, before + upto > x_begin);
      if (reached) {
        const int owner = __ffs(reached) - 1;
        const int row_begin = __shfl_sync(0xffffffffu, before + upto - own, owner);
        walk.start(seq_lens, num_kv_heads, segment_cost, base + owner, row_begin, x_begin, x_end);
        return;
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
      own = cost_of(base + 32 + lane);
      upto = scan(own, lane);
    }
  }
};

}  // namespace pkv
