// Where the results of shared reads and of their members' own tiles go, and how they are put together.
//
// A member's output is the merge of its read's parts, in their order, then of its own span's. Parts travel in slots of
// global memory, every word of which is its own arrival flag (state.cuh):
//   cut     of the piece that a range cuts at its end, of many rows or of one
//   shared  of the piece that ends the read of a row
//   own     of the piece that ends a member's own span
// The CTA that ends a member's own span merges (MemberMerge), after its last segment, when most of the reads are done:
// a read's last parts may take as long as the whole step. It empties what it has read. Rows that are in no read go the
// way of a plain step (parts.cuh).
#pragma once
#include "early_plan.cuh"
#include "parts.cuh"
#include "warp_spans.cuh"

namespace pkv {

constexpr int STEP_RECORD_BYTES = 8 * (64 + 9 * THREADS);  // StepRecord (shared_step.cuh), which lies before some

// Where they are is worked out anew each time: as pointers they would take registers of the main loop.
struct SpanSlots {
  const DecodeArguments& given;

  __device__ __forceinline__ Slot* cut() const { return given.partials; }  // [num_ctas]
  __device__ __forceinline__ unsigned char* step_records() const {         // [num_ctas]
    return reinterpret_cast<unsigned char*>(reinterpret_cast<PlanRecord*>(given.partials + gridDim.x) + gridDim.x);
  }
  // [batch_size][num_kv_heads] each
  __device__ __forceinline__ RowSlot* shared() const {
    return reinterpret_cast<RowSlot*>(step_records() + static_cast<long long>(gridDim.x) * STEP_RECORD_BYTES);
  }
  __device__ __forceinline__ RowSlot* own() const { return shared() + given.batch_size * given.num_kv_heads; }
  __device__ __forceinline__ long long at(int row, int head) const {
    return static_cast<long long>(row) * given.num_kv_heads + head;
  }
};

// Where the results of a range's reads go: whole states, or what they are made of.
struct ReadEmit {
  const SpanSlots& slots;
  int range, lane;

  __device__ __forceinline__ void operator()(const ReadPiece& s, int column, const HeadState& state) const {
    const int member = column / COLUMNS;
    if (s.ends) send_state(slots.shared()[slots.at(s.rows[member], s.kv_head)], column % COLUMNS, state, lane);
    else send_state(slots.cut()[range], column, state, lane);
  }
  __device__ __forceinline__ float2* ml(const ReadPiece& s, int column) const {
    return s.ends ? &row_slot(s, column).ml[column % COLUMNS] : &slots.cut()[range].ml[column];
  }
  __device__ __forceinline__ float4* acc(const ReadPiece& s, int column) const {
    return s.ends ? row_slot(s, column).acc[column % COLUMNS] : slots.cut()[range].acc[column];
  }

 private:
  __device__ __forceinline__ RowSlot& row_slot(const ReadPiece& s, int column) const {
    return slots.shared()[slots.at(s.rows[column / COLUMNS], s.kv_head)];
  }
};

// Where the results of a range's rows go.
struct RowEmit {
  const Output& output;
  const SpanSlots& slots;
  Parts& parts;

  __device__ __forceinline__ void operator()(const RowPiece& s, int column, const HeadState& state) {
    if (!s.ends) parts.send(column, state);
    else if (s.member) send_state(slots.own()[slots.at(s.row, s.kv_head)], column, state, parts.lane);
    else if (s.begins) store_result(output, s.row, s.kv_head, column, state, parts.lane);
    else parts.keep(s, column, state);
  }
};

// Merges the members whose own spans end in a range.
//
// The warps share out all columns of all these spans. A warp takes the parts of several columns at once, as many as its
// part of the ring has room for: a lane knows where one of them is, and waits for its (m, l) before anything of it is
// fetched, since polling whole states would take bandwidth from the reads.
struct MemberMerge {
  const Axis& axis;
  const Cut& cut;
  const SpanSlots& slots;
  const Output& output;
  int range, lane;

  static constexpr int ROOM = Parts::RING_BYTES / (V_DIM * 4);
  static constexpr int IN_FLIGHT = ROOM < 32 ? ROOM : 32;  // parts that are fetched at once
  static constexpr int FETCHED_ABSENT = 4;  // missing parts that are fetched over and over until they are there
  using Fetched = float4[HEAD_QUADS];

