// pkv_decode_shared: pkv_decode_balanced for steps whose rows may have leading pages in common.
//
// Computes the same as pkv_decode_balanced (balanced.cu), in one launch too, and reads what rows have in common once
// for as many of them as READ_COLUMNS serve. pkvsim.schedule.spans is the specification.
// Grid: [num_ctas]; block: [WARPS * 32]; dynamic shared memory: SharedMemories, StepPlan (shared_step.cuh), then
// Readers::words ints.
//
// The reads of all groups lie before all rows on the cost axis, so a CTA's range has reads, or rows, or both; each has
// a width of its own, and rows are read as in a plain step. Where no row is in a group the step is a plain one, by the
// plain kernel's own code, and costs what it costs there.
//
//   given          as there, but partials: [num_ctas] Slot (of READ_COLUMNS), [num_ctas] PlanRecord, [num_ctas]
//                  StepRecord, then [2][batch_size][num_kv_heads] RowSlot; slots' words are EMPTY_WORD between
//                  launches
//   costs, shared_costs  of the schedule
//   group_of_row   [batch_size] the group whose prefix the row begins with, or -1
//   prefix_pages   [num_groups] pages that the group's rows have in common, 0 where it is unused
//   max_tokens, written  as there
//
// Its speed is bound by HBM and, where reads serve many columns, by the products; at its end by the latency of the
// merge.
#include "balanced_step.cuh"
#include "shared_step.cuh"

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_shared(const pkv::DecodeArguments given, const pkv::Costs costs, const pkv::SharedCosts shared_costs,
                  const int* group_of_row, const int* prefix_pages, int num_groups, int max_tokens) {
  using namespace pkv;
#if READ_TILES
  extern __shared__ __align__(1024) unsigned char memory[];  // the swizzle is one of addresses
#else
  extern __shared__ __align__(128) unsigned char memory[];
#endif
  SharedMemories& shared = *reinterpret_cast<SharedMemories*>(memory);
  StepPlan& step = *reinterpret_cast<StepPlan*>(memory + sizeof(SharedMemories));
  const int stream = threadIdx.x / 32 / RowWidth::TEAM_SIZE, lane = threadIdx.x % 32;
  const Pages pages = pages_of(given);
  const Output output = output_of(given);
  const Lengths lens{given.lengths, given.batch_size, max_tokens, given.reach() PKV_LAST_PAGE(, given.row_begins)};
  const Groups groups{group_of_row, prefix_pages, num_groups, PAGE_SIZE, QUERY_TOKENS};
  const Readers readers(reinterpret_cast<int*>(memory + READ_SHARED_BYTES), given.batch_size, num_groups);
  const Axis axis{lens, groups, readers, shared_costs, costs, given.num_kv_heads, COLUMNS};

  let_next_kernel_start();
  const bool overlapped = KERNELS_OVERLAP && given.batch_size <= NOTED_LENGTHS;
  if (!overlapped) wait_for_previous_kernel();
  RangePlan plan;
  EarlyPlan planning{
      .lens = lens, .num_kv_heads = given.num_kv_heads, .costs = costs, .plan = plan,
      .record = reinterpret_cast<PlanRecord*>(given.partials + gridDim.x) + blockIdx.x,
      .noted = reinterpret_cast<int*>(shared.rows.states[0][stream][RowWidth::first_column()]), .lane = lane,
      .early = overlapped, .groups = groups};
  planning.ask();
  StepRecall recall;
  recall.ask(reinterpret_cast<const StepRecord*>(SpanSlots{given}.step_records()) + blockIdx.x, given.batch_size,
             num_groups);
  prefetch_table(pages, given.batch_size);
  const bool mine = note_rows(axis, threadIdx.x, THREADS);
  init_barriers(shared.rows);
  // The first plan is one that the CTA agrees on, since its threads may find different things. What they find later is
  // what the previous kernel left, so that warps which have to make another plan agree with those that have not.
  bool together = __syncthreads_or(mine);
  if (!together) planning.recall();
  Known known = Known::NOTES;
  if (together && __syncthreads_and(recall.fits(axis))) {
    known = Known::PLAN;
    recall.restore(axis, step);
    __syncthreads();
  }
  #pragma unroll 1
  for (;;) {
    if (together ? attempt_shared(axis, step, known, planning.early, pages, given, output, shared)
                 : attempt_step(planning, plan, pages, given, output, shared.rows))
      break;
    planning.distrust();
    known = Known::NOTHING;
    settle(planning.found), settle(plan);
    const bool before = together;
    together = __any_sync(ALL_LANES, groups.any_grouped(given.batch_size, lane, 32));
    if (before || together) __syncthreads();  // no warp works by the last plan any more
    if (before && !together) init_barriers(shared.rows);
  }
}
