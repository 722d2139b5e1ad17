// pkv_decode_balanced: paged decode attention, one launch, planned on the device.
//
// Computes softmax(q K^T * scale) V of each row's query tokens over its pages, for rows of any length.
// Grid: [num_ctas]; block: [WARPS * 32]; dynamic shared memory: SharedMemory<RowWidth> (attend.cuh).
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
#include "balanced_step.cuh"

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_balanced(const pkv::DecodeArguments given, const pkv::Costs costs, int max_tokens) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  SharedMemory<RowWidth>& shared = *reinterpret_cast<SharedMemory<RowWidth>*>(memory);
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
      .noted = reinterpret_cast<int*>(shared.states[0][stream][RowWidth::first_column()]), .lane = lane,
      .early = early};
  planning.ask();
  prefetch_table(pages, given.batch_size);
  init_barriers(shared);
  #pragma unroll 1
  for (planning.recall(); !attempt_step(planning, plan, pages, given, output, shared);) planning.distrust();
}
