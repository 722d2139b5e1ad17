// The decode path of every schedule: a CTA walks a stream of segments and yields one partial softmax state for each.
//
// Tokens are the M of the tensor-core product and the query heads of the group its N, so that a group of up to 8
// heads wastes no accumulators: S^T = K Q^T, O^T = V^T P^T. Each warp keeps its own running state over its tiles, leaves
// it in shared memory at the segment's end and goes on; each query head's states are merged by one warp when it comes
// to the next segment's end. So no warp stops for another while there is work.
#pragma once
#include "paged_load.cuh"
#include "state.cuh"

namespace pkv {

constexpr int HEAD_BLOCKS = (COLUMNS + 7) / 8;     // blocks of 8 columns
constexpr int K_STEPS = HEAD_DIM / 16, V_STEPS = V_DIM / 16;
constexpr int STATE_ROW = V_DIM + 4;               // floats; the 4 more keep the writes of head pairs in different banks
constexpr float RESCALE_ABOVE = 8.0f;              // p stays below 2^8, so the maximum may lag by that much

struct __align__(16) SharedMemory {
  unsigned char ring[WARPS][STAGES][SLOT_BYTES];
  float states[BUFFERS][WARPS][COLUMNS][STATE_ROW];  // acc, then m and l
  float kept[COLUMNS][STATE_ROW];                       // the same, merged (balanced only)
  ArrivalBarrier left[BUFFERS], merged[BUFFERS];        // by all warps: their states left there, their heads merged
};

static_assert(sizeof(SharedMemory) == SHARED_BYTES, "gpu/config.py computes the same size");

struct WarpState {
  float m[HEAD_BLOCKS][2], l[HEAD_BLOCKS][2];
  float acc[V_STEPS][HEAD_BLOCKS][4];

  __device__ __forceinline__ void reset() {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) m[b][0] = m[b][1] = LOWEST, l[b][0] = l[b][1] = 0.0f;
    #pragma unroll
    for (int i = 0; i < V_STEPS; ++i)
      #pragma unroll
      for (int b = 0; b < HEAD_BLOCKS; ++b) acc[i][b][0] = acc[i][b][1] = acc[i][b][2] = acc[i][b][3] = 0.0f;
  }

  // Raises the running maximum of block b to cover the logits s of this tile.
  __device__ __forceinline__ void raise(int b, const float (&s)[4]) {
    #pragma unroll
    for (int column = 0; column < 2; ++column) {
      float top = fmaxf(s[column], s[column + 2]);
      #pragma unroll
      for (int hop = 4; hop < 32; hop <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, hop));
      top = fmaxf(top, m[b][column]);
      const float scale = exp2_fast(m[b][column] - top);
      m[b][column] = top;
      l[b][column] *= scale;
      #pragma unroll
      for (int i = 0; i < V_STEPS; ++i) acc[i][b][column] *= scale, acc[i][b][column + 2] *= scale;
    }
  }
};

// Query fragments of the group, B operands of S^T = K Q^T. In registers while they fit beside the accumulators,
// else read again for every tile: they stay in L1.
constexpr bool QUERY_IN_REGISTERS = K_STEPS * HEAD_BLOCKS <= 16;

struct Query {
  const half_type* rows;  // the (row, KV head)'s first query head of the first token
  int token_stride;       // elements
  unsigned fragment[QUERY_IN_REGISTERS ? K_STEPS : 1][HEAD_BLOCKS][2];

