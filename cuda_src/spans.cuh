// The arithmetic of a step whose rows share reads, in integers only. pkvsim.schedule.spans is its specification; a CPU
// test compiles this header with g++ and compares the two task for task.
//
// The cost axis is made of entries: first the groups, whose spans are (read, KV head), then the rows, whose spans are
// (row, KV head). A span of n tiles that starts at x0 reaches to x0 + c + max(1, n) * e / 8, rounded up: tile 0 sits at
// x0, tile t >= 1 at x0 + c + t * e / 8, rounded down, where c is what its end costs in tiles and e what a tile of it
// costs in eighths. It is cut as plan.cuh cuts rows.
#pragma once
#include "plan.cuh"

namespace pkv {

constexpr int EIGHTHS = 8, STATED_COLUMNS = 64;

// pkvsim.schedule.costs.SharedCosts, field by field.
struct SharedCosts {
  int columns;  // that a read serves at most
  int tile;     // of a read for 64 columns, in eighths of a plain tile
  int least;    // that a tile of any read costs, in eighths
  int segment;  // of a read's end for each column, in eighths of a tile
  int merge;    // tiles in whose time an output of a member is merged

  PKV_HD int tile_eighths(int read_columns) const {
    const int cost = divide(read_columns * tile + STATED_COLUMNS - 1, STATED_COLUMNS);
    return cost > least ? cost : least;
  }
  PKV_HD int segment_tiles(int read_columns, int plain) const {
    const int cost = divide(read_columns * segment + EIGHTHS - 1, EIGHTHS);
    return cost > plain ? cost : plain > 1 ? plain : 1;
  }
  // Tiles that a member's own span costs at least, beside a plain segment: pkvsim says why it is this root. reads_cost:
  // of all reads; outputs: members times KV heads.
  PKV_HD int least_own(int reads_cost, int outputs) const {
    const int each = divide(reads_cost, outputs > 0 ? outputs : 1);
    return square_root(merge * (each < PKV_MOST_TILES ? each : PKV_MOST_TILES));
  }
  // Most tiles between two places where the axis can be cut: ranges of so many are never empty.
  PKV_HD int longest_gap(int most_columns, int plain, int least_own) const {
    const int read = segment_tiles(most_columns, plain) + divide(tile_eighths(most_columns) + EIGHTHS - 1, EIGHTHS);
    return read > plain + least_own ? read : plain + least_own;
  }
};

// Some spans of the same tiles and cost, end to end.
struct Entry {
  int tiles, spans;  // tiles of each; 0 spans where the entry is not there
  int segment, eighths;

  PKV_HD int costing() const { return tiles > 1 ? tiles : 1; }
  // Cost of the first `count` tiles, floor(count * eighths / 8) without a product of more than 31 bits.
  PKV_HD int upto(int count) const {
    return count * (eighths / EIGHTHS) + count * (eighths % EIGHTHS) / EIGHTHS;
  }
  PKV_HD int span_cost() const {
    const int part = costing() * (eighths % EIGHTHS);
    return segment + costing() * (eighths / EIGHTHS) + (part + EIGHTHS - 1) / EIGHTHS;
  }
  PKV_HD int cost() const { return spans > 0 ? spans * span_cost() : 0; }
  // Where tile t sits in a span that starts at x0; and the first tile that sits at or past x, of those that may be.
  PKV_HD int position(int t, int x0) const { return t > 0 ? x0 + segment + upto(t) : x0; }
  PKV_HD int tile_at(int x, int x0) const {
    if (x <= x0) return 0;
    const int past = x - x0 - segment;
    if (past <= 0) return 1;
    const int whole = divide(past, eighths);  // eight tiles cost `eighths` together
    return whole * EIGHTHS + divide((past - whole * eighths) * EIGHTHS + eighths - 1, eighths);
  }
};

// Which rows may read together, as the caller says. What is there is read early and cut to what can be: see Lengths.
struct Groups {
  const int* of_row;        // [batch_size] or -1
  const int* prefix_pages;  // [num_groups]
  int num_groups, page_size, query_tokens;

