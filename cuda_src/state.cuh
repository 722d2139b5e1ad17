// Partial softmax states (m, l, acc): m is the running maximum of the scaled logits in base 2, l the sum of 2^(s - m)
// and acc the weighted sum of V. Two states merge exactly, by scaling both to the larger m and adding.
//
// A warp merges the states of one column. Lane i adds elements 4 i to 4 i + 3 of acc, those 128 further on and so
// forth; it weighs part i, and hands that part's scale to the others.
//
// Between CTAs a state travels in a slot of global memory. An empty word holds EMPTY_WORD, a bit pattern no arithmetic
// produces, so every word is its own arrival flag.
#pragma once
#include "mma.cuh"

namespace pkv {

constexpr unsigned EMPTY_WORD = 0xffffffffu;
constexpr float LN2 = 0.6931471805599453f, LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e30f;  // stands for -inf where differences are taken: exp2(-inf - LOWEST) is 0, not NaN
constexpr unsigned ALL_LANES = 0xffffffffu;

// Which query head of the group, at which of the row's query tokens, a column is.
struct ColumnPlace {
  int token, head;
};
__device__ __forceinline__ ColumnPlace place_of(int column) { return {column / GROUP_SIZE, column % GROUP_SIZE}; }

// The states of a segment's columns, as one CTA leaves them for another: those of a (row, KV head), or of a read for
// many rows where there are such.
constexpr int SLOT_COLUMNS = READ_COLUMNS > 0 ? READ_COLUMNS : COLUMNS;
struct __align__(16) Slot {
  float4 acc[SLOT_COLUMNS][HEAD_QUADS];
  float2 ml[SLOT_COLUMNS];
};
#if READ_COLUMNS
struct __align__(16) RowSlot {
  float4 acc[COLUMNS][HEAD_QUADS];
  float2 ml[COLUMNS];
};
#endif

// The state of one column in a warp's registers; every lane has m and l.
struct HeadState {
  float m, l;
  float4 acc[LANE_QUADS];

  __device__ __forceinline__ void reset() {
    m = LOWEST, l = 0.0f;
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i) acc[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  // Takes up the (m, l) of up to 32 parts. Lane i brings those of part i, or (LOWEST, 0) where there is none, and gets
  // the scale of its part's acc.
  __device__ __forceinline__ float weigh(float2 ml) {
    float top = fmaxf(m, ml.x);
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, hop));
    const float own = exp2_fast(m - top), scale = exp2_fast(ml.x - top);
    float sum = ml.y * scale;
    #pragma unroll
    for (int hop = 1; hop < 32; hop <<= 1) sum += __shfl_xor_sync(ALL_LANES, sum, hop);
    m = top, l = l * own + sum;
    #pragma unroll
    for (int i = 0; i < LANE_QUADS; ++i) acc[i].x *= own, acc[i].y *= own, acc[i].z *= own, acc[i].w *= own;
    return scale;
  }
  __device__ __forceinline__ void add(int i, const float4& part, float scale) {
    acc[i].x += part.x * scale, acc[i].y += part.y * scale, acc[i].z += part.z * scale, acc[i].w += part.w * scale;
  }
};

__device__ __forceinline__ bool arrived(float word) { return __float_as_uint(word) != EMPTY_WORD; }
__device__ __forceinline__ bool arrived(const float4& v) {
  // The operators are bitwise, since a short circuit would be a branch for each word.
  return arrived(v.x) & arrived(v.y) & arrived(v.z) & arrived(v.w);
}
template <class AnySlot>
__device__ __forceinline__ void send_state(AnySlot& to, int column, const HeadState& state, int lane) {
  #pragma unroll
  for (int i = 0; i < LANE_QUADS; ++i)
    if (lane + i * 32 < HEAD_QUADS) send(&to.acc[column][lane + i * 32], state.acc[i]);
  if (lane == 0) send(&to.ml[column], make_float2(state.m, state.l));
}

// Where results go: out [batch_size, QUERY_TOKENS, num_q_heads, V_DIM], lse [batch_size, QUERY_TOKENS, num_q_heads] in
// natural log.
struct Output {
  half_type* out;
  float* lse;
  int num_kv_heads;
  const int* query_lens;  // [batch_size] query tokens of each row, or null where all have QUERY_TOKENS
  const float* sinks;     // [num_q_heads] natural-log logits that take part in the softmax without a value (SINKS)
};

// Writes a finished column of a (row, KV head). Outputs of query tokens that the row does not have stay as they were.
__device__ __forceinline__ void store_result(const Output& o, int row, int kv_head, int column, const HeadState& state,
                                             int lane) {
  const int token = place_of(column).token, q_head = kv_head * GROUP_SIZE + place_of(column).head;
  if (QUERY_TOKENS > 1 && o.query_lens && token >= o.query_lens[row]) return;
  const int at = (row * QUERY_TOKENS + token) * o.num_kv_heads * GROUP_SIZE + q_head;
  float m = state.m, l = state.l, scale = 1.0f;
  if (SINKS) {
    const float sink = o.sinks[q_head] * LOG2E;
    m = fmaxf(m, sink), scale = exp2_fast(state.m - m), l = l * scale + exp2_fast(sink - m);
  }
  const float inverse = __fdividef(scale, l);
  uint2* out = reinterpret_cast<uint2*>(o.out + static_cast<long long>(at) * V_DIM);
  #pragma unroll
  for (int i = 0; i < LANE_QUADS; ++i) {
    const float4& a = state.acc[i];
    if (lane + i * 32 < HEAD_QUADS)
      out[lane + i * 32] = make_uint2(pack(a.x * inverse, a.y * inverse), pack(a.z * inverse, a.w * inverse));
  }
  if (lane == 0) o.lse[at] = (m + log2_fast(l)) * LN2;
}

// Writes zeros and -inf for the rows without tokens, a length below 0 among them. Warp `worker` of `workers` takes every
// workers-th row.
template <class Lengths>
__device__ __forceinline__ void store_empty_rows(const Output& o, const Lengths& seq_lens, int batch_size, int worker,
                                                 int workers, int lane) {
  for (int row = worker; row < batch_size; row += workers) {
    if (seq_lens[row] > 0) continue;
    const int heads = QUERY_TOKENS * o.num_kv_heads * GROUP_SIZE;
    unsigned* out = reinterpret_cast<unsigned*>(o.out + static_cast<long long>(row) * heads * V_DIM);
    for (int i = lane; i < heads * (V_DIM / 2); i += 32) out[i] = 0u;
    for (int i = lane; i < heads; i += 32) o.lse[row * heads + i] = __int_as_float(0xff800000);
  }
}

}  // namespace pkv
