// pkv_append: writes new tokens' K and V into their pages, and rotates their queries in the same pass.
//
// Computes rotated (RoPE) and quantised K, quantised V and rotated queries, each operation rounded as
// pkvsim.reference.append rounds it.
// Grid: [ceil(num_tokens * chunks / 4)]; block: [128]. A warp has one token and every chunks-th step of its heads (K,
// then V, then queries); LANES lanes share a head, and each holds two vectors of 8 elements, placed so that it has both
// elements of its pairs.
//
//   given    see AppendArguments for the arrays, their shapes and strides
//   written  k_pages, v_pages, of INT8 pages k_scales and v_scales, and q_out where there are queries
// A row's tokens take its last positions. Tokens are passed over that belong to empty rows, lie past the last offset or
// before position 0, or whose page or position is not there: a graph may have been captured for more than a step has.
//
// Its speed is bound by HBM when there are many tokens, each input being read and each output written once (through L2,
// where decode finds them); in a decode step by the latency of a row's length, its page's id and one store.
#include "mma.cuh"
#include "arguments.cuh"
#include "quantize.cuh"
#include "vectors.cuh"

namespace pkv {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARPS = 4;
constexpr int WIDEST = HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V;
constexpr int LANES =
    WIDEST <= 16 ? 1 : WIDEST <= 32 ? 2 : WIDEST <= 64 ? 4 : WIDEST <= 128 ? 8 : WIDEST <= 256 ? 16 : 32;
constexpr int HEADS_PER_STEP = 32 / LANES;
constexpr int IN_FLIGHT = 4;  // steps whose loads a warp has under way at once
constexpr int ROTATING_LANES = ROPE_STYLE ? ROTARY_DIM / 16 : 0;
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM_V % 16 == 0 && WIDEST <= 512, "a warp holds whole vectors of a head");
static_assert(ROTARY_DIM % 16 == 0 && ROTARY_DIM <= HEAD_DIM, "a lane holds both elements of its pairs");

struct PageStrides {
  long long page, head, token;

  __device__ __forceinline__ long long at(int id, int kv_head, int slot) const {
    return id * page + kv_head * head + slot * token;
  }
};

__device__ __forceinline__ void unpack_vector(uint4 vector, float (&x)[8]) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void store_vector(half_type* at, const float (&x)[8]) {
  store(at, make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])));
}

#if CACHE_TYPE != 0
__device__ __forceinline__ void store_vector(unsigned char* at, const float (&x)[8], float inverse_scale) {
  unsigned pairs[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = quantize_pair(__fmul_rn(x[2 * i], inverse_scale), __fmul_rn(x[2 * i + 1], inverse_scale));
  store(at, make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16));
}
#endif

// Where in a head a lane's two vectors begin: half a region apart, in the rotated region if that has lanes left.
template <int DIM, int ROTATED>
__device__ __forceinline__ int2 place(int part) {
  constexpr int LANES_IN = ROTATED / 16;
  if (part < LANES_IN) return make_int2(part * 8, ROTATED / 2 + part * 8);
  const int first = ROTATED + (part - LANES_IN) * 8;
  return make_int2(first, first + (DIM - ROTATED) / 2);
}

// The row of a token, the last one that begins at or before it. All lanes get it, and each looks at another row.
__device__ __forceinline__ int find_row(const int* token_offsets, int batch_size, int token, int lane) {
  int begin = 0, end = batch_size;
  while (end - begin > 1) {
    const int step = (end - begin + 31) / 32, row = begin + lane * step;
    const unsigned before = __ballot_sync(ALL_LANES, row < end && __ldcg(token_offsets + row) <= token);
    begin += max(__popc(before) - 1, 0) * step;
    end = min(end, begin + step);
  }
  return begin;
}

#if ROPE_STYLE
// The cosines and sines of a lane's pairs. Where halves turn they are of its 8 pairs in order, else of the 4 pairs in
// its first vector, then of the 4 in its second.
struct Angles {
  float cosine[8], sine[8];

