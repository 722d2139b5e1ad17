// The decode path of every schedule: a CTA walks the segments of a source and yields one softmax state of each column
// of each segment.
//
// Tokens are the M of the tensor-core product and the query heads of the group its N, so that a group of up to 8
// heads wastes no accumulators: S^T = K Q^T, O^T = V^T P^T. Each warp keeps its own running state over its tiles,
// leaves it in shared memory at the segment's end and goes on; each query head's states are merged by one warp when it
// comes to the next segment's end. So no warp stops for another while there is work.
//
// Columns whose accumulators are too many for a warp's registers go to a team of TEAM warps, which read the same tiles
// from one ring (ring.cuh).
#pragma once
#include "ring.cuh"
#include "weights.cuh"
#if PAGE_LSE
#include "page_lse.cuh"
#endif

namespace pkv {

constexpr int STATE_ROW = V_DIM + 4;  // floats; the 4 more keep the writes of pairs of columns in different banks

template <class W>
struct __align__(16) SharedMemory {
  unsigned char ring[W::STREAMS][W::NUM_STAGES][SLOT_BYTES];
  float states[W::NUM_BUFFERS][W::STREAMS][W::COLUMNS][STATE_ROW];  // acc, then m and l
  float kept[W::MANY_ROWS ? 1 : W::COLUMNS][STATE_ROW];         // the same, merged (balanced only, see parts.cuh)
  ArrivalBarrier left[W::NUM_BUFFERS];    // all warps have left their states there,
  ArrivalBarrier merged[W::NUM_BUFFERS];  // have merged theirs
};

static_assert(sizeof(SharedMemory<RowWidth>) == SHARED_BYTES, "gpu/kernels/variant.py computes the same size");

template <class W>
__device__ __forceinline__ void accumulate(WarpState<W>& state, const unsigned (&p)[W::HEAD_BLOCKS][2],
                                           const Query<W>& query, unsigned tile, int lane) {
  ValueFragments values(tile, lane);
  #pragma unroll
  for (int i = 0; i < V_STEPS; ++i) {
    unsigned v[4];
    values.get(v, i);
    #pragma unroll
    for (int b = 0; b < W::HEAD_BLOCKS; ++b)
      if (query.used(b)) multiply_add(state.acc[i][b], v, p[b][0], p[b][1]);
  }
}

// Leaves this warp's state in shared memory: of its stream's rows, those of its columns.
template <class W>
__device__ __forceinline__ void publish(const WarpState<W>& state, float (&to)[W::COLUMNS][STATE_ROW], int lane) {
  #pragma unroll
  for (int b = 0; b < W::HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int column = 0; column < 2; ++column) {
      float l = state.l[b][column];
      #pragma unroll
      for (int hop = 4; hop < 32; hop <<= 1) l += __shfl_xor_sync(0xffffffffu, l, hop);
      const int head = b * 8 + (lane % 4) * 2 + column;
      if (W::MANY_ROWS ? W::column_at(head) >= W::COLUMNS
                       : head >= W::WARP_COLUMNS || (W::LAST_COLUMNS < W::WARP_COLUMNS && head >= W::own_columns()))
        continue;
      float* row = to[W::column_at(head)];
      if (lane < 4) row[V_DIM] = state.m[b][column], row[V_DIM + 1] = l;
      #pragma unroll
      for (int i = 0; i < V_STEPS; ++i) {
        row[i * 16 + lane / 4 * LANES_APART] = state.acc[i][b][column];
        row[i * 16 + lane / 4 * LANES_APART + ROWS_APART] = state.acc[i][b][column + 2];
      }
    }
}

// Merges the STREAMS states that a segment has of one column. value_scale: V's, where 8-bit pages have one for all.
template <class W>
__device__ __forceinline__ HeadState gather(const float (&states)[W::STREAMS][W::COLUMNS][STATE_ROW], int column,
                                            float value_scale, int lane) {
  constexpr int STREAMS = W::STREAMS;
  HeadState sum;
  sum.reset();
  float2 ml[STREAMS];  // every lane reads them all, which is sooner done than to exchange what they have in common
  #pragma unroll
  for (int s = 0; s < STREAMS; ++s) {
    ml[s] = *reinterpret_cast<const float2*>(&states[s][column][V_DIM]);
    sum.m = fmaxf(sum.m, ml[s].x);
  }
  #pragma unroll
  for (int s = 0; s < STREAMS; ++s) {
    const float4* part = reinterpret_cast<const float4*>(states[s][column]);
    const float scale = exp2_fast(ml[s].x - sum.m);
    sum.l += ml[s].y * scale;
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i)
      if (lane + i * 32 < HEAD_QUADS) sum.add(i, part[lane + i * 32], scale * value_scale);
  }
  return sum;
}

