// pkv_merge: the segmented merge after pkv_decode_tasks. Each row's partial states, in split order, become its output.
//
// Grid: [num_kv_heads, len(rows)], block: [WARPS * 32]. rows: the rows to merge, int32; those of fewer than two splits
// were written by the decode kernel and are passed over. Other arrays as in decode.cu. Bound by the latency of one read
// of the partials.
#include "state.cuh"

extern "C" __global__ void __launch_bounds__(pkv::THREADS)
pkv_merge(const pkv::Packet* partials, const int* split_offsets, const int* rows, half_type* out, float* lse) {
  pkv::wait_for_previous_kernel();
  const int kv_head = blockIdx.x, row = rows[blockIdx.y], num_kv_heads = gridDim.x;
  const int first = split_offsets[row], last = split_offsets[row + 1];
  if (last - first < 2) return;
  const pkv::Output output{out, lse, num_kv_heads};
  for (int pair = threadIdx.x; pair < pkv::STATE_PAIRS; pair += pkv::THREADS) {
    const pkv::Packet* parts = partials + (static_cast<long long>(first) * num_kv_heads + kv_head) * pkv::STATE_PAIRS + pair;
    const long long stride = static_cast<long long>(num_kv_heads) * pkv::STATE_PAIRS;
    pkv::Packet sum{0.0f, 0.0f, __int_as_float(0xff800000), 0.0f};
    #pragma unroll 8
    for (int i = 0; i < last - first; ++i) sum.m = fmaxf(sum.m, parts[i * stride].m);
    #pragma unroll 8
    for (int i = 0; i < last - first; ++i) pkv::add(sum, parts[i * stride]);
    pkv::store_result(output, row, kv_head, pair, sum);
  }
}
