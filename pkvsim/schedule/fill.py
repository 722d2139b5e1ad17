"""The compiled loops of the schedules: they fill task lists, and check nothing.

Kept apart and few because each costs compile time on a machine's first run (later runs load the
cache). Tasks are int32 [num_tasks, 5] here: row, kv_head, split, tile_begin, tile_end (exclusive).
"""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import outer


@outer
def fill_queue(tiles: np.ndarray, splits: np.ndarray, num_kv_heads: int, tasks: np.ndarray) -> None:
    """Writes the queue of non-empty tasks: rows, then KV heads, then splits.

    tiles, splits [batch_size] int64 with splits <= tiles; tasks [sum(splits) * num_kv_heads, 5] int32.
    """
    task = 0
    for row in range(len(tiles)):
        count = splits[row]
        whole = tiles[row] // max(1, count)
        rest = tiles[row] - whole * count
        for kv_head in range(num_kv_heads):
            begin = 0
            carry = 0  # tiles * split % count, so that split s ends at tiles * (s + 1) // count without dividing
            for split in range(count):
                end = begin + whole
                carry += rest
                if carry >= count:
                    carry -= count
                    end += 1
                tasks[task, 0] = row
                tasks[task, 1] = kv_head
                tasks[task, 2] = split
                tasks[task, 3] = begin
                tasks[task, 4] = end
                begin = end
                task += 1


@outer
def _cut(i: int, total_cost: int, num_ranges: int, parts: int, segment_cost: int, head_tiles: int) -> int:
    """Where range i begins on the cost axis."""
    if parts == 0:
        return i * total_cost // num_ranges
    tile = i % parts * head_tiles // parts
    return i // parts * (head_tiles + segment_cost) + (segment_cost + tile if tile > 0 else 0)


@outer
def fill_balanced(
    tiles: np.ndarray,  # [batch_size] int64
    num_kv_heads: int,
    segment_cost: int,
    total_cost: int,
    num_ranges: int,
    parts: int,  # of every head, all of the same tiles; 0: cuts as below
    tasks: np.ndarray,  # [>= batch_size * num_kv_heads + num_ranges, 5] int32
    cta_offsets: np.ndarray,  # [num_ranges + 1] int32
    row_splits: np.ndarray,  # [batch_size] int64, out: most pieces of any head of the row
) -> tuple[int, int]:
    """Cuts all tiles, laid end to end, at i * total_cost // num_ranges, or every head into `parts` of equal tiles;
    returns (tasks, partial tasks).

    A head's tile 0 sits at the head's first cost, tile t >= 1 at segment_cost + t past it; a range
    holds the tiles whose position lies between its cuts.
    """
    num_tasks = 0
    num_partial_tasks = 0
    current = 0  # range being filled
    head_tiles = tiles.max() if parts > 0 else 0
    next_cut = _cut(1, total_cost, num_ranges, parts, segment_cost, head_tiles)
    head_cost = 0  # position of the head's tile 0
    for row in range(len(tiles)):
        row_splits[row] = 0
        if tiles[row] == 0:
            continue
        for kv_head in range(num_kv_heads):
            begin = 0
            split = 0
            while begin < tiles[row]:
                position = head_cost if begin == 0 else head_cost + segment_cost + begin
                while next_cut <= position:
                    current += 1
                    cta_offsets[current] = num_tasks
                    next_cut = _cut(current + 1, total_cost, num_ranges, parts, segment_cost, head_tiles)
                end = min(tiles[row], max(1, next_cut - head_cost - segment_cost))
                tasks[num_tasks, 0] = row
                tasks[num_tasks, 1] = kv_head
                tasks[num_tasks, 2] = split
                tasks[num_tasks, 3] = begin
                tasks[num_tasks, 4] = end
                num_tasks += 1
                split += 1
                begin = end
            row_splits[row] = max(row_splits[row], split)
            if split > 1:
                num_partial_tasks += split
            head_cost += tiles[row] + segment_cost
    cta_offsets[num_ranges] = num_tasks
    return num_tasks, num_partial_tasks


@outer
def fill_spans(
    tiles: np.ndarray,  # [num_entries] int64 of each of the entry's spans
    spans: np.ndarray,  # [num_entries] int64, 0 where an entry is not there
    segment_cost: np.ndarray,  # [num_entries] int64 tiles
    tile_eighths: np.ndarray,  # [num_entries] int64, at least 1
    total_cost: int,
    num_ranges: int,
    tasks: np.ndarray,  # [>= sum(spans) + num_ranges, 5] int32: entry, span of it, part, tile_begin, tile_end
    cta_offsets: np.ndarray,  # [num_ranges + 1] int32
    most_parts: np.ndarray,  # [num_entries] int64, out: of any span of the entry
) -> int:
    """Cuts all spans, laid end to end, at i * total_cost // num_ranges; returns the number of tasks.

    A span's tile 0 sits at its first cost, tile t >= 1 at segment_cost + t * tile_eighths // 8 past it. A span of no
    tiles costs as much as one of a single tile and becomes a task of none.
    """
    num_tasks = 0
    current = 0  # range being filled
    next_cut = total_cost // num_ranges
    begins_at = 0  # position of the span's tile 0
    for entry in range(len(tiles)):
        most_parts[entry] = 0
        costing = max(1, tiles[entry])
        segment, eighths = segment_cost[entry], tile_eighths[entry]
        for span in range(spans[entry]):
            begin = 0
            part = 0
            while begin < costing:
                position = begins_at if begin == 0 else begins_at + segment + begin * eighths // 8
                while next_cut <= position:
                    current += 1
                    cta_offsets[current] = num_tasks
                    next_cut = (current + 1) * total_cost // num_ranges
                end = min(costing, max(1, -(-8 * (next_cut - begins_at - segment) // eighths)))
                tasks[num_tasks, 0] = entry
                tasks[num_tasks, 1] = span
                tasks[num_tasks, 2] = part
                tasks[num_tasks, 3] = begin
                tasks[num_tasks, 4] = min(end, tiles[entry])
                num_tasks += 1
                part += 1
                begin = end
            most_parts[entry] = max(most_parts[entry], part)
            begins_at += segment - (-costing * eighths // 8)
    cta_offsets[num_ranges] = num_tasks
    return num_tasks
