// The states of a step over several GPUs, on their way from the ranks that read a row's pages to those that own its
// output.
//
// Every rank has an inbox that all others can write: two halves of slots, one for each source rank and (row, KV head),
// which steps use in turn. A state goes there as soon as a rank has it, its own included; when a CTA has sent all it
// has, its warps take the columns that fall to them of what the rank owns, wait until all ranks' states are there, and
// merge them in the order of the ranks. Every word is its own arrival flag, as in parts.cuh; whoever merges a state
// empties its slot. A shard without tokens, or all of whose logits are -inf, sends (LOWEST, 0) and no acc: nobody waits
// for one, so that it could come when the slot has been emptied already, and pass for the next step's.
//
// A half is used again two steps later. A rank may send into it when its owner has begun the step between, since the
// owner's step before that one has ended then and left the half empty: begun[] says so. Where every rank receives from
// every other it always has, and the look costs nothing; a rank that receives nothing is held back by it.
//
// Waiting ends: after patience_ns the rank that was waited for is written down here, with the host and with every rank
// that can be reached, and from then on nothing is sent, awaited or merged; each rank's next step tells its own host.
// The inboxes are useless then until the hosts have emptied them all together.
//
// Where each rank has a GPU for itself, the next launch's CTAs may take an SM as soon as one is free (early_plan.cuh).
// Ranks that share a GPU must not let them before all ranks' CTAs of this step are there: they would take the SMs that
// another rank needs for the states that this one waits for. started[] counts those CTAs; whoever finds all of them
// there lets the next launch begin, and where nobody does it begins when this one has ended.
#pragma once
#include "attend.cuh"

namespace pkv {

// The ranks that own an output: all; one by the row, the first rows being the first rank's; one by the KV head.
enum Owner { OWNER_ALL, OWNER_ROW, OWNER_HEAD };

// What other ranks tell this one. All words are EMPTY_WORD before the first step. The slots follow.
struct __align__(128) Inbox {
  unsigned begun[RANKS];    // the last step that each rank has begun, from 0 on
  unsigned failed;          // a rank that somebody waited for in vain
  unsigned started[RANKS];  // CTAs of all steps so far, from -1 on (same_gpu)
};

// How steps of one rank count: each warp of each CTA has a word behind the plans' records, so that they need not agree.
struct OpenedStep {
  Inbox* inboxes[RANKS];
  unsigned number;
  unsigned failed;
};
static_assert(sizeof(Inbox) == 128, "gpu/several/inbox.py has the same");
// A warp's own, behind SharedMemory, since the registers are the main loop's.
constexpr int OPENED_BYTES = sizeof(OpenedStep);
// How often a warp looks for all CTAs of a step at its beginning: as often as it can until its first tile arrives.
constexpr int LOOKS = 2;

struct Patience {
  long long most, began;
  int polls;

  __device__ __forceinline__ explicit Patience(long long most_ns) : most(most_ns), began(-1), polls(0) {}
  // Is asked after each time that something was not there.
  __device__ __forceinline__ bool over() {
    if (began < 0) began = nanoseconds();
    return (++polls & 63) == 0 && nanoseconds() - began > most;
  }
};

// Who owns what, and in which order (row, KV head)s lie in a source's slots: such that what a rank owns is contiguous.
struct Ownership {
  int owner, batch_size, num_kv_heads;

