// Early planning: a balanced CTA makes its plan while the previous kernel still runs, and checks afterwards that it
// holds.
//
// Where kernels overlap (programmatic dependent launch, sm_90) a CTA is on its SM before the previous kernel has ended.
// That kernel may still write the lengths, the block table and the plan's record, for it may be anything: the sampler,
// an append, this very kernel of the layer before. So all three are read twice, past L1 (read_early), and what was read
// first is used but not trusted: it is cut to where it can do no harm, and only if it turns out to be what the second
// reading finds does anything that was computed from it count.
//
//   time        what happens                                                                        where
//   CTA starts  the record of the last plan and the first 32 lengths are asked for                  EarlyPlan::ask
//               meanwhile: page table to L2, barriers                                               balanced.cu
//               the record becomes the plan, if it was made for these lengths                       EarlyPlan::recall
//               else the plan is made of all lengths; those past the 32nd are noted                 EarlyPlan::make
//               the first segment's page ids are read                                               attend, look_ahead
//               release: wait for the previous kernel's end                                         EarlyStart::release
//   prev. ends  and ask again for lengths, page ids and record, without waiting for the answers
//               queries, then the first tiles are asked for, by the first page ids                  attend
//               begin: the second answers are compared with the first ones                          EarlyStart::begin
//               - one differs: this attempt ends before it has written anything, and another        EarlyPlan::distrust
//                 begins with a plan of what is there, which cannot fail
//               - none does: the plan is recorded, empty rows are written, the tiles are computed   attend
//
// The record helps because the launches of a step's layers have the same lengths. It lies in the workspace behind the
// slots, one for each CTA, and is kept for steps of up to 32 rows, whose lengths a warp holds in registers. A launch
// trusts the record of the launch before it only as far as the comparison goes: it may be met half written.
//
// Steps of more rows than there is room to note, and GPUs without overlap, wait first and then go through the same
// code: `early` is false, nothing is compared, and the first attempt holds.
#pragma once
#include "attend.cuh"
#if READ_COLUMNS
#include "warp_spans.cuh"
#else
#include "warp_plan.cuh"
#endif

namespace pkv {

// Lengths that any warp's rows of states have room for: they are noted there until the warp leaves its first state.
constexpr int NOTED_LENGTHS = RowWidth::LAST_COLUMNS * STATE_ROW;

// What a CTA planned last, kept in the workspace for launches of the same lengths; all ones where there is none.
struct __align__(16) PlanRecord {
  enum { BATCH_SIZE, MOST, ROW, HEAD, TILE, X0, X_END, SEQ_LEN, RANGE, FIRST, SOME_EMPTY, NUM_WORDS };
  int lengths[32], words[32];

  // Is called by one warp. No other launch trusts what it writes before this one has ended.
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
  // Whether the record is of these lengths, `own` of row `lane`, and leads to nothing that is not there; if so, it
  // becomes `plan`.
  __device__ __forceinline__ bool recall(RangePlan& plan, const Lengths& lens, int kv_heads, int seg_cost, int own,
                                         int lane) const {
    int most = 0x7fffffff;
    if (lane == PlanRecord::MOST || lane == PlanRecord::SEQ_LEN) most = lens.most;
    if (lane == PlanRecord::ROW) most = lens.batch_size - 1;
    bool fits = length == own && (lane >= PlanRecord::NUM_WORDS || (word >= 0 && word <= most));
    if (lane == PlanRecord::BATCH_SIZE) fits &= word == lens.batch_size;
    if (lane == PlanRecord::MOST) fits &= word == lens.most;
    if (lens.batch_size > 32 || !__all_sync(ALL_LANES, fits)) return false;
    const auto value = [&](int which) { return __shfl_sync(ALL_LANES, word, which); };
    BalancedWalk& walk = plan.walk;
    walk.seq_lens = lens, walk.num_kv_heads = kv_heads, walk.segment_cost = seg_cost;
    walk.row = value(PlanRecord::ROW), walk.head = value(PlanRecord::HEAD), walk.tile = value(PlanRecord::TILE);
    walk.x0 = value(PlanRecord::X0), walk.x_end = value(PlanRecord::X_END), walk.seq_len = value(PlanRecord::SEQ_LEN);
    plan.range = value(PlanRecord::RANGE), plan.first = value(PlanRecord::FIRST);
    plan.some_empty = value(PlanRecord::SOME_EMPTY), plan.length = own;
    return true;
  }
};

// Not 0 if the length of one of this lane's rows past the 32nd is another than the one that was noted.
__device__ __forceinline__ int later_changes(const Lengths& lens, const int* noted, int lane) {
  int found = 0;
  #pragma unroll 4
  for (int row = lane + 32; row < lens.batch_size; row += 32) found |= lens.cut(lens.stored(row)) ^ noted[row];
  return found;
}

// One warp's way to a plan that holds.
struct EarlyPlan {
  const Lengths& lens;
  const int num_kv_heads;
  const Costs& costs;
  RangePlan& plan;     // is outside: as a member it would take 6 registers more
  PlanRecord* record;  // this CTA's
  int* noted;          // [batch_size] room in shared memory for the lengths past the 32nd
  const int lane;
  bool early;          // what was read may have changed since
#if READ_COLUMNS
  const Groups& groups;  // of which no row is in any, or the plan would be another one (shared.cu)
#endif
  bool recalled = false;  // the plan is the record's
  int stored;          // row lane's length, as it is in memory
  ReadRecord found;    // the record, as it was read first

