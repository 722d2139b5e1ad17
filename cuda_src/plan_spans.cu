// pkv_list_spans: writes down the tasks of a step whose rows share reads, for inspection and tests.
//
// Grid: [num_ctas] as the decode kernel's, block: [32]; dynamic shared memory: pkv::Readers::words ints.
//   group_of_row [batch_size], prefix_pages [num_groups] int32: see Groups
//   tasks  [num_ctas][max_tasks] SpanTask
//   counts [num_ctas] int32: tasks of each range, also those past max_tasks
//   parts  [batch_size][num_kv_heads][3] int32: SharedParts of the members, others untouched
#include "warp_spans.cuh"

namespace pkv {

// One line of the list: a task, and of a read its group, its number in it and the rows it is for (else -1, -1 and 1).
struct SpanTask {
  int group, read, members, row, kv_head, split, tile_begin, tile_end;
};

}  // namespace pkv

extern "C" __global__ void pkv_list_spans(const int* lengths, const int* group_of_row, const int* prefix_pages,
                                          int batch_size, int num_groups, int num_kv_heads, int row_columns,
                                          int query_tokens, int page_size, const pkv::Costs costs,
                                          const pkv::SharedCosts shared, int max_tokens, pkv::SpanTask* tasks,
                                          int max_tasks, int* counts, int* parts, const int* row_begins) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x, range = blockIdx.x;
  static_cast<void>(row_begins);  // only with LAST_PAGE_LENGTHS
  pkv::Axis axis{{lengths, batch_size, max_tokens, 0 PKV_LAST_PAGE(, row_begins)},
                 {group_of_row, prefix_pages, num_groups, page_size, query_tokens},
                 pkv::Readers(reinterpret_cast<int*>(memory), batch_size, num_groups),
                 shared, costs, num_kv_heads, row_columns};
  pkv::note_rows(axis, lane, 32);
  __syncwarp();
  axis.least_own = pkv::find_readers(axis, lane);
  const pkv::StepCut step = pkv::StepCut::of(axis, gridDim.x, lane);
  const pkv::Cut& cut = step.cut;
  int count = 0;
  const auto list = [&](const pkv::Segment& s, int group, int read, int members) {
    if (lane == 0 && count < max_tasks)
      tasks[static_cast<long long>(range) * max_tasks + count] = {
          group, read, members, s.row, s.kv_head, range - cut.range_of(s.slot), s.tile_begin, s.tile_end};
    ++count;
  };
  pkv::ReadWalk reads;
  pkv::RowWalk rows;
  pkv::start_reads(reads, axis, step, range, lane);
  pkv::start_rows(rows, axis, step, range, lane);
  for (pkv::ReadPiece s; reads.next(s);) list(s, s.group, s.read, s.members);
  for (pkv::RowPiece s; rows.next(s);) list(s, -1, -1, 1);
  if (lane == 0) counts[range] = count;
  for (int row = range; row < batch_size; row += gridDim.x)
    for (int head = lane; axis.readers.group[row] >= 0 && head < num_kv_heads; head += 32) {
      const pkv::SharedParts found = axis.parts_of(row, head, cut);
      int* to = parts + (row * num_kv_heads + head) * 3;
      to[0] = found.first, to[1] = found.last, to[2] = found.column;
    }
}
