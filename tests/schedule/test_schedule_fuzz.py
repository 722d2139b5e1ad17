"""A million random steps, planned as a queue and as balanced ranges: every tile once, and ranges of equal cost."""
from __future__ import annotations

import numba
import numpy as np
import pytest

from pkvsim.schedule.fill import fill_balanced, fill_queue


@numba.njit
def _covers(tasks, tiles, row_splits, num_kv_heads):
    """Whether tasks, in row, head, split order, tile every head without gap, overlap or empty piece."""
    at = 0
    for row in range(len(tiles)):
        for kv_head in range(num_kv_heads):
            begin, split = 0, 0
            while begin < tiles[row]:
                if at >= len(tasks):
                    return False
                task = tasks[at]
                if task[0] != row or task[1] != kv_head or task[2] != split or task[3] != begin:
                    return False
                if task[4] <= begin or task[4] > tiles[row]:
                    return False
                begin, split, at = task[4], split + 1, at + 1
            if split > row_splits[row]:
                return False
    return at == len(tasks)


@numba.njit
def _fuzz(seed, count):
    """Plans `count` random steps both ways; returns the first bad step, or -1."""
    np.random.seed(seed)
    for step in range(count):
        batch, heads = np.random.randint(0, 7), np.random.randint(1, 5)
        top = 1 << np.random.randint(0, 9)
        tiles, splits, used = np.zeros(batch, np.int64), np.zeros(batch, np.int64), 0
        for row in range(batch):
            tiles[row] = np.random.randint(0, top + 1)
            splits[row] = min(tiles[row], np.random.randint(1, 9))
            used += tiles[row] > 0
        queue = np.full((splits.sum() * heads, 5), -1, np.int32)
        fill_queue(tiles, splits, heads, queue)
        if not _covers(queue, tiles, splits, heads):
            return step
        cost = np.random.randint(0, 4)
        total = heads * (tiles.sum() + used * cost)
        ranges = max(1, min(total // (1 + cost), np.random.randint(1, 40)))
        tasks = np.full((used * heads + ranges, 5), -1, np.int32)
        offsets, pieces = np.zeros(ranges + 1, np.int32), np.zeros(batch, np.int64)
        parts = 0
        if used > 0 and step % 4 == 0:  # equal rows, cut into equal parts
            tiles[:] = np.where(tiles > 0, top, 0)
            total = heads * used * (top + cost)
            parts = np.random.randint(1, min(top, 8) + 1)
            ranges = heads * used * parts
            tasks, offsets = np.full((ranges, 5), -1, np.int32), np.zeros(ranges + 1, np.int32)
        made, _ = fill_balanced(tiles, heads, cost, total, ranges, parts, tasks, offsets, pieces)
        if not _covers(tasks[:made], tiles, pieces, heads) or offsets[ranges] != made:
            return step
        for i in range(ranges):
            if total > 0 and offsets[i + 1] <= offsets[i]:
                return step
            weight = 0
            for task in tasks[offsets[i] : offsets[i + 1]]:
                weight += task[4] - task[3] + (cost if task[3] == 0 else 0)
            if abs(weight * ranges - total) > (1 + cost) * ranges:
                return step
    return -1


@pytest.mark.slow
def test_a_million_random_steps():
    assert _fuzz(20260623, 1_000_000) == -1