  __device__ __forceinline__ int places() const { return batch_size * num_kv_heads; }
  // Rows or KV heads of the model, which may be several of the schedule.
  __device__ __forceinline__ int units() const { return owner == OWNER_ROW ? batch_size : num_kv_heads / HEAD_SPLIT; }
  __device__ __forceinline__ int place(int row, int kv_head) const {
    return owner == OWNER_HEAD ? kv_head * batch_size + row : row * num_kv_heads + kv_head;
  }
  // The rank r with floor(units * r / RANKS) <= unit < floor(units * (r + 1) / RANKS).
  __device__ __forceinline__ int rank_of(int row, int kv_head) const {
    const int upto = ((owner == OWNER_ROW ? row : kv_head / HEAD_SPLIT) + 1) * RANKS;
    int rank = 0;
    #pragma unroll
    for (int r = 1; r < RANKS; ++r) rank += units() * r < upto;
    return rank;
  }
  __device__ __forceinline__ int begin(int rank) const {
    if (owner == OWNER_ALL) return 0;
    return divide(units() * rank, RANKS) * (owner == OWNER_ROW ? num_kv_heads : HEAD_SPLIT * batch_size);
  }
  __device__ __forceinline__ int end(int rank) const { return owner == OWNER_ALL ? places() : begin(rank + 1); }
  // Row and KV head of a place.
  __device__ __forceinline__ int2 at(int place) const {
    const int inner = owner == OWNER_HEAD ? batch_size : num_kv_heads, outer = divide(place, inner);
    const int rest = place - outer * inner;
    return owner == OWNER_HEAD ? make_int2(rest, outer) : make_int2(outer, rest);
  }
};

// One column's states of all ranks, as a warp takes them up.
struct RankStates {
  float2 ml[RANKS];
  float4 acc[RANKS][LANE_QUADS];

  // Reads them, `stride` slots from one rank's to the next. Returns a rank whose state is not there, or RANKS.
  __device__ __forceinline__ int read(const Slot* first, long long stride, int column, int lane) {
    #pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
      const Slot& slot = first[rank * stride];
      ml[rank] = receive_from_rank(&slot.ml[column]);
      #pragma unroll
      for (int i = 0; i < LANE_QUADS; ++i)
        acc[rank][i] = lane + i * 32 < HEAD_QUADS ? receive_from_rank(&slot.acc[column][lane + i * 32])
                                                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    int missing = RANKS;
    #pragma unroll
    for (int rank = RANKS - 1; rank >= 0; --rank) {
      bool there = arrived(ml[rank].x) & arrived(ml[rank].y);
      if (ml[rank].y != 0.0f) {
        #pragma unroll
        for (int i = 0; i < LANE_QUADS; ++i) there &= arrived(acc[rank][i]);
      }
      if (!there) missing = rank;
    }
    return __reduce_min_sync(ALL_LANES, missing);
  }
  __device__ __forceinline__ HeadState sum(int lane) const {
    HeadState sum;
    sum.reset();
    float2 own = make_float2(LOWEST, 0.0f);
    #pragma unroll
    for (int rank = 0; rank < RANKS; ++rank)
      if (lane == rank) own = ml[rank];
    const float scale = sum.weigh(own);
    #pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
      const float rank_scale = __shfl_sync(ALL_LANES, scale, rank);
      if (ml[rank].y == 0.0f) continue;
      #pragma unroll
      for (int i = 0; i < LANE_QUADS; ++i) sum.add(i, acc[rank][i], rank_scale);
    }
    return sum;
  }
  __device__ __forceinline__ static void empty(Slot* first, long long stride, int column, int lane) {
    const float word = __uint_as_float(EMPTY_WORD);
    #pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
      Slot& slot = first[rank * stride];
      #pragma unroll
      for (int i = 0; i < LANE_QUADS; ++i)
        if (lane + i * 32 < HEAD_QUADS) send(&slot.acc[column][lane + i * 32], make_float4(word, word, word, word));
      if (lane == 0) send(&slot.ml[column], make_float2(word, word));
    }
  }
};

// Writes a column that all ranks' states are in; zeros and -inf for a row that has no tokens anywhere.
__device__ __forceinline__ void store_merged(const Output& output, int row, int kv_head, int column,
                                             HeadState sum, int lane) {
  const bool none = sum.l == 0.0f;
  if (none) sum.l = 1.0f;  // acc is 0
  store_result(output, row, kv_head, column, sum, lane);
  if (none && lane == 0)
    output.lse[(row * output.num_kv_heads + kv_head) * GROUP_SIZE + column] = __int_as_float(0xff800000);
}

