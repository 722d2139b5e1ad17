// The online softmax of one warp: how logits become weights.
#pragma once
#include "query.cuh"

namespace pkv {

constexpr float RESCALE_ABOVE = 8.0f;        // p stays below 2^8, so the maximum may lag by that much
// Scales of V that are smaller count as 0. From there to 2^60 scales may differ within a row: factors from one maximum
// to another are then 2^120 at most, which a float holds.
constexpr float SMALLEST_SCALE = 0x1p-60f;
constexpr float SMALLEST_ROUNDED = -14.0f;   // log2 of the weights below which FP16 loses bits

#if CACHE_SCALES
// The scales of the tokens lane / 4 and lane / 4 + 8 of a tile.
//
// V's scale goes into the weights. Small ones would then be lost in FP16, so the running maximum is that of the weights
// with their scales, m of the states is its logarithm, and l still sums weights without: whatever the scales, acc / l
// and m + log2 l are what they were.
struct TileScales {
  float key[2], value_log2[2], value_inverse[2];
  bool valued[2];  // not 0 or so small that it counts as 0

  __device__ __forceinline__ void read(unsigned at, int lane) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 both = load_shared(at + (lane / 4 + i * 8) * sizeof(float2));
      key[i] = both.x;
      valued[i] = !(both.y < SMALLEST_SCALE);  // a NaN is, and shows
      value_log2[i] = log2_fast(max_or_nan(both.y, SMALLEST_SCALE));
      value_inverse[i] = exp2_fast(-value_log2[i]);
    }
  }
  // The weight 2^exponent of token i as l sums it, without V's scale: as it was rounded for V, or unrounded where FP16
  // has too few bits left for it. V's part is small then, but the token's part of l need not be.
  __device__ __forceinline__ float without_value(float exponent, float rounded, int i) const {
    return exponent < SMALLEST_ROUNDED || !valued[i] ? exp2_fast(exponent - value_log2[i]) : rounded * value_inverse[i];
  }
};
#endif

template <class W>
struct WarpState {
  static constexpr int HEAD_BLOCKS = W::HEAD_BLOCKS;
  float m[HEAD_BLOCKS][2], l[HEAD_BLOCKS][2];
  float acc[V_STEPS][HEAD_BLOCKS][4];
#if CACHE_SCALES
  TileScales scales;  // of the tile at hand
#endif
  PKV_PAGE_LSE(float tile[HEAD_BLOCKS][2];)  // the sums of that tile's weights, of this lane's tokens

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

// Which of a row's tokens the columns see. Of what is read for many rows all see all.
struct Mask {
  int seq_len;
  int query_len;  // the row's query tokens, the last of its tokens
  int window;     // tokens that a query token sees, itself among them (WINDOWED)
  // Of a list (SELECTED) seq_len counts its tokens; which of them a query token sees, their places in the row say.
  PKV_SELECTED(int row_len; const int* places;)

  // Makes -inf of the logits s that a column does not see, in the tile that begins at token `first`.
  template <class W>
  __device__ __forceinline__ void hide(float (&s)[W::HEAD_BLOCKS][4], int first, int lane) const {
    constexpr int HEAD_BLOCKS = W::HEAD_BLOCKS;
    const bool ends = first + PKV_TILE > seq_len - (QUERY_TOKENS > 1 ? query_len - 1 : 0);
    if (!ends && !(WINDOWED && first < seq_len - window)) return;
    const float none = __int_as_float(0xff800000);
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = first + lane / 4 + i / 2 * 8;
        const int token = place_of(W::first_column() + b * 8 + lane % 4 * 2 + i % 2).token;
#if SELECTED
        const int place = QUERY_TOKENS > 1 && at < seq_len ? __ldg(places + at / PAGE_SIZE) : 0;
        const bool later = QUERY_TOKENS > 1 && place * PAGE_SIZE + at % PAGE_SIZE >= row_len - (query_len - 1 - token);
        const int end = later ? 0 : seq_len;
#else
        const int end = QUERY_TOKENS > 1 ? min(seq_len, seq_len - (query_len - 1 - token)) : seq_len;
#endif
        if (at >= end || (WINDOWED && at < end - window)) s[b][i] = none;
      }
  }
};

// Turns logits into weights p, the B operands of O^T = V^T P^T, and updates m and l. `scale` takes products to logits
// in base 2, or with SOFT_CAP to the argument of the tanh, whose height in base 2 is `cap`.
template <class W>
__device__ __forceinline__ void weigh(WarpState<W>& state, unsigned (&p)[W::HEAD_BLOCKS][2],
                                      float (&s)[W::HEAD_BLOCKS][4], const Query<W>& query, float scale, float cap,
                                      const Mask& mask, int first, int lane) {
  constexpr int HEAD_BLOCKS = W::HEAD_BLOCKS;
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      float factor = scale;
#if CACHE_SCALES
      factor *= state.scales.key[i / 2];
#endif
#if QUERY_SCALED
      factor *= query.inverse[b][i % 2];
#endif
      s[b][i] = SOFT_CAP ? cap * hyperbolic_tangent(s[b][i] * factor) : s[b][i] * factor;
    }
  if constexpr (!W::MANY_ROWS) mask.template hide<W>(s, first, lane);
#if CACHE_SCALES
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] += state.scales.value_log2[i / 2];
#endif
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b) {
    if (!query.used(b)) continue;
    const bool above = fmaxf(s[b][0], s[b][2]) > state.m[b][0] + RESCALE_ABOVE
                       || fmaxf(s[b][1], s[b][3]) > state.m[b][1] + RESCALE_ABOVE;
    if (__any_sync(0xffffffffu, above)) state.raise(b, s[b]);
#if CACHE_SCALES
    float exponent[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) exponent[i] = s[b][i] - state.m[b][i & 1];
#endif
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] = exp2_fast(s[b][i] - state.m[b][i & 1]);
#if CACHE_SCALES
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] = state.scales.valued[i / 2] ? s[b][i] : 0.0f;
#endif
    // l sums the weights as rounded, the ones V is multiplied with, so that they add up to one.
    const unsigned low = pack_operands(s[b][0], s[b][1]), high = pack_operands(s[b][2], s[b][3]);
    float2 first = unpack_operands(low), second = unpack_operands(high);
#if CACHE_SCALES
    first.x = state.scales.without_value(exponent[0], first.x, 0);
    first.y = state.scales.without_value(exponent[1], first.y, 0);
    second.x = state.scales.without_value(exponent[2], second.x, 1);
    second.y = state.scales.without_value(exponent[3], second.y, 1);
#endif
    PKV_PAGE_LSE(state.tile[b][0] = first.x + second.x, state.tile[b][1] = first.y + second.y;)
    state.l[b][0] += first.x + second.x;
    state.l[b][1] += first.y + second.y;
    p[b][0] = transpose(low);
    p[b][1] = transpose(high);
  }
}

}  // namespace pkv