  // Tokens of a prefix of so many pages; 0, which nobody reads, where it is longer than any row.
  PKV_HD int tokens(int pages, int most) const {
    return pages > 0 && pages <= divide(most, page_size) ? pages * page_size : 0;
  }
  // The group of a row for which `group` stands in memory, long enough for it or not, or -1.
  PKV_HD int asked(int group) const {
    return static_cast<unsigned>(group) < static_cast<unsigned>(num_groups) ? group : -1;
  }
  // Whether a row of this length may read a prefix of so many tokens with others.
  PKV_HD bool fits(int length, int prefix) const {
    return prefix >= PKV_TILE && prefix <= length - (query_tokens - 1);
  }
  // Whether one of the rows first, first + step, .. is in a group, long enough for it or not. Several are asked for at
  // once, the last one again where there are fewer.
  PKV_HD bool any_grouped(int batch_size, int first, int step) const {
    constexpr int AT_ONCE = 4;
    bool found = false;
#ifdef __CUDACC__
    #pragma unroll 1
#endif
    for (int row = first; row < batch_size; row += AT_ONCE * step) {
      int asked[AT_ONCE];
#ifdef __CUDACC__
      #pragma unroll
#endif
      for (int i = 0; i < AT_ONCE; ++i)
        asked[i] = read_early(of_row + (row + i * step < batch_size ? row + i * step : batch_size - 1));
#ifdef __CUDACC__
      #pragma unroll
#endif
      for (int i = 0; i < AT_ONCE; ++i) found |= static_cast<unsigned>(asked[i]) < static_cast<unsigned>(num_groups);
    }
    return found;
  }
};

// Who does read together, and all that the plan needs of lengths and groups: found once a step, in shared memory, since
// every look at what is read early goes to L2.
struct Readers {
  int* length;  // [batch_size]
  int* group;   // [batch_size] that the row reads with; -1 of a row with none, alone_in(group) where it is alone in it
  int* place;   // [batch_size] of a member among its group's
  int* rows;    // [batch_size] the members, group by group, ascending
  int* prefix;  // [num_groups] in tokens
  int* count;   // [num_groups] members: 0 or at least 2
  int* begin;   // [num_groups] of each group's in `rows`
  int* at;      // [num_groups] where the group's entry begins on the axis

  PKV_HD Readers(int* memory, int batch_size, int num_groups)
      : length(memory), group(length + batch_size), place(group + batch_size), rows(place + batch_size),
        prefix(rows + batch_size), count(prefix + num_groups), begin(count + num_groups), at(begin + num_groups) {}
  PKV_HD static int words(int batch_size, int num_groups) { return 4 * (batch_size + num_groups); }
  PKV_HD static int alone_in(int group) { return -2 - group; }
  PKV_HD int tiles(int group) const { return prefix[group] / PKV_TILE; }  // that are shared
};

// Where a row's states of its read lie, for one KV head.
struct SharedParts {
  int first, last;  // ranges that hold the read; the last one ends it
  int column;       // the row's first column in it
};

// The entries of a step.
struct Axis {
  Lengths lens;
  Groups groups;
  Readers readers;
  SharedCosts shared;
  Costs costs;
  int num_kv_heads, row_columns;  // row_columns: query heads of a KV head times query tokens
  int least_own = 1;              // tiles that a member's own span costs at least; is known when the reads are

  PKV_HD int num_entries() const { return groups.num_groups + lens.batch_size; }
#if READ_COLUMNS
  PKV_HD int most_members() const { return READ_COLUMNS / COLUMNS; }  // as shared.columns says, but without a division
#else
  PKV_HD int most_members() const { return divide(shared.columns, row_columns); }
#endif
  PKV_HD int most_columns() const { return most_members() * row_columns; }
  PKV_HD int num_reads(int group) const { return divide(readers.count[group] + most_members() - 1, most_members()); }
  // The first member of a read, from the first one of the group; and the read that a place belongs to.
  PKV_HD int first_member(int group, int read, int reads) const { return divide(readers.count[group] * read, reads); }
  PKV_HD int read_of(int group, int place, int reads) const {
    return divide((place + 1) * reads - 1, readers.count[group]);
  }
  PKV_HD int shared_tiles(int row) const { return readers.group[row] < 0 ? 0 : readers.tiles(readers.group[row]); }

