// pkv_decode_several: one rank's launch of a decode step whose rows' pages are spread over RANKS GPUs.
//
// Computes what pkv_decode_balanced (balanced.cu) does of rows of which every rank has some pages, in one launch of each
// rank: it attends to this rank's pages and merges the states of all ranks of what this rank owns (inbox.cuh).
// Grid: [num_ctas], the same in every launch; block: [WARPS * 32]; dynamic shared memory: SharedMemory<RowWidth>
// (attend.cuh), then OpenedStep for each warp. All CTAs have to be on the GPU at a time, beside those of other ranks
// that share it: they wait for each other.
//
//   given       as there, but lengths: whole rows', of which `share` says how many tokens are here; the page table has
//               this rank's pages. partials: [num_ctas] Slot, [num_ctas] PlanRecord, [num_ctas * WARPS] the number of
//               the last step, all words EMPTY_WORD at first
//   ranks       see RankArguments; every rank launches its steps in the same order, with the same batch_size and owner
//   costs, max_tokens  as there, of this rank's pages
//   written     out and lse of what this rank owns; the inboxes are left empty
//
// Its speed is bound by each rank's HBM; at its end by the way of a state to another GPU, about 0.7 us over NVLink.
//
// pkv_merge_ranks: the merge alone, where GPUs do not reach each other's memory and the host exchanges the states.
// Grid: [any]; block: [WARPS * 32].
//
//   states      [RANKS][stride] Slot, of this rank's places on; stride: slots of each source
//   written     out and lse of those places
//
// Its speed is bound by the latency of one read of the states.
#include "several_step.cuh"

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_several(const pkv::DecodeArguments given, const pkv::Costs costs, const pkv::RankArguments ranks,
                   int max_tokens) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  SharedMemory<RowWidth>& shared = *reinterpret_cast<SharedMemory<RowWidth>*>(memory);
  const int warp = threadIdx.x / 32, stream = warp / TEAM, lane = threadIdx.x % 32;
  const Pages pages = pages_of(given);
  const Output output = output_of(given);
  const Lengths lens{given.lengths, given.batch_size, max_tokens, given.reach(),
                     {ranks.share_begin, ranks.share_tokens, ranks.share_cycle, ranks.share_magic, ranks.share_shift}};
  const Ownership who{ranks.owner, given.batch_size, given.num_kv_heads};
  PlanRecord* const records = reinterpret_cast<PlanRecord*>(given.partials + gridDim.x);
  const Links links{.ranks = ranks, .who = who, .output = output,
                    .opened = reinterpret_cast<OpenedStep*>(memory + sizeof(SharedMemory<RowWidth>))[warp],
                    .number = reinterpret_cast<unsigned*>(records + gridDim.x) + blockIdx.x * WARPS + warp,
                    .lane = lane};

  if (!ranks.same_gpu) let_next_kernel_start();
  const bool early = KERNELS_OVERLAP && given.batch_size <= NOTED_LENGTHS;
  if (!early) wait_for_previous_kernel();
  RangePlan plan;
  EarlyPlan planning{
      .lens = lens, .num_kv_heads = given.num_kv_heads, .costs = costs, .plan = plan,
      .record = records + blockIdx.x,
      .noted = reinterpret_cast<int*>(shared.states[0][stream][RowWidth::first_column()]), .lane = lane,
      .early = early};
  planning.ask();
  prefetch_table(pages, given.batch_size);
  init_barriers(shared);
  #pragma unroll 1
  for (planning.recall(); !attempt_rank(planning, plan, pages, given, links, shared);) planning.distrust();
  links.merge();
  links.close();
}

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_merge_ranks(const pkv::Slot* states, int stride, half_type* out, float* lse, const float* sinks, int rank,
                int owner, int batch_size, int num_kv_heads) {
  using namespace pkv;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int lane = threadIdx.x % 32;
  const Ownership who{owner, batch_size, num_kv_heads};
  const Output output{out, lse, num_kv_heads, nullptr, sinks};
  const int first = who.begin(rank), items = (who.end(rank) - first) * COLUMNS;
  for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * WARPS) {
    RankStates found;
    found.read(states + item / COLUMNS, stride, item % COLUMNS, lane);
    const int2 at = who.at(first + item / COLUMNS);
    store_merged(output, at.x, at.y, item % COLUMNS, found.sum(lane), lane);
  }
}