  __device__ __forceinline__ void read(unsigned (&to)[HEAD_BLOCKS][2], int step, int lane) const {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) {
      const int column = min(b * 8 + lane / 4, COLUMNS - 1);  // columns past the last repeat it, unused
      const int head = column % GROUP_SIZE, token = column / GROUP_SIZE;
      const unsigned* row = reinterpret_cast<const unsigned*>(rows + token * token_stride + head * HEAD_DIM) + step * 8 + lane % 4;
      to[b][0] = __ldg(row), to[b][1] = __ldg(row + 4);
    }
  }
  __device__ __forceinline__ void get(unsigned (&to)[HEAD_BLOCKS][2], int step, int lane) const {
    if constexpr (QUERY_IN_REGISTERS) {
      #pragma unroll
      for (int b = 0; b < HEAD_BLOCKS; ++b) to[b][0] = fragment[step][b][0], to[b][1] = fragment[step][b][1];
    } else {
      read(to, step, lane);
    }
  }
  // q [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE, HEAD_DIM]
  __device__ __forceinline__ Query(const half_type* q, int row, int kv_head, int num_kv_heads, int lane) : token_stride(num_kv_heads * GROUP_SIZE * HEAD_DIM) {
    rows = q + static_cast<long long>(row) * QUERY_TOKENS * token_stride + kv_head * GROUP_SIZE * HEAD_DIM;
    if constexpr (QUERY_IN_REGISTERS) {
      #pragma unroll
      for (int i = 0; i < K_STEPS; ++i) read(fragment[i], i, lane);
    }
  }
};

// Logits of one K tile: s[b] holds tokens lane/4, lane/4 + 8 by heads 2*(lane%4), + 1 of block b.
__device__ __forceinline__ void score(float (&s)[HEAD_BLOCKS][4], const Query& query, unsigned tile, int lane) {
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b) s[b][0] = s[b][1] = s[b][2] = s[b][3] = 0.0f;
  #pragma unroll
  for (int i = 0; i < K_STEPS; ++i) {
    unsigned k[4];
    load_matrix(k, tile + ring_offset<K_ROW_BYTES>(lane & 15, 2 * i + (lane >> 4)));
    unsigned q[HEAD_BLOCKS][2];
    query.get(q, i, lane);
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) multiply_add(s[b], k, q[b][0], q[b][1]);
  }
}

// What the columns see of a row's tokens.
struct Mask {
  int seq_len;
  int query_len;  // the row's query tokens, the last of its tokens
  int window;     // tokens that a query token sees, itself among them (WINDOWED)

  // Hides what a column does not see of the tile of logits s that begins at token `first`.
  __device__ __forceinline__ void hide(float (&s)[HEAD_BLOCKS][4], int first, int lane) const {
    const bool ends = first + PKV_TILE > seq_len - (QUERY_TOKENS > 1 ? query_len - 1 : 0);
    if (!ends && !(WINDOWED && first < seq_len - window)) return;
    const float none = __int_as_float(0xff800000);
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = first + lane / 4 + i / 2 * 8, token = (b * 8 + lane % 4 * 2 + i % 2) / GROUP_SIZE;
        const int end = QUERY_TOKENS > 1 ? min(seq_len, seq_len - (query_len - 1 - token)) : seq_len;
        if (at >= end || (WINDOWED && at < end - window)) s[b][i] = none;
      }
  }
};

// Turns logits into weights p (B operands of O^T = V^T P^T) and updates m and l. scale: to logits in base 2, or with
// SOFT_CAP to the argument of the tanh, whose height in base 2 is cap.
__device__ __forceinline__ void weigh(WarpState& state, unsigned (&p)[HEAD_BLOCKS][2], float (&s)[HEAD_BLOCKS][4], float scale, float cap, const Mask& mask, int first, int lane) {
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] = SOFT_CAP ? cap * hyperbolic_tangent(s[b][i] * scale) : s[b][i] * scale;
  mask.hide(s, first, lane);
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b) {
    const bool above = fmaxf(s[b][0], s[b][2]) > state.m[b][0] + RESCALE_ABOVE || fmaxf(s[b][1], s[b][3]) > state.m[b][1] + RESCALE_ABOVE;
    if (__any_sync(0xffffffffu, above)) state.raise(b, s[b]);
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] = exp2_fast(s[b][i] - state.m[b][i & 1]);
    // l sums the weights as rounded, the ones V is multiplied with, so that they add up to one.
    const unsigned low = pack(s[b][0], s[b][1]), high = pack(s[b][2], s[b][3]);
    const float2 first = unpack(low), second = unpack(high);
    state.l[b][0] += first.x + second.x;
    state.l[b][1] += first.y + second.y;
    p[b][0] = transpose(low);
    p[b][1] = transpose(high);
  }
}

