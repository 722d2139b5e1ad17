// Selected pages: what each (row, KV head) reads is a list of its row's pages.
//
// A list is a row of its own to the balanced schedule, of one KV head and of as many tokens as its pages have room for.
// So the axis and the cut of plan.cuh serve lists as they do rows; pkvsim.schedule.page_lists says what the GPU's plan
// must equal. What differs is here: how long a list is, and where its pages are.
#pragma once
#include "table.cuh"

namespace pkv {

// The lists, which may change from step to step. Heads of the schedule that share a KV head share its list.
struct PageLists {
  const int* pages;   // [batch_size, num_kv_heads / HEAD_SPLIT, stride] places in the row's table, ascending
  const int* counts;  // [batch_size, num_kv_heads / HEAD_SPLIT] pages that are listed, those past the row's not counted
  int stride;
  int most_place;     // of a row that the table has room for

  // The i-th place of a list, cut to the table: a list is the caller's word, and may lead nowhere.
  __device__ __forceinline__ int place(int list, int i) const {
    const int stored = __ldg(pages + static_cast<long long>(list) * stride + i);
    return min(static_cast<unsigned>(stored), static_cast<unsigned>(most_place));
  }
};

// A run of tiles of one list. Tiles and tokens count through the listed pages.
struct ListPiece : Segment {
  int list;     // whose places its pages are at
  int row_len;  // tokens of the row, where seq_len has those of the list
};

// What is looked up of a list before it is planned.
struct ListSize {
  int pages, row_len;  // of the list, and its row's tokens

  __device__ __forceinline__ int tiles() const { return tiles_of(pages * PAGE_SIZE); }
};

// All lists of a step as rows of the schedule: number v is head v % heads of row v / heads.
struct Lists {
  Lengths lens;
  PageLists lists;
  int heads;  // of the schedule

  __device__ __forceinline__ int count() const { return lens.batch_size * heads; }
  __device__ __forceinline__ int row_of(int v) const { return divide(v, heads); }
  __device__ __forceinline__ int list_of(int v) const { return HEAD_SPLIT == 1 ? v : divide(v, HEAD_SPLIT); }
  // The size of list v < count(), which holds no more pages than its row. Its tiles are those of its pages; the last of
  // these may hold fewer, which is not known before the list's last place is.
  __device__ __forceinline__ ListSize size(int v) const {
    const int row_len = lens[row_of(v)], listed = min(read_early(lists.counts + list_of(v)), lists.stride);
    return {max(0, min(listed, divide(row_len + PAGE_SIZE - 1, PAGE_SIZE))), row_len};
  }
};

// Walks the pieces of one range, as BalancedWalk does those of rows.
struct ListWalk {
  using Piece = ListPiece;
  Lists lists;
  int segment_cost;
  int v;                // the list at hand
  ListSize size;        // of it, which is looked up a piece ahead
  int tile, x0, x_end;  // the next of its tiles, and where they lie

  // first, first_size, list_begin: the first list that is not empty and reaches past x_begin, and where it lies.
  __device__ __forceinline__ void start(int first, const ListSize& first_size, int list_begin, int x_begin, int end) {
    v = first, size = first_size, x0 = list_begin, x_end = end;
    tile = tile_at(x_begin, x0, segment_cost);
    if (tile >= size.tiles()) step();
  }
  __device__ __forceinline__ bool next(ListPiece& s) {
    if (x0 >= x_end) return false;
    const int end = min(tile_at(x_end, x0, segment_cost), size.tiles());
    s.row = lists.row_of(v), s.kv_head = v - s.row * lists.heads, s.list = lists.list_of(v), s.row_len = size.row_len;
    s.seq_len = size.pages * PAGE_SIZE;
    // Of all pages only the row's last may have room left.
    const int row_pages = divide(size.row_len + PAGE_SIZE - 1, PAGE_SIZE);
    if (PAGE_SIZE > 1 && lists.lists.place(s.list, max(0, size.pages - 1)) == row_pages - 1)
      s.seq_len -= row_pages * PAGE_SIZE - size.row_len;
    s.tile_begin = tile, s.tile_end = end;
    if constexpr (PAGE_SIZE > PKV_TILE) s.tile_end = max(tile, min(end, tiles_of(s.seq_len)));
    s.begins = tile == 0, s.ends = end == size.tiles(), s.slot = x0;
    step();
    return true;
  }

 private:
  __device__ __forceinline__ void step() {
    x0 += size.tiles() + segment_cost, tile = 0;
    if (x0 >= x_end) return;
    do {
      if (++v >= lists.count()) {  // past the last list only where lengths or counts change meanwhile
        x_end = x0;
        return;
      }
      size = lists.size(v);
    } while (size.pages == 0);
  }
};

}  // namespace pkv
