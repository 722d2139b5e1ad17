// The parts of segments that balanced ranges cut, on their way between CTAs and to the output.
//
// A range cuts at most two heads. The part at its end goes to the CTA's slot in global memory (send); the part at its
// beginning, of a head that earlier CTAs began, is kept in shared memory (keep) and merged last of all with the slots
// of the CTAs before it, in their order (finish). Every word of a slot is its own arrival flag (state.cuh), and the
// reader empties what it has read, so the slots are empty again when the kernel ends.
#pragma once
#include "attend.cuh"
#include "warp_plan.cuh"

namespace pkv {

struct Parts {
  Slot* slots;               // [num_ctas]
  float (*kept)[STATE_ROW];  // [COLUMNS] in shared memory: this CTA's part of the head that it will merge
  const RangePlace& plan;
  int lane;
  // Whose part is kept, if one is. It begins undefined: zeros would take registers that the main loop has not.
  struct Held {
    int row, head;
    bool any;
    __device__ __forceinline__ Held() : any(false) { settle(row), settle(head); }
  } held;

  static constexpr int RING_BYTES = STAGES * SLOT_BYTES / TEAM;  // of a warp's part of its stream's ring
  // Parts are fetched through there, those of both of a warp's columns together where it has two.
  static constexpr int TOGETHER = COLUMNS > WARPS && COLUMNS <= 2 * WARPS ? 2 : 1;
  static constexpr int ROOM = RING_BYTES / (TOGETHER * V_DIM * 4);
  static constexpr int IN_FLIGHT = ROOM < 32 ? ROOM : 32;  // parts that are fetched at once, a lane for each
  using Fetched = float4[TOGETHER][HEAD_QUADS];

  __device__ __forceinline__ void send(int column, const HeadState& state) const {
    send_state(slots[plan.range], column, state, lane);
  }
  __device__ __forceinline__ void keep(const Segment& s, int column, const HeadState& state) {
    float4* acc = reinterpret_cast<float4*>(kept[column]);
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i)
      if (lane + i * 32 < HEAD_QUADS) acc[lane + i * 32] = state.acc[i];
    if (lane == 0) kept[column][V_DIM] = state.m, kept[column][V_DIM + 1] = state.l;
    held.row = s.row, held.head = s.kv_head, held.any = true;
  }

  // Merges the head whose part is kept, and writes its output or whatever store_result does with another `output`.
  // ring: this warp's part of its stream's, free by now.
  template <class AnyOutput>
  __device__ __forceinline__ void finish(const AnyOutput& output, unsigned char* ring) const {
    Fetched* fetched = reinterpret_cast<Fetched*>(ring);
    __syncwarp();
    #pragma unroll 1
    for (int column = threadIdx.x / 32; column < COLUMNS; column += TOGETHER * WARPS) {
      // A last column without a partner goes twice.
      const int columns[2] = {column, TOGETHER > 1 && column + WARPS < COLUMNS ? column + WARPS : column};
      HeadState sum[TOGETHER];
      #pragma unroll
      for (int c = 0; c < TOGETHER; ++c) take_kept(sum[c], columns[c]);
      #pragma unroll 1
      for (int first = plan.first; first < plan.range; first += IN_FLIGHT) {
        const int count = min(IN_FLIGHT, plan.range - first);
        float2 ml[TOGETHER];
        fetch(fetched, ml, slots + first, count, columns);
        add(sum, fetched, ml, slots + first, count, columns);
      }
      #pragma unroll
      for (int c = 0; c < TOGETHER; ++c) store_result(output, held.row, held.head, columns[c], sum[c], lane);
    }
  }

 private:
  __device__ __forceinline__ void take_kept(HeadState& sum, int column) const {
    const float* own = kept[column];
    sum.m = own[V_DIM], sum.l = own[V_DIM + 1];
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i)
      if (lane + i * 32 < HEAD_QUADS) sum.acc[i] = reinterpret_cast<const float4*>(own)[lane + i * 32];
  }

  // Brings the accumulators of `count` parts to shared memory and (m, l) of part `lane` to registers, all in flight at
  // once; what has not arrived is fetched again.
  __device__ __forceinline__ void fetch(Fetched* fetched, float2 (&ml)[TOGETHER], Slot* parts, int count,
                                        const int (&columns)[2]) const {
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
  }

  // Adds fetched parts to the sums, in their order, and empties their slots.
  __device__ __forceinline__ void add(HeadState (&sum)[TOGETHER], const Fetched* fetched, const float2 (&ml)[TOGETHER],
                                      Slot* parts, int count, const int (&columns)[2]) const {
    const float empty = __uint_as_float(EMPTY_WORD);
    float scale[TOGETHER];
    #pragma unroll
    for (int c = 0; c < TOGETHER; ++c) {
      scale[c] = sum[c].weigh(ml[c]);
      if (lane < count) pkv::send(&parts[lane].ml[columns[c]], make_float2(empty, empty));
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
            pkv::send(&parts[p].acc[columns[c]][lane + i * 32], make_float4(empty, empty, empty, empty));
          }
      }
  }
};

}  // namespace pkv
