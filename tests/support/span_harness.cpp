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
  for (int group = 0; group < num_groups; ++group) axis.note_group(group);
  for (int row = 0; row < batch_size; ++row) {
    axis.note_row(row, axis.lens[row]);
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
  int total = 0, num_spans = 0, most = 0, least = INT_MAX;
  for (int index = 0; index < axis.num_entries(); ++index) {
    const pkv::Entry entry = axis.entry(index);
    if (index < num_groups) readers.at[index] = total;
    total += entry.cost(), num_spans += entry.spans;
    if (entry.cost() > most) most = entry.cost();
    if (entry.cost() > 0 && entry.cost() < least) least = entry.cost();
  }
  const pkv::Cut cut = axis.cut(total, num_spans, listed > 0, most == least, numbers[6]);
  int count = 0;
  for (int range = 0; range < cut.num_ranges; ++range) {
    cta_offsets[range] = count;
    if (total == 0) continue;
    int index = 0, begin = 0;
    while (begin + axis.entry(index).cost() <= cut.begin(range)) begin += axis.entry(index++).cost();
    pkv::SpanWalk walk{axis, {}, 0, 0, 0, 0, 0};
    walk.start(axis, index, begin, cut.begin(range), cut.begin(range + 1));
    for (pkv::SpanSegment s; walk.next(s); ++count)
      if (count < max_tasks)
        tasks[count] = {s.group, s.read, s.members, s.row, s.kv_head, range - cut.range_of(s.slot), s.tile_begin,
                        s.tile_end};
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