__device__ __forceinline__ void accumulate(WarpState& state, const unsigned (&p)[HEAD_BLOCKS][2], unsigned tile, int lane) {
  #pragma unroll
  for (int i = 0; i < V_STEPS; ++i) {
    unsigned v[4];
    load_matrix_transposed(v, tile + ring_offset<V_ROW_BYTES>((lane & 7) + ((lane >> 4) << 3), 2 * i + ((lane >> 3) & 1)));
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) multiply_add(state.acc[i][b], v, p[b][0], p[b][1]);
  }
}

// Leaves this warp's state in shared memory.
__device__ __forceinline__ void publish(const WarpState& state, float (&to)[COLUMNS][STATE_ROW], int lane) {
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int column = 0; column < 2; ++column) {
      float l = state.l[b][column];
      #pragma unroll
      for (int hop = 4; hop < 32; hop <<= 1) l += __shfl_xor_sync(0xffffffffu, l, hop);
      const int head = b * 8 + (lane % 4) * 2 + column;
      if (head >= COLUMNS) continue;
      float* row = to[head];
      if (lane < 4) row[V_DIM] = state.m[b][column], row[V_DIM + 1] = l;
      #pragma unroll
      for (int i = 0; i < V_STEPS; ++i) {
        row[i * 16 + lane / 4] = state.acc[i][b][column];
        row[i * 16 + lane / 4 + 8] = state.acc[i][b][column + 2];
      }
    }
}

// The WARPS states of a segment merged for one column.
__device__ __forceinline__ HeadState gather(const float (&states)[WARPS][COLUMNS][STATE_ROW], int column, int lane) {
  HeadState sum;
  sum.reset();
  float2 ml = make_float2(sum.m, 0.0f);
  if (lane < WARPS) ml = *reinterpret_cast<const float2*>(&states[lane][column][V_DIM]);
  const float scale = sum.weigh(ml);
  #pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float4* part = reinterpret_cast<const float4*>(states[w][column]);
    const float part_scale = __shfl_sync(ALL_LANES, scale, w);
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i)
      if (lane + i * 32 < HEAD_QUADS) sum.add(i, part[lane + i * 32], part_scale);
  }
  return sum;
}

// What both decode kernels are given, as gpu/engine.py lays it out (gpu.engine.ARGUMENTS).
struct DecodeArguments {
  const half_type *q;      // [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE, HEAD_DIM]
  const half_type *k_pages, *v_pages;
  const page_id* block_table;  // [batch_size, table_stride]; with TABLE_CSR the indices, [table_stride]
  const int *seq_lens;     // [batch_size]; with LAST_PAGE_LENGTHS see Lengths
  const int *query_lens;   // see Output
  const float* sinks;      // see Output
  half_type* out;          // like q, with V_DIM
  float* lse;              // [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE]
  Slot* partials;
  long long k_page_stride, v_page_stride;
  int k_head_stride, k_token_stride, v_head_stride, v_token_stride;
  int batch_size, num_kv_heads, table_stride, num_pages;
  int window;              // see Mask
  float scale, cap;        // see weigh
  PKV_CSR(const int* row_begins;)  // see PageTable

