// One stream of K,V tiles from pages into its ring in shared memory.
//
// A stream belongs to a warp, or to a team of them, each of which copies its part of every tile and keeps account of
// the whole stream for itself. A CTA's tiles are dealt to its streams in turn, on across segment ends, so that none
// has more than one tile more than another. The loader runs up to STAGES tiles ahead of the arithmetic and on across
// segment ends; page ids of the tiles to come, and of the next segment, are in registers before they are needed.
#pragma once
#include "mma.cuh"
#include "arguments.cuh"
#include "width.cuh"
#if SELECTED
#include "lists.cuh"
#endif

namespace pkv {

// Where the pages of K or V are. Strides are in elements.
struct PagedTensor {
  const cache_type* at;  // [num_pages, num_kv_heads, PAGE_SIZE, HEAD_DIM or V_DIM], in any order
  long long page_stride;
  int head_stride, token_stride;
};

// Where the scales of K and V are, float32 and of the same strides. Scales of whole pages have a token_stride of 0.
struct PagedScales {
  const float *k, *v;  // [num_pages, num_kv_heads, PAGE_SIZE]
  long long page_stride;
  int head_stride, token_stride;
};

// Everything that a loader reads. Groups too large for a team's registers are split, so HEAD_SPLIT heads of the
// schedule share the pages of one KV head.
struct Pages {
  PagedTensor k, v;
  PageTable table;
  int reach;               // tokens at a row's end that are read (WINDOWED)
  bool alike;              // K and V have the same strides
#if CACHE_SCALES
  PagedScales scales;
#endif
  PKV_SELECTED(PageLists lists;)
};

// The place of a row's vectors is XORed with this, so that the eight rows of an ldmatrix fall into different banks.
// Where rows are an odd number of half bank rows (64 or 192 bytes), two neighbours fill both halves, and it is pairs of
// rows that must be told apart.
template <int ROW_BYTES>
__device__ __forceinline__ int swizzle(int row) { return ROW_BYTES % 128 ? row >> 1 & 3 : row & 7; }
template <int ROW_BYTES>
__device__ __forceinline__ unsigned ring_offset(int row, int vector) {
  return row * ROW_BYTES + ((vector ^ swizzle<ROW_BYTES>(row)) << 4);
}
// Goes from the place of a row and a vector to one so many rows and vectors further on, which must share no bit with
// them: by constants that is one instruction or none.
template <int ROW_BYTES>
__device__ __forceinline__ unsigned ring_further(unsigned at, int rows, int vectors) {
  constexpr int SWIZZLED = ROW_BYTES % 128 ? 3 : 7;
  return (at ^ ((vectors & SWIZZLED) ^ swizzle<ROW_BYTES>(rows)) << 4) + rows * ROW_BYTES
         + ((vectors & ~SWIZZLED) << 4);
}

// A segment and a stream's share of it: the tile `first`, and every STREAMS-th from there on.
template <class Source>
struct Share : Source::Piece {
  int first;
};

// Deals the tiles of a source's segments to the streams. A source is any class with a `Piece`, which is a Segment
// or more, and `bool next(Piece&)`.
template <class Source, class W>
struct Dealer {
  Source source;
  int lead = 0;  // the stream that gets the next segment's first tile

  __device__ __forceinline__ explicit Dealer(const Source& range) : source(range) {}
  __device__ __forceinline__ bool next(Share<Source>& s, int stream) {
    if (!source.next(s)) return false;
    s.first = s.tile_begin + (stream + W::STREAMS - lead) % W::STREAMS;
    lead = (lead + s.tile_end - s.tile_begin) % W::STREAMS;
    return true;
  }
};

template <class Source, class W>
struct Loader {
  Dealer<Source, W> source;
  Share<Source> now, ahead;
  bool live, ahead_live, ahead_known;
  int tile;                          // the next tile to load
  unsigned count;                    // tiles of this segment already loaded
  int ids, ids_next, ids_ahead;      // page ids: this batch of tiles, the next one, the next segment's first
  int pending_tile, pending_head, pending_ids;  // of the V tile to load
  unsigned pending_count;
  int pending_rows, pending_skip;  // its tokens that are read: [pending_skip, pending_rows); the others become zeros
  long long pending_base;          // element offset of its page and head in K (TILE_IN_PAGE)

