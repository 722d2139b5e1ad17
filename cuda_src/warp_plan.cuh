// How a warp finds its CTA's range: by sums and scans over the lengths, 32 rows at a time. Every warp does it for
// itself, which is sooner done than to wait for one that does it for all.
#pragma once
#include "plan.cuh"

namespace pkv {

// The inclusive sum over the warp's lanes.
__device__ __forceinline__ int scan(int value, int lane) {
  #pragma unroll
  for (int hop = 1; hop < 32; hop <<= 1) {
    const int lower = __shfl_up_sync(0xffffffffu, value, hop);
    if (lane >= hop) value += lower;
  }
  return value;
}

// The costs of one step's rows, as seen by one warp. Rows 0 to 31 stay in registers; `noted` [batch_size], if given,
// keeps the lengths of the others.
struct Rows {
  Lengths seq_lens;
  int num_kv_heads, segment_cost;
  int length;                // of row `lane`
  int cost, through, total;  // of row `lane`: its cost, and that of rows 0..lane; of all rows
  int num_heads;             // non-empty (row, KV head) pairs
  bool even;                 // all non-empty rows cost the same

  // stored: the length of row `lane` as it is in memory (Lengths::stored).
  __device__ __forceinline__ Rows(const Lengths& lens, int kv_heads, int seg_cost, int lane, int stored,
                                  int* noted = nullptr)
      : seq_lens(lens), num_kv_heads(kv_heads), segment_cost(seg_cost), length(lens.cut(stored)) {
    cost = row_cost(seq_lens.tiles(length), num_kv_heads, segment_cost);
    int more = 0, live = cost > 0, most = cost, least = cost > 0 ? cost : 0x7fffffff;
    for (int row = lane + 32; row < seq_lens.batch_size; row += 32) {
      const int next_length = length_of(row), next = row_cost(seq_lens.tiles(next_length), num_kv_heads, segment_cost);
      if (noted) noted[row] = next_length;
      more += next, live += next > 0, most = max(most, next), least = next > 0 ? min(least, next) : least;
    }
    total = __reduce_add_sync(0xffffffffu, cost + more);
    through = scan(cost, lane);
    even = __reduce_max_sync(0xffffffffu, most) == __reduce_min_sync(0xffffffffu, least);
    num_heads = __reduce_add_sync(0xffffffffu, live) * num_kv_heads;
  }
  __device__ __forceinline__ int length_of(int row) const { return seq_lens.cut(seq_lens.stored(row)); }
  __device__ __forceinline__ bool some_empty() const { return num_heads < seq_lens.batch_size * num_kv_heads; }
  // Points `walk` at a range. Whole warps call it: one lane finds where the range begins, another where it ends.
  __device__ __forceinline__ void start(BalancedWalk& walk, const Cut& cut, int range, int lane) const {
    const int edge = cut.begin(range + (lane & 1));
    const int x_begin = __shfl_sync(0xffffffffu, edge, 0), x_end = __shfl_sync(0xffffffffu, edge, 1);
    int before = 0, own_length = length, own = cost, upto = through;  // of the block of 32 rows at `base`
    // All rows may lie behind without the range's begin, where lengths have become shorter since they were summed. The walk
    // is left as it was then, empty, and what changed is found before the plan counts.
    for (int base = 0; base < seq_lens.batch_size; base += 32) {
      const unsigned reached = __ballot_sync(0xffffffffu, before + upto > x_begin);
      if (reached) {
        const int owner = __ffs(reached) - 1;
        const int row_begin = __shfl_sync(0xffffffffu, before + upto - own, owner);
        const int row_length = __shfl_sync(0xffffffffu, own_length, owner);
        walk.start(seq_lens, num_kv_heads, segment_cost, base + owner, row_length, row_begin, x_begin, x_end);
        return;
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
      own_length = length_of(base + 32 + lane);
      own = row_cost(seq_lens.tiles(own_length), num_kv_heads, segment_cost);
      upto = scan(own, lane);
    }
  }
};

// Which range a CTA has, and the range in which its first segment begins.
struct RangePlace {
  int range, first;
};

// One CTA's plan of a step.
struct RangePlan : RangePlace {
  BalancedWalk walk;
  int length;       // of row `lane`, as planned with
  bool some_empty;  // rows

  __device__ __forceinline__ RangePlan() {}
  __device__ __forceinline__ RangePlan(const Rows& rows, const Cut& cut, int own, int lane)
      : RangePlace{own, own}, length(rows.length), some_empty(rows.some_empty()) {
    walk.row = walk.head = walk.tile = walk.x0 = walk.x_end = walk.seq_len = 0;  // an empty walk
    if (rows.total <= 0 || range >= cut.num_ranges) return;
    rows.start(walk, cut, range, lane);
    if (walk.tile > 0) first = cut.range_of(walk.x0);
  }
};

}  // namespace pkv
