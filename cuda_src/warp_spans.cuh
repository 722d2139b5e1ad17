// How a warp finds who reads together, and its CTA's range of a step whose rows do: sums and scans over entries, 32
// at a time.
#pragma once
#include "spans.cuh"
#include "warp_plan.cuh"

namespace pkv {

// Notes lengths and groups, each of `workers` threads some. All meet before find_readers.
__device__ __forceinline__ void note_rows(const Axis& axis, int worker, int workers) {
  #pragma unroll 4
  for (int row = worker; row < axis.lens.batch_size; row += workers) axis.note_row(row, axis.lens[row]);
  #pragma unroll 4
  for (int group = worker; group < axis.groups.num_groups; group += workers) axis.note_group(group);
}

// Finds the members of all groups in what was noted. Called by one whole warp; others look at it after a barrier.
__device__ __forceinline__ void find_readers(const Axis& axis, int lane) {
  const Readers& readers = axis.readers;
  const int batch_size = axis.lens.batch_size, num_groups = axis.groups.num_groups;
  for (int base = 0; base < batch_size; base += 32) {
    const int row = base + lane;
    const int group = row < batch_size ? readers.group[row] : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, group);
    const int rank = __popc(peers & ((1u << lane) - 1)), before = group >= 0 ? readers.count[group] : 0;
    __syncwarp();
    if (row < batch_size) readers.place[row] = before + rank;
    if (group >= 0 && rank == 0) readers.count[group] = before + __popc(peers);
    __syncwarp();
  }
  // A group of one has nobody to read with.
  int listed = 0;
  for (int base = 0; base < num_groups; base += 32) {
    const int group = base + lane, found = group < num_groups ? readers.count[group] : 0, count = found < 2 ? 0 : found;
    const int through = scan(count, lane);
    if (group < num_groups) readers.count[group] = count, readers.begin[group] = listed + through - count;
    listed += __shfl_sync(0xffffffffu, through, 31);
  }
  __syncwarp();
  for (int row = lane; row < batch_size; row += 32) {
    const int group = readers.group[row];
    if (group < 0) continue;
    if (readers.count[group] == 0) readers.group[row] = -1;
    else readers.rows[readers.begin[group] + readers.place[row]] = row;
  }
  __syncwarp();
  int before = 0;
  for (int base = 0; base < num_groups; base += 32) {
    const int group = base + lane, cost = group < num_groups ? axis.group_entry(group).cost() : 0;
    const int through = scan(cost, lane);
    if (group < num_groups) readers.at[group] = before + through - cost;
    before += __shfl_sync(0xffffffffu, through, 31);
  }
  __syncwarp();
}

// What all entries cost, as seen by one warp, after find_readers.
struct Entries {
  const Axis& axis;
  int total, num_spans;
  bool shared, even;  // whether any is a group's; whether all that are there cost the same

  __device__ __forceinline__ Entries(const Axis& entries, int lane) : axis(entries) {
    int cost = 0, spans = 0, members = 0, most = 0, least = 0x7fffffff;
    for (int index = lane; index < axis.num_entries(); index += 32) {
      const Entry entry = axis.entry(index);
      const int own = entry.cost();
      cost += own, spans += entry.spans, most = max(most, own), least = own > 0 ? min(least, own) : least;
      if (index < axis.groups.num_groups) members |= entry.spans;
    }
    total = __reduce_add_sync(0xffffffffu, cost), num_spans = __reduce_add_sync(0xffffffffu, spans);
    shared = __any_sync(0xffffffffu, members);
    even = __reduce_max_sync(0xffffffffu, most) == __reduce_min_sync(0xffffffffu, least);
  }
  __device__ __forceinline__ Cut cut(int num_ctas) const {
    return axis.cut(total, num_spans, shared, even, num_ctas);
  }
  // Points `walk` at a range. Of no entries at all none has anything.
  __device__ __forceinline__ void start(SpanWalk& walk, const Cut& cut, int range, int lane) const {
    const int x_begin = cut.begin(range), x_end = cut.begin(range + 1);
    int before = 0;
    for (int base = 0; base < axis.num_entries(); base += 32) {
      const int own = base + lane < axis.num_entries() ? axis.entry(base + lane).cost() : 0, upto = scan(own, lane);
      const unsigned reached = __ballot_sync(0xffffffffu, before + upto > x_begin);
      if (reached) {
        const int owner = __ffs(reached) - 1;
        walk.start(axis, base + owner, __shfl_sync(0xffffffffu, before + upto - own, owner), x_begin, x_end);
        return;
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
    }
    walk.axis = axis, walk.x0 = walk.x_end = 0;
  }
};

}  // namespace pkv
