// cuda_src/warp_plan.cuh on a CPU: one warp that plans a range of lengths which change while it does.
#define WARPS 1
#include "cuda_on_cpu.h"

#include "warp_plan.cuh"

struct Given {
  int *lengths, *found;
  const int* later;
  int batch_size, kv_heads, ranges, range, most;
};
static Given given;

// numbers: rows, KV heads, ranges, which of them, the longest length there is room for. lengths [rows] are those of
// `later` once their costs are summed. found: row, x0 and x_end of the walk.
extern "C" const char* plan_while_lengths_change(int* lengths, const int* later, const int* numbers, int* found) {
  given = {lengths, found, later, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
  body = [] {
    using namespace pkv;
    const int lane = threadIdx.x;
    const Costs costs{1, 2, 0, 0};
    const Lengths lens{given.lengths, given.batch_size, given.most, 0};
    const Rows rows(lens, given.kv_heads, costs.segment, lane, lens.stored(lane));
    __syncwarp();
    if (lane == 0) std::copy_n(given.later, given.batch_size, given.lengths);
    __syncwarp();
    const RangePlan plan(rows, Cut(rows.total, rows.num_heads, rows.even, given.ranges, costs), given.range, lane);
    if (lane == 0) given.found[0] = plan.walk.row, given.found[1] = plan.walk.x0, given.found[2] = plan.walk.x_end;
  };
  run_ctas(1);
  return complained();
}
