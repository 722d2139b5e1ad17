// pkv_summarize_pages: summaries of the keys of the pages that an append has touched.
//
// For each page that holds any of a row's last new_tokens tokens, and each KV head: mean and standard deviation of the
// keys, or their minimum and maximum, element by element, of the tokens that the row has in the page. So a summary is
// right after growth, and after a page has come to another row. With SUMMARY_CODES it is kept in 8-bit codes, as
// pkvsim.selection.summaries says: each vector has a scale of its own, which is as new as its codes. Of SCORING 3 they
// are centroids of the keys (centroid_summaries.cuh).
// Grid: [pages of a row that are looked at / WARPS, batch_size * num_kv_heads]; block: [WARPS * 32], a warp for each
// page.
//
//   k_pages    [num_pages, num_kv_heads, PAGE_SIZE, HEAD_DIM] by the strides, 16-bit
//   summaries  [num_pages, num_kv_heads, 2, HEAD_DIM], out, 16-bit or codes; of centroids as pkv_select_pages has them
//
// Bound by HBM: it reads what it summarises. After an append those pages are in L2 in part.
#include "mma.cuh"
#include "arguments.cuh"
#include "page_scores.cuh"
// Whether all warps of a CTA make a page's centroids together.
#define PKV_TEAMS (SCORING == 3 && PAGE_SIZE <= 16)
#if PKV_TEAMS
#include "centroid_teams.cuh"
#elif SCORING == 3
#include "centroid_summaries.cuh"
#endif

namespace pkv {

constexpr int TOKEN_LANES = HEAD_DIM / 8;         // lanes that a token's key takes, 16 bytes each
constexpr int AT_ONCE = 32 / TOKEN_LANES;         // tokens that a warp reads at once
static_assert(TOKEN_LANES * AT_ONCE == 32, "lanes are whole tokens'");

// The sum, minimum or maximum over the tokens of the lanes that have the same elements.
template <class Combine>
__device__ __forceinline__ void over_tokens(float (&x)[8], Combine combine) {
  #pragma unroll
  for (int i = 0; i < 8; ++i)
    #pragma unroll
    for (int hop = TOKEN_LANES; hop < 32; hop <<= 1) x[i] = combine(x[i], __shfl_xor_sync(0xffffffffu, x[i], hop));
}

__device__ __forceinline__ void widen(float (&to)[8], const uint4& from) {
  const unsigned words[4] = {from.x, from.y, from.z, from.w};
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i]);
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ uint4 narrow(const float (&x)[8]) {
  return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

#if PKV_TEAMS
// Centroids of a row's pages from `first` on, of one head: no more than there are warps.
__device__ __forceinline__ void summarize_pages(const SummaryArguments& given, const PageTable& table, int row,
                                                int head, int first, int row_len) {
  __shared__ PageNotes notes[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tokens = min(row_len - first * PAGE_SIZE, WARPS * PAGE_SIZE), pages = divide(tokens - 1, PAGE_SIZE) + 1;
  const auto id_of = [&](int page) { return table.cut(table.stored<false>(row, first + page)); };
  const auto keys_of = [&](int page, int id) {
    return PageKeys{given.k_pages + id * given.k_page_stride + static_cast<long long>(head) * given.k_head_stride,
                    given.k_token_stride, min(PAGE_SIZE, tokens - page * PAGE_SIZE), lane};
  };
  #pragma unroll 1
  for (int page = 0; page < pages; ++page) keys_of(page, id_of(page)).measure(notes[page], warp, lane);
  __syncthreads();
  if (warp < pages) keys_of(warp, 0).split(notes[warp], lane);
  __syncthreads();
  #pragma unroll 1
  for (int page = 0; page < pages; ++page) {
    const int id = id_of(page);
    const long long at = (static_cast<long long>(id) * given.num_kv_heads + head) * PAGE_CENTROIDS;
    keys_of(page, id).write(notes[page], warp, given.summaries + at * CENTROID_BYTES,
                            reinterpret_cast<unsigned*>(given.summary_scales) + at, lane);
  }
}
#elif SCORING == 3
// One page of one head, of which the row has `tokens`. from: the page's keys; to, scales: its centroids.
__device__ __forceinline__ void summarize(const half_type* from, int token_stride, int tokens, summary_type* to,
                                          unsigned* scales, int lane, TokenParts& notes) {
  const half_type* own = from + lane % TOKEN_LANES * 8;
  const auto read = [&](int token, float (&x)[8]) {
    widen(x, *reinterpret_cast<const uint4*>(own + static_cast<long long>(token) * token_stride));
  };
  const CentroidMaker<TOKEN_LANES, decltype(read)> maker{read, tokens, lane, notes};
  maker.split();
  maker.write(to, scales);
}
#else
#if SUMMARY_CODES
// How an element is rounded to a code: minima and maxima outward, so that they stay bounds.
enum Rounding { NEAREST, DOWN, UP };
constexpr float CODE_ZERO = 128.0f;
// The largest magnitude in steps; what is rounded outward needs one more step.
constexpr float SIGNED_STEPS = 127.0f, OUTWARD_STEPS = 126.5f, UNSIGNED_STEPS = 255.0f;

// A vector's codes, of which this lane has 8 elements, and its scale, 0 where all elements are.
template <Rounding ROUNDING>
__device__ __forceinline__ float encode(const float (&x)[8], float steps, float zero, uint2& codes) {
  float largest = 0.0f;
  #pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
  #pragma unroll
  for (int hop = 1; hop < TOKEN_LANES; hop <<= 1)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, hop));
  const float scale = largest / steps, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  unsigned words[2] = {0, 0};
  #pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float at = x[i] * inverse;
    const float code = zero + (ROUNDING == DOWN ? floorf(at) : ROUNDING == UP ? ceilf(at) : rintf(at));
    words[i / 4] |= static_cast<unsigned>(fminf(fmaxf(code, 0.0f), 255.0f)) << i % 4 * 8;
  }
  codes = make_uint2(words[0], words[1]);
  return scale;
}
#endif

