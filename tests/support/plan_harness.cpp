// Lists the balanced schedule with the device's own arithmetic, one range after the other: what warp_plan.cuh finds
// with scans over a warp, found here with plain sums.
#include <climits>
#include <cmath>

#include "plan.cuh"

struct Task {
  int row, kv_head, split, tile_begin, tile_end;
};

// tasks: room for max_tasks; cta_offsets: [num_ctas + 1]. Returns the number of ranges; cta_offsets[ranges] tasks were
// found, of which at most max_tasks are written. No tokens at all are one range without tasks.
extern "C" int list_balanced(const int* seq_lens, int batch_size, int num_kv_heads, pkv::Costs costs, int window,
                             int num_ctas, Task* tasks, int max_tasks, int* cta_offsets) {
  const int segment_cost = costs.segment;
  const pkv::Lengths lens{seq_lens, batch_size, INT_MAX, window};
  int total = 0, num_heads = 0, most = 0, least = INT_MAX;
  for (int row = 0; row < batch_size; ++row) {
    const int cost = pkv::row_cost(lens.tiles(lens[row]), num_kv_heads, segment_cost);
    total += cost;
    num_heads += cost > 0 ? num_kv_heads : 0;
    if (cost > most) most = cost;
    if (cost > 0 && cost < least) least = cost;
  }
  const pkv::Cut cut(total, num_heads, most == least, num_ctas, costs);
  int count = 0;
  for (int range = 0; range < cut.num_ranges; ++range) {
    cta_offsets[range] = count;
    if (total == 0) continue;
    int row = 0, row_begin = 0;
    for (;; ++row) {
      const int cost = pkv::row_cost(lens.tiles(lens[row]), num_kv_heads, segment_cost);
      if (row_begin + cost > cut.begin(range)) break;
      row_begin += cost;
    }
    pkv::BalancedWalk walk;
    walk.start(lens, num_kv_heads, segment_cost, row, lens[row], row_begin, cut.begin(range), cut.begin(range + 1));
    for (pkv::Segment s; walk.next(s); ++count)
      if (count < max_tasks) tasks[count] = {s.row, s.kv_head, range - cut.range_of(s.slot), s.tile_begin, s.tile_end};
  }
  cta_offsets[cut.num_ranges] = count;
  return cut.num_ranges;
}
