"""Spans: what is read once, for whom. The specification of schedules whose rows share reads.

A **span** is a run of tiles of one KV head that is read once, with the rows whose queries it is read for, its members.
A plain step has one span per (row, KV head). Where rows have leading pages in common there is one span per (read, KV
head) over these, and one per (row, KV head) over what is left of the row. The device planner (cuda_src/spans.cuh)
equals what follows task for task; everything is integers, within 31 bits on the device as in plan.cuh.

**Who reads together.** Given group_of_row [batch_size], prefix_pages [num_groups] (PrefixGroups), page_size,
query_tokens n and tiles of T tokens: group g's prefix is P = prefix_pages[g] * page_size tokens, of which s = P // T
tiles are shared. Row r is a member of its group if s >= 1 and P <= seq_len - (n - 1), so that every query token sees
every shared token; a group with fewer than two members has none. This is decided row by row, from the lengths as they
are: a plan made of stale lengths or groups is wrong but harmless, and a row that is too short merely reads alone.

**Reads.** A row has c = group_size * n columns and a read at most SharedCosts.columns, so at most M = columns // c
members. The m members of a group, rows ascending, become k = ceil(m / M) reads; read j has members
[m * j // k, m * (j + 1) // k). All reads of a group cost as the largest does, q = ceil(m / k) * c columns.

**Entries.** The axis is made of entries, each some spans of the same tiles and cost, end to end:
  - group g, g = 0, 1, ..: k * num_kv_heads spans; span i is KV head i % num_kv_heads of read i // num_kv_heads. n = s
    tiles, segment cost C = SharedCosts.segment_tiles(q), tile cost E = SharedCosts.tile_eighths(q) in eighths.
  - row r, r = 0, 1, ..: num_kv_heads spans. A member's: n = tiles [s, tiles(seq_len)), which may be none, C = segment +
    max(0, F - max(1, n)), E = 8. Others': all tiles, C = segment, E = 8; a row of length 0 has no spans.
F = SharedCosts.least_own(R, O), of the total cost R of the groups' entries and the number O of members' spans.
With n' = max(1, n), a span that starts at x0 reaches to x0 + C + ceil(n' * E / 8). Its tile 0 sits at x0, tile t >= 1
at x0 + C + t * E // 8, before the span's end. Plain entries (E = 8) are those of plan.cuh. Selected pages make one
entry of one span per (row, KV head), several GPUs entries of the tiles that lie on this one; nothing below changes.

**Ranges.** Total cost W, H spans. N = min(W // L, num_ctas) ranges, at least 1, no more than costs.part allows for H
heads of W // H (balanced_ranges), where L = max(minimum, the longest gap between two neighbouring tile positions that
SharedCosts.longest_gap(M * c, F) allows): so no range is empty. Range i holds the tiles whose position lies in
[i * W // N, (i + 1) * W // N). The part of a span in range i is number i - (the range of the span's tile 0). Steps
without members are plain steps, rules for equal rows and pairs of SMs included; those rules do not apply beside reads.

**States.** A state belongs to (span, member, part) and is that of the member's c columns. The output of (row, KV head)
is the merge of its read's parts in their order, then of its own span's parts in theirs, sinks counted once, here. All
reads lie before all rows, so every part lies in a range at or before the one that holds the last tile of the row's own
span (or the place of its empty span): this range merges, and waits only for ranges of lower index.

**Slots.** A range holds at most one piece that does not end its span, its last. Pieces that end theirs are many, but
each (row, KV head) has one such piece of its read and one of its own. So there are three kinds of slots, every word
empty between launches, each (member, column) of each read by exactly one CTA, which empties it again:
  cut    [num_ctas] x `columns` columns: of the piece that is cut at the range's end; column (place of the member in its
         read) * c + column of the row. A plain row's cut piece uses the first c.
  shared [batch_size][num_kv_heads] x c: of the piece that ends the read of the row
  own    [batch_size][num_kv_heads] x c: of the piece that ends the own span of a member
When row r's own span ends in a range, its CTA parks that state in `own` and goes on; a read's last parts may take as
long as the whole step. After its last segment the CTA walks its range once more. For each member's span that ends
there, with the read's span in ranges [a, b] and its own in [e, i], it merges
  cut[a] .. cut[b - 1], shared[r, head], cut[e] .. cut[i - 1], own[r, head]
in this order, polling each word as finish() in balanced.cu does. (`own` is written and read by one CTA, whose warps
may differ, so it is polled as well.) At most one other row may end in a range without having begun there; its state is
kept in shared memory and merged as in a plain step.

**Queues.** workqueue lays a task list the same way: reads before rows. A row asked for S splits reads u = ceil(tiles /
S) tiles a task; what it has for itself takes ceil(own tiles / u) tasks, and a read ceil(s / u) of its members' least u.
A member's slots are those of its read's parts, then its own, so the merge kernel is the plain one. split launches rows
by length, which members of one read need not share: it refuses groups.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.schedule.balanced import balanced_ranges
from pkvsim.schedule.costs import EIGHTHS, BalancedCosts, SharedCosts
from pkvsim.schedule.fill import fill_queue, fill_spans
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.task_list import READ_DTYPE, TASK_DTYPE, Schedule, SharedReads, offsets_of, parts_of_rows
from pkvsim.shapes import DecodeShape


@dataclass(frozen=True, slots=True, eq=False)
class Reads:
    """Who reads together in a step, before anything is cut."""

    reads: np.ndarray  # [num_reads] READ_DTYPE, parts still 0
    members: np.ndarray  # [num_members] int32 rows, read by read
    read_of_row: np.ndarray  # [batch_size] int32 or -1
    own_tiles: np.ndarray  # [batch_size] int64 that each row reads for itself
    row_columns: int  # of a row: query heads of a KV head times query tokens
    most_columns: int  # of any read there may be

    def reads_of_groups(self, num_groups: int) -> np.ndarray:
        """Reads of each group, int64 [num_groups]."""
        return np.bincount(self.reads["group"], minlength=num_groups)

    def shared_tiles(self) -> np.ndarray:
        """Tiles at each row's start that its read holds, int64 [batch_size]."""
        return np.append(self.reads["tiles"], 0)[self.read_of_row].astype(np.int64)