  // A span that ends in this range, and where its parts are. A lane has one.
  struct Ended {
    int row, head, slot;
    int num_parts;
    int first, of_read, column;  // the read's: `of_read` from range `first` on, at `column`, and the one that ends it
    int begin;                   // the span's are those from this range on, and its own
  };
  // A batch of parts: lane i has the i-th.
  struct Batch {
    unsigned acc;  // where its accumulator lies behind the first slot, in float4s
    float2* ml;
    int count;
    unsigned ends;  // bit i: that is the last one of its column
  };

  // walk: the range's rows. ring: this warp's part of its stream's, free by now.
  __device__ __forceinline__ void finish(RowWalk walk, unsigned char* ring) const {
    Ended own{};
    int count = 0;
    #pragma unroll 1
    for (bool more = true; more;) {
      RowPiece s;
      more = walk.next(s);
      if (more && s.member && s.ends) {
        if (lane == count) own.row = s.row, own.head = s.kv_head, own.slot = s.slot;
        ++count;
      }
      if (count == 32 || (!more && count > 0)) merge(own, count, reinterpret_cast<Fetched*>(ring)), count = 0;
    }
  }

 private:
  __device__ __forceinline__ void merge(Ended& own, int count, Fetched* fetched) const {
    if (lane < count) {
      const SharedParts read = axis.parts_of(own.row, own.head, cut);
      own.first = read.first, own.of_read = read.last - read.first, own.column = read.column;
      own.begin = cut.range_of(own.slot);
      own.num_parts = own.of_read + 1 + range - own.begin + 1;
    }
    const int items = count * COLUMNS;  // columns of spans
    HeadState sum;
    sum.reset();
    int item = threadIdx.x / 32, taken = 0;  // the column at hand, and how many of its parts are in `sum`
    #pragma unroll 1
    while (item < items) {
      const Batch batch = next_batch(own, item, taken, items);
      const float2 ml = fetch(batch, fetched);
      add(batch, ml, fetched, own, sum, item, taken);
    }
  }

  __device__ __forceinline__ int from(int value, int source) const { return __shfl_sync(ALL_LANES, value, source); }

  // The parts from the `skip`-th of column `item` on, and of the warp's columns after it.
  __device__ __forceinline__ Batch next_batch(const Ended& own, int item, int skip, int items) const {
    Batch batch{};
    #pragma unroll 1
    while (item < items && batch.count < IN_FLIGHT) {
      const int span = item / COLUMNS, column = item % COLUMNS, num_parts = from(own.num_parts, span);
      const int count = min(num_parts - skip, IN_FLIGHT - batch.count), part = skip + lane - batch.count;
      const int of_read = from(own.of_read, span), first = from(own.first, span), begin = from(own.begin, span);
      const int read_column = from(own.column, span) + column;
      const long long at = slots.at(from(own.row, span), from(own.head, span));
      if (lane >= batch.count && lane < batch.count + count) {
        if (part == of_read || part == num_parts - 1) {
          RowSlot& slot = (part == of_read ? slots.shared() : slots.own())[at];
          batch.acc = place_of(slot.acc[column]), batch.ml = &slot.ml[column];
        } else {
          Slot& slot = slots.cut()[part < of_read ? first + part : begin + part - of_read - 1];
          const int place = part < of_read ? read_column : column;
          batch.acc = place_of(slot.acc[place]), batch.ml = &slot.ml[place];
        }
      }
      batch.count += count, skip += count;
      if (skip == num_parts) batch.ends |= 1u << (batch.count - 1), item += WARPS, skip = 0;
    }
    return batch;
  }

  __device__ __forceinline__ float4* first_acc() const { return reinterpret_cast<float4*>(slots.given.partials); }
  __device__ __forceinline__ unsigned place_of(const float4* acc) const { return static_cast<unsigned>(acc - first_acc()); }
  __device__ __forceinline__ float4* acc_of(const Batch& batch, int part) const {
    return first_acc() + __shfl_sync(ALL_LANES, batch.acc, part);
  }

