// How a CTA finds its range of the lists' tiles (lists.cuh).
//
// There is a list for every (row, KV head), so they are many. The whole CTA plans, each thread for some of the lists,
// where few rows are planned by each warp for itself (warp_plan.cuh).
#pragma once
#include "attend.cuh"
#include "warp_plan.cuh"

namespace pkv {

// What the CTA's threads tell each other of the plan, in shared memory.
struct ListNotes {
  int total[WARPS], live[WARPS], most[WARPS], least[WARPS];  // of each warp's lists
  int first, begin;                                          // the list that the CTA's range begins in, where,
  ListSize size;                                             // and its size
};

// One CTA's plan of a step. The whole CTA makes it, each thread of as many neighbouring lists as the others.
struct ListPlan : RangePlace {
  ListWalk walk;
  bool some_empty;  // lists

  __device__ __forceinline__ ListPlan(const Lists& lists, const Costs& costs, ListNotes& notes) : RangePlace{0, 0} {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int each = divide(lists.count() + THREADS - 1, THREADS), begin = threadIdx.x * each;
    const int end = min(begin + each, lists.count());
    int own = 0, live = 0, most = 0, least = 0x7fffffff;
    ListSize mine{0, 0};  // of the first of them, which are few: mostly it is the only one
    #pragma unroll 4
    for (int v = begin; v < end; ++v) {
      const ListSize size = lists.size(v);
      if (v == begin) mine = size;
      const int cost = row_cost(size.tiles(), 1, costs.segment);
      own += cost, live += cost > 0, most = max(most, cost), least = cost > 0 ? min(least, cost) : least;
    }
    const int through = scan(own, lane);
    live = __reduce_add_sync(ALL_LANES, live);
    most = __reduce_max_sync(ALL_LANES, most), least = __reduce_min_sync(ALL_LANES, least);
    if (lane == 31) notes.total[warp] = through;
    if (lane == 0) notes.live[warp] = live, notes.most[warp] = most, notes.least[warp] = least;
    __syncthreads();
    int total = 0, before = through - own;
    live = 0, most = 0, least = 0x7fffffff;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) before += notes.total[w];
      total += notes.total[w], live += notes.live[w];
      most = max(most, notes.most[w]), least = min(least, notes.least[w]);
    }
    const Cut cut(total, live, most == least, gridDim.x, costs);
    some_empty = live < lists.count();
    walk.lists = lists, walk.segment_cost = costs.segment;
    walk.v = walk.tile = walk.x0 = walk.x_end = 0, walk.size = {0, 0};  // an empty walk
    range = first = paired_place(cut.num_ranges);
    if (total <= 0 || range >= cut.num_ranges) return;  // the whole CTA
    const int x_begin = cut.begin(range), x_end = cut.begin(range + 1);
    if (before <= x_begin && x_begin < before + own) {
      int v = begin, cost = row_cost(mine.tiles(), 1, costs.segment);
      while (before + cost <= x_begin) {
        before += cost, mine = lists.size(++v);
        cost = row_cost(mine.tiles(), 1, costs.segment);
      }
      notes.first = v, notes.begin = before, notes.size = mine;
    }
    __syncthreads();
    walk.start(notes.first, notes.size, notes.begin, x_begin, x_end);
    if (walk.tile > 0) first = cut.range_of(walk.x0);
  }
};

}  // namespace pkv
