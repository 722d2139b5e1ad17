// The arithmetic of the balanced schedule, in integers only. pkvsim.schedule states the same rules in Numba; a CPU test
// compiles this header with g++ and compares the two task for task.
//
// Rows, then their KV heads, then their tiles of PKV_TILE tokens are laid end to end on a cost axis. A (row, KV head)
// of n tiles starts at x0 and spans n + c: tile 0 lies at x0, tile t >= 1 at x0 + c + t, where c is the fixed cost of a
// segment in tiles. Of a total W, range i of N holds the tiles that lie in [i * W / N, (i + 1) * W / N); few heads of
// equal length are cut into parts of equal tiles instead (Cut).
#pragma once
#include "read_early.cuh"
#include "variant.cuh"

// Bounds of the cut, as pkvsim/schedule/balanced.py has them.
#define PKV_SHORT_RANGE 640        // tiles
#define PKV_MOST_TILES (1 << 20)   // of a head, for the root of its parts
#define PKV_IDLE_OF_HALVES 6       // half the CTAs are taken where at most 1 of so many of them idles
#define PKV_IDLE_OF_PARTS 8        // heads are cut into equal parts where that idles at most 1 of so many CTAs,
#define PKV_IDLE_OF_HEADS 32       // and are left whole where that does

namespace pkv {

#if RANKS
// Which tokens of a row are a rank's: of every `cycle` tokens those in [begin, begin + tokens). The rank keeps them in
// their order, in pages of its own.
struct RankShare {
  int begin, tokens, cycle;
  int magic, shift;  // floor(n / cycle) is n * magic >> 32 + shift for n of 31 bits: pkvsim.schedule.shares

  PKV_HD int of(int seq_len) const {
    const unsigned long long wide = static_cast<unsigned long long>(static_cast<unsigned>(seq_len))
                                    * static_cast<unsigned>(magic);
    const int cycles = static_cast<int>(static_cast<unsigned>(wide >> 32) >> shift);
    const int rest = seq_len - cycles * cycle - begin;
    return cycles * tokens + (rest < 0 ? 0 : rest < tokens ? rest : tokens);
  }
};
#endif

// What the balanced schedule weighs against each other, in tiles: pkvsim.schedule.costs.BalancedCosts, field by field.
struct Costs {
  int segment;  // what a segment costs beside its tiles
  int minimum;  // the least cost of a range
  int part;     // what merging one more part of a head costs
  int pair;     // even steps that cost less than this for each CTA get half of the CTAs
};

PKV_HD int tiles_of(int seq_len) { return (seq_len + PKV_TILE - 1) / PKV_TILE; }

// The cost of a row of so many tiles over all its KV heads. An empty row costs nothing.
PKV_HD int row_cost(int tiles, int num_kv_heads, int segment_cost) {
  return tiles > 0 ? num_kv_heads * (tiles + segment_cost) : 0;
}

// The rows' lengths, which are read early (early_plan.cuh). Every one is cut to [0, most], so that a plan made of what
// is not there yet is wrong but harmless.
struct Lengths {
  const int* at;  // [batch_size]; with LAST_PAGE_LENGTHS the tokens in the rows' last pages
  int batch_size, most;
  int window;  // tokens, of the row's first query token back to where its last one's window begins (WINDOWED)
  PKV_LAST_PAGE(const int* row_begins;)  // [batch_size + 1] the rows' first pages
  PKV_RANKS(RankShare share;)            // of this rank; lengths in memory are whole rows'

  // The tiles of a row that lie before its window, which are neither read nor scheduled.
  PKV_HD int skipped(int seq_len) const { return WINDOWED && seq_len > window ? (seq_len - window) / PKV_TILE : 0; }
  PKV_HD int tiles(int seq_len) const { return tiles_of(seq_len) - skipped(seq_len); }

