// pkv_decode_selected: paged decode attention over lists of pages, one for each (row, KV head), planned on the device.
//
// Computes softmax(q K^T * scale) V of each row's query tokens over the tokens of the listed pages alone. The lists may
// be ragged and may change in place from launch to launch, also under a captured graph.
// Grid: [num_ctas]; block: [WARPS * 32]; dynamic shared memory: SharedMemory<RowWidth> (attend.cuh).
//
// All (row, KV head) pairs' tiles are laid end to end and cut into ranges of equal cost, as in pkv_decode_balanced;
// lists.cuh and list_plan.cuh have what differs. Lists are mostly written by the kernel before, so nothing is read until that has ended:
// there is no early plan.
//
//   given       see DecodeArguments for the arrays and their shapes (SELECTED). partials: [num_ctas] Slot, all words
//               EMPTY_WORD between launches
//   costs       of the schedule
//   max_tokens  that a row of the table has room for; lengths beyond are cut to it
//   written     out and lse of every (row, query head), 0 and -inf where no page is listed; partials are left as they
//               were found
//
// Its speed is bound by HBM: each listed K,V byte is read once. Beside it there are a plan of two reads, and for each
// head three reads in turn (count, place, page id), which are made while other tiles are under way.
#include "list_plan.cuh"
#include "parts.cuh"

namespace pkv {

// The kernel has waited for the previous one when attend begins.
struct ListStart {
  const Output& output;
  const Lists& lists;
  bool some_empty;
  int lane;

  static constexpr bool EARLY = false;
  template <class AnyLoader>
  __device__ __forceinline__ void release(const Pages&, const AnyLoader&) const {}
  // Writes zeros and -inf for the lists without pages, while the first tiles are on their way.
  __device__ __forceinline__ bool begin(const Pages&) const {
    if (!some_empty) return true;
    #pragma unroll 1
    for (int v = blockIdx.x * WARPS + threadIdx.x / 32; v < lists.count(); v += gridDim.x * WARPS) {
      if (lists.size(v).pages > 0) continue;
      const int row = lists.row_of(v), head = v - row * lists.heads;
      #pragma unroll 1
      for (int column = 0; column < COLUMNS; ++column) {
        const ColumnPlace place = place_of(column);
        const int at = (row * QUERY_TOKENS + place.token) * lists.heads * GROUP_SIZE + head * GROUP_SIZE + place.head;
        unsigned* out = reinterpret_cast<unsigned*>(output.out + static_cast<long long>(at) * V_DIM);
        for (int i = lane; i < V_DIM / 2; i += 32) out[i] = 0u;
        if (lane == 0) output.lse[at] = __int_as_float(0xff800000);
      }
    }
    return true;
  }
};

// Where the results of a range go.
struct ListEmit {
  const Output& output;
  Parts& parts;

  __device__ __forceinline__ void operator()(const ListPiece& s, int column, const HeadState& state) {
    if (s.begins && s.ends) store_result(output, s.row, s.kv_head, column, state, parts.lane);
    else if (s.ends) parts.keep(s, column, state);
    else parts.send(column, state);
  }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_selected(const pkv::DecodeArguments given, const pkv::Costs costs, int max_tokens) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  SharedMemory<RowWidth>& shared = *reinterpret_cast<SharedMemory<RowWidth>*>(memory);
  const int stream = threadIdx.x / 32 / RowWidth::TEAM_SIZE, lane = threadIdx.x % 32;
  Pages pages = pages_of(given);
  pages.lists = {given.selected_pages, given.selected_counts, given.max_selected, (max_tokens - 1) / PAGE_SIZE};
  const Output output = output_of(given);
  const Lists lists{{given.lengths, given.batch_size, max_tokens, given.reach() PKV_LAST_PAGE(, given.row_begins)},
                    pages.lists, given.num_kv_heads};

  let_next_kernel_start();
  wait_for_previous_kernel();
  static_assert(sizeof(ListNotes) <= sizeof(shared.ring), "the plan is noted where the tiles come to be");
  const ListPlan plan(lists, costs, *reinterpret_cast<ListNotes*>(memory));
  init_barriers(shared);  // which the CTA leaves together, so that nobody overwrites the notes before
  ListStart start{.output = output, .lists = lists, .some_empty = plan.some_empty, .lane = lane};
  Parts parts{.slots = given.partials, .kept = shared.kept, .plan = plan, .lane = lane};
  ListEmit emit{.output = output, .parts = parts};
  attend(plan.walk, pages, given, shared, start, emit);
  if (parts.held.any) parts.finish(output, shared.ring[stream][0] + RowWidth::team_member() * Parts::RING_BYTES);
}
