// A balanced step in which every row reads for itself: what pkv_decode_balanced does, and pkv_decode_shared where no
// row is in a group.
#pragma once
#include "early_plan.cuh"
#include "parts.cuh"

namespace pkv {

// Where the results of a range go.
struct BalancedEmit {
  const Output& output;
  Parts& parts;

  __device__ __forceinline__ void operator()(const Segment& s, int column, const HeadState& state) {
    if (s.begins && s.ends) store_result(output, s.row, s.kv_head, column, state, parts.lane);
    else if (s.ends) parts.keep(s, column, state);
    else parts.send(column, state);
  }
};

// Asks for the block table before the plan is known, so that its first read is an L2 hit. Only small tables are: a wide
// one may be mostly unused. The last of several rows is left out, since it may end before its stride does.
__device__ __forceinline__ void prefetch_table(const Pages& pages, int batch_size) {
  constexpr int LINE = 128 / sizeof(page_id), MOST = 1 << 16;
  const int entries = TABLE_CSR ? pages.table.stride : max(1, batch_size - 1) * pages.table.stride;
  const int at = (threadIdx.x * gridDim.x + blockIdx.x) * LINE;
  if (entries <= MOST && at < entries) prefetch_l2(pages.table.ids + at);
  PKV_CSR(if (at <= batch_size) prefetch_l2(pages.table.row_begins + at);)
}

// One attempt at a step by `planning`, which makes `plan`. False where the plan did not hold; nothing is written then.
__device__ __forceinline__ bool attempt_step(EarlyPlan& planning, const RangePlan& plan, const Pages& pages,
                                             const DecodeArguments& given, const Output& output,
                                             SharedMemory<RowWidth>& shared) {
  planning.make();
  EarlyStart<Output> start{.from = planning, .output = output};
  Parts parts{.slots = given.partials, .kept = shared.kept, .plan = plan, .lane = planning.lane};
  BalancedEmit emit{.output = output, .parts = parts};
  if (!attend(plan.walk, pages, given, shared, start, emit)) return false;
  const int stream = threadIdx.x / 32 / RowWidth::TEAM_SIZE;
  if (parts.held.any) parts.finish(output, shared.ring[stream][0] + RowWidth::team_member() * Parts::RING_BYTES);
  return true;
}

}  // namespace pkv