  // (m, l) of this lane's part, as far as it has arrived; those past the last part weigh nothing.
  __device__ __forceinline__ float2 look(const Batch& batch) const {
    return lane < batch.count ? receive(batch.ml) : make_float2(LOWEST, 0.0f);
  }
  // Brings the accumulators to shared memory and (m, l) of this lane's part to registers, all in flight at once; what has
  // not arrived is fetched again. The parts of a read come at about one time: while many are missing, only their (m, l)
  // are looked at.
  __device__ __forceinline__ float2 fetch(const Batch& batch, Fetched* fetched) const {
    unsigned missing = ALL_LANES >> (32 - batch.count);
    float2 ml;
    __syncwarp();
    #pragma unroll 1
    for (;;) {
      ml = look(batch);
      #pragma unroll 4
      for (int p = 0; p < batch.count; ++p) {
        const float4* acc = acc_of(batch, p);
        #pragma unroll
        for (int i = 0; i < LANE_QUADS; ++i)
          if ((missing >> p & 1) && lane + i * 32 < HEAD_QUADS)
            copy_async(shared_address(&fetched[p][lane + i * 32]), &acc[lane + i * 32]);
      }
      copy_commit();
      copy_wait<0>();
      unsigned unseen = arrived(ml.x) && arrived(ml.y) ? 0 : 1u << lane;  // of this lane, as far as it looks
      #pragma unroll 4
      for (int p = 0; p < batch.count; ++p) {
        bool whole = true;
        #pragma unroll
        for (int i = 0; i < LANE_QUADS; ++i)
          if (lane + i * 32 < HEAD_QUADS) whole &= arrived(fetched[p][lane + i * 32]);
        if (!whole) unseen |= 1u << p;
      }
      missing = __reduce_or_sync(ALL_LANES, unseen);
      if (!missing) break;
      bool absent;
      do {
        ml = look(batch);
        absent = !(arrived(ml.x) && arrived(ml.y));
      } while (__popc(__ballot_sync(ALL_LANES, absent)) > FETCHED_ABSENT);
    }
    if (lane < batch.count) pkv::send(batch.ml, make_float2(__uint_as_float(EMPTY_WORD), __uint_as_float(EMPTY_WORD)));
    return ml;
  }

  // Adds a batch to the sums of its columns, in order, and empties it. Columns that it ends are written.
  __device__ __forceinline__ void add(const Batch& batch, float2 ml, const Fetched* fetched, const Ended& own,
                                      HeadState& sum, int& item, int& taken) const {
    // What all parts of this lane's column that the batch has weigh: the largest m, and the sum of l up to this part.
    const unsigned below = batch.ends & ((1u << lane) - 1), above = batch.ends >> lane;
    const int first = below ? 32 - __clz(below) : 0, last = above ? lane + __ffs(above) - 1 : batch.count - 1;
    float top = first == 0 ? fmaxf(ml.x, sum.m) : ml.x;
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) {
      const float other = __shfl_up_sync(ALL_LANES, top, hop);
      if (lane - hop >= first) top = fmaxf(top, other);
    }
    top = __shfl_sync(ALL_LANES, top, last & 31);
    const float scale = exp2_fast(ml.x - top);
    float l = ml.y * scale;
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) {
      const float other = __shfl_up_sync(ALL_LANES, l, hop);
      if (lane - hop >= first) l += other;
    }
    const float before = exp2_fast(sum.m - __shfl_sync(ALL_LANES, top, 0));  // of what is in the first column's sum
    sum.l *= before;
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i)
      sum.acc[i].x *= before, sum.acc[i].y *= before, sum.acc[i].z *= before, sum.acc[i].w *= before;
    const float empty = __uint_as_float(EMPTY_WORD);
    #pragma unroll 1
    for (int p = 0; p < batch.count;) {
      const unsigned ahead = batch.ends >> p;
      const int end = ahead ? p + __ffs(ahead) : batch.count;
      taken += end - p;
      sum.m = __shfl_sync(ALL_LANES, top, end - 1), sum.l += __shfl_sync(ALL_LANES, l, end - 1);
      #pragma unroll 4
      for (; p < end; ++p) {
        const float part_scale = __shfl_sync(ALL_LANES, scale, p);
        float4* acc = acc_of(batch, p);
        #pragma unroll
        for (int i = 0; i < LANE_QUADS; ++i)
          if (lane + i * 32 < HEAD_QUADS) {
            sum.add(i, fetched[p][lane + i * 32], part_scale);
            pkv::send(&acc[lane + i * 32], make_float4(empty, empty, empty, empty));
          }
      }
      if (!ahead) break;
      const int span = item / COLUMNS;
      store_result(output, from(own.row, span), from(own.head, span), item % COLUMNS, sum, lane);
      sum.reset();
      item += WARPS, taken = 0;
    }
  }
};

}  // namespace pkv
