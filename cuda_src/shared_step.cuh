// A balanced step in which rows read together: how it is planned, and what a CTA does of it.
//
// As in early_plan.cuh the plan is made while the previous kernel may still write lengths, groups and page ids, and
// counts if they are found again afterwards. It is one plan for the CTA, in shared memory:
//   note_rows     every thread looks up some rows' lengths and groups, once; also where no row turns out to be in one
//   StepRecall    the record of the CTA's last plan becomes the plan, if it was made for the same; else
//   plan_step     one warp finds out who reads together, how the step is cut (StepCut), and what the CTA has of it
// What is read twice is compared by each warp with the same notes, so all find the same.
// Planning is code that runs once and is fetched from L2 as it goes, at some 10 cycles an instruction: hence the record.
#pragma once
#include "early_plan.cuh"
#include "shared_parts.cuh"
#if READ_TILES
#include "group_reads.cuh"
#endif

namespace pkv {

// The shared memory of a CTA: a range's reads come before its rows, so both widths use the same.
union SharedMemories {
  SharedMemory<ReadWidth> reads;
  SharedMemory<RowWidth> rows;
};
// Behind it: the plan, then Readers::words ints. All of it is looked up where it is needed, since the registers are the
// main loop's.
constexpr int STEP_PLAN_BYTES = 512;
struct RangeWork {
  int batch_size, num_groups;  // of the step
  StepCut step;
  RangePlace place;
  ReadWalk reads;
  RowWalk rows;
};
struct __align__(16) StepPlan {
  Axis axis;
  RangeWork work;  // of this CTA
};
static_assert(sizeof(StepPlan) <= STEP_PLAN_BYTES && sizeof(SharedMemories) + STEP_PLAN_BYTES == READ_SHARED_BYTES,
              "gpu/kernels/variant.py computes the same");

// What a CTA planned last, for launches of the same lengths, groups and prefixes, and these themselves; in the workspace,
// all ones where there is none. It is read while the launch before may write it. So every word has a stamp beside it, the
// same in the whole record, which each writing changes: a record of one stamp is one that somebody wrote whole.
struct __align__(16) StepRecord {
  enum { LENGTH, ASKED, GROUP, PLACE, ROWS, TOKENS, COUNT, BEGIN, AT, NUM_ITEMS, OF_GROUPS = TOKENS };  // before: of rows
  unsigned long long work[2][32];
  unsigned long long items[NUM_ITEMS][THREADS];  // thread i has row i and group i
};
constexpr int WORK_WORDS = sizeof(RangeWork) / sizeof(int);
static_assert(sizeof(StepRecord) == STEP_RECORD_BYTES, "gpu/kernels/variant.py computes the same");
static_assert(WORK_WORDS <= 64 && sizeof(RangeWork) % sizeof(int) == 0, "a lane has two words");

// A thread's part of the record, as it is read first.
struct StepRecall {
  unsigned long long work[2], items[StepRecord::NUM_ITEMS];
  unsigned stamp;

