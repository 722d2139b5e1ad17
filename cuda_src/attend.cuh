// The decode path of every schedule: a CTA walks a stream of segments and yields one partial softmax state for each.
//
// Tokens are the M of the tensor-core product and the query heads of the group its N, so that a group of up to 8
// heads wastes no accumulators: S^T = K Q^T, O^T = V^T P^T. Each warp keeps its own running state over its tiles;
// at a segment's end the WARPS states are merged through shared memory once.
#pragma once
#include "paged_load.cuh"
#include "state.cuh"

namespace pkv {

constexpr int HEAD_BLOCKS = (GROUP_SIZE + 7) / 8;  // blocks of 8 query heads
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int STATE_ROW = HEAD_DIM + 4;            // floats; 4 more keep the writes of head pairs in different banks
constexpr float RESCALE_ABOVE = 8.0f;              // p stays below 2^8, so the maximum may lag by that much

struct __align__(16) SharedMemory {
  unsigned char ring[WARPS][STAGES][2][TILE_BYTES];  // K, V
  float acc[WARPS][GROUP_SIZE][STATE_ROW];
  float2 ml[WARPS][GROUP_SIZE];
  Packet kept[STATE_PAIRS];  // balanced only
};

static_assert(sizeof(SharedMemory) == SHARED_BYTES, "gpu/config.py computes the same size");

struct WarpState {
  float m[HEAD_BLOCKS][2], l[HEAD_BLOCKS][2];
  float acc[K_STEPS][HEAD_BLOCKS][4];

  __device__ __forceinline__ void reset() {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) m[b][0] = m[b][1] = __int_as_float(0xff800000), l[b][0] = l[b][1] = 0.0f;
    #pragma unroll
    for (int i = 0; i < K_STEPS; ++i)
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
      for (int i = 0; i < K_STEPS; ++i) acc[i][b][column] *= scale, acc[i][b][column + 2] *= scale;
    }
  }
};

// Query fragments of the group, B operands of S^T = K Q^T. In registers while they fit beside the accumulators,
// else read again for every tile: they stay in L1.
constexpr bool QUERY_IN_REGISTERS = K_STEPS * HEAD_BLOCKS <= 16;

struct Query {
  const half_type* rows;  // [GROUP_SIZE, HEAD_DIM]
  unsigned fragment[QUERY_IN_REGISTERS ? K_STEPS : 1][HEAD_BLOCKS][2];

  __device__ __forceinline__ void read(unsigned (&to)[HEAD_BLOCKS][2], int step, int lane) const {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) {
      const int head = min(b * 8 + lane / 4, GROUP_SIZE - 1);  // heads past the group repeat its last one, unused
      const unsigned* row = reinterpret_cast<const unsigned*>(rows + head * HEAD_DIM) + step * 8 + lane % 4;
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
  __device__ __forceinline__ Query(const half_type* group, int lane) : rows(group) {
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
    load_matrix(k, tile + ring_offset(lane & 15, 2 * i + (lane >> 4)));
    unsigned q[HEAD_BLOCKS][2];
    query.get(q, i, lane);
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) multiply_add(s[b], k, q[b][0], q[b][1]);
  }
}

// Turns logits into weights p (B operands of O^T = V^T P^T) and updates m and l.
__device__ __forceinline__ void weigh(WarpState& state, unsigned (&p)[HEAD_BLOCKS][2], float (&s)[HEAD_BLOCKS][4], float scale_log2, int rows, int lane) {
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b) {
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] *= scale_log2;
    if (rows < PKV_TILE) {
      const float none = __int_as_float(0xff800000);
      if (lane / 4 >= rows) s[b][0] = s[b][1] = none;
      if (lane / 4 + 8 >= rows) s[b][2] = s[b][3] = none;
    }
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
  for (int i = 0; i < K_STEPS; ++i) {
    unsigned v[4];
    load_matrix_transposed(v, tile + ring_offset((lane & 7) + ((lane >> 4) << 3), 2 * i + ((lane >> 3) & 1)));
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) multiply_add(state.acc[i][b], v, p[b][0], p[b][1]);
  }
}

