// pkv_list_balanced: writes down the tasks that pkv_decode_balanced would run, for inspection and tests.
//
// Computes each range's segments as the decode kernel does, from the same lengths and costs.
// Grid: [num_ctas] as the decode kernel's; block: [32].
//
//   lengths, row_begins, max_tokens, window: see Lengths; window is its reach (DecodeArguments)
//   costs   of the schedule
//   tasks   [num_ctas][max_tasks] Task, written; `split` is the order of the partial within its KV head
//   counts  [num_ctas], written: the tasks of each range, also those past max_tasks
//
// Its speed matters to nobody; a lane writes a task at a time.
#include "warp_plan.cuh"

extern "C" __global__ void
pkv_list_balanced(const int* lengths, int batch_size, int num_kv_heads, const pkv::Costs costs, int max_tokens,
                  int window, pkv::Task* tasks, int max_tasks, int* counts, const int* row_begins) {
  const int lane = threadIdx.x, range = blockIdx.x;
  int count = 0;
  const pkv::Lengths lens{lengths, batch_size, max_tokens, window PKV_LAST_PAGE(, row_begins)};
  const pkv::Rows rows(lens, num_kv_heads, costs.segment, lane, lens.stored(lane));
  const pkv::Cut cut(rows.total, rows.num_heads, rows.even, gridDim.x, costs);
  if (rows.total > 0 && range < cut.num_ranges) {
    pkv::BalancedWalk walk;
    walk.x0 = walk.x_end = 0;
    rows.start(walk, cut, range, lane);
    for (pkv::Segment s; walk.next(s); ++count)
      if (lane == 0 && count < max_tasks)
        tasks[static_cast<long long>(range) * max_tasks + count] = {
            s.row, s.kv_head, range - cut.range_of(s.slot), s.tile_begin, s.tile_end};
  }
  if (lane == 0) counts[range] = count;
}
