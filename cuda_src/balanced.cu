// pkv_decode_balanced: paged decode attention, one launch, planned on the device.
//
// Computes softmax(q K^T * scale) V for one query token per row over paged K,V, rows of any length.
// Grid: [num_ctas]; block: [WARPS * 32]; dynamic shared memory: SharedMemory.
// Every CTA reads seq_lens itself and finds its own equal-cost range of tiles (plan.cuh): no planner, no host.
//
// A CTA holds at most two partial segments. One that its range cuts at the end goes to the CTA's slot in
// `partials`; one that an earlier CTA began and this CTA ends is merged here, last of all, with the slots of the
// CTAs before it, in their order. A CTA waits only for CTAs of lower index, which never wait for it, so progress
// needs no co-residency; the reader empties the slots again, so the workspace is clean when the kernel ends.
//
//   given    see DecodeArguments
//   partials [num_ctas] Slot: the CTAs' slots, all words EMPTY_WORD between launches
//
// Bound by HBM: each K,V byte is read once; the rest is a few KiB per CTA.
#include "attend.cuh"
#include "warp_plan.cuh"

namespace pkv {

constexpr int RING_PART = STAGES * SLOT_BYTES / TEAM;     // bytes
constexpr int NOTED_LENGTHS = LAST_COLUMNS * STATE_ROW;  // that any warp's rows of states have room for

struct BalancedEmit {
  Output output;
  Slot* partials;            // [num_ctas]
  float (*kept)[STATE_ROW];  // [COLUMNS] in shared memory: this CTA's part of the segment it will merge
  const Lengths& lens;
  const RangePlan& plan;
  PlanRecord* record;
  const ReadRecord& found;   // of the record, before the previous kernel's end
  bool recalled;             // whether the plan was read there
  bool early;                // lengths, page ids and the record may have changed since they were read
  const int* noted;          // [batch_size] the lengths that were, but for the first 32
  int lane;
  int length, ids_before, changes;  // of row `lane`, read again; the first page ids that were read; see later_changes
  page_id ids;                      // the same read again
  ReadRecord again;                 // of the record, where the plan was read there
  int held_row, held_head;
  bool holds;

  static constexpr bool EARLY = KERNELS_OVERLAP;
  // Waits for the previous kernel's end, and asks again for what was read before it: without waiting, for up to 32 rows.
  __device__ __forceinline__ void release(const Pages& pages, const Loader<BalancedWalk>& loader) {
    if (!early) return;
    wait_for_previous_kernel();
    changes = later_changes(lens, noted, lane);
    length = lens.stored(lane);
    ids = loader.template stored_ids<true>(pages, loader.ahead, loader.ahead_live, 0, lane);
    ids_before = loader.ids_ahead;
    if (recalled) again.read(record, lane);
  }

  // Called once the first loads are under way; whether the plan holds. What else is to be done is done here, while there
  // is nothing to compute: the next launch's CTA waits for this one's end.
  __device__ __forceinline__ bool begin(const Pages& pages) {
    if (early) {
      changes |= (lens.cut(length) ^ plan.length) | (pages.table.cut(ids) ^ ids_before);
      if (recalled) changes |= (again.length ^ found.length) | (again.word ^ found.word);
      if (__any_sync(ALL_LANES, changes)) return false;
    }
    if (!recalled && lens.batch_size <= 32 && threadIdx.x < 32) record->remember(plan, lens, lane);
    if (plan.some_empty) {
      const int worker = blockIdx.x * WARPS + threadIdx.x / 32, workers = gridDim.x * WARPS;
      if constexpr (LAST_PAGE_LENGTHS) store_empty_rows(output, lens, lens.batch_size, worker, workers, lane);
      else store_empty_rows(output, lens.at, lens.batch_size, worker, workers, lane);
    }
    return true;
  }