  // The page ids that this lane keeps of a batch of s's tiles, `skip` tiles of this stream further on, as they are in
  // memory; 0 where it keeps none. Where a segment's pages are listed is said here and nowhere else.
  template <bool EARLY>
  __device__ __forceinline__ page_id stored_ids(const Pages& pages, const Share<Source>& s, bool live, int skip,
                                                int lane) const {
    const int index = TILE_IN_PAGE ? lane : lane >> 4;
    const int t = s.first + (skip + index) * W::STREAMS;
    const int token = t * PKV_TILE + (TILE_IN_PAGE ? 0 : lane & 15);
#if SELECTED
    // How many tokens a list has takes its last place, which whole tiles of pages need not wait for.
    if (!live || t >= s.tile_end || (!TILE_IN_PAGE && token >= s.seq_len)) return 0;
    return pages.table.stored<EARLY>(s.row, pages.lists.place(s.list, token / PAGE_SIZE));
#else
    if (!live || t >= s.tile_end || token >= s.seq_len) return 0;
    return pages.table.stored<EARLY>(s.row, token / PAGE_SIZE);
#endif
  }

  __device__ __forceinline__ explicit Loader(const Source& first)
      : source(first), live(true), ahead_known(false), tile(0) {
    settle(now), settle(ahead), settle(ids), settle(ids_next), settle(ids_ahead), settle(ahead_live), settle(count);
    settle(pending_tile), settle(pending_head), settle(pending_ids), settle(pending_count), settle(pending_rows);
    settle(pending_skip), settle(pending_base);
    now.tile_end = 0;
    if constexpr (W::TEAM_SIZE > 1) pending_rows = 0;  // a team's first issue_v comes before any issue_k
  }

  // Looks up the next segment in which this stream has a tile. It must be called once before the first issue_k.
  template <bool EARLY>
  __device__ __forceinline__ void look_ahead(const Pages& pages, int stream, int lane) {
    do ahead_live = source.next(ahead, stream); while (ahead_live && ahead.first >= ahead.tile_end);
    ids_ahead = pages.table.cut(stored_ids<EARLY>(pages, ahead, ahead_live, 0, lane));
    ahead_known = true;
  }

  // Goes to the next tile, and looks the next segment up while two tiles of this one are left.
  __device__ __forceinline__ void advance(const Pages& pages, int stream, int lane) {
    if (tile + W::STREAMS < now.tile_end) return;
    if (!ahead_known) look_ahead<false>(pages, stream, lane);
    if (tile < now.tile_end) return;
    now = ahead, live = ahead_live, ids = ids_ahead, ahead_known = !live;
    tile = now.first, count = 0;
    if (now.tile_end - tile > IDS_TILES * W::STREAMS) load_next_ids(pages, lane);
  }
  __device__ __forceinline__ void load_next_ids(const Pages& pages, int lane) {
    ids_next = pages.table.cut(stored_ids<false>(pages, now, live, count + IDS_TILES, lane));
  }

  // The element offset of the pending tile's head, with TILE_IN_PAGE also of its page and first token.
  template <class Tensor>
  __device__ __forceinline__ long long offset_in(const Tensor& tensor) const {
    const long long head = static_cast<long long>(pending_head / HEAD_SPLIT) * tensor.head_stride;
    if (!TILE_IN_PAGE) return head;
    const unsigned id = __shfl_sync(0xffffffffu, pending_ids, pending_count % IDS_TILES);
    return head + id * tensor.page_stride
           + static_cast<long long>(pending_tile * PKV_TILE % PAGE_SIZE) * tensor.token_stride;
  }

