"""The balanced schedule: all rows' tiles laid end to end and cut into ranges of equal cost.

Its arithmetic is the specification of the device planner (cuda_src/plan.cuh), which must equal it task for task.
"""
from __future__ import annotations

import math

import numpy as np

from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.fill import fill_balanced
from pkvsim.schedule.task_list import TASK_DTYPE, Schedule, offsets_of
from pkvsim.shapes import DecodeShape

SHORT_RANGE_TILES = 640  # PKV_SHORT_RANGE in cuda_src/plan.cuh
MOST_TILES_PER_HEAD = 2**20  # PKV_MOST_TILES in cuda_src/plan.cuh; a longer head is cut as one of that length
IDLE_OF_HALVES = 6  # PKV_IDLE_OF_HALVES: half the CTAs are taken where at most 1 of so many of them idles
IDLE_OF_PARTS = 8  # PKV_IDLE_OF_PARTS: heads are cut into equal parts where at most 1 of so many CTAs idles,
IDLE_OF_HEADS = 32  # PKV_IDLE_OF_HEADS: and are left whole where at most 1 of so many does


def balanced_ranges(
    total_cost: int, num_heads: int, num_ctas: int, costs: BalancedCosts, even: bool
) -> tuple[int, int]:
    """Ranges to cut total_cost (tiles) of num_heads non-empty (row, KV head) pairs into, and the parts of each head
    where all are cut into parts of equal tiles, else 0.

    Never so many that one could be empty. A head of n tiles in p parts takes about n / p + costs.part * p, least at
    p = sqrt(n / costs.part): no more are made of the mean head. even: whether all heads have the same tiles. If so,
    short ranges come in multiples of the heads where that idles at most 1/8 of the CTAs, or with the same number of
    heads each where that idles at most 1/32: heads are then cut into equal parts, or not at all. They always are where
    the cost asks for fewer ranges than there are CTAs, since some idle then whatever the cut.

    Two neighbouring SMs share their way to memory, which one of them fills alone. So a short step whose heads divide
    half the CTAs but for at most 1/6 is cut for those, and then always into equal parts or whole heads: there are fewer
    parts to merge. The engine gives the ranges of so few to one SM of each pair. More, but not twice as many, would
    leave some pairs with twice the work of others. The bound: 7 rows of 8 heads, which leave 10 of 66 CTAs idle, take
    6.4 us so at 512 tokens (9.3 us on all 132 CTAs), 10.4 (12.4) at 1K, 18.7 (18.8) at 2K (one H200, 2026-11-29).
    """
    half = num_ctas // 2
    short = even and 0 < num_heads <= half and total_cost < costs.pair * num_ctas
    halved = short and half % num_heads * IDLE_OF_HALVES <= half
    most = half if halved else num_ctas
    ranges = max(1, min(total_cost // max(costs.minimum, 1 + costs.segment), most))
    if costs.part > 0 and num_heads > 0:
        head_cost = min(total_cost // num_heads, MOST_TILES_PER_HEAD)
        part = max(1, int(math.sqrt(costs.part * head_cost)))  # exact: a float64 holds any 53-bit integer
        ranges = min(ranges, num_heads * max(1, (head_cost + part // 2) // part))
    if halved or (num_heads > 0 and even and total_cost // ranges < SHORT_RANGE_TILES):
        if num_heads <= ranges:
            spare = ranges % num_heads
            if halved or ranges < most or spare * IDLE_OF_PARTS <= ranges:
                ranges -= spare
                return ranges, ranges // num_heads
        else:
            heads_each = (num_heads + ranges - 1) // ranges
            needed = (num_heads + heads_each - 1) // heads_each
            if halved or ranges < most or (ranges - needed) * IDLE_OF_HEADS <= ranges:
                ranges = needed
    return ranges, 0


def balanced_schedule(
    shape: DecodeShape, tiles: np.ndarray, tile_tokens: int, num_ctas: int, costs: BalancedCosts
) -> Schedule:
    used = int(np.count_nonzero(tiles))
    total_cost = shape.num_kv_heads * (int(tiles.sum()) + used * costs.segment)
    even = used > 0 and bool((tiles[tiles > 0] == tiles.max()).all())
    num_ranges, parts = balanced_ranges(total_cost, used * shape.num_kv_heads, num_ctas, costs, even)
    tasks = np.empty((used * shape.num_kv_heads + num_ranges, 5), np.int32)
    cta_offsets = np.zeros(num_ranges + 1, np.int32)
    row_splits = np.zeros(len(tiles), np.int64)
    num_tasks, partial_tasks = fill_balanced(
        tiles, shape.num_kv_heads, costs.segment, total_cost, num_ranges, parts, tasks, cta_offsets, row_splits
    )
    return Schedule(
        name="balanced",
        tasks=tasks[:num_tasks].view(TASK_DTYPE).reshape(-1),
        split_offsets=offsets_of(row_splits),
        cta_offsets=cta_offsets,
        tile_tokens=tile_tokens,
        num_launches=1,
        merge_launches=0,
        num_partial_slots=-(-partial_tasks // shape.num_kv_heads),
        num_partial_tasks=partial_tasks,
        num_ctas=num_ranges,
        grid_ctas=num_ranges,
    )
