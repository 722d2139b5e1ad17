// The mass of every tile as a by-product (PAGE_LSE): the log-sum-exp of its logits, for each query head, so that
// exp(page_lse - lse) is the share of the attention that goes to the tile.
//
// The weights are at hand anyway, so what it costs is three exchanges in a warp and a store of GROUP_SIZE floats. Those
// of a head's tiles lie side by side: what its warps write at about one time fills whole lines of L2, where parts of
// lines would each be read, filled up and written in memory (that took 9 % of a step on an H200). Where L2 has room for
// all of them it keeps them until then, and for whoever reads them next. The weights are those of the row's running
// maximum: a tile 2^126 below it has no mass that a float holds, and -inf says so.
#pragma once
#include "weights.cuh"

namespace pkv {

// Writes the tile at hand of a piece, whose weights' sums `state` has. Of a listed step (SELECTED) tiles count through
// the listed pages.
template <class W, class Piece>
__device__ __forceinline__ void store_page_lse(const DecodeArguments& given, const Piece& s, int tile,
                                               const WarpState<W>& state, int lane) {
  static_assert(TILE_IN_PAGE && !W::MANY_ROWS, "a tile is of one page and one row");
  const bool kept = static_cast<long long>(given.batch_size * given.num_kv_heads) * given.page_lse_tiles <=
                    MOST_KEPT_BYTES / (4 * COLUMNS);
  #pragma unroll
  for (int b = 0; b < W::HEAD_BLOCKS; ++b) {
    // A lane has two columns of its tokens. It gives one of them away and keeps the other: lanes 0 to 3 of each eight
    // the even ones, lanes 4 to 7 the odd ones.
    const bool odd = lane & 4;
    float sum = odd ? state.tile[b][1] : state.tile[b][0];
    sum += __shfl_xor_sync(ALL_LANES, odd ? state.tile[b][0] : state.tile[b][1], 4);
    sum += __shfl_xor_sync(ALL_LANES, sum, 8);
    sum += __shfl_xor_sync(ALL_LANES, sum, 16);
    const int own = b * 8 + lane % 4 * 2 + odd;
    if (lane >= 8 || own >= W::own_columns() || tile >= given.page_lse_tiles) continue;
    const ColumnPlace place = place_of(W::first_column() + own);
    const float m = odd ? state.m[b][1] : state.m[b][0];
    const long long list = static_cast<long long>(s.row) * (given.num_kv_heads / HEAD_SPLIT) + s.kv_head / HEAD_SPLIT;
    const int column = (place.token * HEAD_SPLIT + s.kv_head % HEAD_SPLIT) * GROUP_SIZE + place.head;
    float* to = given.page_lse + (list * given.page_lse_tiles + tile) * (COLUMNS * HEAD_SPLIT) + column;
    const float mass = (m + log2_fast(sum)) * LN2;
    if (kept) store_kept(to, mass);
    else *to = mass;
  }
}

}  // namespace pkv
