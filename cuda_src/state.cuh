// Partial softmax states (m, l, acc): m the running maximum of the scaled logits in base 2, l the sum of 2^(s - m),
// acc the weighted sum of V. Two states merge exactly: scale both to the larger m and add.
//
// Between CTAs a state travels as packets of 16 bytes, one per pair of head_dim elements: {acc0, acc1, m, l}. The
// thread that reads a packet is the one that computed its own, so no thread waits for another thread's packets,
// and a packet is its own arrival flag: an empty word holds EMPTY_WORD, a bit pattern no arithmetic produces.
#pragma once
#include "mma.cuh"

namespace pkv {

constexpr int THREADS = WARPS * 32;
constexpr int HEAD_PAIRS = HEAD_DIM / 2;
constexpr int STATE_PAIRS = GROUP_SIZE * HEAD_PAIRS;                       // packets of one (row, KV head) state
constexpr unsigned EMPTY_WORD = 0xffffffffu;
constexpr float LN2 = 0.6931471805599453f;

struct __align__(16) Packet {
  float acc0, acc1, m, l;
};

// Scales a state to a maximum m >= its own.
__device__ __forceinline__ void rescale(Packet& p, float m) {
  const float scale = exp2_fast(p.m - m);
  p.acc0 *= scale, p.acc1 *= scale, p.l *= scale, p.m = m;
}
// Adds a state whose maximum is at most into.m.
__device__ __forceinline__ void add(Packet& into, const Packet& from) {
  const float scale = exp2_fast(from.m - into.m);
  into.acc0 += from.acc0 * scale, into.acc1 += from.acc1 * scale, into.l += from.l * scale;
}

__device__ __forceinline__ void send(Packet* to, const Packet& p) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(p.acc0), "f"(p.acc1), "f"(p.m), "f"(p.l) : "memory");
}
__device__ __forceinline__ bool arrived(const Packet& p) {
  // Bitwise: a short circuit would be a branch for every word.
  return (__float_as_uint(p.acc0) != EMPTY_WORD) & (__float_as_uint(p.acc1) != EMPTY_WORD) &
         (__float_as_uint(p.m) != EMPTY_WORD) & (__float_as_uint(p.l) != EMPTY_WORD);
}
__device__ __forceinline__ void clear(Packet* at) {
  const float empty = __uint_as_float(EMPTY_WORD);
  send(at, Packet{empty, empty, empty, empty});
}

// Where results go. out [batch_size, num_q_heads, HEAD_DIM], lse [batch_size, num_q_heads] natural log.
struct Output {
  half_type* out;
  float* lse;
  int num_kv_heads;
};

// Writes pair `pair` of a finished (row, KV head).
__device__ __forceinline__ void store_result(const Output& o, int row, int kv_head, int pair, const Packet& p) {
  const int head = (row * o.num_kv_heads + kv_head) * GROUP_SIZE + pair / HEAD_PAIRS;
  const float inverse = 1.0f / p.l;
  unsigned* out = reinterpret_cast<unsigned*>(o.out + static_cast<long long>(head) * HEAD_DIM) + pair % HEAD_PAIRS;
  *out = pack(p.acc0 * inverse, p.acc1 * inverse);
  if (pair % HEAD_PAIRS == 0) o.lse[head] = (p.m + log2f(p.l)) * LN2;
}

// Zeros and -inf for the rows without tokens; warp `worker` of `workers` takes every workers-th row.
__device__ __forceinline__ void store_empty_rows(const Output& o, const int* seq_lens, int batch_size, int worker, int workers, int lane) {
  for (int row = worker; row < batch_size; row += workers) {
    if (seq_lens[row] != 0) continue;
    const int heads = o.num_kv_heads * GROUP_SIZE;
    unsigned* out = reinterpret_cast<unsigned*>(o.out + static_cast<long long>(row) * heads * HEAD_DIM);
    for (int i = lane; i < heads * HEAD_PAIRS; i += 32) out[i] = 0u;
    for (int i = lane; i < heads; i += 32) o.lse[row * heads + i] = __int_as_float(0xff800000);
  }
}

}  // namespace pkv