  // Asks for what the step has of it: a record is long, and most of it lies idle where rows are few. Nothing waits for the
  // answers yet.
  __device__ __forceinline__ void ask(const StepRecord* from, int batch_size, int num_groups) {
    const int own = threadIdx.x;
    const auto read = [](const unsigned long long* at) {
      return static_cast<unsigned long long>(read_early(reinterpret_cast<const long long*>(at)));
    };
    #pragma unroll
    for (int i = 0; i < 2; ++i) work[i] = own < 32 ? read(&from->work[i][own]) : 0;
    #pragma unroll
    for (int i = 0; i < StepRecord::NUM_ITEMS; ++i)
      items[i] = own < (i < StepRecord::OF_GROUPS ? batch_size : num_groups) ? read(&from->items[i][own]) : 0;
    stamp = static_cast<unsigned>(read(&from->work[0][0]) >> 32);
  }
  __device__ __forceinline__ static int value(unsigned long long word) { return static_cast<int>(word); }
  // Whether this thread finds it whole and of what it has noted itself (note_rows). If all do, so it is.
  __device__ __forceinline__ bool fits(const Axis& axis) const {
    const int own = threadIdx.x, batch_size = axis.lens.batch_size, num_groups = axis.groups.num_groups;
    bool same = batch_size <= THREADS && num_groups <= THREADS;
    if (own < 32) {
      same &= work[0] >> 32 == stamp && work[1] >> 32 == stamp;
      if (own < 2) same &= value(work[0]) == (own ? num_groups : batch_size);  // RangeWork begins with these
    }
    if (own < batch_size) {
      #pragma unroll
      for (int i = 0; i < StepRecord::OF_GROUPS; ++i) same &= items[i] >> 32 == stamp;
      same &= value(items[StepRecord::LENGTH]) == axis.readers.length[own]
              && value(items[StepRecord::ASKED]) == axis.readers.group[own];
    }
    if (own < num_groups) {
      #pragma unroll
      for (int i = StepRecord::OF_GROUPS; i < StepRecord::NUM_ITEMS; ++i) same &= items[i] >> 32 == stamp;
      same &= value(items[StepRecord::TOKENS]) == axis.readers.prefix[own];
    }
    return same;
  }
  // Makes it the plan. All meet before anybody looks at it.
  __device__ __forceinline__ void restore(const Axis& axis, StepPlan& plan) const {
    const int own = threadIdx.x;
    const Readers& readers = axis.readers;
    if (own < axis.lens.batch_size) {
      readers.group[own] = value(items[StepRecord::GROUP]), readers.place[own] = value(items[StepRecord::PLACE]);
      readers.rows[own] = value(items[StepRecord::ROWS]);
    }
    if (own < axis.groups.num_groups) {
      readers.count[own] = value(items[StepRecord::COUNT]), readers.begin[own] = value(items[StepRecord::BEGIN]);
      readers.at[own] = value(items[StepRecord::AT]);
    }
    if (own >= 32) return;
    int* to = reinterpret_cast<int*>(&plan.work);
    #pragma unroll
    for (int i = 0; i < 2; ++i)
      if (own + i * 32 < WORK_WORDS) to[own + i * 32] = value(work[i]);
    __syncwarp();
    if (own == 0) {
      plan.axis = axis, plan.axis.least_own = plan.work.step.least_own;
      plan.work.reads.axis = plan.work.rows.axis = &plan.axis;
    }
  }
};

// Every warp calls this once for a plan that holds, when no launch before writes any more. asked: what its row asks for.
__device__ __forceinline__ void remember_step(StepRecord* to, const StepPlan& plan) {
  const Axis& axis = plan.axis;
  const Readers& readers = axis.readers;
  const int own = threadIdx.x, batch_size = axis.lens.batch_size, num_groups = axis.groups.num_groups;
  if (batch_size > THREADS || num_groups > THREADS) return;
  // A warp goes by the stamp of its own words, which no other changes.
  const unsigned long long* mine = &to->items[0][own / 32 * 32];
  const unsigned stamp = 1 + static_cast<unsigned>(
      static_cast<unsigned long long>(read_early(reinterpret_cast<const long long*>(mine))) >> 32);
  __syncwarp();
  const auto write = [stamp](unsigned long long* at, int value) {
    *at = static_cast<unsigned long long>(stamp) << 32 | static_cast<unsigned>(value);
  };
  const int row = min(own, batch_size - 1), group = min(own, num_groups - 1);
  write(&to->items[StepRecord::LENGTH][own], readers.length[row]);
  write(&to->items[StepRecord::ASKED][own], axis.groups.asked(read_early(axis.groups.of_row + row)));
  write(&to->items[StepRecord::GROUP][own], readers.group[row]);
  write(&to->items[StepRecord::PLACE][own], readers.place[row]);
  write(&to->items[StepRecord::ROWS][own], readers.rows[row]);
  write(&to->items[StepRecord::TOKENS][own], group < 0 ? 0 : readers.prefix[group]);
  write(&to->items[StepRecord::COUNT][own], group < 0 ? 0 : readers.count[group]);
  write(&to->items[StepRecord::BEGIN][own], group < 0 ? 0 : readers.begin[group]);
  write(&to->items[StepRecord::AT][own], group < 0 ? 0 : readers.at[group]);
  if (own >= 32) return;
  const int* words = reinterpret_cast<const int*>(&plan.work);
  #pragma unroll
  for (int i = 0; i < 2; ++i) write(&to->work[i][own], own + i * 32 < WORK_WORDS ? words[own + i * 32] : 0);
}

// The `start` of attend, of a range's reads and then of its rows: it waits and checks once.
struct SharedStart {
  const Axis& axis;
  const Output& output;
  const StepPlan& plan;
  const SpanSlots& slots;
  bool remembered;  // the plan is the record's
  int lane;
  bool early, begun;

  // What was read again, where the plan is early.
  struct Again {
    page_id ids;      // of the first segment's first tiles,
    int ids_before;   // which were these
  } again;

  static constexpr bool EARLY = KERNELS_OVERLAP;

