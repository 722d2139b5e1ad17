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

// The costs of one step's rows, as seen by one warp. Rows 0 to 31 stay in registers; `noted` [batch_size], if given,
// keeps the lengths of the others.
struct Rows {
  Lengths seq_lens;
  int num_kv_heads, segment_cost;
  int length;                // of row `lane`
  int cost, through, total;  // of row `lane`: its cost, and that of rows 0..lane; of all rows
  int num_heads;             // non-empty (row, KV head) pairs
  bool even;                 // all non-empty rows cost the same

  // stored: row lane's length, see Lengths.
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
  // Points `walk` at a range. Called by whole warps, of which one lane finds where the range begins, another where it
  // ends.
  __device__ __forceinline__ void start(BalancedWalk& walk, const Cut& cut, int range, int lane) const {
    const int edge = cut.begin(range + (lane & 1));
    const int x_begin = __shfl_sync(0xffffffffu, edge, 0), x_end = __shfl_sync(0xffffffffu, edge, 1);
    int before = 0, own_length = length, own = cost, upto = through;  // of the block of 32 rows at `base`
    for (int base = 0;; base += 32) {
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

// Not 0 if the length of one of this lane's rows past the 32nd is another than planned with.
__device__ __forceinline__ int later_changes(const Lengths& lens, const int* noted, int lane) {
  int found = 0;
  #pragma unroll 4
  for (int row = lane + 32; row < lens.batch_size; row += 32) found |= lens.cut(lens.stored(row)) ^ noted[row];
  return found;
}

// One CTA's plan of a step.
struct RangePlan {
  BalancedWalk walk;
  int range;
  int first;        // the range in which its first segment begins
  int length;       // of row `lane`, as planned with
  bool some_empty;  // rows

  __device__ __forceinline__ RangePlan() {}
  __device__ __forceinline__ RangePlan(const Rows& rows, const Cut& cut, int own, int lane)
      : range(own), first(own), length(rows.length), some_empty(rows.some_empty()) {
    walk.row = walk.head = walk.tile = walk.x0 = walk.x_end = walk.seq_len = 0;  // nothing
    if (rows.total <= 0 || range >= cut.num_ranges) return;
    rows.start(walk, cut, range, lane);
    if (walk.tile > 0) first = cut.range_of(walk.x0);
  }
};

// What a CTA planned last, kept in the workspace for launches of the same lengths: most, for every layer's is the same.
// Of steps of up to 32 rows; all ones where there is none.
struct __align__(16) PlanRecord {
  enum { BATCH_SIZE, MOST, ROW, HEAD, TILE, X0, X_END, SEQ_LEN, RANGE, FIRST, SOME_EMPTY, NUM_WORDS };
  int lengths[32], words[32];

  // Written by one warp, before whose launch's end no other launch trusts it.
  __device__ __forceinline__ void remember(const RangePlan& plan, const Lengths& lens, int lane) {
    const BalancedWalk& walk = plan.walk;
    const int values[NUM_WORDS] = {lens.batch_size, lens.most, walk.row, walk.head, walk.tile, walk.x0, walk.x_end,
                                   walk.seq_len, plan.range, plan.first, plan.some_empty};
    lengths[lane] = plan.length;
    #pragma unroll
    for (int i = 0; i < NUM_WORDS; ++i)
      if (lane == i) words[i] = values[i];
  }
};

// A record as a warp read it, perhaps while it was written: lane i has the i-th length and word.
struct ReadRecord {
  int length, word;

  __device__ __forceinline__ void read(const PlanRecord* from, int lane) {
    length = read_early(from->lengths + lane), word = read_early(from->words + lane);
  }
  // Whether it is of these lengths, `own` of row `lane`, and leads to nothing that is not there; if so, it is `plan`.
  __device__ __forceinline__ bool recall(RangePlan& plan, const Lengths& lens, int kv_heads, int seg_cost, int own,
                                         int lane) const {
    int most = 0x7fffffff;
    if (lane == PlanRecord::MOST || lane == PlanRecord::SEQ_LEN) most = lens.most;
    if (lane == PlanRecord::ROW) most = lens.batch_size - 1;
    bool fits = length == own && (lane >= PlanRecord::NUM_WORDS || (word >= 0 && word <= most));
    if (lane == PlanRecord::BATCH_SIZE) fits &= word == lens.batch_size;
    if (lane == PlanRecord::MOST) fits &= word == lens.most;
    if (lens.batch_size > 32 || !__all_sync(0xffffffffu, fits)) return false;
    const auto value = [&](int which) { return __shfl_sync(0xffffffffu, word, which); };
    BalancedWalk& walk = plan.walk;
    walk.seq_lens = lens, walk.num_kv_heads = kv_heads, walk.segment_cost = seg_cost;
    walk.row = value(PlanRecord::ROW), walk.head = value(PlanRecord::HEAD), walk.tile = value(PlanRecord::TILE);
    walk.x0 = value(PlanRecord::X0), walk.x_end = value(PlanRecord::X_END), walk.seq_len = value(PlanRecord::SEQ_LEN);
    plan.range = value(PlanRecord::RANGE), plan.first = value(PlanRecord::FIRST);
    plan.some_empty = value(PlanRecord::SOME_EMPTY), plan.length = own;
    return true;
  }
};

}  // namespace pkv