// What the arguments say of the pages and of where results go.
__device__ __forceinline__ Pages pages_of(const DecodeArguments& given) {
  return {{given.k_pages, given.k_page_stride, given.k_head_stride, given.k_token_stride},
          {given.v_pages, given.v_page_stride, given.v_head_stride, given.v_token_stride},
          {given.page_ids, given.table_stride, given.num_pages PKV_CSR(, given.row_begins, given.batch_size)},
          given.reach(),
          given.k_page_stride == given.v_page_stride && given.k_head_stride == given.v_head_stride
              && given.k_token_stride == given.v_token_stride,
#if CACHE_SCALES
          {given.k_scales, given.v_scales, given.scale_page_stride, given.scale_head_stride, given.scale_token_stride},
#endif
  };
}
__device__ __forceinline__ Output output_of(const DecodeArguments& given) {
  return {given.out, given.lse, given.num_kv_heads, given.query_lens, given.sinks};
}

// The one scale of K and the one of V, of 8-bit pages that have no others. They are read from memory, so that a
// captured graph follows their changes.
struct TensorScales {
#if CACHE_TYPE && !CACHE_SCALES
  float k, v;

  __device__ __forceinline__ void load(const DecodeArguments& given) {
    k = given.k_scales ? __ldg(given.k_scales) : 1.0f;
    v = given.v_scales ? __ldg(given.v_scales) : given.v_scale;
  }
  __device__ __forceinline__ float of_logits(const DecodeArguments& given) const { return given.scale * k; }
  __device__ __forceinline__ float of_values() const { return v; }
#else
  __device__ __forceinline__ void load(const DecodeArguments&) {}
  __device__ __forceinline__ float of_logits(const DecodeArguments& given) const { return given.scale; }
  __device__ __forceinline__ float of_values() const { return 1.0f; }
#endif
};

// Columns of a segment that count. Those of a read are its members'.
template <class W, class Piece>
__device__ __forceinline__ int columns_of(const Piece& s) {
  if constexpr (W::MANY_ROWS) return s.members * COLUMNS;
  else return W::COLUMNS;
}

