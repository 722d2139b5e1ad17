// Lists a step with shared reads by the device's own arithmetic, one range after the other: what warp_spans.cuh finds
// with scans over a warp, found here with plain loops.
#include <climits>
#include <cmath>
#include <vector>

#include "spans.cuh"

struct Listed {
  int group, read, members, row, kv_head, split, tile_begin, tile_end;
};

// numbers: batch_size, num_groups, num_kv_heads, row_columns, query_tokens, page_size, num_ctas, then segment, minimum,
// part, pair, then the fields of SharedCosts. parts [batch_size][num_kv_heads][3]: SharedParts of members. Returns the
// number of ranges; cta_offsets[ranges] tasks were found, of which at most max_tasks are written.
extern "C" int list_spans(const int* seq_lens, const int* group_of_row, const int* prefix_pages, const int* numbers,
                          Listed* tasks, int max_tasks, int* cta_offsets, int* parts) {
  const int batch_size = numbers[0], num_groups = numbers[1], num_kv_heads = numbers[2];
  std::vector<int> memory(pkv::Readers::words(batch_size, num_groups) + 1);
  pkv::Axis axis{{seq_lens, batch_size, INT_MAX, INT_MAX},
                 {group_of_row, prefix_pages, num_groups, numbers[5], numbers[4]},
                 pkv::Readers(memory.data(), batch_size, num_groups),
                 {numbers[11], numbers[12], numbers[13], numbers[14], numbers[15]},
                 {numbers[7], numbers[8], numbers[9], numbers[10]}, num_kv_heads, numbers[3]};
  pkv::Readers& readers = axis.readers;
  for (int group = 0; group < num_groups; ++group) axis.note_group(group, axis.groups.tokens(prefix_pages[group], INT_MAX));
  for (int row = 0; row < batch_size; ++row) {
    axis.note_row(row, axis.lens[row], axis.fitting(axis.lens[row], axis.groups.asked(group_of_row[row])));
    if (readers.group[row] >= 0) readers.place[row] = readers.count[readers.group[row]]++;
  }
  int listed = 0;
  for (int group = 0; group < num_groups; ++group) {
    if (readers.count[group] < 2) readers.count[group] = 0;
    readers.begin[group] = listed;
    for (int row = 0; row < batch_size; ++row)
      if (readers.group[row] == group) {
        if (readers.count[group] == 0) readers.group[row] = -1;
        else readers.rows[listed++] = row;
      }
  }
  int total = 0, reads_total = 0, num_spans = 0, most = 0, least = INT_MAX;
  for (int index = 0; index < axis.num_entries(); ++index) {
    if (index == num_groups) axis.least_own = axis.shared.least_own(reads_total, listed * num_kv_heads);
    const pkv::Entry entry = axis.entry(index);
    if (index < num_groups) readers.at[index] = total, reads_total += entry.cost();
    total += entry.cost(), num_spans += entry.spans;
    if (entry.cost() > most) most = entry.cost();
    if (entry.cost() > 0 && entry.cost() < least) least = entry.cost();
  }
  const pkv::Cut cut = axis.cut(total, num_spans, listed > 0, most == least, numbers[6]);
  int count = 0;
  for (int range = 0; range < cut.num_ranges; ++range) {
    cta_offsets[range] = count;
    if (total == 0) continue;
    // Reads are laid before rows, and a range holds some of either.
    const int x_begin = cut.begin(range), x_end = cut.begin(range + 1);
    const auto list = [&](const pkv::Segment& s, int group, int read, int members) {
      if (count < max_tasks)
        tasks[count] = {group, read, members, s.row, s.kv_head, range - cut.range_of(s.slot), s.tile_begin, s.tile_end};
      ++count;
    };
    const auto entry_at = [&](int first, int x, int& begin) {
      for (begin = first ? reads_total : 0; begin + axis.entry(first).cost() <= x;) begin += axis.entry(first++).cost();
      return first;
    };
    int begin;
    if (x_begin < reads_total) {
      pkv::ReadWalk reads;
      const int group = entry_at(0, x_begin, begin);
      reads.start(axis, group, begin, x_begin, x_end < reads_total ? x_end : reads_total);
      for (pkv::ReadPiece s; reads.next(s);) list(s, s.group, s.read, s.members);
    }
    if (x_end > reads_total) {
      pkv::RowWalk rows;
      const int from = x_begin > reads_total ? x_begin : reads_total;
      const int row = entry_at(num_groups, from, begin) - num_groups;
      rows.start(axis, row, begin, from, x_end);
      for (pkv::RowPiece s; rows.next(s);) list(s, -1, -1, 1);
    }
  }
  cta_offsets[cut.num_ranges] = count;
  for (int row = 0; row < batch_size; ++row)
    for (int head = 0; head < num_kv_heads && readers.group[row] >= 0; ++head) {
      const pkv::SharedParts found = axis.parts_of(row, head, cut);
      int* to = parts + (row * num_kv_heads + head) * 3;
      to[0] = found.first, to[1] = found.last, to[2] = found.column;
    }
  return cut.num_ranges;
}
