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
//   q        [batch_size, num_kv_heads * GROUP_SIZE, HEAD_DIM]
//   pages    see Pages; block_table [batch_size, table_stride] int32; seq_lens [batch_size] int32
//   out      like q; lse [batch_size, num_kv_heads * GROUP_SIZE] float32
//   partials [num_ctas][STATE_PAIRS] Packet: the CTAs' slots, all words EMPTY_WORD between launches
//
// Bound by HBM: each K,V byte is read once; the rest is a few KiB per CTA.
#include "attend.cuh"
#include "warp_plan.cuh"

namespace pkv {

struct BalancedEmit {
  Output output;
  Packet* partials;
  Packet* kept;  // [STATE_PAIRS] in shared memory: this CTA's part of the segment it will merge
  Cut cut;
  int first;     // the range in which this CTA's first segment begins
  int held_row, held_head;
  bool holds;

  __device__ __forceinline__ Packet* slot(int range) const { return partials + static_cast<long long>(range) * STATE_PAIRS; }
  // Called once the first loads are under way.
  __device__ __forceinline__ void begin(const BalancedWalk& walk) { first = walk.tile > 0 ? cut.range_of(walk.x0) : blockIdx.x; }

  __device__ __forceinline__ void operator()(const Segment& s, int pair, const Packet& p) {
    if (s.begins && s.ends) {
      store_result(output, s.row, s.kv_head, pair, p);
    } else if (s.ends) {
      kept[pair] = p;
      held_row = s.row, held_head = s.kv_head, holds = true;
    } else {
      send(slot(blockIdx.x) + pair, p);
    }
  }

  // Merges the segment this CTA ends with the earlier CTAs' parts of it. The parts are fetched through the ring, free
  // by now, all in flight at once, and again while one is missing: most arrive together.
  __device__ __forceinline__ void finish(SharedMemory& shared) const {
    constexpr int IN_FLIGHT = sizeof(shared.ring) / (STATE_PAIRS * sizeof(Packet));
    Packet* fetched = reinterpret_cast<Packet*>(shared.ring);
    #pragma unroll 1
    for (int pair = threadIdx.x; pair < STATE_PAIRS; pair += THREADS) {
      Packet sum = kept[pair];
      #pragma unroll 1
      for (int j = first; j < blockIdx.x; j += IN_FLIGHT) {
        const int count = min(IN_FLIGHT, static_cast<int>(blockIdx.x) - j);
        Packet* parts = slot(j) + pair;
        Packet* copies = fetched + pair;
        float m;
        bool complete;
        do {
          #pragma unroll 4
          for (int i = 0; i < count; ++i) copy_async(shared_address(copies + i * STATE_PAIRS), parts + i * STATE_PAIRS);
          copy_commit();
          copy_wait<0>();
          m = sum.m, complete = true;
          #pragma unroll 4
          for (int i = 0; i < count; ++i) {
            const Packet part = copies[i * STATE_PAIRS];
            complete &= arrived(part), m = fmaxf(m, part.m);
          }
        } while (!complete);
        rescale(sum, m);
        #pragma unroll 4
        for (int i = 0; i < count; ++i) {
          add(sum, copies[i * STATE_PAIRS]);
          clear(parts + i * STATE_PAIRS);
        }
      }
      store_result(output, held_row, held_head, pair, sum);
    }
  }
};

// Asks for the block table before the plan is known, so that its first read is an L2 hit. Small tables only: a wide
// one may be mostly unused. The last of several rows is left out, since it may end before its stride does.
__device__ __forceinline__ void prefetch_table(const Pages& pages, int batch_size) {
  constexpr int LINE = 128 / sizeof(int), MOST = 1 << 16;
  const int entries = max(1, batch_size - 1) * pages.table_stride;
  const int at = (threadIdx.x * gridDim.x + blockIdx.x) * LINE;
  if (entries <= MOST && at < entries) asm volatile("prefetch.global.L2 [%0];" ::"l"(pages.block_table + at));
}

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

  pkv::prefetch_table(pages, batch_size);
  pkv::wait_for_previous_kernel();
  const pkv::Rows rows(seq_lens, batch_size, num_kv_heads, segment_cost, lane);
  const pkv::Cut cut(rows.total, rows.num_heads, gridDim.x, segment_cost, min_cost);
  if (rows.total > 0 && static_cast<int>(blockIdx.x) < cut.num_ranges) {
    pkv::BalancedWalk walk;
    rows.start(walk, cut.begin(blockIdx.x), cut.begin(blockIdx.x + 1), lane);
    pkv::BalancedEmit emit{output, partials, shared.kept, cut};
    emit.holds = false;
    pkv::attend(walk, pages, q, num_kv_heads, scale_log2, shared, emit);
    if (emit.holds) emit.finish(shared);
  }
  pkv::store_empty_rows(output, seq_lens, batch_size, blockIdx.x * WARPS + warp, gridDim.x * WARPS, lane);
}