  // Starts the copy of this warp's part of the pending tile, whose vectors it shares out with the rest of its team. A
  // tile that lies in one page has all its rows there, also those that are not read, so its addresses need no check.
  template <int ROW_BYTES>
  __device__ __forceinline__ void copy_tile(const PagedTensor& tensor, long long base, unsigned to, int lane) const {
    constexpr int VECTORS = ROW_BYTES / 16, LANES = W::TEAM_SIZE * 32, STEPS = (PKV_TILE * VECTORS + LANES - 1) / LANES;
    constexpr int STEP_ROWS = LANES % VECTORS ? 0 : LANES / VECTORS;  // from each step to the next, if always as many
    const int own = W::team_member() * 32 + lane, own_row = own / VECTORS;
    const cache_type* from = tensor.at + base;
    const cache_type* own_from = keep_address(from + static_cast<long long>(own_row) * tensor.token_stride
                                              + own % VECTORS * (16 / ELEMENT_BYTES));
    const unsigned own_slot = to + ring_offset<ROW_BYTES>(own_row, own % VECTORS);
    const int end = pending_rows - own_row, begin = pending_skip - own_row;  // of what is read, from own_row
    #pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int rows = STEP_ROWS ? step * STEP_ROWS : (step * LANES + own) / VECTORS - own_row;
      const int row = own_row + rows, vector = (step * LANES + own) % VECTORS;
      if (PKV_TILE * VECTORS % LANES != 0 && row >= PKV_TILE) break;  // whole warps agree
      const int bytes = rows < end && rows >= begin ? 16 : 0;  // the others are filled with zeros
      if constexpr (TILE_IN_PAGE && STEP_ROWS) {
        copy_async(ring_further<ROW_BYTES>(own_slot, rows, 0),
                   own_from + static_cast<long long>(tensor.token_stride) * rows, bytes);
      } else {
        long long offset = static_cast<long long>(row) * tensor.token_stride;
        if (!TILE_IN_PAGE) {
          const int id = __shfl_sync(0xffffffffu, pending_ids, (pending_count % IDS_TILES) * 16 + row);
          offset = id * tensor.page_stride
                   + static_cast<long long>((pending_tile * PKV_TILE + row) % PAGE_SIZE) * tensor.token_stride;
        }
        const cache_type* address = from + offset + vector * (16 / ELEMENT_BYTES);
        copy_async(to + ring_offset<ROW_BYTES>(row, vector), TILE_IN_PAGE || bytes ? address : from, bytes);
      }
    }
  }

#if CACHE_SCALES
  // Starts the copy of the scales of the pending tile's tokens, a lane each, by one warp of the team. Tokens that are
  // not read get zeros.
  __device__ __forceinline__ void copy_scales(const PagedScales& scales, unsigned to, int lane) const {
    if (W::team_member() != 0) return;
    const int row = lane & 15;
    long long offset = offset_in(scales) + static_cast<long long>(row) * scales.token_stride;
    if (!TILE_IN_PAGE) {
      const int id = __shfl_sync(0xffffffffu, pending_ids, (pending_count % IDS_TILES) * 16 + row);
      offset = offset_in(scales) + id * scales.page_stride
               + static_cast<long long>((pending_tile * PKV_TILE + row) % PAGE_SIZE) * scales.token_stride;
    }
    const bool read = row < pending_rows && row >= pending_skip;
    const float* from = lane < PKV_TILE ? scales.k : scales.v;
    copy_float_async(to + row * 8 + lane / PKV_TILE * 4, read ? from + offset : from, read ? 4 : 0);
  }
#endif

  // Starts the copy of the next tile's K, and of all its scales, into a slot of the ring. An empty group is committed
  // at the end of the stream, so that waiting can count groups.
  __device__ __forceinline__ void issue_k(const Pages& pages, unsigned slot, int stream, int lane) {
    if (live) advance(pages, stream, lane);
    pending_rows = 0;
    if (live) {
      pending_tile = tile, pending_count = count, pending_head = now.kv_head, pending_ids = ids;
      pending_rows = now.seq_len - tile * PKV_TILE;
      pending_skip = WINDOWED ? pending_rows - pages.reach : 0;
      pending_base = offset_in(pages.k);
      copy_tile<K_ROW_BYTES>(pages.k, pending_base, slot, lane);
#if CACHE_SCALES
      copy_scales(pages.scales, slot + K_TILE_BYTES + V_TILE_BYTES, lane);
#endif
      tile += W::STREAMS;
      if (++count % IDS_TILES == 0) {
        ids = ids_next;
        load_next_ids(pages, lane);
      }
    }
    copy_commit();
  }

  // Starts the copy of the V tile that belongs to the last issue_k. Before the first one there is none to copy.
  __device__ __forceinline__ void issue_v(const Pages& pages, unsigned slot, int lane) const {
    if (pending_rows > 0) {
      const long long base = HEAD_DIM == V_DIM && pages.alike ? pending_base : offset_in(pages.v);
      copy_tile<V_ROW_BYTES>(pages.v, base, slot + K_TILE_BYTES, lane);
    }
    copy_commit();
  }
};

}  // namespace pkv
