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

struct BalancedEmit {
  Output output;
  Slot* partials;
  float (*kept)[STATE_ROW];  // [COLUMNS] in shared memory: this CTA's part of the segment it will merge
  Cut cut;
  int lane;
  int stale;     // not 0: a length that this lane looked at is not what was planned with
  int first;     // the range in which this CTA's first segment begins
  int held_row, held_head;
  bool holds;

  // Called once the first loads are under way; whether the plan holds.
  __device__ __forceinline__ bool begin(const BalancedWalk& walk) {
    first = walk.tile > 0 ? cut.range_of(walk.x0) : blockIdx.x;
    return !__any_sync(ALL_LANES, stale);
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
      send_state(partials[blockIdx.x], column, state, lane);
    }
  }

  // Merges the segment this CTA ends with the earlier CTAs' parts of it. A column's parts are fetched through its warp's
  // ring, free by now, all in flight at once, and again while one is missing: most arrive together.
  __device__ __forceinline__ void finish(unsigned char* ring) const {
    constexpr int MOST = STAGES * SLOT_BYTES / (V_DIM * 4);
    constexpr int IN_FLIGHT = MOST < 32 ? MOST : 32;
    float4 (*fetched)[HEAD_QUADS] = reinterpret_cast<float4 (*)[HEAD_QUADS]>(ring);
    __syncwarp();
    #pragma unroll 1
    for (int column = threadIdx.x / 32; column < COLUMNS; column += WARPS) {
      HeadState sum;
      sum.m = kept[column][V_DIM], sum.l = kept[column][V_DIM + 1];
      #pragma unroll
      for (int i = 0; i < LANE_QUADS; ++i)
        if (lane + i * 32 < HEAD_QUADS) sum.acc[i] = reinterpret_cast<const float4*>(kept[column])[lane + i * 32];
      #pragma unroll 1
      for (int j = first; j < blockIdx.x; j += IN_FLIGHT) {
        const int count = min(IN_FLIGHT, static_cast<int>(blockIdx.x) - j);
        Slot* parts = partials + j;
        float2 ml;
        bool complete;
        do {
          ml = make_float2(LOWEST, 0.0f);
          if (lane < count) ml = receive(&parts[lane].ml[column]);
          #pragma unroll 4
          for (int p = 0; p < count; ++p)
            for (int quad = lane; quad < HEAD_QUADS; quad += 32) copy_async(shared_address(&fetched[p][quad]), &parts[p].acc[column][quad]);
          copy_commit();
          copy_wait<0>();
          complete = arrived(ml.x) & arrived(ml.y);
          #pragma unroll 4
          for (int p = 0; p < count; ++p)
            for (int quad = lane; quad < HEAD_QUADS; quad += 32) complete &= arrived(fetched[p][quad]);
        } while (!__all_sync(ALL_LANES, complete));
        const float scale = sum.weigh(ml);
        const float empty = __uint_as_float(EMPTY_WORD);
        if (lane < count) send(&parts[lane].ml[column], make_float2(empty, empty));
        #pragma unroll 4
        for (int p = 0; p < count; ++p) {
          const float part_scale = __shfl_sync(ALL_LANES, scale, p);
          #pragma unroll
          for (int i = 0; i < LANE_QUADS; ++i) {
            const int quad = lane + i * 32;
            if (quad >= HEAD_QUADS) continue;
            sum.add(i, fetched[p][quad], part_scale);
            send(&parts[p].acc[column][quad], make_float4(empty, empty, empty, empty));
          }
        }
      }
      store_result(output, held_row, held_head, column, sum, lane);
    }
  }
};

// Asks for the block table before the plan is known, so that its first read is an L2 hit. Small tables only: a wide
// one may be mostly unused. The last of several rows is left out, since it may end before its stride does.
__device__ __forceinline__ void prefetch_table(const Pages& pages, int batch_size) {
  constexpr int LINE = 128 / sizeof(int), MOST = 1 << 16;
  const int entries = max(1, batch_size - 1) * pages.table_stride;
  const int at = (threadIdx.x * gridDim.x + blockIdx.x) * LINE;
  if (entries <= MOST && at < entries) prefetch_l2(pages.block_table + at);
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_balanced(const pkv::DecodeArguments given, int segment_cost, int min_cost, int part_cost, int max_tokens) {
  extern __shared__ __align__(128) unsigned char memory[];
  pkv::SharedMemory& shared = *reinterpret_cast<pkv::SharedMemory*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const pkv::Pages pages = given.pages();
  const pkv::Output output = given.output();
  const pkv::Lengths lens{given.seq_lens, given.batch_size, max_tokens, given.reach()};
  const int num_kv_heads = given.num_kv_heads;
  pkv::let_next_kernel_start();
  pkv::prefetch_table(pages, given.batch_size);
  pkv::init_barriers(shared);
  // Where kernels overlap, the plan is made while the previous one still runs, and again if a length has changed since.
  int* noted = reinterpret_cast<int*>(shared.states[0][warp]);  // free until this warp publishes a state
  bool early = pkv::KERNELS_OVERLAP && given.batch_size <= pkv::COLUMNS * pkv::STATE_ROW;
  if (!early) pkv::wait_for_previous_kernel();
  #pragma unroll 1
  for (;; early = false) {
    const pkv::Rows rows(lens, num_kv_heads, segment_cost, lane, early ? noted : nullptr);
    const pkv::Cut cut(rows.total, rows.num_heads, rows.even, gridDim.x, segment_cost, min_cost, part_cost);
    pkv::BalancedWalk walk;
    walk.x0 = walk.x_end = 0;  // nothing
#if CACHE_TYPE
    walk.tile = 0;  // begin() looks at it; 16-bit kernels, whose code stays as measured, leave it to the compiler
#endif
    if (rows.total > 0 && static_cast<int>(blockIdx.x) < cut.num_ranges) rows.start(walk, cut.begin(blockIdx.x), cut.begin(blockIdx.x + 1), lane);
    int stale = 0;
    if (early) {
      pkv::wait_for_previous_kernel();
      stale = rows.changes(noted, lane);
    }
    pkv::BalancedEmit emit{output, given.partials, shared.kept, cut, lane, stale};
    emit.holds = false;
    if (!pkv::attend(walk, pages, given, shared, emit)) continue;
    if (emit.holds) emit.finish(shared.ring[warp][0]);
    break;
  }
  pkv::store_empty_rows(output, given.seq_lens, given.batch_size, blockIdx.x * WARPS + warp, gridDim.x * WARPS, lane);
}