  PKV_HD int operator[](int row) const { return row < batch_size ? cut(stored(row)) : most; }
  // A length as it is in memory, 0 past the last row. Nothing waits for it before it is used: cut() says what becomes
  // of it.
  PKV_HD int stored(int row) const {
    if (row >= batch_size) return 0;
    int length = read_early(at + row);
#if LAST_PAGE_LENGTHS
    const int full = read_early(row_begins + row + 1) - read_early(row_begins + row) - 1;  // pages before the last
    length = full < 0 ? 0 : full <= most / PAGE_SIZE ? full * PAGE_SIZE + length : most;
#endif
    return length;
  }
  PKV_HD int cut(int length) const {
    PKV_RANKS(length = share.of(length < 0 ? 0 : length);)
    return length < 0 ? 0 : length < most ? length : most;
  }
};

// floor(a / b) of a >= 0, b > 0. Without signs a division takes a third fewer instructions.
PKV_HD int divide(int a, int b) { return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b)); }

// floor(sqrt(x)), at least 1, of x up to 2^30.
PKV_HD int square_root(int x) {
#ifdef __CUDA_ARCH__
  float estimate;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(estimate) : "f"(static_cast<float>(x)));
  int root = static_cast<int>(estimate);
#else
  int root = static_cast<int>(sqrtf(static_cast<float>(x)));
#endif
  while (root * root > x) --root;  // the estimate is off by one at most, but exact is exact
  while ((root + 1) * (root + 1) <= x) ++root;
  return root > 1 ? root : 1;
}

// How the total cost W is cut. The caller keeps W below 2^31. Every division is a place in the code that a step alone
// fetches from a cold L2 and waits for, so there is one where two would read more plainly.
struct Cut {
  int total, num_ranges, quotient, remainder;  // of total / num_ranges, or of a head's tiles / parts
  int parts;  // of every head, when all are cut alike; else 0
  int head_cost, segment_cost;

  // A head of n tiles in p parts takes about n / p + costs.part * p, least at p = sqrt(n / costs.part): no more parts
  // are made of the mean head. num_heads: non-empty (row, KV head) pairs. even: whether all of those have the same
  // tiles. If they do, and the ranges are short, a multiple of the heads is taken, or so many that each has the same
  // number of heads: heads are then cut into equal parts, or not at all. Where such a step costs less than costs.pair a
  // CTA, half the CTAs are taken, one on each pair of SMs (pkvsim.schedule.balanced.balanced_ranges says why).
  PKV_HD Cut(int total_, int num_heads, bool even, int num_ctas, Costs costs)
      : total(total_), parts(0), head_cost(divide(total_, num_heads > 0 ? num_heads : 1)), segment_cost(costs.segment) {
    const int least = costs.minimum > 1 + segment_cost ? costs.minimum : 1 + segment_cost, half = num_ctas >> 1;
    const bool halved = even && num_heads > 0 && num_heads <= half && total < costs.pair * num_ctas
                        && (half - divide(half, num_heads) * num_heads) * PKV_IDLE_OF_HALVES <= half;
    const int most = halved ? half : num_ctas;
    num_ranges = divide(total, least);
    if (num_ranges > most) num_ranges = most;
    if (num_ranges < 1) num_ranges = 1;
    if (costs.part > 0 && num_heads > 0) {
      const int mean = head_cost < PKV_MOST_TILES ? head_cost : PKV_MOST_TILES;
      const int part = square_root(costs.part * mean), paying = divide(mean + part / 2, part);
      const long long wanted = static_cast<long long>(num_heads) * (paying > 1 ? paying : 1);
      if (wanted < num_ranges) num_ranges = static_cast<int>(wanted);
    }
    if (halved || (num_heads > 0 && even && total < PKV_SHORT_RANGE * num_ranges)) {
      const bool few = num_heads <= num_ranges;
      // Ranges of each head, rounded down, or heads of each range, rounded up.
      const int each = few ? divide(num_ranges, num_heads) : divide(num_heads + num_ranges - 1, num_ranges);
      const int needed = few ? num_heads * each : divide(num_heads + each - 1, each);
      const int idle = (num_ranges - needed) * (few ? PKV_IDLE_OF_PARTS : PKV_IDLE_OF_HEADS);
      if (halved || num_ranges < most || idle <= num_ranges) num_ranges = needed, parts = few ? each : 0;
    }
    const int whole = parts > 0 ? head_cost - segment_cost : total, pieces = parts > 0 ? parts : num_ranges;
    quotient = divide(whole, pieces);
    remainder = whole - quotient * pieces;
  }
  // Where range i begins: at floor(i * W / N), worked out without a 64-bit product, or at the first tile of its part.
  PKV_HD int begin(int i) const {
    const int upto = divide(parts > 0 ? i : i * remainder, parts > 0 ? parts : num_ranges);
    if (parts == 0) return i * quotient + upto;
    const int part = i - upto * parts, tile = part * quotient + divide(part * remainder, parts);
    return upto * head_cost + (tile > 0 ? segment_cost + tile : 0);
  }
  // The range that holds the first tile of the head that starts at x: the largest j with begin(j) <= x.
  PKV_HD int range_of(int x) const {
    if (parts > 0) return divide(x, head_cost) * parts;
    // The estimate is off by one at most, but exact is exact.
    int j = static_cast<int>(static_cast<float>(x) / static_cast<float>(total) * static_cast<float>(num_ranges)) + 1;
    if (j >= num_ranges) j = num_ranges - 1;
    while (begin(j) > x) --j;
    return j;
  }
};