  // What there is of a row and of a group, as it is in memory: nothing waits for it before it is used, so that a thread
  // asks for all that it looks up at once. Without groups the last of it says nothing.
  struct Stored {
    int length, group, pages;
  };
  PKV_HD Stored stored(int row, int group) const {
    const int* of_group = groups.num_groups > 0 ? groups.prefix_pages + group : groups.of_row + row;
    return {lens.stored(row), read_early(groups.of_row + row), read_early(of_group)};
  }
  // Notes what was read of a row and of a group. A row's group is the one that it asks for until all are noted, and then
  // the one that it reads with if another row does; where members are counted from there, see find_readers.
  PKV_HD void note_row(int row, int length, int asked) const {
    readers.length[row] = length, readers.group[row] = asked;
  }
  PKV_HD void note_group(int group, int tokens) const { readers.prefix[group] = tokens, readers.count[group] = 0; }
  // The group that a row of this length asks for, if it is long enough for what was noted of it in tokens, or -1.
  PKV_HD int fitting(int length, int asked) const {
    return asked >= 0 && groups.fits(length, readers.prefix[asked]) ? asked : -1;
  }
  // Whether what was noted of a row or a group is another than what is there; of a row, if no group is.
  PKV_HD bool row_changed(int row, const Stored& now) const {
    const int length = lens.cut(now.length), noted = readers.group[row];
    const int wanted = fitting(length, groups.asked(now.group));
    return length != readers.length[row] || (noted != wanted && (wanted < 0 || noted != Readers::alone_in(wanted)));
  }
  PKV_HD bool group_changed(int group, const Stored& now) const {
    return readers.prefix[group] != groups.tokens(now.pages, lens.most);
  }

  PKV_HD Entry group_entry(int group) const {
    if (readers.count[group] == 0) return {0, 0, 0, EIGHTHS};
    const int reads = num_reads(group), columns = divide(readers.count[group] + reads - 1, reads) * row_columns;
    return {readers.tiles(group), reads * num_kv_heads, shared.segment_tiles(columns, costs.segment),
            shared.tile_eighths(columns)};
  }
  // What a row's own span costs beside its tiles, of which there are so many, at least 1.
  PKV_HD int own_segment(int costing, bool member) const {
    return costs.segment + (member && costing < least_own ? least_own - costing : 0);
  }
  PKV_HD Entry row_entry(int row) const {
    const int length = readers.length[row], tiles = tiles_of(length) - shared_tiles(row);
    return {tiles, length > 0 ? num_kv_heads : 0, own_segment(tiles > 1 ? tiles : 1, readers.group[row] >= 0), EIGHTHS};
  }
  PKV_HD Entry entry(int index) const {
    return index < groups.num_groups ? group_entry(index) : row_entry(index - groups.num_groups);
  }
  // How the axis is cut. total: cost of all entries, num_spans: spans of them, any_shared: whether any is a group's.
  // Where none is, rows are cut as a plain step's are; even: all that are there cost the same.
  PKV_HD Cut cut(int total, int num_spans, bool any_shared, bool even, int num_ctas) const {
    const int gap = any_shared ? shared.longest_gap(most_columns(), costs.segment, least_own) : 0;
    Costs cutting = costs;
    if (gap > cutting.minimum) cutting.minimum = gap;
    return Cut(total, num_spans, even && !any_shared, num_ctas, cutting);
  }
  // Of a member.
  PKV_HD SharedParts parts_of(int row, int kv_head, const Cut& cut) const {
    const int group = readers.group[row], place = readers.place[row], reads = num_reads(group);
    const int read = read_of(group, place, reads);
    const Entry entry = group_entry(group);
    const int x0 = readers.at[group] + (read * num_kv_heads + kv_head) * entry.span_cost();
    return {cut.range_of(x0), cut.range_of(entry.position(entry.tiles - 1, x0)),
            (place - first_member(group, read, reads)) * row_columns};
  }
};

// A run of tiles of a read. Its row is the first member, through whose pages it is read; seq_len ends the prefix.
struct ReadPiece : Segment {
  int group, read;   // the group, and the read's number in it
  int members;       // rows that it is read for,
  const int* rows;   // which are these
};

// A run of tiles of a row's own span.
struct RowPiece : Segment {
  bool member;  // of a read, so that what ends here is merged with the states of that
};

// Walks a range's part of the reads.
struct ReadWalk {
  using Piece = ReadPiece;
  const Axis* axis;
  Entry entry;
  int group, read, head, tile, x0, x_end;  // of the next piece; x0: where its span starts

