// The arithmetic of the balanced schedule, in integers only. pkvsim.schedule states the same rules in
// Numba; a CPU test compiles this header with g++ and compares the two task for task.
//
// Order of work: rows, then KV heads, then tiles of PKV_TILE tokens, laid end to end on a cost axis.
// A (row, KV head) of n tiles starts at x0 and spans n + c: tile 0 at x0, tile t >= 1 at x0 + c + t, where c
// is the fixed cost of a segment in tiles. Range i of N holds the tiles whose position lies in
// [i*W/N, (i+1)*W/N).
#pragma once

#ifdef __CUDACC__
#define PKV_HD __host__ __device__ __forceinline__
#else
#define PKV_HD inline
#endif

#define PKV_TILE 16           // tokens; also the M of the tensor-core product, see mma.cuh
#define PKV_SHORT_RANGE 256   // tiles

namespace pkv {

PKV_HD int tiles_of(int seq_len) { return (seq_len + PKV_TILE - 1) / PKV_TILE; }

// Cost of one row over all its KV heads; an empty row costs nothing.
PKV_HD int row_cost(int seq_len, int num_kv_heads, int segment_cost) {
  const int tiles = tiles_of(seq_len);
  return tiles > 0 ? num_kv_heads * (tiles + segment_cost) : 0;
}

// How the total cost W is cut. The caller keeps W below 2^31.
struct Cut {
  int total, num_ranges, quotient, remainder;

  // num_heads: non-empty (row, KV head) pairs. When they are few and the ranges short, a multiple of them is taken, so
  // that heads of equal length are cut alike and no range spends its time on two; at most 1/8 of the CTAs idle for it.
  PKV_HD Cut(int total_, int num_heads, int num_ctas, int segment_cost, int min_cost) : total(total_) {
    const int least = min_cost > 1 + segment_cost ? min_cost : 1 + segment_cost;
    num_ranges = total / least;
    if (num_ranges > num_ctas) num_ranges = num_ctas;
    if (num_ranges < 1) num_ranges = 1;
    if (num_heads > 0 && num_heads <= num_ranges && total / num_ranges < PKV_SHORT_RANGE) {
      const int spare = num_ranges % num_heads;
      if (spare * 8 <= num_ranges) num_ranges -= spare;
    }
    quotient = total / num_ranges;
    remainder = total % num_ranges;
  }
  // floor(i * W / N) without a 64-bit product.
  PKV_HD int begin(int i) const { return i * quotient + i * remainder / num_ranges; }
  // The range that holds the tile at position x: the largest j with begin(j) <= x.
  PKV_HD int range_of(int x) const {
    int j = static_cast<int>(static_cast<float>(x) / static_cast<float>(total) * static_cast<float>(num_ranges));
    if (j >= num_ranges) j = num_ranges - 1;
    while (begin(j) > x) --j;  // the estimate is off by one at most, but exact is exact
    while (j + 1 < num_ranges && begin(j + 1) <= x) ++j;
    return j;
  }
};

// First tile whose position is >= x in a head that starts at x0 <= x.
PKV_HD int tile_at(int x, int x0, int segment_cost) {
  const int rem = x - x0;
  if (rem <= 0) return 0;
  return rem - segment_cost > 1 ? rem - segment_cost : 1;
}

// One line of a task list, as pkvsim.schedule lays it out.
struct Task {
  int row, kv_head, split, tile_begin, tile_end;  // tiles, end exclusive
};

// A contiguous run of tiles of one (row, KV head).
struct Segment {
  int row, kv_head, tile_begin, tile_end;  // tiles, end exclusive
  int seq_len;                             // tokens of the row
  int slot;                                // partial-state slot (task list), or position of the head's tile 0 (balanced)
  int begins, ends;                        // whether it holds the first, the last tile of its (row, KV head)
};

// Walks the segments of one range.
struct BalancedWalk {
  const int* seq_lens;  // [batch_size]
  int num_kv_heads, segment_cost;
  int row, head, tile, x0, x_end, seq_len;

  // row, row_begin: the first non-empty row whose cost interval reaches past x_begin, and where that interval starts.
  PKV_HD void start(const int* lens, int kv_heads, int seg_cost, int first_row, int row_begin, int x_begin, int end) {
    seq_lens = lens, num_kv_heads = kv_heads, segment_cost = seg_cost, row = first_row, x_end = end;
    seq_len = lens[row];
    const int span = tiles_of(seq_len) + segment_cost;
    head = (x_begin - row_begin) / span;
    x0 = row_begin + head * span;
    tile = tile_at(x_begin, x0, segment_cost);
    if (tile >= tiles_of(seq_len)) step_head();
  }

  PKV_HD bool next(Segment& s) {
    if (x0 >= x_end) return false;
    const int tiles = tiles_of(seq_len);
    int end = tile_at(x_end, x0, segment_cost);
    if (end > tiles) end = tiles;
    s.row = row, s.kv_head = head, s.tile_begin = tile, s.tile_end = end, s.seq_len = seq_len;
    s.begins = tile == 0, s.ends = end == tiles, s.slot = x0;
    step_head();
    return true;
  }

 private:
  PKV_HD void step_head() {
    x0 += tiles_of(seq_len) + segment_cost;
    tile = 0;
    if (++head < num_kv_heads || x0 >= x_end) return;
    head = 0;
    do seq_len = seq_lens[++row]; while (seq_len == 0);
  }
};

}  // namespace pkv
