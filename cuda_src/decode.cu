// pkv_decode_tasks: paged decode attention over a task list (the split and workqueue schedules).
//
// Grid: [any], block: [WARPS * 32]; CTA b takes tasks b, b + gridDim.x, ..., loads running on from one task into the
// next. A row of one split is written directly; every other task leaves its state in its slot of `partials` for
// pkv_merge (merge.cu).
//
//   tasks         [num_tasks] Task, queue order; tiles of tile_tokens (a multiple of PKV_TILE), end exclusive
//   split_offsets [batch_size + 1] int32: row r's slots are split_offsets[r] .. split_offsets[r + 1]
//   partials      [num_slots][num_kv_heads] Slot
//   given         see DecodeArguments
//
// Bound by HBM, plus the tail of the CTA with the most work: the queue is not cut to equal cost.
#include "attend.cuh"

namespace pkv {

struct TaskSource {
  const Task* tasks;
  const int *seq_lens, *split_offsets;
  int index, num_tasks, stride, tile_scale;

  __device__ __forceinline__ bool next(Segment& s) {
    if (index >= num_tasks) return false;
    const Task* t = tasks + index;
    const int split = __ldg(&t->split);
    s.row = __ldg(&t->row), s.kv_head = __ldg(&t->kv_head);
    s.seq_len = __ldg(seq_lens + s.row);
    s.tile_begin = __ldg(&t->tile_begin) * tile_scale;
    s.tile_end = min(__ldg(&t->tile_end) * tile_scale, tiles_of(s.seq_len));
    const int first = __ldg(split_offsets + s.row);
    s.slot = first + split;
    s.begins = s.ends = __ldg(split_offsets + s.row + 1) - first == 1;
    index += stride;
    return true;
  }
};

struct TaskEmit {
  Output output;
  Slot* partials;
  int lane;

  __device__ __forceinline__ void operator()(const Segment& s, int column, const HeadState& state) const {
    if (s.begins && s.ends) store_result(output, s.row, s.kv_head, column, state, lane);
    else send_state(partials[static_cast<long long>(s.slot) * output.num_kv_heads + s.kv_head], column, state, lane);
  }
  static constexpr bool EARLY = false;
  __device__ __forceinline__ void release(const Pages&, const Loader<TaskSource>&) const {}
  __device__ __forceinline__ bool begin(const Pages&) const { return true; }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_tasks(const pkv::DecodeArguments given, const pkv::Task* tasks, const int* split_offsets, int num_tasks,
                 int tile_scale) {
  extern __shared__ __align__(128) unsigned char memory[];
  pkv::SharedMemory& shared = *reinterpret_cast<pkv::SharedMemory*>(memory);
  const pkv::Output output = pkv::output_of(given);
  pkv::let_next_kernel_start();
  pkv::init_barriers(shared);
  pkv::wait_for_previous_kernel();
  const pkv::TaskSource source{tasks, given.lengths, split_offsets, static_cast<int>(blockIdx.x), num_tasks,
                               static_cast<int>(gridDim.x), tile_scale};
  pkv::TaskEmit emit{output, given.partials, static_cast<int>(threadIdx.x % 32)};
  pkv::attend(source, pkv::pages_of(given), given, shared, emit);
  pkv::store_empty_rows(output, given.lengths, given.batch_size, blockIdx.x * WARPS + threadIdx.x / 32,
                        gridDim.x * WARPS, threadIdx.x % 32);
}