// One warp's way to the ranks' inboxes. It is what EarlyStart and Parts take for an output: store_result and
// store_empty_rows of it send.
struct Links {
  const RankArguments& ranks;
  const Ownership& who;
  const Output& output;
  OpenedStep& opened;  // this warp's
  unsigned* number;    // of the last step, this warp's word in the workspace
  int lane;

  // What is read before the first tiles are asked for: lane i has what concerns rank i.
  struct Asked {
    Inbox* inbox;
    unsigned begun, number, failed;
  };

  __device__ __forceinline__ Asked ask() const {
    Asked asked;
    const int rank = lane < RANKS ? lane : 0;
    asked.inbox = reinterpret_cast<Inbox*>(
        read_early(reinterpret_cast<const long long*>(ranks.inboxes + rank)));
    asked.begun = receive_from_rank(&ranks.own->begun[rank]);
    asked.failed = receive_from_rank(&ranks.own->failed);
    asked.number = static_cast<unsigned>(read_early(reinterpret_cast<const int*>(number)));
    return asked;
  }
  // Opens the step, when the previous kernel has ended. Returns when the half that it uses is empty everywhere.
  __device__ __forceinline__ void open(const Asked& asked) const {
    const unsigned step = asked.number + 1;
    if (lane < RANKS) opened.inboxes[lane] = asked.inbox;
    if (lane == 0) opened.number = step, opened.failed = asked.failed;
    __syncwarp();
    if (!ranks.in_kernel) return;
    // Who comes late finds only here that the others have given up; its host would take what is in `out` for results.
    if (asked.failed != EMPTY_WORD) return tell_host(asked.failed);
    // The previous kernel has ended: what it emptied is empty for whoever sees this.
    if (blockIdx.x == 0 && threadIdx.x < RANKS) send_to_rank(&asked.inbox->begun[ranks.rank], step);
    unsigned begun = asked.begun;
    Patience patience(ranks.patience_ns);
    for (;;) {
      const bool ready = lane >= RANKS || lane == ranks.rank || static_cast<int>(begun - (step - 1)) >= 0;
      const unsigned late = ~__ballot_sync(ALL_LANES, ready);
      if (!late) return;
      if (__any_sync(ALL_LANES, patience.over())) return fail(__ffs(late) - 1);
      begun = receive_from_rank(&ranks.own->begun[lane < RANKS ? lane : 0]);
    }
  }
  __device__ __forceinline__ bool failed() const { return opened.failed != EMPTY_WORD; }

  // Of ranks that share a GPU: counts this CTA among those that are there, once in a step.
  __device__ __forceinline__ void count() const {
    if (ranks.same_gpu && ranks.in_kernel && threadIdx.x < RANKS && !failed())
      add_at_rank(&opened.inboxes[lane]->started[ranks.rank], 1);
  }
  // Lets the next launch begin if all CTAs of this step are there. One warp of a CTA is enough, and it looks a few times
  // at most.
  __device__ __forceinline__ void let_next_start(int looks) const {
    if (!ranks.same_gpu || !ranks.in_kernel || threadIdx.x >= 32 || failed()) return;
    const unsigned all = (opened.number + 1) * gridDim.x;
    #pragma unroll 1
    for (; looks > 0; --looks) {
      const unsigned there = receive_from_rank(&ranks.own->started[lane < RANKS ? lane : 0]) + 1;
      if (!__all_sync(ALL_LANES, static_cast<int>(there - all) >= 0)) continue;
      let_next_kernel_start();
      return;
    }
  }