// Runs every segment of `source`, in order.
//
// start   says when the work may begin. `start.release(pages, loader)` is called when nothing has been read but lengths
//         and the first segment's page ids, in loader.ids_ahead; it returns when queries and tiles may be read.
//         `start.begin(pages)` is called when the first tiles are under way; if it is false nothing more is done, and
//         attend returns false. start.EARLY: whether those first page ids are read early (early_plan.cuh).
// emit    takes the results: `emit(segment, column, state)` is called by one warp for each column of every segment, of
//         the first segment by warp column % WARPS.
template <class W, class Source, class Start, class Emit>
__device__ __forceinline__ bool attend(const Source& source, const Pages& pages, const DecodeArguments& given,
                                       SharedMemory<W>& shared, Start& start, Emit& emit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stream = warp / W::TEAM_SIZE;
  const unsigned first_slot = shared_address(shared.ring[stream][0]);
  Loader<Source, W> loader(source);
  Ring<Source, W> ring{.loader = loader, .pages = pages, .begin = first_slot, .stream = stream, .lane = lane,
                    .slot = first_slot, .stage = 0};
  Dealer<Source, W> walk(source);
  TensorScales tensor_scales;
  Query<W> query;
  settle(query);
  Mask mask;
  settle(mask);
  const auto enter = [&](const Share<Source>& s) {
    if constexpr (W::QUERY_EARLY) query.load(given.q, s, given.num_kv_heads, lane);
    mask = {s.seq_len, QUERY_TOKENS, given.window};
    if (QUERY_TOKENS > 1 && given.query_lens) mask.query_len = given.query_lens[s.row];
    PKV_SELECTED(mask.row_len = s.row_len;
                 mask.places = pages.lists.pages + static_cast<long long>(s.list) * pages.lists.stride;)
  };

  loader.template look_ahead<Start::EARLY>(pages, stream, lane);
  Share<Source> share;
  settle(share);
  bool live = walk.next(share, stream);  // whether `share` is a segment to compute
  start.release(pages, loader);
  // Queries and scales are asked for before the first tiles, behind which they would arrive.
  if (live) enter(share);
  tensor_scales.load(given);
  ring.fill();
  if (!start.begin(pages)) {
    copy_wait<0>();
    return false;
  }

  typename Source::Piece before;  // the segment whose states are to be merged, the (count - 1)-th
  settle(before);
  for (int count = 0;; ++count) {
    WarpState<W> state;
    settle(state);
    if (live) {
      state.reset();
      if constexpr (!W::QUERY_EARLY) query.load(given.q, share, given.num_kv_heads, lane);
      for (int tile = share.first; tile < share.tile_end; tile += W::STREAMS) {
        float s[W::HEAD_BLOCKS][4];
        unsigned p[W::HEAD_BLOCKS][2];
        ring.await_keys();
        score(s, query, ring.slot, lane);
#if CACHE_SCALES
        state.scales.read(ring.slot + K_TILE_BYTES + V_TILE_BYTES, lane);
#endif
        ring.keys_read();
        weigh(state, p, s, query, tensor_scales.of_logits(given), given.cap, mask, tile * PKV_TILE, lane);
        ring.await_values();
        accumulate(state, p, query, ring.slot + K_TILE_BYTES, lane);
        ring.values_read();
        // Only here, where the warp would wait for the next keys: before, the tile's values would wait in their slot.
        PKV_PAGE_LSE(store_page_lse(given, share, tile, state, lane);)
      }
    }
    // The next segment's queries are on their way while this one's states are merged.
    Share<Source> next;
    settle(next);
    const bool more = live && walk.next(next, stream);
    if (more) enter(next);
    if (count > 0) {
      const int buffer = (count - 1) % W::NUM_BUFFERS, phase = (count - 1) / W::NUM_BUFFERS;
      shared.left[buffer].wait(phase);
      // Columns that are fewer than the warps go to other warps each time.
      #pragma unroll 1
      for (int column = (warp + (count - 1) * (WARPS - W::COLUMNS % WARPS)) % WARPS; column < columns_of<W>(before);
           column += WARPS)
        emit(before, column, gather<W>(shared.states[buffer], column, tensor_scales.of_values(), lane));
      shared.merged[buffer].arrive(lane);
    }
    if (!live) break;
    const int buffer = count % W::NUM_BUFFERS, phase = count / W::NUM_BUFFERS;
    if (phase > 0) shared.merged[buffer].wait(phase - 1);
    publish(state, shared.states[buffer][stream], lane);
    shared.left[buffer].arrive(lane);
    before = share, share = next, live = more;
  }
  copy_wait<0>();
  return true;
}

// Which of `count` pieces of work this CTA has, count or more if none. Two CTAs of a cluster are on neighbouring SMs,
// which share their way to memory: where there is work for no more than half the CTAs, one of each two has none.
__device__ __forceinline__ int paired_place(int count) {
  const int cta = blockIdx.x;
  if (!KERNELS_OVERLAP || count * 2 > static_cast<int>(gridDim.x)) return cta;
  return cta % 2 ? count : cta / 2;
}

// The whole CTA calls this once, before attend.
template <class W>
__device__ __forceinline__ void init_barriers(SharedMemory<W>& shared) {
  if (threadIdx.x < W::NUM_BUFFERS) shared.left[threadIdx.x].init(WARPS), shared.merged[threadIdx.x].init(WARPS);
  __syncthreads();
}

}  // namespace pkv
