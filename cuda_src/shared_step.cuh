// A balanced step in which rows read together: how it is planned, and what a CTA does of it.
//
// As in early_plan.cuh the plan is made while the previous kernel may still write lengths, groups and page ids, and
// counts if they are found again afterwards. It is one plan for the CTA, in shared memory:
//   note_rows     every thread looks up some rows' lengths and groups, once
//   find_readers  one warp finds out who reads together, and how the step is cut (StepCut)
//   start_walks   each warp finds its CTA's range
// What is read twice is compared by each warp with the same notes, so all find the same.
#pragma once
#include "early_plan.cuh"
#include "shared_parts.cuh"

namespace pkv {

// The shared memory of a CTA: a range's reads come before its rows, so both widths use the same.
union SharedMemories {
  SharedMemory<ReadWidth> reads;
  SharedMemory<RowWidth> rows;
};
// Behind it: the plan, then Readers::words ints. All of it is looked up where it is needed, since the registers are the
// main loop's.
constexpr int STEP_PLAN_BYTES = 256;
struct __align__(16) StepPlan {
  Axis axis;
  StepCut step;
};
static_assert(sizeof(StepPlan) <= STEP_PLAN_BYTES && sizeof(SharedMemories) + STEP_PLAN_BYTES == READ_SHARED_BYTES,
              "gpu/kernels/variant.py computes the same");

// The `start` of attend, of a range's reads and then of its rows: it waits and checks once.
struct SharedStart {
  const Axis& axis;
  const Output& output;
  const StepPlan& plan;
  int lane;
  bool early, begun;

  // What was read again, where the plan is early.
  struct Again {
    bool changed;     // a row or a group is another
    page_id ids;      // of the first segment's first tiles,
    int ids_before;   // which were these
  } again;

  static constexpr bool EARLY = KERNELS_OVERLAP;

  template <class AnyLoader>
  __device__ __forceinline__ void release(const Pages& pages, const AnyLoader& loader) {
    if (!early || begun) return;
    wait_for_previous_kernel();
    again.changed = false;
    #pragma unroll 4
    for (int row = lane; row < axis.lens.batch_size; row += 32) again.changed |= axis.row_changed(row);
    for (int group = lane; group < axis.groups.num_groups; group += 32) again.changed |= axis.group_changed(group);
    again.ids = loader.template stored_ids<true>(pages, loader.ahead, loader.ahead_live, 0, lane);
    again.ids_before = loader.ids_ahead;
  }
  __device__ __forceinline__ bool begin(const Pages& pages) {
    if (begun) return true;
    begun = true;
    if (early && __any_sync(ALL_LANES, again.changed || pages.table.cut(again.ids) != again.ids_before)) return false;
    if (plan.step.some_empty)
      store_empty_rows(output, axis.readers.length, axis.lens.batch_size, blockIdx.x * WARPS + threadIdx.x / 32,
                       gridDim.x * WARPS, lane);
    return true;
  }
};

// One attempt at a step. False where the plan did not hold; nothing is written then, and all warps find so.
__device__ __forceinline__ bool attempt_shared(const Axis& given_axis, StepPlan& plan, bool early, const Pages& pages,
                                               const DecodeArguments& given, const Output& output,
                                               SharedMemories& shared) {
  const int lane = threadIdx.x % 32;
  note_rows(given_axis, threadIdx.x, THREADS);
  if (threadIdx.x == 0) plan.axis = given_axis;
  __syncthreads();
  const Axis& axis = plan.axis;
  if (threadIdx.x < 32) {
    find_readers(axis, lane);
    const StepCut step = StepCut::of(axis, gridDim.x, lane);
    if (lane == 0) plan.step = step;
  }
  __syncthreads();
  const Cut& cut = plan.step.cut;
  RangePlace place;
  place.range = place.first = paired_place(cut.num_ranges);
  PlanRecord* records = reinterpret_cast<PlanRecord*>(given.partials + gridDim.x);
  RowSlot* row_slots = reinterpret_cast<RowSlot*>(records + gridDim.x);
  const SpanSlots slots{given.partials, row_slots, row_slots + axis.lens.batch_size * axis.num_kv_heads,
                        axis.num_kv_heads};
  SharedStart start{.axis = axis, .output = output, .plan = plan, .lane = lane, .early = early, .begun = false};
  ReadWalk reads;
  start_reads(reads, axis, plan.step, place.range, lane);
  if (reads.some()) {
    init_barriers(shared.reads);
    ReadEmit emit{.slots = slots, .range = place.range, .lane = lane};
    if (!attend(reads, pages, given, shared.reads, start, emit)) return false;
    if (cut.begin(place.range + 1) <= plan.step.reads_total) return true;
    __syncthreads();  // the rows' memory is the reads'
  }
  RowWalk rows;
  start_rows(rows, axis, plan.step, place.range, lane);
  if (rows.tile > 0) place.first = cut.range_of(rows.x0);
  init_barriers(shared.rows);
  Parts parts{.slots = given.partials, .kept = shared.rows.kept, .plan = place, .lane = lane};
  RowEmit emit{.output = output, .slots = slots, .parts = parts};
  if (!attend(rows, pages, given, shared.rows, start, emit)) return false;
  unsigned char* ring = shared.rows.ring[threadIdx.x / 32 / RowWidth::TEAM_SIZE][0]
                        + RowWidth::team_member() * Parts::RING_BYTES;
  if (parts.held.any) parts.finish(output, ring);
  const MemberMerge merge{.axis = axis, .cut = cut, .slots = slots, .output = output, .range = place.range,
                          .lane = lane};
  merge.finish(rows, ring);
  return true;
}

}  // namespace pkv