  __device__ __forceinline__ static int pair(int i, int part) {
    return ROPE_STYLE == 1 ? part * 8 + i : part * 4 + i % 4 + i / 4 * (ROTARY_DIM / 4);
  }

  __device__ __forceinline__ void load(const void* rope, int position, long long row_stride, float factor, int part) {
#if ROPE_TABLE
    const float* row = static_cast<const float*>(rope) + position * row_stride;
    #pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 c = *reinterpret_cast<const float4*>(row + pair(i, part));
      const float4 s = *reinterpret_cast<const float4*>(row + ROTARY_DIM / 2 + pair(i, part));
      cosine[i] = c.x, cosine[i + 1] = c.y, cosine[i + 2] = c.z, cosine[i + 3] = c.w;
      sine[i] = s.x, sine[i + 1] = s.y, sine[i + 2] = s.z, sine[i + 3] = s.w;
    }
#else
    const unsigned long long* turns = static_cast<const unsigned long long*>(rope);
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      // Whole turns overflow away, so the angle is as exact at position 2^30 as at 1.
      const unsigned long long angle = turns[pair(i, part)] * static_cast<unsigned>(position);
      sincospif(static_cast<float>(static_cast<int>(angle >> 32)) * 0x1p-31f, &sine[i], &cosine[i]);
      cosine[i] = __fmul_rn(cosine[i], factor), sine[i] = __fmul_rn(sine[i], factor);
    }
#endif
  }

  // Each operation is rounded for itself, as the reference does it, bit for bit.
  __device__ __forceinline__ static void turn(float& x, float& y, float c, float s) {
    const float turned = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
    y = __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
    x = turned;
  }

  __device__ __forceinline__ void rotate(float (&low)[8], float (&high)[8]) const {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (ROPE_STYLE == 1) turn(low[i], high[i], cosine[i], sine[i]);
      else if (i < 4) turn(low[2 * i], low[2 * i + 1], cosine[i], sine[i]);
      else turn(high[2 * i - 8], high[2 * i - 7], cosine[i], sine[i]);
    }
  }
};
#endif

// The scale of a head, by which its largest magnitude is 127 steps. The LANES lanes that hold the head get the same
// one, and a NaN makes it NaN.
__device__ __forceinline__ float head_scale(const float (&low)[8], const float (&high)[8]) {
  unsigned largest = 0;  // bits, which order magnitudes and put NaN above all
  #pragma unroll
  for (int i = 0; i < 8; ++i)
    largest = max(largest, max(__float_as_uint(low[i]) & 0x7fffffffu, __float_as_uint(high[i]) & 0x7fffffffu));
  #pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, mask));
  return __fdiv_rn(__uint_as_float(largest), 127.0f);
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::WARPS * 32)
pkv_append(const pkv::AppendArguments arguments) {
  using namespace pkv;
  const AppendArguments given = arguments;  // of a copy the compiler makes up to 3 % less code than of the parameter
  const int lane = threadIdx.x % 32, part = lane % LANES;
  const int warp = blockIdx.x * WARPS + threadIdx.x / 32, token = warp / given.chunks;
  const int num_heads = 2 * given.num_kv_heads + given.num_q_heads;
  const int num_steps = (num_heads + HEADS_PER_STEP - 1) / HEADS_PER_STEP;
  const PageStrides k_strides{given.k_page, given.k_page_head, given.k_page_token};
  const PageStrides v_strides{given.v_page, given.v_page_head, given.v_page_token};
  const int2 rotated = place<HEAD_DIM, ROTATING_LANES * 16>(part), plain = place<HEAD_DIM_V, 0>(part);

  let_next_kernel_start();
  wait_for_previous_kernel();
  if (token >= given.num_tokens) return;

  uint4 held[IN_FLIGHT][2];
  const auto load = [&](int first_step) {
    #pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      held[i][0] = held[i][1] = make_uint4(0, 0, 0, 0);
      const int head = (first_step + i * given.chunks) * HEADS_PER_STEP + lane / LANES;
      const bool is_v = head >= given.num_kv_heads && head < 2 * given.num_kv_heads;
      if (head >= num_heads || part >= (is_v ? HEAD_DIM_V : HEAD_DIM) / 16) continue;
      const half_type* from = head < given.num_kv_heads ? given.k_new + token * given.k_token + head * given.k_head
                              : is_v ? given.v_new + token * given.v_token + (head - given.num_kv_heads) * given.v_head
                                     : given.q + token * given.q_token + (head - 2 * given.num_kv_heads) * given.q_head;
      held[i][0] = load_once(from + (is_v ? plain.x : rotated.x));
      held[i][1] = load_once(from + (is_v ? plain.y : rotated.y));
    }
  };
  int step = warp % given.chunks;
  load(step);  // is under way while the token's place is looked up

  int row = token, after = 1;  // the row's tokens from this one on
  if (given.token_offsets) {
    row = find_row(given.token_offsets, given.batch_size, token, lane);
    if (token < __ldcg(given.token_offsets + row)) return;
    after = __ldcg(given.token_offsets + row + 1) - token;
    if (after <= 0) return;
  }
  const int position = __ldcg(given.seq_lens + row) - after;
  if (position < 0 || position >= given.max_positions || position / given.page_size >= given.max_pages) return;
  const int id = __ldcg(given.block_table + row * given.table_stride + position / given.page_size);
  const int slot = position % given.page_size;
  if (id < 0 || id >= given.num_pages) return;