// The first tile whose position is >= x in a head that starts at x0 <= x.
PKV_HD int tile_at(int x, int x0, int segment_cost) {
  const int rem = x - x0;
  if (rem <= 0) return 0;
  return rem - segment_cost > 1 ? rem - segment_cost : 1;
}

// One line of a task list, as pkvsim.schedule lays it out.
struct Task {
  int row, kv_head, split, tile_begin, tile_end;  // tiles, end exclusive
};

// A contiguous run of tiles of one (row, KV head): what a CTA reads at a stretch and has one state of each column of.
// Its pages are the row's, which Loader::stored_ids looks up; the queries that it is read for are the group's at the
// row's query tokens, which Query::load, Mask and store_result work out of row and column (place_of).
struct Segment {
  int row, kv_head, tile_begin, tile_end;  // tiles, end exclusive
  int seq_len;       // tokens of the row
  int slot;          // partial-state slot (task list), or position of the head's tile 0 (balanced)
  int begins, ends;  // whether it holds the first, the last tile of its (row, KV head)
};

// Walks the segments of one range.
struct BalancedWalk {
  using Piece = Segment;
  Lengths seq_lens;
  int num_kv_heads, segment_cost;
  int row, head, tile, x0, x_end, seq_len;  // tile: from the first one not skipped

  // row, row_begin: the first non-empty row whose cost interval reaches past x_begin, and where that interval starts.
  PKV_HD void start(const Lengths& lens, int kv_heads, int seg_cost, int first_row, int first_length, int row_begin,
                    int x_begin, int end) {
    seq_lens = lens, num_kv_heads = kv_heads, segment_cost = seg_cost, row = first_row, x_end = end;
    seq_len = first_length;
    const int span = seq_lens.tiles(seq_len) + segment_cost;
    head = divide(x_begin - row_begin, span);
    if (head >= num_kv_heads) head = num_kv_heads - 1;  // lengths that change meanwhile: see Lengths
    x0 = row_begin + head * span;
    tile = tile_at(x_begin, x0, segment_cost);
    if (tile >= seq_lens.tiles(seq_len)) step_head();
  }

  PKV_HD bool next(Segment& s) {
    if (x0 >= x_end) return false;
    const int tiles = seq_lens.tiles(seq_len), skipped = seq_lens.skipped(seq_len);
    int end = tile_at(x_end, x0, segment_cost);
    if (end > tiles) end = tiles;
    s.row = row, s.kv_head = head, s.tile_begin = skipped + tile, s.tile_end = skipped + end, s.seq_len = seq_len;
    s.begins = tile == 0, s.ends = end == tiles, s.slot = x0;
    step_head();
    return true;
  }

 private:
  PKV_HD void step_head() {
    x0 += seq_lens.tiles(seq_len) + segment_cost;
    tile = 0;
    if (++head < num_kv_heads || x0 >= x_end) return;
    head = 0;
    do seq_len = seq_lens[++row]; while (seq_len == 0);
    if (row >= seq_lens.batch_size) x_end = x0;  // past the last row only where lengths change meanwhile
  }
};

}  // namespace pkv
