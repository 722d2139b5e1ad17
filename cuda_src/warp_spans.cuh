// How a warp finds who reads together, and its CTA's range of a step whose rows do: sums and scans over entries, 32
// at a time.
//
// It is code that runs once a launch, if at all, and is fetched from L2 as it goes: loops are not unrolled.
#pragma once
#include "spans.cuh"
#include "warp_plan.cuh"

namespace pkv {

// Notes lengths and groups, each of `workers` threads some, and returns whether one of those rows is in a group. All
// meet before find_readers. Whatever there is to read is asked for at once.
__device__ __forceinline__ bool note_rows(const Axis& axis, int worker, int workers) {
  const int batch_size = axis.lens.batch_size, num_groups = axis.groups.num_groups;
  bool grouped = false;
  #pragma unroll 1
  for (int i = worker; i < max(batch_size, num_groups); i += workers) {
    const int row = min(i, batch_size - 1), group = min(i, num_groups - 1);
    const Axis::Stored found = axis.stored(row, group);
    const int length = axis.lens.cut(found.length), asked = axis.groups.asked(found.group);
    const int tokens = axis.groups.tokens(found.pages, axis.lens.most);
    if (i < batch_size) axis.note_row(row, length, asked), grouped |= asked >= 0;
    if (i < num_groups) axis.note_group(group, tokens);
  }
  return grouped;
}

// Finds the members of all groups in what was noted, and returns Axis::least_own. Called by one whole warp; others look
// at it after a barrier.
__device__ __forceinline__ int find_readers(const Axis& axis, int lane) {
  const Readers& readers = axis.readers;
  const int batch_size = axis.lens.batch_size, num_groups = axis.groups.num_groups;
  #pragma unroll 1
  for (int base = 0; base < batch_size; base += 32) {
    const int row = base + lane;
    int group = row < batch_size ? readers.group[row] : -1;
    if (row < batch_size) group = readers.group[row] = axis.fitting(readers.length[row], group);
    const unsigned peers = __match_any_sync(0xffffffffu, group);
    const int rank = __popc(peers & ((1u << lane) - 1)), before = group >= 0 ? readers.count[group] : 0;
    __syncwarp();
    if (row < batch_size) readers.place[row] = before + rank;
    if (group >= 0 && rank == 0) readers.count[group] = before + __popc(peers);
    __syncwarp();
  }
  // A group of one has nobody to read with.
  int listed = 0;
  #pragma unroll 1
  for (int base = 0; base < num_groups; base += 32) {
    const int group = base + lane, found = group < num_groups ? readers.count[group] : 0, count = found < 2 ? 0 : found;
    const int through = scan(count, lane);
    if (group < num_groups) readers.count[group] = count, readers.begin[group] = listed + through - count;
    listed += __shfl_sync(0xffffffffu, through, 31);
  }
  __syncwarp();
  #pragma unroll 1
  for (int row = lane; row < batch_size; row += 32) {
    const int group = readers.group[row];
    if (group < 0) continue;
    if (readers.count[group] == 0) readers.group[row] = Readers::alone_in(group);
    else readers.rows[readers.begin[group] + readers.place[row]] = row;
  }
  __syncwarp();
  int before = 0;
  #pragma unroll 1
  for (int base = 0; base < num_groups; base += 32) {
    const int group = base + lane, cost = group < num_groups ? axis.group_entry(group).cost() : 0;
    const int through = scan(cost, lane);
    if (group < num_groups) readers.at[group] = before + through - cost;
    before += __shfl_sync(0xffffffffu, through, 31);
  }
  __syncwarp();
  return axis.shared.least_own(before, listed * axis.num_kv_heads);
}

// How a step is cut, found by one warp after find_readers for the whole CTA.
struct StepCut {
  Cut cut;
  int total, reads_total;  // cost of all entries, and of those of groups, which come first
  bool some_empty;         // rows
  int least_own;           // as Axis

  __device__ __forceinline__ static StepCut of(const Axis& axis, int num_ctas, int lane) {
    int reads = 0, cost = 0, spans = 0, grouped = 0, most = 0, least = 0x7fffffff, empty = 0;
    #pragma unroll 1
    for (int group = lane; group < axis.groups.num_groups; group += 32) {
      const Entry entry = axis.group_entry(group);
      const int own = entry.cost();
      reads += own, grouped += entry.spans;
      if (own > 0) most = max(most, own), least = min(least, own);
    }
    #pragma unroll 1
    for (int row = lane; row < axis.lens.batch_size; row += 32) {
      const Entry entry = axis.row_entry(row);
      const int own = entry.cost();
      cost += own, spans += entry.spans, empty |= own == 0;
      if (own > 0) most = max(most, own), least = min(least, own);
    }
    const int reads_total = __reduce_add_sync(0xffffffffu, reads);
    const int total = reads_total + __reduce_add_sync(0xffffffffu, cost);
    const int num_spans = __reduce_add_sync(0xffffffffu, spans + grouped);
    const bool even = __reduce_max_sync(0xffffffffu, most) == __reduce_min_sync(0xffffffffu, least);
    return {axis.cut(total, num_spans, reads_total > 0, even, num_ctas), total, reads_total,
            __any_sync(0xffffffffu, empty) != 0, axis.least_own};
  }
};

// Points a walk at a range's reads, which come before its rows. Whole warps call it.
__device__ __forceinline__ void start_reads(ReadWalk& reads, const Axis& axis, const StepCut& step, int range,
                                            int lane) {
  reads.start_empty(axis);
  if (range >= step.cut.num_ranges) return;
  const int x_begin = step.cut.begin(range);
  if (x_begin >= step.reads_total) return;
  int group = 0;
  #pragma unroll 1
  for (int base = 0;; base += 32) {
    // Entries that begin at or before x_begin; an absent one begins where the next does.
    const int own = base + lane;
    const bool before = own < axis.groups.num_groups && axis.readers.at[own] <= x_begin;
    const unsigned found = __ballot_sync(0xffffffffu, before && axis.readers.count[own] > 0);
    const unsigned all = __ballot_sync(0xffffffffu, before);
    if (found) group = base + 31 - __clz(found);
    if (all != 0xffffffffu || base + 32 >= axis.groups.num_groups) break;
  }
  reads.start(axis, group, axis.readers.at[group], x_begin, min(step.cut.begin(range + 1), step.reads_total));
}

// The same of its rows.
__device__ __forceinline__ void start_rows(RowWalk& rows, const Axis& axis, const StepCut& step, int range, int lane) {
  rows.start_empty(axis);
  if (range >= step.cut.num_ranges) return;
  const int x_end = step.cut.begin(range + 1), rows_begin = max(step.cut.begin(range), step.reads_total);
  if (x_end <= step.reads_total || step.total <= 0) return;
  int before = step.reads_total;
  #pragma unroll 1
  for (int base = 0;; base += 32) {
    const int row = base + lane, own = row < axis.lens.batch_size ? axis.row_entry(row).cost() : 0;
    const int upto = scan(own, lane);
    const unsigned reached = __ballot_sync(0xffffffffu, before + upto > rows_begin);
    if (reached) {
      const int owner = __ffs(reached) - 1;
      const int begins_at = before + __shfl_sync(0xffffffffu, upto - own, owner);
      rows.start(axis, base + owner, begins_at, rows_begin, x_end);
      return;
    }
    before += __shfl_sync(0xffffffffu, upto, 31);
  }
}

}  // namespace pkv