#if ROPE_STYLE
  Angles angles;
  if (part < ROTATING_LANES) angles.load(given.rope, position, given.rope_stride, given.rope_factor, part);
#endif
#if CACHE_TYPE == 1 || CACHE_TYPE == 2
  const float k_inverse = __frcp_rn(given.k_scales ? __ldcg(given.k_scales) : given.k_scale);
  const float v_inverse = __frcp_rn(given.v_scales ? __ldcg(given.v_scales) : given.v_scale);
#endif

  for (;;) {
    #pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int head = (step + i * given.chunks) * HEADS_PER_STEP + lane / LANES;
      const bool is_k = head < given.num_kv_heads, is_v = !is_k && head < 2 * given.num_kv_heads;
      const int2 at = is_v ? plain : rotated;
      float low[8], high[8];
      unpack_vector(held[i][0], low);
      unpack_vector(held[i][1], high);
#if ROPE_STYLE
      if (!is_v && part < ROTATING_LANES) angles.rotate(low, high);
#endif
#if CACHE_TYPE == 3
      const float scale = head_scale(low, high);  // all lanes take part, whatever they hold
      const float inverse = scale > 0.0f ? __frcp_rn(scale) : 0.0f;
#endif
      if (head >= num_heads || part >= (is_v ? HEAD_DIM_V : HEAD_DIM) / 16) continue;
      if (!is_k && !is_v) {
        half_type* to = given.q_out + token * given.q_out_token + (head - 2 * given.num_kv_heads) * given.q_out_head;
        store_vector(to + at.x, low);
        store_vector(to + at.y, high);
        continue;
      }
      const int kv_head = is_k ? head : head - given.num_kv_heads;
      cache_type* to =
          is_k ? given.k_pages + k_strides.at(id, kv_head, slot) : given.v_pages + v_strides.at(id, kv_head, slot);
#if CACHE_TYPE == 0
      store_vector(to + at.x, low);
      store_vector(to + at.y, high);
#else
#if CACHE_TYPE == 3
      const PageStrides scale_strides{given.scale_page, given.scale_head, given.scale_token};
      if (part == 0) (is_k ? given.k_scales : given.v_scales)[scale_strides.at(id, kv_head, slot)] = scale;
#else
      const float inverse = is_k ? k_inverse : v_inverse;
#endif
      store_vector(to + at.x, low, inverse);
      store_vector(to + at.y, high, inverse);
#endif
    }
    step += IN_FLIGHT * given.chunks;
    if (step >= num_steps) break;
    load(step);
  }
}