// One page of one head, of which the row has `tokens`. from: the page's keys; to, scales: its summary.
__device__ __forceinline__ void summarize(const half_type* from, int token_stride, int tokens, summary_type* to,
                                          float2* scales, int lane) {
  const half_type* own = from + lane % TOKEN_LANES * 8;
  float first[8], second[8], x[8];
  const auto read = [&](int token) {
    widen(x, *reinterpret_cast<const uint4*>(own + static_cast<long long>(token) * token_stride));
  };
  const int begin = lane / TOKEN_LANES;
  if constexpr (SCORING == MEAN_STD) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) first[i] = second[i] = 0.0f;
    for (int token = begin; token < tokens; token += AT_ONCE) {
      read(token);
      #pragma unroll
      for (int i = 0; i < 8; ++i) first[i] += x[i];
    }
    over_tokens(first, [](float a, float b) { return a + b; });
    const float share = 1.0f / static_cast<float>(tokens);
    #pragma unroll
    for (int i = 0; i < 8; ++i) first[i] *= share;
    for (int token = begin; token < tokens; token += AT_ONCE) {  // once more, from L1
      read(token);
      #pragma unroll
      for (int i = 0; i < 8; ++i) second[i] += (x[i] - first[i]) * (x[i] - first[i]);
    }
    over_tokens(second, [](float a, float b) { return a + b; });
    #pragma unroll
    for (int i = 0; i < 8; ++i) second[i] = sqrtf(second[i] * share);
  } else {
    #pragma unroll
    for (int i = 0; i < 8; ++i) first[i] = 3e38f, second[i] = -3e38f;
    for (int token = begin; token < tokens; token += AT_ONCE) {
      read(token);
      #pragma unroll
      for (int i = 0; i < 8; ++i) first[i] = fminf(first[i], x[i]), second[i] = fmaxf(second[i], x[i]);
    }
    over_tokens(first, [](float a, float b) { return fminf(a, b); });
    over_tokens(second, [](float a, float b) { return fmaxf(a, b); });
  }
