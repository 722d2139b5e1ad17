// pkv_decode_balanced: paged decode attention, one launch, planned on the device.
//
// Computes softmax(q K^T * scale) V of each row's query tokens over its pages, for rows of any length.
// Grid: [num_ctas]; block: [WARPS * 32]; dynamic shared memory: SharedMemory (attend.cuh).
//
// Every CTA reads the lengths itself and finds its own equal-cost range of tiles (plan.cuh): there is no planner and no
// host. It does so while the previous kernel still runs (early_plan.cuh). Heads that ranges cut are merged by the CTA
// that holds their end (parts.cuh). A CTA waits only for CTAs of lower index, which never wait for it, so progress
// needs no co-residency.
//
//   given       see DecodeArguments for the arrays and their shapes. partials: [num_ctas] Slot, all words EMPTY_WORD
//               between launches, then [num_ctas] PlanRecord
//   costs       of the schedule
//   max_tokens  that a row of the table has room for; lengths beyond are cut to it
//   written     out and lse of every row; partials are left as they were found, records hold the plans
//
// Its speed is bound by HBM: each K,V byte is read once, and the rest is a few KiB of each CTA. Steps of a few
// microseconds are bound by the chain of reads from a length to the last merge.
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

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_balanced(const pkv::DecodeArguments given, const pkv::Costs costs, int max_tokens) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(memory);
  const int stream = threadIdx.x / 32 / TEAM, lane = threadIdx.x % 32;
  const Pages pages = pages_of(given);
  const Output output = output_of(given);
  const Lengths lens{given.lengths, given.batch_size, max_tokens, given.reach() PKV_LAST_PAGE(, given.row_begins)};

  let_next_kernel_start();
  const bool early = KERNELS_OVERLAP && given.batch_size <= NOTED_LENGTHS;
  if (!early) wait_for_previous_kernel();
  RangePlan plan;
  EarlyPlan planning{
      .lens = lens, .num_kv_heads = given.num_kv_heads, .costs = costs, .plan = plan,
      .record = reinterpret_cast<PlanRecord*>(given.partials + gridDim.x) + blockIdx.x,
      .noted = reinterpret_cast<int*>(shared.states[0][stream][first_column()]), .lane = lane, .early = early};
  planning.ask();
  prefetch_table(pages, given.batch_size);
  init_barriers(shared);
  #pragma unroll 1
  for (planning.recall();; planning.distrust()) {
    planning.make();
    EarlyStart start{.from = planning, .output = output};
    Parts parts{.slots = given.partials, .kept = shared.kept, .plan = plan, .lane = lane};
    BalancedEmit emit{.output = output, .parts = parts};
    if (!attend(plan.walk, pages, given, shared, start, emit)) continue;
    if (parts.held.any) parts.finish(output, shared.ring[stream][0] + team_member() * Parts::RING_BYTES);
    break;
  }
}