  template <class AnyLoader>
  __device__ __forceinline__ void release(const Pages& pages, const AnyLoader& loader) {
    if (!early || begun) return;
    wait_for_previous_kernel();
    again.ids = loader.template stored_ids<true>(pages, loader.ahead, loader.ahead_live, 0, lane);
    again.ids_before = loader.ids_ahead;
  }
  __device__ __forceinline__ bool begin(const Pages& pages) {
    if (begun) return true;
    begun = true;
    if (early && __any_sync(ALL_LANES, changed() || pages.table.cut(again.ids) != again.ids_before)) return false;
    if (!remembered) remember_step(reinterpret_cast<StepRecord*>(slots.step_records()) + blockIdx.x, plan);
    if (plan.work.step.some_empty)
      store_empty_rows(output, axis.readers.length, axis.lens.batch_size, blockIdx.x * WARPS + threadIdx.x / 32,
                       gridDim.x * WARPS, lane);
    return true;
  }
  // Whether one of this lane's rows or groups is another than was noted. It takes a trip to L2, for which the first tiles
  // need not wait.
  __device__ __forceinline__ bool changed() const {
    bool found = false;
    const int last_row = axis.lens.batch_size - 1, last_group = axis.groups.num_groups - 1;
    #pragma unroll 1
    for (int i = lane; i <= max(last_row, last_group); i += 64) {
      Axis::Stored now[2];
      #pragma unroll
      for (int more = 0; more < 2; ++more)
        now[more] = axis.stored(min(i + more * 32, last_row), min(i + more * 32, last_group));
      #pragma unroll
      for (int more = 0; more < 2; ++more) {
        found |= axis.row_changed(min(i + more * 32, last_row), now[more]);
        if (last_group >= 0) found |= axis.group_changed(min(i + more * 32, last_group), now[more]);
      }
    }
    return found;
  }
};

// What is known of a step when an attempt begins: nothing, what note_rows finds, or all (StepRecall).
enum class Known { NOTHING, NOTES, PLAN };

// Makes the plan of a CTA, from what is noted.
__device__ __forceinline__ void plan_step(const Axis& given_axis, StepPlan& plan) {
  if (threadIdx.x == 0) plan.axis = given_axis;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const Axis& axis = plan.axis;
    const int least_own = find_readers(axis, lane);
    if (lane == 0) plan.axis.least_own = least_own;
    __syncwarp();
    const StepCut step = StepCut::of(axis, gridDim.x, lane);
    const int range = paired_place(step.cut.num_ranges);
    RangePlace place{range, range};
    ReadWalk reads;
    start_reads(reads, axis, step, range, lane);
    RowWalk rows;
    start_rows(rows, axis, step, range, lane);
    if (rows.some() && rows.tile > 0) place.first = step.cut.range_of(rows.x0);
    if (lane == 0) plan.work = {axis.lens.batch_size, axis.groups.num_groups, step, place, reads, rows};
  }
  __syncthreads();
}

// One attempt at a step. False where the plan did not hold; nothing is written then, and all warps find so.
__device__ __forceinline__ bool attempt_shared(const Axis& given_axis, StepPlan& plan, Known known, bool early,
                                               const Pages& pages, const DecodeArguments& given, const Output& output,
                                               SharedMemories& shared) {
  const int lane = threadIdx.x % 32;
  if (known == Known::NOTHING) note_rows(given_axis, threadIdx.x, THREADS);
  if (known != Known::PLAN) plan_step(given_axis, plan);
  const Axis& axis = plan.axis;
  const RangeWork& work = plan.work;
  const Cut& cut = work.step.cut;
  const SpanSlots slots{given};
  SharedStart start{.axis = axis, .output = output, .plan = plan, .slots = slots, .remembered = known == Known::PLAN,
                    .lane = lane, .early = early, .begun = false};
  if (work.reads.some()) {
    init_barriers(shared.reads);
    ReadEmit emit{.slots = slots, .range = work.place.range, .lane = lane};
#if READ_TILES
    if (!attend_groups(work.reads, pages, given, shared.reads, start, emit)) return false;
#else
    if (!attend(work.reads, pages, given, shared.reads, start, emit)) return false;
#endif
    if (!work.rows.some()) return true;
    __syncthreads();  // the rows' memory is the reads'
  }
  init_barriers(shared.rows);
  Parts parts{.slots = given.partials, .kept = shared.rows.kept, .plan = work.place, .lane = lane};
  RowEmit emit{.output = output, .slots = slots, .parts = parts};
  if (!attend(work.rows, pages, given, shared.rows, start, emit)) return false;
  unsigned char* ring = shared.rows.ring[threadIdx.x / 32 / RowWidth::TEAM_SIZE][0]
                        + RowWidth::team_member() * Parts::RING_BYTES;
  if (parts.held.any) parts.finish(output, ring);
  const MemberMerge merge{.axis = axis, .cut = cut, .slots = slots, .output = output, .range = work.place.range,
                          .lane = lane};
  merge.finish(work.rows, ring);
  return true;
}

}  // namespace pkv