#if SUMMARY_CODES
  uint2 codes[2];
  float2 scale;
  if constexpr (SCORING == MEAN_STD) {
    scale.x = encode<NEAREST>(first, SIGNED_STEPS, CODE_ZERO, codes[0]);
    scale.y = encode<NEAREST>(second, UNSIGNED_STEPS, 0.0f, codes[1]);
  } else {
    scale.x = encode<DOWN>(first, OUTWARD_STEPS, CODE_ZERO, codes[0]);
    scale.y = encode<UP>(second, OUTWARD_STEPS, CODE_ZERO, codes[1]);
  }
  if (lane == 0) *scales = scale;
  if (lane >= TOKEN_LANES) return;
  reinterpret_cast<uint2*>(to)[lane] = codes[0];
  reinterpret_cast<uint2*>(to + HEAD_DIM)[lane] = codes[1];
#else
  if (lane >= TOKEN_LANES) return;
  reinterpret_cast<uint4*>(to)[lane] = narrow(first);
  reinterpret_cast<uint4*>(to + HEAD_DIM)[lane] = narrow(second);
#endif
}
#endif

}  // namespace pkv

#if PKV_TEAMS
#define PKV_SUMMARY_CTAS , (HEAD_DIM <= 128 ? 4 : 2)  // of an SM, so that those of many rows' appends run at once
#elif SCORING == 3
#define PKV_SUMMARY_CTAS , 2  // of an SM; told nothing, the compiler takes so few registers that some are spilled
#else
#define PKV_SUMMARY_CTAS
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32 PKV_SUMMARY_CTAS)
pkv_summarize_pages(const pkv::SummaryArguments given) {
  using namespace pkv;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Lengths lens{given.lengths, given.batch_size, given.max_tokens, 0 PKV_LAST_PAGE(, given.row_begins)};
  const PageTable table{given.page_ids, given.table_stride, given.num_pages
                        PKV_CSR(, given.row_begins, given.batch_size)};
  const int row = divide(blockIdx.y, given.num_kv_heads), head = blockIdx.y - row * given.num_kv_heads;
  const int row_len = lens[row];
#if PKV_TEAMS
  const int first = divide(max(0, row_len - given.new_tokens), PAGE_SIZE) + blockIdx.x * WARPS;
  if (first * PAGE_SIZE < row_len) summarize_pages(given, table, row, head, first, row_len);
#else
  const int page = divide(max(0, row_len - given.new_tokens), PAGE_SIZE) + blockIdx.x * WARPS + threadIdx.x / 32;
  if (page * PAGE_SIZE >= row_len) return;
  const int id = table.cut(table.stored<false>(row, page));
  const long long at = static_cast<long long>(id) * given.num_kv_heads + head;
#if SCORING == 3
  __shared__ TokenParts notes[WARPS];
  summarize(given.k_pages + id * given.k_page_stride + static_cast<long long>(head) * given.k_head_stride,
            given.k_token_stride, min(PAGE_SIZE, row_len - page * PAGE_SIZE),
            given.summaries + at * PAGE_CENTROIDS * CENTROID_BYTES,
            reinterpret_cast<unsigned*>(given.summary_scales) + at * PAGE_CENTROIDS, threadIdx.x % 32,
            notes[threadIdx.x / 32]);
#else
  summarize(given.k_pages + id * given.k_page_stride + static_cast<long long>(head) * given.k_head_stride,
            given.k_token_stride, min(PAGE_SIZE, row_len - page * PAGE_SIZE),
            given.summaries + at * 2 * HEAD_DIM, given.summary_scales + at, threadIdx.x % 32);
#endif
#endif
}