def find_reads(
    groups: PrefixGroups, shape: DecodeShape, lens: np.ndarray, tile_tokens: int, query_tokens: int, columns: int
) -> Reads:
    """The reads of a step with lengths `lens` [batch_size].

    Raises ValueError naming the argument where a read cannot serve two rows.
    """
    row_columns = shape.group_size * query_tokens
    most_members = columns // row_columns
    if most_members < 2:
        raise ValueError(f"shared_costs.columns: expected two rows' {2 * row_columns} or more, got {columns}")
    group = groups.members(lens, page_size=shape.page_size, tile_tokens=tile_tokens, query_tokens=query_tokens)
    tiles = -(-lens.astype(np.int64) // tile_tokens)
    shared = groups.prefix_pages.astype(np.int64) * shape.page_size // tile_tokens  # [num_groups]
    members = np.argsort(group, kind="stable")[np.count_nonzero(group < 0) :].astype(np.int32)
    counts = np.bincount(group[group >= 0], minlength=len(shared))
    read_of_row = np.full(len(lens), -1, np.int32)
    rows: list[tuple[int, ...]] = []
    begin = 0
    for index in np.flatnonzero(counts).tolist():
        count = int(counts[index])
        parts = -(-count // most_members)
        for part in range(parts):
            first, end = begin + count * part // parts, begin + count * (part + 1) // parts
            read_of_row[members[first:end]] = len(rows)
            rows.append((index, shared[index], first, end, 0))
        begin += count
    own = tiles - np.where(group >= 0, np.append(shared, 0)[group], 0)
    return Reads(
        np.array(rows, READ_DTYPE), members, read_of_row, own, row_columns, most_members * row_columns
    )


def balanced_spans(
    shape: DecodeShape, found: Reads, num_groups: int, tile_tokens: int, num_ctas: int,
    costs: BalancedCosts, shared_costs: SharedCosts,
) -> Schedule:  # fmt: skip
    """The balanced schedule of a step with reads."""
    heads, batch_size = shape.num_kv_heads, len(found.own_tiles)
    reads_of = found.reads_of_groups(num_groups)
    largest = np.zeros(num_groups, np.int64)  # members of each group's largest read
    np.maximum.at(largest, found.reads["group"], found.reads["member_end"] - found.reads["member_begin"])
    group_tiles = np.zeros(num_groups, np.int64)
    group_tiles[found.reads["group"]] = found.reads["tiles"]
    columns = (largest * found.row_columns).tolist()
    is_member = found.read_of_row >= 0

    # Entries: the groups, then the rows.
    tiles = np.concatenate((group_tiles, found.own_tiles))
    spans = np.concatenate((reads_of, (found.own_tiles > 0) | is_member)).astype(np.int64) * heads
    segment = np.full(num_groups + batch_size, costs.segment, np.int64)
    segment[:num_groups] = [shared_costs.segment_tiles(count, costs.segment) for count in columns]
    eighths = np.full(num_groups + batch_size, EIGHTHS, np.int64)
    eighths[:num_groups] = [shared_costs.tile_eighths(count) for count in columns]
    span_costs = segment - (-np.maximum(1, tiles) * eighths // EIGHTHS)
    reads_cost = int((spans * span_costs)[:num_groups].sum())
    least_own = shared_costs.least_own(reads_cost, int(np.count_nonzero(is_member)) * heads)
    more = np.maximum(0, least_own - np.maximum(1, found.own_tiles)) * is_member
    segment[num_groups:] += more
    span_costs[num_groups:] += more

    total_cost = int((spans * span_costs).sum())
    num_spans = int(spans.sum())
    least = max(costs.minimum, shared_costs.longest_gap(found.most_columns, costs.segment, least_own))
    num_ranges, _ = balanced_ranges(total_cost, num_spans, num_ctas, costs._replace(minimum=least), even=False)
    filled = np.empty((num_spans + num_ranges, 5), np.int32)
    cta_offsets = np.zeros(num_ranges + 1, np.int32)
    most_parts = np.zeros(len(tiles), np.int64)
    count = fill_spans(tiles, spans, segment, eighths, total_cost, num_ranges, filled, cta_offsets, most_parts)
    filled = filled[:count]

    of_group = filled[:, 0] < num_groups
    first_read = np.concatenate(([0], np.cumsum(reads_of)))  # of each group
    read_of_task = np.where(
        of_group, first_read[np.minimum(filled[:, 0], num_groups)] + filled[:, 1] // heads, -1
    ).astype(np.int32)  # fmt: skip
    reads = found.reads.copy()
    reads["parts"] = most_parts[reads["group"]]
    shared = SharedReads(reads, found.members, found.read_of_row, read_of_task)
    tasks = _tasks(filled, shared, np.where(of_group, 0, filled[:, 0] - num_groups), filled[:, 1] % heads, found)
    partial = _states(tasks, shared, found, heads)
    return Schedule(
        name="balanced",
        tasks=tasks,
        split_offsets=offsets_of(shared.shared_parts() + most_parts[num_groups:]),
        cta_offsets=cta_offsets,
        tile_tokens=tile_tokens,
        num_launches=1,
        merge_launches=0,
        num_partial_slots=-(-partial // heads),
        num_partial_tasks=partial,
        num_ctas=num_ranges,
        grid_ctas=num_ranges,
        shared=shared,
    )


def _tasks(
    filled: np.ndarray, shared: SharedReads, row: np.ndarray, kv_head: np.ndarray, found: Reads
) -> np.ndarray:  # fmt: skip
    """Tasks from what a fill loop wrote: a read's has its first member's row, a member's own begins after the read."""
    tasks = np.empty(len(filled), TASK_DTYPE)
    of_read = shared.read_of_task >= 0
    firsts = shared.members[shared.reads["member_begin"]]
    tasks["row"] = np.where(of_read, firsts[np.where(of_read, shared.read_of_task, 0)], row)
    tasks["kv_head"], tasks["split"] = kv_head, filled[:, 2]
    skipped = np.where(of_read, 0, found.shared_tiles()[tasks["row"]])
    tasks["tile_begin"], tasks["tile_end"] = filled[:, 3] + skipped, filled[:, 4] + skipped
    return tasks


def _states(tasks: np.ndarray, shared: SharedReads, found: Reads, num_kv_heads: int) -> int:
    """States that the balanced tasks leave in slots: one for every member of a read, one for every own task of a
    member, and those of other rows' heads that are cut."""
    of_read = shared.read_of_task >= 0
    alone = ~of_read & (found.read_of_row[tasks["row"]] < 0)
    heads = tasks["row"][alone].astype(np.int64) * num_kv_heads + tasks["kv_head"][alone]
    pieces = np.bincount(heads, minlength=1)
    return int(shared.members_of_tasks()[~alone].sum()) + int(pieces[pieces > 1].sum())


def queue_spans(
    shape: DecodeShape, found: Reads, asked: np.ndarray, tile_tokens: int
) -> Schedule:  # fmt: skip
    """The workqueue schedule of a step with reads. asked [batch_size] int64: splits asked of each row's tiles."""
    heads = shape.num_kv_heads
    whole = found.own_tiles + found.shared_tiles()
    each = -(-np.maximum(1, whole) // asked)  # tiles of a row's task, [batch_size]
    finest = np.full(len(found.reads), np.iinfo(np.int64).max)
    is_member = found.read_of_row >= 0
    np.minimum.at(finest, found.read_of_row[is_member], each[is_member])
    tiles = np.concatenate((found.reads["tiles"].astype(np.int64), found.own_tiles))
    splits = -(-tiles // np.concatenate((finest, each)))
    filled = np.empty((int(splits.sum()) * heads, 5), np.int32)
    fill_queue(tiles, splits, heads, filled)

    num_reads = len(found.reads)
    reads = found.reads.copy()
    reads["parts"] = splits[:num_reads]
    read_of_task = np.where(filled[:, 0] < num_reads, filled[:, 0], -1).astype(np.int32)
    shared = SharedReads(reads, found.members, found.read_of_row, read_of_task)
    tasks = _tasks(filled, shared, np.maximum(0, filled[:, 0] - num_reads), filled[:, 1], found)
    row_slots = parts_of_rows(reads, found.read_of_row) + splits[num_reads:]
    slots = int(row_slots.sum())
    return Schedule(
        name="workqueue",
        tasks=tasks,
        split_offsets=offsets_of(row_slots),
        cta_offsets=np.arange(len(tasks) + 1, dtype=np.int32),
        tile_tokens=tile_tokens,
        num_launches=2,
        merge_launches=1,
        num_partial_slots=slots,
        num_partial_tasks=slots * heads,
        num_ctas=len(tasks),
        grid_ctas=len(tasks),
        shared=shared,
    )
