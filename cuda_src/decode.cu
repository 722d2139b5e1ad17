// pkv_decode_tasks: paged decode attention over a list of tasks that the host planned (the split and workqueue
// schedules).
//
// Computes softmax(q K^T * scale) V of each row's query tokens over its pages: whole for rows of one split, a partial
// state of each task for the others, which pkv_merge (merge.cu) puts together.
// Grid: [any]; block: [WARPS * 32]; dynamic shared memory: SharedMemory<RowWidth> (attend.cuh). CTA b has the tasks b,
// b + gridDim.x, ... and its loads run on from one task into the next. Where the grid has twice the tasks, CTA 2 i has
// task i and CTA 2 i + 1 none (paired_place).
//
//   given          see DecodeArguments for the arrays and their shapes. partials: [num_slots][num_kv_heads] Slot
//   tasks          [num_tasks] Task, queue order; tiles of tile_scale * PKV_TILE tokens, end exclusive
//   split_offsets  [batch_size + 1]: row r's slots are split_offsets[r] .. split_offsets[r + 1]
//   written        out and lse of rows of at most one split, slots of the others' tasks
//
// Its speed is bound by HBM, and by the CTA with the most work: the queue is not cut to equal cost.
#include "attend.cuh"

namespace pkv {

struct TaskSource {
  using Piece = Segment;
  const Task* tasks;
  const int *lengths, *split_offsets;
  int index, num_tasks, stride, tile_scale;

  __device__ __forceinline__ bool next(Segment& s) {
    if (index >= num_tasks) return false;
    const Task* t = tasks + index;
    const int split = __ldg(&t->split);
    s.row = __ldg(&t->row), s.kv_head = __ldg(&t->kv_head);
    s.seq_len = __ldg(lengths + s.row);
    s.tile_begin = __ldg(&t->tile_begin) * tile_scale;
    s.tile_end = min(__ldg(&t->tile_end) * tile_scale, tiles_of(s.seq_len));
    const int first = __ldg(split_offsets + s.row);
    s.slot = first + split;
    s.begins = s.ends = __ldg(split_offsets + s.row + 1) - first == 1;
    index += stride;
    return true;
  }
};

// The kernel has waited for the previous one when attend begins.
struct TaskStart {
  static constexpr bool EARLY = false;
  __device__ __forceinline__ void release(const Pages&, const Loader<TaskSource, RowWidth>&) const {}
  __device__ __forceinline__ bool begin(const Pages&) const { return true; }
};

struct TaskEmit {
  const Output& output;
  Slot* partials;
  int lane;

  __device__ __forceinline__ void operator()(const Segment& s, int column, const HeadState& state) const {
    if (s.begins && s.ends) store_result(output, s.row, s.kv_head, column, state, lane);
    else send_state(partials[static_cast<long long>(s.slot) * output.num_kv_heads + s.kv_head], column, state, lane);
  }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_tasks(const pkv::DecodeArguments given, const pkv::Task* tasks, const int* split_offsets, int num_tasks,
                 int tile_scale) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  SharedMemory<RowWidth>& shared = *reinterpret_cast<SharedMemory<RowWidth>*>(memory);
  const Output output = output_of(given);
  let_next_kernel_start();
  init_barriers(shared);
  wait_for_previous_kernel();
  const TaskSource source{
      .tasks = tasks, .lengths = given.lengths, .split_offsets = split_offsets, .index = paired_place(num_tasks),
      .num_tasks = num_tasks, .stride = static_cast<int>(gridDim.x), .tile_scale = tile_scale};
  const int lane = threadIdx.x % 32;
  TaskStart start;
  TaskEmit emit{.output = output, .partials = given.partials, .lane = lane};
  attend(source, pages_of(given), given, shared, start, emit);
  store_empty_rows(output, given.lengths, given.batch_size, blockIdx.x * WARPS + threadIdx.x / 32, gridDim.x * WARPS,
                   lane);
}