  PKV_HD void start_empty(const Axis& entries) { axis = &entries, x0 = x_end = 0; }
  // first: the group whose entry, which begins at `begins_at`, holds x_begin.
  PKV_HD void start(const Axis& entries, int first, int begins_at, int x_begin, int end) {
    axis = &entries, group = first, x_end = end, entry = axis->group_entry(first);
    const int cost = entry.span_cost(), span = divide(x_begin - begins_at, cost);
    read = divide(span, axis->num_kv_heads), head = span - read * axis->num_kv_heads;
    x0 = begins_at + span * cost;
    tile = entry.tile_at(x_begin, x0);
    if (tile >= entry.costing()) step_span();
  }
  PKV_HD bool some() const { return x0 < x_end; }

  PKV_HD bool next(ReadPiece& s) {
    if (x0 >= x_end) return false;
    int end = entry.tile_at(x_end, x0);
    s.begins = tile == 0, s.ends = end >= entry.tiles, s.slot = x0;
    if (end > entry.tiles) end = entry.tiles;
    const int reads = axis->num_reads(group), first = axis->first_member(group, read, reads);
    s.group = group, s.read = read, s.members = axis->first_member(group, read + 1, reads) - first;
    s.rows = axis->readers.rows + axis->readers.begin[group] + first;
    s.row = s.rows[0], s.kv_head = head;
    s.tile_begin = tile, s.tile_end = end, s.seq_len = entry.tiles * PKV_TILE;
    step_span();
    return true;
  }

 private:
  PKV_HD void step_span() {
    x0 += entry.span_cost();
    tile = 0;
    if (++head < axis->num_kv_heads || x0 >= x_end) return;
    head = 0;
    if (++read < axis->num_reads(group)) return;
    read = 0;
    do entry = axis->group_entry(++group); while (entry.spans == 0);
  }
};

// Walks a range's part of what rows read for themselves.
struct RowWalk {
  using Piece = RowPiece;
  const Axis* axis;
  int row, head, tile, x0, x_end;  // of the next piece; tile: from the first one that the row reads for itself
  int seq_len, skipped;            // of the row; skipped: tiles that its read holds
  bool member;

  PKV_HD void start_empty(const Axis& entries) { axis = &entries, x0 = x_end = tile = 0; }
  // first: the row whose entry, which begins at `begins_at`, holds x_begin.
  PKV_HD void start(const Axis& entries, int first, int begins_at, int x_begin, int end) {
    axis = &entries, x_end = end;
    enter(first);
    head = divide(x_begin - begins_at, span_cost());
    x0 = begins_at + head * span_cost();
    tile = tile_at(x_begin, x0, segment_cost());
    if (tile >= costing()) step_span();
  }
  PKV_HD bool some() const { return x0 < x_end; }

  PKV_HD bool next(RowPiece& s) {
    if (x0 >= x_end) return false;
    int end = tile_at(x_end, x0, segment_cost());
    s.begins = tile == 0, s.ends = end >= costing(), s.slot = x0, s.member = member;
    if (end > own_tiles()) end = own_tiles();
    s.row = row, s.kv_head = head, s.seq_len = seq_len;
    s.tile_begin = skipped + tile, s.tile_end = skipped + end;
    step_span();
    return true;
  }

 private:
  PKV_HD int own_tiles() const { return tiles_of(seq_len) - skipped; }
  PKV_HD int costing() const { return own_tiles() > 1 ? own_tiles() : 1; }
  PKV_HD int segment_cost() const { return axis->own_segment(costing(), member); }
  PKV_HD int span_cost() const { return segment_cost() + costing(); }
  PKV_HD void enter(int next) {
    const int group = axis->readers.group[next];
    row = next, seq_len = axis->readers.length[next], member = group >= 0;
    skipped = member ? axis->readers.tiles(group) : 0;
  }
  PKV_HD void step_span() {
    x0 += span_cost();
    tile = 0;
    if (++head < axis->num_kv_heads || x0 >= x_end) return;
    head = 0;
    do enter(row + 1); while (seq_len == 0);
  }
};

}  // namespace pkv
