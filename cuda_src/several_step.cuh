// What a rank's warps do of a balanced step over several GPUs: balanced_step.cuh's, whose results go to the inboxes of the
// ranks that own them (inbox.cuh) instead of an output.
//
// The step is opened where the plan is checked, once the previous kernel has ended, and each rank merges what it owns
// after the last send. The parts of heads that CTAs of one rank cut meet within the rank (parts.cuh): other ranks see
// whole states alone.
#pragma once
#include "balanced_step.cuh"
#include "inbox.cuh"

namespace pkv {

// The `start` of attend: EarlyStart's, and the step is opened.
struct RankStart {
  EarlyStart<Links> early;
  const Links& links;
  Links::Asked asked;

  static constexpr bool EARLY = KERNELS_OVERLAP;

  __device__ __forceinline__ void release(const Pages& pages, const Loader<BalancedWalk, RowWidth>& loader) {
    early.release(pages, loader);
    asked = links.ask();
  }
  __device__ __forceinline__ bool begin(const Pages& pages) {
    links.open(asked);
    if (!early.begin(pages)) return false;
    links.count();
    links.let_next_start(LOOKS);
    return true;
  }
};

// Where the results of a range go.
struct RankEmit {
  const Links& links;
  Parts& parts;

  __device__ __forceinline__ void operator()(const Segment& s, int column, const HeadState& state) {
    if (s.begins && s.ends) links.send(s.row, s.kv_head, column, state);
    else if (s.ends) parts.keep(s, column, state);
    else parts.send(column, state);
  }
};

// One attempt at a rank's part of a step, up to its last send. False where the plan did not hold; nothing is written
// then.
__device__ __forceinline__ bool attempt_rank(EarlyPlan& planning, const RangePlan& plan, const Pages& pages,
                                             const DecodeArguments& given, const Links& links,
                                             SharedMemory<RowWidth>& shared) {
  planning.make();
  RankStart start{.early = {.from = planning, .output = links}, .links = links};
  Parts parts{.slots = given.partials, .kept = shared.kept, .plan = plan, .lane = planning.lane};
  RankEmit emit{.links = links, .parts = parts};
  if (!attend(plan.walk, pages, given, shared, start, emit)) return false;
  const int stream = threadIdx.x / 32 / RowWidth::TEAM_SIZE;
  if (parts.held.any) parts.finish(links, shared.ring[stream][0] + RowWidth::team_member() * Parts::RING_BYTES);
  return true;
}

}  // namespace pkv
