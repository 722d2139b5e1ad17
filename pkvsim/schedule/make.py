"""Split, workqueue and balanced: the only task decomposition in the project.

The GPU runs these tasks and the simulator prices them. The balanced arithmetic here is the
specification of the device planner, which must equal it task for task.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkvsim.schedule.costs import BalancedCosts, check_costs
from pkvsim.schedule.fill import fill_balanced, fill_queue
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens, describe

SHORT_RANGE_TILES = 640  # PKV_SHORT_RANGE in cuda_src/plan.cuh
MOST_TILES_PER_HEAD = 2**20  # PKV_MOST_TILES in cuda_src/plan.cuh; a longer head is cut as one of that length
IDLE_OF_PARTS = 8  # PKV_IDLE_OF_PARTS: heads are cut into equal parts where at most 1 of so many CTAs idles,
IDLE_OF_HEADS = 32  # PKV_IDLE_OF_HEADS: and are left whole where at most 1 of so many does
MAX_CTAS = 2**20  # far above any GPU; keeps i * total_cost within 64 bits
FREE = BalancedCosts()
SCHEDULES = ("split", "workqueue", "balanced")
TASK_DTYPE = np.dtype([(name, np.int32) for name in ("row", "kv_head", "split", "tile_begin", "tile_end")])


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A step's task list, and where each partial state goes.

    The partial of a task belongs in slot `split_offsets[row] + split` of its KV head, and partials of
    a (row, KV head) merge in the order of `split`.

    split, workqueue: one task per CTA, row r in `split_offsets[r + 1] - split_offsets[r]` splits on
    every KV head. num_partial_slots is the sum of the rows' splits, single ones included, as the paper
    counts; num_partial_tasks is that times the KV heads.
    balanced: range i is tasks [cta_offsets[i], cta_offsets[i + 1]). Heads held by one range write their
    output directly, so num_partial_tasks counts only the tasks of heads that are cut;
    num_partial_slots is ceil(num_partial_tasks / num_kv_heads), and split_offsets leaves a row room for
    its most cut head.
    """

    name: str
    tasks: np.ndarray  # [num_tasks] TASK_DTYPE, queue order, tile_end exclusive
    split_offsets: np.ndarray  # [batch_size + 1] int32
    cta_offsets: np.ndarray  # [num_ctas + 1] int32
    tile_tokens: int
    num_launches: int
    merge_launches: int
    num_partial_slots: int
    num_partial_tasks: int
    num_ctas: int
    grid_ctas: int  # decode CTAs launched, those with no task included (split's dense grid)