  // A window reaches back from the first query token, lengths count to the last.
  __device__ __forceinline__ int reach() const { return window + QUERY_TOKENS - 1; }
  __device__ __forceinline__ Pages pages() const {
    return {{k_pages, k_page_stride, k_head_stride, k_token_stride}, {v_pages, v_page_stride, v_head_stride, v_token_stride},
            {block_table, table_stride, num_pages PKV_CSR(, row_begins, batch_size)}, reach(),
            k_page_stride == v_page_stride && k_head_stride == v_head_stride && k_token_stride == v_token_stride};
  }
  __device__ __forceinline__ Output output() const { return {out, lse, num_kv_heads, query_lens, sinks}; }
};

// Runs every segment of `source`. For each, `emit(segment, column, state)` is called by the warp that owns the column;
// the same warp owns the same columns in every CTA. Where there is a segment, `emit.begin(source)` is called once, when the
// first loads are under way; if it returns false nothing is done, and attend returns false.
template <class Source, class Emit>
__device__ __forceinline__ bool attend(const Source& source, const Pages& pages, const DecodeArguments& given, SharedMemory& shared, Emit& emit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned ring = shared_address(shared.ring[warp][0]);
  Loader<Source> loader(source);
  Dealer<Source> walk(source);
  int unused = STAGES;  // slots of the ring to be filled before there is anything to compute
  Share share;
  Segment before;  // the segment whose states are to be merged, the (count - 1)-th
  unsigned slot = ring;
  int stage = 0;
  for (int count = 0;; ++count) {
    const bool more = walk.next(share, warp);
    if (!more && count == 0) return true;
    WarpState state;
    if (more) {
      state.reset();
      const Query query(given.q, share.row, share.kv_head, given.num_kv_heads, lane);
      Mask mask{share.seq_len, QUERY_TOKENS, given.window};
      if (QUERY_TOKENS > 1 && given.query_lens) mask.query_len = given.query_lens[share.row];
      // The first loads are this loop's too, in rounds without arithmetic: one copy of the loader's code, whose fetching
      // shows in short steps.
      for (int tile = share.first - unused * WARPS; tile < share.tile_end || unused > 0; tile += WARPS) {
        float s[HEAD_BLOCKS][4];
        unsigned p[HEAD_BLOCKS][2];
        if (unused == 0) {
          copy_wait<2 * STAGES - 1>();
          __syncwarp();
          score(s, query, slot, lane);
          __syncwarp();
        }
        loader.issue_k(pages, slot, warp, lane);
        if (unused == 0) {
          weigh(state, p, s, given.scale, given.cap, mask, tile * PKV_TILE, lane);
          copy_wait<2 * STAGES - 1>();
          __syncwarp();
          accumulate(state, p, slot + K_TILE_BYTES, lane);
          __syncwarp();
        }
        loader.issue_v(pages, slot, lane);
        if (++stage == STAGES) stage = 0;
        slot = ring + stage * SLOT_BYTES;
        if (unused > 0 && --unused == 0 && !emit.begin(source)) {
          copy_wait<0>();
          return false;
        }
      }
    }
    if (count > 0) {
      const int buffer = (count - 1) % BUFFERS, phase = (count - 1) / BUFFERS;
      shared.left[buffer].wait(phase);
      #pragma unroll 1
      for (int column = warp; column < COLUMNS; column += WARPS) emit(before, column, gather(shared.states[buffer], column, lane));
      shared.merged[buffer].arrive(lane);
    }
    if (!more) break;
    const int buffer = count % BUFFERS, phase = count / BUFFERS;
    if (phase > 0) shared.merged[buffer].wait(phase - 1);
    publish(state, shared.states[buffer][warp], lane);
    shared.left[buffer].arrive(lane);
    before = share;
  }
  copy_wait<0>();
  return true;
}

// Called once by the whole CTA, before attend.
__device__ __forceinline__ void init_barriers(SharedMemory& shared) {
  if (threadIdx.x < BUFFERS) shared.left[threadIdx.x].init(WARPS), shared.merged[threadIdx.x].init(WARPS);
  __syncthreads();
}

}  // namespace pkv
