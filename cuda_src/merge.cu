// pkv_merge: the segmented merge after pkv_decode_tasks.
//
// Computes the output of rows that were split from their partial states, in the order of the splits.
// Grid: [num_kv_heads, num_rows]; block: [WARPS * 32]. A warp merges one column after another.
//
//   partials       [num_slots][num_kv_heads] Slot, as pkv_decode_tasks left them
//   split_offsets  [batch_size + 1]: row r's slots are split_offsets[r] .. split_offsets[r + 1]
//   rows           [num_rows]: the rows to merge. Those of fewer than two splits are passed over: they were written by
//                  the decode kernel
//   out, lse, query_lens, sinks: see DecodeArguments; out and lse are written
//
// Its speed is bound by the latency of one read of the partials.
#include "state.cuh"

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_merge(const pkv::Slot* partials, const int* split_offsets, const int* rows, half_type* out, float* lse,
          const int* query_lens, const float* sinks) {
  pkv::let_next_kernel_start();
  pkv::wait_for_previous_kernel();
  const int kv_head = blockIdx.x, row = rows[blockIdx.y], num_kv_heads = gridDim.x;
  const int first = split_offsets[row], last = split_offsets[row + 1];
  if (last - first < 2) return;
  const pkv::Output output{out, lse, num_kv_heads, query_lens, sinks};
  const int lane = threadIdx.x % 32;
  for (int column = threadIdx.x / 32; column < pkv::COLUMNS; column += WARPS) {
    pkv::HeadState sum;
    sum.reset();
    for (int begin = 0; begin < last - first; begin += 32) {
      const pkv::Slot* parts = partials + static_cast<long long>(first + begin) * num_kv_heads + kv_head;
      const int count = min(32, last - first - begin);
      float2 ml = make_float2(pkv::LOWEST, 0.0f);
      if (lane < count) ml = parts[static_cast<long long>(lane) * num_kv_heads].ml[column];
      const float scale = sum.weigh(ml);
      #pragma unroll 4
      for (int p = 0; p < count; ++p) {
        const float part_scale = __shfl_sync(pkv::ALL_LANES, scale, p);
        #pragma unroll
        for (int i = 0; i < pkv::LANE_QUADS; ++i)
          if (lane + i * 32 < pkv::HEAD_QUADS)
            sum.add(i, parts[static_cast<long long>(p) * num_kv_heads].acc[column][lane + i * 32], part_scale);
      }
    }
    pkv::store_result(output, row, kv_head, column, sum, lane);
  }
}