def make_schedule(
    name: str,
    shape: DecodeShape,
    seq_lens: Sequence[int] | np.ndarray,
    *,
    splits: int | Sequence[int] | np.ndarray | None = None,
    tile_tokens: int = 32,
    num_ctas: int | None = None,
    costs: BalancedCosts = FREE,
    window: int | None = None,
) -> Schedule:
    """Plans one step.

    name: "split", "workqueue" or "balanced". seq_lens: integers [batch_size], tokens, 0 allowed.
    splits (split and workqueue): one count or one per row, >= 1, cut down to the row's tiles.
    num_ctas (balanced): most ranges to cut into. costs (balanced): what it weighs, in tiles.
    window: tokens at a row's end that are read (AttentionOptions.reach); tiles before them have no task.
    Raises ValueError naming the argument.
    """
    lens = check_seq_lens(seq_lens)
    tile_tokens = check_int("tile_tokens", tile_tokens, 1, MAX_TOKENS)
    tiles = -(-lens.astype(np.int64) // tile_tokens)  # [batch_size]
    if window is not None:
        window = check_int("window", window, 1)
        skipped = skipped_tiles(lens.astype(np.int64), window, tile_tokens)  # [batch_size]
        schedule = _plan(name, shape, lens, tiles - skipped, tile_tokens, splits, num_ctas, costs)
        for field in ("tile_begin", "tile_end"):
            schedule.tasks[field] += skipped[schedule.tasks["row"]].astype(np.int32)
        return schedule
    return _plan(name, shape, lens, tiles, tile_tokens, splits, num_ctas, costs)


def skipped_tiles(lengths: int | np.ndarray, reach: int, tile_tokens: int) -> int | np.ndarray:
    """Tiles at the start of rows of these lengths (int64, one or [batch_size]) before the last `reach` tokens."""
    return (lengths > reach) * (lengths - reach) // tile_tokens


def _plan(
    name: str, shape: DecodeShape, lens: np.ndarray, tiles: np.ndarray, tile_tokens: int,
    splits: int | Sequence[int] | np.ndarray | None, num_ctas: int | None, costs: BalancedCosts,
) -> Schedule:  # fmt: skip
    """As make_schedule, of rows of so many tiles [batch_size]."""
    if name == "balanced":
        if splits is not None:
            raise ValueError(f"splits: expected None for balanced, which cuts by num_ctas, got {splits!r}")
        num_ctas = check_int("num_ctas", num_ctas, 1, MAX_CTAS)
        return _balanced(shape, tiles, tile_tokens, num_ctas, check_costs(costs))
    if name not in SCHEDULES:
        raise ValueError(f"name: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    if num_ctas is not None:
        raise ValueError(f"num_ctas: expected None for {name}, which runs one CTA per task, got {num_ctas!r}")
    return _queue(name, shape, lens, tiles, _check_splits(splits, len(lens)), tile_tokens)


def _check_splits(splits: int | Sequence[int] | np.ndarray | None, batch_size: int) -> np.ndarray:
    """Splits asked of each row, int64 [batch_size]."""
    if splits is None or np.ndim(splits) == 0:
        value = splits.item() if isinstance(splits, np.ndarray) else splits
        return np.full(batch_size, check_int("splits", value, 1, MAX_TOKENS), np.int64)
    array = np.asarray(splits)
    if array.shape != (batch_size,) or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"splits: expected an integer or integers [{batch_size}], got {describe(array)}")
    if array.size and array.min() < 1:
        raise ValueError(f"splits: expected counts >= 1, got {int(array.min())}")
    return array.astype(np.int64)


def _queue(
    name: str, shape: DecodeShape, lens: np.ndarray, tiles: np.ndarray, asked: np.ndarray, tile_tokens: int
) -> Schedule:
    row_splits = np.minimum(asked, tiles)  # [batch_size]
    slots = int(row_splits.sum())
    num_tasks = slots * shape.num_kv_heads
    if num_tasks > MAX_TOKENS:
        raise ValueError(f"splits: expected at most {MAX_TOKENS} tasks in all, got {num_tasks}")
    tasks = np.empty((num_tasks, 5), np.int32)
    fill_queue(tiles, row_splits, shape.num_kv_heads, tasks)
    grid_ctas, num_launches, merge_launches = num_tasks, 2, 1
    if name == "split":
        used = tiles > 0
        # Rows of one length and split count share launches; both fit 31 bits.
        buckets = np.unique(lens[used].astype(np.int64) << 32 | row_splits[used])
        merge_launches = int(np.count_nonzero((buckets & 0xFFFFFFFF) > 1))
        num_launches = len(buckets) + merge_launches
        grid_ctas = int(asked[used].sum()) * shape.num_kv_heads
    return Schedule(
        name=name,
        tasks=tasks.view(TASK_DTYPE).reshape(-1),
        split_offsets=_offsets(row_splits),
        cta_offsets=np.arange(num_tasks + 1, dtype=np.int32),
        tile_tokens=tile_tokens,
        num_launches=num_launches,
        merge_launches=merge_launches,
        num_partial_slots=slots,
        num_partial_tasks=num_tasks,
        num_ctas=num_tasks,
        grid_ctas=grid_ctas,
    )


def balanced_ranges(
    total_cost: int, num_heads: int, num_ctas: int, costs: BalancedCosts, even: bool
) -> tuple[int, int]:
    """Ranges to cut total_cost (tiles) of num_heads non-empty (row, KV head) pairs into, and the parts of each head
    where all are cut into parts of equal tiles, else 0.

    Never so many that one could be empty. A head of n tiles in p parts takes about n / p + costs.part * p, least at
    p = sqrt(n / costs.part): no more are made of the mean head. even: whether all heads have the same tiles. If so,
    short ranges come in multiples of the heads where that idles at most 1/8 of the CTAs, or with the same number of
    heads each where that idles at most 1/32: heads are then cut into equal parts, or not at all.

    Two neighbouring SMs share their way to memory, which one of them fills alone. So a short step whose heads divide
    half the CTAs but for at most 1/8 is cut for those, and then always into equal parts or whole heads: there are fewer
    parts to merge. The engine gives the ranges of so few to one SM of each pair. More, but not twice as many, would
    leave some pairs with twice the work of others. The bound is the one of equal parts.
    """
    half = num_ctas // 2
    short = even and 0 < num_heads <= half and total_cost < costs.pair * num_ctas
    halved = short and half % num_heads * IDLE_OF_PARTS <= half
    most = half if halved else num_ctas
    ranges = max(1, min(total_cost // max(costs.minimum, 1 + costs.segment), most))
    if costs.part > 0 and num_heads > 0:
        head_cost = min(total_cost // num_heads, MOST_TILES_PER_HEAD)
        part = max(1, int(math.sqrt(costs.part * head_cost)))  # exact: a float64 holds any 53-bit integer
        ranges = min(ranges, num_heads * max(1, (head_cost + part // 2) // part))
    if halved or (num_heads > 0 and even and total_cost // ranges < SHORT_RANGE_TILES):
        if num_heads <= ranges:
            spare = ranges % num_heads
            if halved or spare * IDLE_OF_PARTS <= ranges:
                ranges -= spare
                return ranges, ranges // num_heads
        else:
            heads_each = (num_heads + ranges - 1) // ranges
            needed = (num_heads + heads_each - 1) // heads_each
            if halved or (ranges - needed) * IDLE_OF_HEADS <= ranges:
                ranges = needed
    return ranges, 0


def _balanced(
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
        split_offsets=_offsets(row_splits),
        cta_offsets=cta_offsets,
        tile_tokens=tile_tokens,
        num_launches=1,
        merge_launches=0,
        num_partial_slots=-(-partial_tasks // shape.num_kv_heads),
        num_partial_tasks=partial_tasks,
        num_ctas=num_ranges,
        grid_ctas=num_ranges,
    )


def _offsets(row_splits: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(row_splits) + 1, np.int32)
    np.cumsum(row_splits, out=offsets[1:])
    return offsets
