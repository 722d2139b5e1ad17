// pkv_decode_balanced: paged decode attention, one launch, planned on the device.
//
// Computes softmax(q K^T * scale) V for one query token per row over paged K,V, rows of any length.
// Grid: [num_ctas], at most as many as are resident; block: [WARPS * 32]; dynamic shared memory: SharedMemory.
// Every CTA reads seq_lens itself and finds its own equal-cost range of tiles (plan.cuh): no planner, no host.
//
// A CTA holds at most two partial segments. One that its range cuts at the end goes to the CTA's slot in
// `partials`; one that an earlier CTA began and this CTA ends is merged here, last of all, with the slots of the
// CTAs before it, in their order. A CTA waits only for CTAs of lower index, which never wait for it, so progress
// needs no co-residency; the reader empties the slots again, so the workspace is clean when the kernel ends.
//
//   q        [batch_size, num_kv_heads * GROUP_SIZE, HEAD_DIM]
//   pages    see Pages; block_table [batch_size, table_stride] int32; seq_lens [batch_size] int32
//   out      like q; lse [batch_size, num_kv_heads * GROUP_SIZE] float32
//   partials [2 * num_ctas][STATE_PAIRS] Packet: the CTAs' slots, all words EMPTY_WORD between launches, then a place
//            for each CTA to keep its own part of the segment it will merge
//
// Bound by HBM: each K,V byte is read once; the rest is a few KiB per CTA.
#include "attend.cuh"
#include "warp_plan.cuh"

namespace pkv {

struct BalancedEmit {
  Output output;
  Packet* partials;
  Cut cut;
  int held_row, held_head, held_x0;
  bool holds;

  __device__ __forceinline__ Packet* kept() const { return partials + static_cast<long long>(gridDim.x + blockIdx.x) * STATE_PAIRS; }

  __device__ __forceinline__ void operator()(const Segment& s, int pair, const Packet& p) {
    if (s.begins && s.ends) {
      store_result(output, s.row, s.kv_head, pair, p);
    } else if (s.ends) {
      kept()[pair] = p;
      held_row = s.row, held_head = s.kv_head, held_x0 = s.slot, holds = true;
    } else {
      send(partials + static_cast<long long>(blockIdx.x) * STATE_PAIRS + pair, p);
    }
  }

  // Merges the segment this CTA ends with the earlier CTAs' parts of it.
  __device__ __forceinline__ void finish() {
    constexpr int IN_FLIGHT = 8;
    const int first = cut.range_of(held_x0), last = blockIdx.x;
    for (int pair = threadIdx.x; pair < STATE_PAIRS; pair += THREADS) {
      Packet* slots = partials + pair;
      const Packet own = kept()[pair];
      Packet sum{0.0f, 0.0f, __int_as_float(0xff800000), 0.0f};
      for (int j = first; j < last; j += IN_FLIGHT) {
        Packet part[IN_FLIGHT];
        #pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
          if (j + i < last) part[i] = peek(slots + static_cast<long long>(j + i) * STATE_PAIRS);
        #pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
          if (j + i < last) {
            Packet* slot = slots + static_cast<long long>(j + i) * STATE_PAIRS;
            while (!arrived(part[i])) part[i] = peek(slot);
            clear(slot);
            merge(sum, part[i]);
          }
      }
      merge(sum, own);
      store_result(output, held_row, held_head, pair, sum);
    }
  }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS, 1)
pkv_decode_balanced(const half_type* q, const half_type* k_pages, const half_type* v_pages, const int* block_table,
                    const int* seq_lens, half_type* out, float* lse, pkv::Packet* partials, int batch_size,
                    int num_kv_heads, int table_stride, long long page_stride, int head_stride, int token_stride,
                    float scale_log2, int segment_cost, int min_cost) {
  extern __shared__ __align__(128) unsigned char memory[];
  pkv::SharedMemory& shared = *reinterpret_cast<pkv::SharedMemory*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const pkv::Pages pages{k_pages, v_pages, block_table, table_stride, page_stride, head_stride, token_stride};
  const pkv::Output output{out, lse, num_kv_heads};

  const int total = pkv::total_cost(seq_lens, batch_size, num_kv_heads, segment_cost, lane);
  const pkv::Cut cut(total, gridDim.x, segment_cost, min_cost);
  if (total > 0 && static_cast<int>(blockIdx.x) < cut.num_ranges) {
    pkv::BalancedWalk walk;
    pkv::start_range(walk, cut, blockIdx.x, seq_lens, batch_size, num_kv_heads, segment_cost, lane);
    pkv::BalancedEmit emit{output, partials, cut};
    emit.holds = false;
    pkv::attend(walk, pages, q, num_kv_heads, scale_log2, shared, emit);
    if (emit.holds) emit.finish();
  }
  pkv::store_empty_rows(output, seq_lens, batch_size, blockIdx.x * WARPS + warp, gridDim.x * WARPS, lane);
}