  // The slots of this step that `source` fills at rank `to`.
  __device__ __forceinline__ Slot* slots(int to, int source) const {
    Slot* const all = reinterpret_cast<Slot*>(opened.inboxes[to] + 1);
    if (!ranks.in_kernel) return all;
    return all + (opened.number & 1) * ranks.half_slots + static_cast<long long>(source) * who.places();
  }
  __device__ __forceinline__ void send(int row, int kv_head, int column, const HeadState& state) const {
    const bool to_all = who.owner == OWNER_ALL && ranks.in_kernel;
    const int place = who.place(row, kv_head), first = to_all ? 0 : who.rank_of(row, kv_head);
    if (failed()) return;
    #pragma unroll 1
    for (int to = first; to < (to_all ? RANKS : first + 1); ++to) {
      Slot& slot = slots(to, ranks.rank)[place];
      #pragma unroll
      for (int i = 0; i < LANE_QUADS; ++i)
        if (lane + i * 32 < HEAD_QUADS && state.l != 0.0f)
          send_to_rank(&slot.acc[column][lane + i * 32], state.acc[i]);
      if (lane == 0) send_to_rank(&slot.ml[column], make_float2(state.m, state.l));
    }
  }
  // Of a row of which this rank has no tokens.
  __device__ __forceinline__ void send_nothing(int row) const {
    if (failed()) return;
    #pragma unroll 1
    for (int item = lane; item < who.num_kv_heads * COLUMNS; item += 32) {
      const int kv_head = item / COLUMNS, place = who.place(row, kv_head);
      const bool to_all = who.owner == OWNER_ALL && ranks.in_kernel;
      const int first = to_all ? 0 : who.rank_of(row, kv_head);
      #pragma unroll 1
      for (int to = first; to < (to_all ? RANKS : first + 1); ++to)
        send_to_rank(&slots(to, ranks.rank)[place].ml[item % COLUMNS], make_float2(LOWEST, 0.0f));
    }
  }
  // Merges what falls to this warp of what the rank owns. The CTA has sent all it has.
  __device__ __forceinline__ void merge() const {
    if (!ranks.in_kernel) return;
    const int first = who.begin(ranks.rank), items = (who.end(ranks.rank) - first) * COLUMNS;
    // Neighbouring items go to different CTAs.
    #pragma unroll 1
    for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * WARPS) {
      const int place = first + item / COLUMNS, column = item % COLUMNS;
      if (failed()) return;
      Slot* const from = slots(ranks.rank, 0) + place;
      RankStates states;
      Patience patience(ranks.patience_ns);
      for (;;) {
        const int missing = states.read(from, who.places(), column, lane);
        if (missing == RANKS) break;
        if (patience.began < 0) let_next_start(1);
        if (__any_sync(ALL_LANES, patience.over())) return fail(missing);
      }
      RankStates::empty(from, who.places(), column, lane);
      const int2 at = who.at(place);
      store_merged(output, at.x, at.y, column, states.sum(lane), lane);
    }
  }
  // Ends the step, for this warp's next launch.
  __device__ __forceinline__ void close() const {
    if (lane == 0) *number = opened.number;
  }

 private:
  // Tells everybody that `rank` was waited for in vain.
  __device__ __forceinline__ void fail(int rank) const {
    if (lane < RANKS) send_to_rank(&opened.inboxes[lane]->failed, static_cast<unsigned>(rank));
    tell_host(static_cast<unsigned>(rank));
    if (lane == 0) opened.failed = rank;
    __syncwarp();
  }
  __device__ __forceinline__ void tell_host(unsigned rank) const {
    if (lane == 0) send_to_rank(ranks.failure, rank);
  }
};

__device__ __forceinline__ void store_result(const Links& links, int row, int kv_head, int column,
                                             const HeadState& state, int) {
  links.send(row, kv_head, column, state);
}
__device__ __forceinline__ void store_empty_rows(const Links& links, const Lengths& lens, int batch_size, int worker,
                                                 int workers, int) {
  for (int row = worker; row < batch_size; row += workers)
    if (lens[row] == 0) links.send_nothing(row);
}

}  // namespace pkv