// Leaves this warp's state in shared memory.
__device__ __forceinline__ void publish(const WarpState& state, SharedMemory& shared, int warp, int lane) {
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int column = 0; column < 2; ++column) {
      float l = state.l[b][column];
      #pragma unroll
      for (int hop = 4; hop < 32; hop <<= 1) l += __shfl_xor_sync(0xffffffffu, l, hop);
      const int head = b * 8 + (lane % 4) * 2 + column;
      if (head >= GROUP_SIZE) continue;
      if (lane < 4) shared.ml[warp][head] = make_float2(state.m[b][column], l);
      #pragma unroll
      for (int i = 0; i < K_STEPS; ++i) {
        shared.acc[warp][head][i * 16 + lane / 4] = state.acc[i][b][column];
        shared.acc[warp][head][i * 16 + lane / 4 + 8] = state.acc[i][b][column + 2];
      }
    }
}

// The WARPS states of a segment merged for one pair of elements.
__device__ __forceinline__ Packet gather(const SharedMemory& shared, int pair) {
  const int head = pair / HEAD_PAIRS, element = pair % HEAD_PAIRS * 2;
  float2 ml[WARPS];
  float m = __int_as_float(0xff800000);
  #pragma unroll
  for (int w = 0; w < WARPS; ++w) ml[w] = shared.ml[w][head], m = fmaxf(m, ml[w].x);
  Packet p{0.0f, 0.0f, m, 0.0f};
  #pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float scale = exp2_fast(ml[w].x - m);
    const float2 acc = *reinterpret_cast<const float2*>(&shared.acc[w][head][element]);
    p.acc0 += acc.x * scale, p.acc1 += acc.y * scale, p.l += ml[w].y * scale;
  }
  return p;
}

// Runs every segment of `source`. For each, `emit(segment, pair, packet)` is called by the thread that owns the pair;
// the same thread owns the same pairs in every CTA. `emit.begin(source)` is called once, when the first loads are
// under way.
template <class Source, class Emit>
__device__ __forceinline__ void attend(const Source& source, const Pages& pages, const half_type* q, int num_kv_heads, float scale_log2, SharedMemory& shared, Emit& emit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned ring = shared_address(shared.ring[warp][0][0]);
  Loader<Source> loader(source);
  #pragma unroll 1  // one copy of the loader's code: instruction fetches show in short steps
  for (int stage = 0; stage < STAGES; ++stage) {
    loader.issue_k(pages, ring + stage * 2 * TILE_BYTES, warp, lane);
    loader.issue_v(pages, ring + (stage * 2 + 1) * TILE_BYTES, lane);
  }
  emit.begin(source);
  Source walk = source;
  Segment segment;
  unsigned slot = ring;
  int stage = 0;
  while (walk.next(segment)) {
    WarpState state;
    state.reset();
    const Query query(q + static_cast<long long>(segment.row * num_kv_heads + segment.kv_head) * GROUP_SIZE * HEAD_DIM, lane);
    for (int tile = segment.tile_begin + warp; tile < segment.tile_end; tile += WARPS) {
      float s[HEAD_BLOCKS][4];
      unsigned p[HEAD_BLOCKS][2];
      copy_wait<2 * STAGES - 1>();
      __syncwarp();
      score(s, query, slot, lane);
      __syncwarp();
      loader.issue_k(pages, slot, warp, lane);
      weigh(state, p, s, scale_log2, segment.seq_len - tile * PKV_TILE, lane);
      copy_wait<2 * STAGES - 1>();
      __syncwarp();
      accumulate(state, p, slot + TILE_BYTES, lane);
      __syncwarp();
      loader.issue_v(pages, slot + TILE_BYTES, lane);
      if (++stage == STAGES) stage = 0;
      slot = ring + stage * 2 * TILE_BYTES;
    }
    publish(state, shared, warp, lane);
    __syncthreads();
    for (int pair = threadIdx.x; pair < STATE_PAIRS; pair += THREADS) emit(segment, pair, gather(shared, pair));
    __syncthreads();
  }
  copy_wait<0>();
}

}  // namespace pkv
