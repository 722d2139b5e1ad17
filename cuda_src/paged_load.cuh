// One warp's stream of K,V tiles from pages into its private ring in shared memory.
//
// The warps of a CTA share a segment tile by tile (warp w takes tiles w, w + WARPS, ...) and never wait for each
// other inside it. The loader runs up to STAGES tiles ahead of the arithmetic and on across segment ends; page
// ids of the tiles to come, and of the next segment, are in registers before they are needed.
#pragma once
#include "mma.cuh"
#include "plan.cuh"

namespace pkv {

constexpr int ROW_BYTES = HEAD_DIM * 2;
constexpr int ROW_VECTORS = ROW_BYTES / 16;         // 16-byte vectors in one token's K or V
constexpr int ROWS_PER_COPY = 32 / ROW_VECTORS;     // tokens one warp-wide copy instruction covers
constexpr int TILE_BYTES = PKV_TILE * ROW_BYTES;
constexpr bool TILE_IN_PAGE = PAGE_SIZE % PKV_TILE == 0;
constexpr int IDS_TILES = TILE_IN_PAGE ? 32 : 2;    // tiles whose page ids one register per lane holds

// Where the pages are. Strides in elements; K and V share them.
struct Pages {
  const half_type *k, *v;
  const int* block_table;  // [batch_size, table_stride]
  int table_stride;
  long long page_stride;
  int head_stride, token_stride;
};

// XOR swizzle: the eight rows of an ldmatrix fall into different banks.
__device__ __forceinline__ unsigned ring_offset(int row, int vector) {
  return row * ROW_BYTES + ((vector ^ (row & 7)) << 4);
}

template <class Source>
struct Loader {
  Source source;
  Segment now, ahead;
  bool live, ahead_live, ahead_known;
  int tile;                          // the next tile to load
  int count;                         // tiles of this segment already loaded by this warp
  int ids, ids_next, ids_ahead;      // page ids: this batch of tiles, the next one, the next segment's first
  long long base;                    // element offset of the pending V tile's page and head (TILE_IN_PAGE)
  int pending_tile, pending_count, pending_rows, pending_head, pending_ids;

  __device__ __forceinline__ int load_ids(const Pages& pages, const Segment& s, bool live, int first, int warp, int lane) {
    const int index = TILE_IN_PAGE ? lane : lane >> 4;
    const int t = s.tile_begin + warp + (first + index) * WARPS;
    const int token = t * PKV_TILE + (TILE_IN_PAGE ? 0 : lane & 15);
    if (!live || t >= s.tile_end || token >= s.seq_len) return 0;
    return __ldg(pages.block_table + static_cast<long long>(s.row) * pages.table_stride + token / PAGE_SIZE);
  }

  __device__ __forceinline__ Loader(const Source& first) : source(first), live(true), ahead_known(false), tile(0) { now.tile_end = 0; }

  // Points at the next tile; looks the next segment up while two tiles of this one are left.
  __device__ __forceinline__ void advance(const Pages& pages, int warp, int lane) {
    if (!ahead_known && tile + WARPS >= now.tile_end) {
      // Segments in which this warp has no tile are passed over.
      do ahead_live = source.next(ahead); while (ahead_live && ahead.tile_begin + warp >= ahead.tile_end);
      ids_ahead = load_ids(pages, ahead, ahead_live, 0, warp, lane);
      ahead_known = true;
    }
    if (tile < now.tile_end) return;
    now = ahead, live = ahead_live, ids = ids_ahead, ahead_known = !live;
    tile = now.tile_begin + warp, count = 0;
    if (now.tile_end - tile > IDS_TILES * WARPS) ids_next = load_ids(pages, now, live, IDS_TILES, warp, lane);
  }

  // Element offset of this lane's token in copy `step` of the pending tile.
  __device__ __forceinline__ long long row_offset(const Pages& pages, int step, int lane) const {
    const int row = step * ROWS_PER_COPY + lane / ROW_VECTORS;
    if (TILE_IN_PAGE) return base + static_cast<long long>(row) * pages.token_stride;
    const int id = __shfl_sync(0xffffffffu, pending_ids, (pending_count % IDS_TILES) * 16 + row);
    return id * pages.page_stride + static_cast<long long>(pending_head) * pages.head_stride +
           static_cast<long long>((pending_tile * PKV_TILE + row) % PAGE_SIZE) * pages.token_stride;
  }

  __device__ __forceinline__ void copy_tile(const half_type* from, unsigned to, const Pages& pages, int lane) const {
    const int vector = lane % ROW_VECTORS;
    #pragma unroll
    for (int step = 0; step < PKV_TILE / ROWS_PER_COPY; ++step) {
      const int row = step * ROWS_PER_COPY + lane / ROW_VECTORS;
      const half_type* address = from + row_offset(pages, step, lane) + vector * 8;
      if (pending_rows >= PKV_TILE) copy_async(to + ring_offset(row, vector), address);
      else copy_async(to + ring_offset(row, vector), row < pending_rows ? address : from, row < pending_rows ? 16 : 0);
    }
  }

  // Starts the copy of the next tile's K. An empty group is committed at the end of the stream, so that waiting
  // can count groups.
  __device__ __forceinline__ void issue_k(const Pages& pages, unsigned to, int warp, int lane) {
    if (live) advance(pages, warp, lane);
    pending_rows = 0;
    if (live) {
      pending_tile = tile, pending_count = count, pending_head = now.kv_head, pending_ids = ids;
      pending_rows = now.seq_len - tile * PKV_TILE;
      if (TILE_IN_PAGE) {
        const int id = __shfl_sync(0xffffffffu, ids, count % IDS_TILES);
        base = id * pages.page_stride + static_cast<long long>(now.kv_head) * pages.head_stride +
               static_cast<long long>((tile * PKV_TILE) % PAGE_SIZE) * pages.token_stride;
      }
      copy_tile(pages.k, to, pages, lane);
      tile += WARPS;
      if (++count % IDS_TILES == 0) {
        ids = ids_next;
        ids_next = load_ids(pages, now, true, count + IDS_TILES, warp, lane);
      }
    }
    copy_commit();
  }

  // Starts the copy of the V tile that belongs to the last issue_k.
  __device__ __forceinline__ void issue_v(const Pages& pages, unsigned to, int lane) const {
    if (pending_rows > 0) copy_tile(pages.v, to, pages, lane);
    copy_commit();
  }
};

}  // namespace pkv