  // Asks for what recall() needs. Nothing waits for the answers yet.
  __device__ __forceinline__ void ask() {
    found.read(record, lane);
    stored = lens.stored(lane);
  }
  // Makes the record the plan, if it was made for the lengths that were read.
  __device__ __forceinline__ void recall() {
    recalled = found.recall(plan, lens, num_kv_heads, costs.segment, lens.cut(stored), lane);
  }
  // Makes the plan, where it is not the record's.
  __device__ __forceinline__ void make() {
    if (recalled) return;
    const Rows rows(lens, num_kv_heads, costs.segment, lane, stored, early ? noted : nullptr);
    const Cut cut(rows.total, rows.num_heads, rows.even, gridDim.x, costs);
    plan = RangePlan(rows, cut, paired_place(cut.num_ranges), lane);
  }
  // Is called when a plan did not hold: what make() reads from then on is what the previous kernel left.
  __device__ __forceinline__ void distrust() {
    early = recalled = false;
    stored = lens.stored(lane);
  }
};

// The balanced kernel's `start` of attend: waits for the previous kernel, checks the plan, records it. output: what
// store_empty_rows takes.
template <class AnyOutput>
struct EarlyStart {
  const EarlyPlan& from;
  const AnyOutput& output;

  // What was read again, where the plan is early.
  struct Again {
    int changes;        // not 0 where a length past the 32nd is another
    int length;         // of row `lane`
    page_id ids;        // of the first segment's first tiles,
    int ids_before;     // which were these
    ReadRecord record;  // where the plan is from it
  } again;

  static constexpr bool EARLY = KERNELS_OVERLAP;

  __device__ __forceinline__ void release(const Pages& pages, const Loader<BalancedWalk, RowWidth>& loader) {
    if (!from.early) return;
    wait_for_previous_kernel();
    again.changes = later_changes(from.lens, from.noted, from.lane);
    again.length = from.lens.stored(from.lane);
    again.ids = loader.template stored_ids<true>(pages, loader.ahead, loader.ahead_live, 0, from.lane);
    again.ids_before = loader.ids_ahead;
    if (from.recalled) again.record.read(from.record, from.lane);
  }

  // Whether the plan holds. What else there is to do is done here, while there is nothing to compute: the next launch's
  // CTA waits for this one's end.
  __device__ __forceinline__ bool begin(const Pages& pages) {
    const Lengths& lens = from.lens;
    const RangePlan& plan = from.plan;
    if (from.early) {
      int changes = again.changes | (lens.cut(again.length) ^ plan.length);
      changes |= pages.table.cut(again.ids) ^ again.ids_before;
      if (from.recalled) changes |= (again.record.length ^ from.found.length) | (again.record.word ^ from.found.word);
#if READ_COLUMNS
      // A trip to L2, for which the first tiles have not waited.
      changes |= from.groups.any_grouped(from.lens.batch_size, from.lane, 32);
#endif
      if (__any_sync(ALL_LANES, changes)) return false;
    }
    if (!from.recalled && lens.batch_size <= 32 && threadIdx.x < 32) from.record->remember(plan, lens, from.lane);
    if (plan.some_empty) {
      const int worker = blockIdx.x * WARPS + threadIdx.x / 32, workers = gridDim.x * WARPS;
      if constexpr (LAST_PAGE_LENGTHS || RANKS > 0) store_empty_rows(output, lens, lens.batch_size, worker, workers, from.lane);
      else store_empty_rows(output, lens.at, lens.batch_size, worker, workers, from.lane);
    }
    return true;
  }
};

}  // namespace pkv