  __device__ __forceinline__ void operator()(const Segment& s, int column, const HeadState& state) {
    if (s.begins && s.ends) {
      store_result(output, s.row, s.kv_head, column, state, lane);
    } else if (s.ends) {
      float4* acc = reinterpret_cast<float4*>(kept[column]);
      #pragma unroll
      for (int i = 0; i < LANE_QUADS; ++i)
        if (lane + i * 32 < HEAD_QUADS) acc[lane + i * 32] = state.acc[i];
      if (lane == 0) kept[column][V_DIM] = state.m, kept[column][V_DIM + 1] = state.l;
      held_row = s.row, held_head = s.kv_head, holds = true;
    } else {
      send_state(partials[plan.range], column, state, lane);
    }
  }

  // Merges the segment this CTA ends with the earlier CTAs' parts of it. Parts are fetched through the warp's part of
  // its stream's ring, free by now, those of both its columns where it has two, all in flight at once; what has not
  // arrived is fetched again.
  __device__ __forceinline__ void finish(unsigned char* ring) const {
    constexpr int TOGETHER = COLUMNS > WARPS && COLUMNS <= 2 * WARPS ? 2 : 1;
    constexpr int MOST = RING_PART / (TOGETHER * V_DIM * 4);
    constexpr int IN_FLIGHT = MOST < 32 ? MOST : 32;
    const float empty = __uint_as_float(EMPTY_WORD);
    float4 (*fetched)[TOGETHER][HEAD_QUADS] = reinterpret_cast<float4 (*)[TOGETHER][HEAD_QUADS]>(ring);
    __syncwarp();
    #pragma unroll 1
    for (int column = threadIdx.x / 32; column < COLUMNS; column += TOGETHER * WARPS) {
      // A last column without a partner goes twice.
      const int columns[2] = {column, TOGETHER > 1 && column + WARPS < COLUMNS ? column + WARPS : column};
      HeadState sum[TOGETHER];
      #pragma unroll
      for (int c = 0; c < TOGETHER; ++c) {
        const float* own = kept[columns[c]];
        sum[c].m = own[V_DIM], sum[c].l = own[V_DIM + 1];
        #pragma unroll
        for (int i = 0; i < LANE_QUADS; ++i)
          if (lane + i * 32 < HEAD_QUADS) sum[c].acc[i] = reinterpret_cast<const float4*>(own)[lane + i * 32];
      }
      #pragma unroll 1
      for (int j = plan.first; j < plan.range; j += IN_FLIGHT) {
        const int count = min(IN_FLIGHT, plan.range - j);
        Slot* parts = partials + j;
        float2 ml[TOGETHER];
        unsigned missing = ALL_LANES >> (32 - count);
        do {
          unsigned unseen = 0;  // of this lane: parts that have not arrived, as far as it looks
          #pragma unroll
          for (int c = 0; c < TOGETHER; ++c) {
            ml[c] = make_float2(LOWEST, 0.0f);
            if (lane < count) ml[c] = receive(&parts[lane].ml[columns[c]]);
          }
          #pragma unroll 4
          for (int p = 0; p < count; ++p) {
            if (!(missing >> p & 1)) continue;
            #pragma unroll
            for (int c = 0; c < TOGETHER; ++c)
              #pragma unroll
              for (int i = 0; i < LANE_QUADS; ++i)
                if (lane + i * 32 < HEAD_QUADS)
                  copy_async(shared_address(&fetched[p][c][lane + i * 32]), &parts[p].acc[columns[c]][lane + i * 32]);
          }
          copy_commit();
          copy_wait<0>();
          #pragma unroll
          for (int c = 0; c < TOGETHER; ++c)
            if (!(arrived(ml[c].x) && arrived(ml[c].y))) unseen = 1u << lane;
          #pragma unroll 4
          for (int p = 0; p < count; ++p) {
            bool whole = true;
            #pragma unroll
            for (int c = 0; c < TOGETHER; ++c)
              #pragma unroll
              for (int i = 0; i < LANE_QUADS; ++i)
                if (lane + i * 32 < HEAD_QUADS) whole &= arrived(fetched[p][c][lane + i * 32]);
            if (!whole) unseen |= 1u << p;
          }
          missing = __reduce_or_sync(ALL_LANES, unseen);
        } while (missing);
        float scale[TOGETHER];
        #pragma unroll
        for (int c = 0; c < TOGETHER; ++c) {
          scale[c] = sum[c].weigh(ml[c]);
          if (lane < count) send(&parts[lane].ml[columns[c]], make_float2(empty, empty));
        }
        #pragma unroll 4
        for (int p = 0; p < count; ++p)
          #pragma unroll
          for (int c = 0; c < TOGETHER; ++c) {
            const float part_scale = __shfl_sync(ALL_LANES, scale[c], p);
            #pragma unroll
            for (int i = 0; i < LANE_QUADS; ++i)
              if (lane + i * 32 < HEAD_QUADS) {
                sum[c].add(i, fetched[p][c][lane + i * 32], part_scale);
                send(&parts[p].acc[columns[c]][lane + i * 32], make_float4(empty, empty, empty, empty));
              }
          }
      }
      #pragma unroll
      for (int c = 0; c < TOGETHER; ++c) store_result(output, held_row, held_head, columns[c], sum[c], lane);
    }
  }
};

// The range of this CTA. Two CTAs of a cluster are on neighbouring SMs, which share their way to memory: where there are
// ranges for no more than half the CTAs, one of each two has none.
__device__ __forceinline__ int own_range(const Cut& cut) {
  const int cta = blockIdx.x;
  if (!KERNELS_OVERLAP || cut.num_ranges * 2 > static_cast<int>(gridDim.x)) return cta;
  return cta % 2 ? cut.num_ranges : cta / 2;
}

// Asks for the block table before the plan is known, so that its first read is an L2 hit. Small tables only: a wide
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
  extern __shared__ __align__(128) unsigned char memory[];
  pkv::SharedMemory& shared = *reinterpret_cast<pkv::SharedMemory*>(memory);
  const int stream = threadIdx.x / 32 / TEAM, lane = threadIdx.x % 32;
  const pkv::Pages pages = pkv::pages_of(given);
  const pkv::Output output = pkv::output_of(given);
  const pkv::Lengths lens{given.lengths, given.batch_size, max_tokens,
                          given.reach() PKV_LAST_PAGE(, given.row_begins)};
  const int num_kv_heads = given.num_kv_heads;
  pkv::let_next_kernel_start();
  // Where kernels overlap, the plan is made and its first page ids are read while the previous one still runs, and again
  // if one of those or a length has changed since.
  bool early = pkv::KERNELS_OVERLAP && given.batch_size <= pkv::NOTED_LENGTHS;
  if (!early) pkv::wait_for_previous_kernel();
  // On their way during what follows.
  pkv::PlanRecord* record = reinterpret_cast<pkv::PlanRecord*>(given.partials + gridDim.x) + blockIdx.x;
  pkv::ReadRecord found;
  found.read(record, lane);
  int stored = lens.stored(lane);
  pkv::prefetch_table(pages, given.batch_size);
  pkv::init_barriers(shared);
  int* noted = reinterpret_cast<int*>(shared.states[0][stream][pkv::first_column()]);  // free until this warp publishes
  pkv::RangePlan plan;
  bool recalled = found.recall(plan, lens, num_kv_heads, costs.segment, lens.cut(stored), lane);
  #pragma unroll 1
  for (;; early = recalled = false, stored = lens.stored(lane)) {
    if (!recalled) {
      const pkv::Rows rows(lens, num_kv_heads, costs.segment, lane, stored, early ? noted : nullptr);
      const pkv::Cut cut(rows.total, rows.num_heads, rows.even, gridDim.x, costs);
      plan = pkv::RangePlan(rows, cut, pkv::own_range(cut), lane);
    }
    pkv::BalancedEmit emit{output, given.partials, shared.kept, lens, plan, record, found, recalled, early, noted, lane};
    emit.holds = false;
    if (!pkv::attend(plan.walk, pages, given, shared, emit)) continue;
    if (emit.holds) emit.finish(shared.ring[stream][0] + pkv::team_member() * pkv::RING_PART);
    break;
  }
}
