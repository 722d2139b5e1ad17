"""Which of the rows that decode have leading blocks in common, and what reading these once has given. Compiled.

The prefix cache keeps one copy of a block, so rows with equal leading blocks have equal page ids. Groups are those of
pkvsim.schedule.prefixes over whole blocks, found again when other rows decode, as an engine plans such a step anew.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pkvsim.compiled import compiled, inner
from pkvsim.memory.prefix_cache import PromptBlocks
from pkvsim.schedule.prefix_trees import group_sorted

ROW_BITS = 17  # of a key that sorts rows, of which there are at most 2^16
# Of Grouping.counts: what was found, the number of times that rows were compared, and the most blocks that the rows
# since then can have in common with others.
NUM_ROWS, NUM_GROUPS, TIMES, MOST_COMMON = range(4)
SHARED_STEPS, READ_BYTES, APART_BYTES, SAVED_US = range(4)  # of Grouping.totals


class Grouping(NamedTuple):
    """The groups of the rows that decode, and what sharing has given so far."""

    counts: np.ndarray  # [4] int64
    seen: np.ndarray  # [n] int64, of each request the TIMES at which it was counted in MOST_COMMON
    requests: np.ndarray  # [max_batch] int64, the rows that were grouped
    order: np.ndarray  # [max_batch] int64, scratch: rows by their blocks
    common: np.ndarray  # [max_batch] int64, scratch: blocks that neighbours of that order have in common
    sorted_groups: np.ndarray  # [max_batch] int64, scratch
    group_of_row: np.ndarray  # [max_batch] int64, of each row the group or -1
    prefix_tokens: np.ndarray  # [max_batch] int64, of each group
    members: np.ndarray  # [max_batch] int64, of each group
    totals: np.ndarray  # [4] float64, sums over steps: steps, bytes by reads, bytes of the same apart, us saved


def new_grouping(most_rows: int, num_requests: int) -> Grouping:
    """Nothing was grouped."""
    requests, order, common, sorted_groups, group_of_row, prefix_tokens, members = np.zeros((7, most_rows), np.int64)
    return Grouping(
        np.array([-1, 0, 0, 2**40]), np.full(num_requests, -1), requests, order, common, sorted_groups, group_of_row,
        prefix_tokens, members, np.zeros(4),
    )  # fmt: skip


def block_places(blocks: PromptBlocks, prompt_tokens: np.ndarray, block_tokens: int) -> np.ndarray:
    """Of each prompt its place among all when they are sorted by their whole blocks, where these begin and end in
    blocks.ids, and the first of them (-1 for none, which no other equals), int64 [n, 4].

    Only blocks of block_tokens tokens are read together: what a prompt's last block holds may end within a page.
    """
    begins = blocks.offsets[:-1]
    ends = np.minimum(begins + prompt_tokens // block_tokens, blocks.offsets[1:])
    written = blocks.ids.astype(">u4").tobytes()  # one string, since an array for each prompt takes as long as a run
    names = [written[4 * begin : 4 * end] for begin, end in zip(begins.tolist(), ends.tolist())]
    ranks = np.empty(len(names), np.int64)
    ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    first = np.full(len(names), -1, np.int64)
    first[ends > begins] = blocks.ids[begins[ends > begins]]
    return np.stack((ranks, begins, ends, first), axis=1)


@inner
def are_grouped(decoding: np.ndarray, num_rows: int, requests: np.ndarray) -> bool:
    """Whether the groups are those of these rows, decoding [rows] int64. num_rows, requests: Grouping's own; asked in
    every step, so it takes the array that it reads."""
    if num_rows != len(decoding):
        return False
    for row in range(num_rows):
        if requests[row] != decoding[row]:
            return False
    return True


@compiled
def group_rows(
    decoding: np.ndarray,  # [rows] int64, requests
    places: np.ndarray,  # [n, 4] int64, as block_places gives them: half a line of the CPU's cache for each row
    ids: np.ndarray,  # of pkvsim.memory.prefix_cache.PromptBlocks
    block_tokens: int,
    tokens_per_member: int,  # of SharingRule
    least_tokens: int,
    grouping: Grouping,
) -> None:
    """Groups the rows that decode.

    What groups save is at most the sum of what neighbours in the sorted order have in common. A row that comes adds at
    most its own blocks to that sum, and one that leaves nothing, so rows that cannot save enough are not compared.
    """
    rows, counts, requests = len(decoding), grouping.counts, grouping.requests
    counts[NUM_ROWS] = rows
    for row in range(rows):
        request = decoding[row]
        requests[row] = request
        if grouping.seen[request] != counts[TIMES]:
            grouping.seen[request] = counts[TIMES]
            counts[MOST_COMMON] += places[request, 2] - places[request, 1]
    if counts[MOST_COMMON] * block_tokens <= least_tokens:
        counts[NUM_GROUPS] = 0
        grouping.group_of_row[:rows] = -1
        return
    counts[TIMES] += 1
    counts[MOST_COMMON] = 0
    for row in range(rows):
        grouping.seen[decoding[row]] = counts[TIMES]
    order = grouping.order[:rows]
    for row in range(rows):
        order[row] = places[decoding[row], 0] << ROW_BITS | row
    gap = rows // 2
    while gap > 0:  # Shell's sort, for the reason that pkvsim.serving.attention gives
        for at in range(gap, rows):
            key = order[at]
            while at >= gap and order[at - gap] > key:
                order[at] = order[at - gap]
                at -= gap
            order[at] = key
        gap //= 2
    for row in range(rows):
        order[row] &= (1 << ROW_BITS) - 1
    for at in range(rows - 1):
        one, other = requests[order[at]], requests[order[at + 1]]
        grouping.common[at] = 0
        if places[one, 3] != places[other, 3] or places[one, 3] < 0:
            continue
        a, b, depth = places[one, 1], places[other, 1], 1
        most = min(places[one, 2] - a, places[other, 2] - b)
        while depth < most and ids[a + depth] == ids[b + depth]:
            depth += 1
        grouping.common[at] = depth
        counts[MOST_COMMON] += depth
    if counts[MOST_COMMON] * block_tokens <= least_tokens:
        counts[NUM_GROUPS] = 0
        grouping.group_of_row[:rows] = -1
        return
    counts[NUM_GROUPS] = group_sorted(
        grouping.common[: max(0, rows - 1)], block_tokens, tokens_per_member, least_tokens,
        grouping.sorted_groups[:rows], grouping.prefix_tokens,
    )  # fmt: skip
    for group in range(counts[NUM_GROUPS]):
        grouping.prefix_tokens[group] *= block_tokens
        grouping.members[group] = 0
    for at in range(rows):
        group = grouping.sorted_groups[at]
        grouping.group_of_row[order[at]] = group
        if group >= 0:
            grouping.members[group] += 1


def sharing_summary(groupings: Sequence[Grouping], attention_us: float, decode_steps: int) -> dict[str, Any]:
    """What shared reads gave to a run, of several servers together. attention_us: of all its decode attention."""
    steps, read_bytes, apart_bytes, saved_us = np.sum([grouping.totals for grouping in groupings], axis=0).tolist()
    return {
        "steps": int(steps),
        "step_share": steps / decode_steps if decode_steps else None,
        "read_bytes": read_bytes,
        "apart_bytes": apart_bytes,
        "attention_us_apart": attention_us + saved_us,
        "saved_share": saved_us / (attention_us + saved_us) if attention_us else None,
    }
