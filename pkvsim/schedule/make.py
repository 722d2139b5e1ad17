"""Split, workqueue and balanced: the only task decomposition in the project.

The GPU runs these tasks and the simulator prices them. The balanced arithmetic here is the
specification of the device planner, which must equal it task for task.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkvsim.schedule.fill import fill_balanced, fill_queue
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens, describe

SHORT_RANGE_TILES = 640  # PKV_SHORT_RANGE in cuda_src/plan.cuh
MOST_TILES_PER_HEAD = 2**20  # PKV_MOST_TILES in cuda_src/plan.cuh; a longer head is cut as one of that length
# The costs that the engine balances with, in tiles of 16 tokens, from a sweep on an H200 (2026-11-21).
SEGMENT_COST = 7
MIN_COST = 8
PART_COST = 2
PAIR_COST = 80  # on a GPU of compute capability PAIRS_MEASURED, none on others
PAIRS_MEASURED = 9, 0
MAX_ACCUMULATED = 2048  # columns x V's head_dim whose sums a warp's registers hold; more go to several warps
MAX_PART_COST = 2**10  # keeps part_cost * MOST_TILES_PER_HEAD within 31 bits
MAX_PAIR_COST = 2**10  # the same of pair_cost * MAX_CTAS
MAX_CTAS = 2**20  # far above any GPU; keeps i * total_cost within 64 bits
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
    segment_cost: int = 0,
    min_cost: int = 1,
    part_cost: int = 0,
    pair_cost: int = 0,
    window: int | None = None,
) -> Schedule:
    """Plans one step.

    name: "split", "workqueue" or "balanced". seq_lens: integers [batch_size], tokens, 0 allowed.
    splits (split and workqueue): one count or one per row, >= 1, cut down to the row's tiles.
    num_ctas (balanced): most ranges to cut into. segment_cost: fixed cost of a row segment, in tiles.
    min_cost: least cost of a range, in tiles, so that small steps take fewer CTAs. part_cost: what merging
    one more part of a head costs, in tiles; heads are cut into no more parts than pay for that. pair_cost: in tiles;
    rows of one length that cost less for each of num_ctas get half of them (balanced_ranges).
    window: tokens at a row's end that are read (AttentionOptions.reach); tiles before them have no task.
    Raises ValueError naming the argument.
    """
    lens = check_seq_lens(seq_lens)
    tile_tokens = check_int("tile_tokens", tile_tokens, 1, MAX_TOKENS)
    tiles = -(-lens.astype(np.int64) // tile_tokens)  # [batch_size]
    if window is not None:
        window = check_int("window", window, 1)
        skipped = skipped_tiles(lens.astype(np.int64), window, tile_tokens)  # [batch_size]
        schedule = _plan(
            name, shape, lens, tiles - skipped, tile_tokens, splits, num_ctas, segment_cost, min_cost, part_cost,
            pair_cost,
        )
        for field in ("tile_begin", "tile_end"):
            schedule.tasks[field] += skipped[schedule.tasks["row"]].astype(np.int32)
        return schedule
    return _plan(name, shape, lens, tiles, tile_tokens, splits, num_ctas, segment_cost, min_cost, part_cost, pair_cost)


def skipped_tiles(lengths: int | np.ndarray, reach: int, tile_tokens: int) -> int | np.ndarray:
    """Tiles at the start of rows of these lengths (int64, one or [batch_size]) before the last `reach` tokens."""
    return (lengths > reach) * (lengths - reach) // tile_tokens


def _plan(
    name: str, shape: DecodeShape, lens: np.ndarray, tiles: np.ndarray, tile_tokens: int,
    splits: int | Sequence[int] | np.ndarray | None, num_ctas: int | None, segment_cost: int, min_cost: int,
    part_cost: int, pair_cost: int,
) -> Schedule:  # fmt: skip
    """As make_schedule, of rows of so many tiles [batch_size]."""
    if name == "balanced":
        if splits is not None:
            raise ValueError(f"splits: expected None for balanced, which cuts by num_ctas, got {splits!r}")
        num_ctas = check_int("num_ctas", num_ctas, 1, MAX_CTAS)
        segment_cost = check_int("segment_cost", segment_cost, 0, MAX_TOKENS)
        min_cost = check_int("min_cost", min_cost, 1, MAX_TOKENS)
        part_cost = check_int("part_cost", part_cost, 0, MAX_PART_COST)
        pair_cost = check_int("pair_cost", pair_cost, 0, MAX_PAIR_COST)
        return _balanced(shape, tiles, tile_tokens, num_ctas, segment_cost, min_cost, part_cost, pair_cost)
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
    total_cost: int, num_heads: int, num_ctas: int, segment_cost: int, min_cost: int, part_cost: int, pair_cost: int,
    even: bool,
) -> tuple[int, int]:  # fmt: skip
    """Ranges to cut total_cost (tiles) of num_heads non-empty (row, KV head) pairs into, and the parts of each head
    where all are cut into parts of equal tiles, else 0.

    Never so many that one could be empty. A head of n tiles in p parts takes about n / p + part_cost * p, least at
    p = sqrt(n / part_cost): no more are made of the mean head. even: whether all heads have the same tiles. If so,
    short ranges come in multiples of the heads where that idles at most 1/8 of the CTAs, or with the same number of
    heads each where that idles at most 1/32: heads are then cut into equal parts, or not at all.

    Two neighbouring SMs share their way to memory, which one of them fills alone. So a short step whose heads divide
    half the CTAs but for at most 1/6 is cut for those: there are fewer parts to merge. The engine gives the ranges of
    so few to one SM of each pair. More, but not twice as many, would leave some pairs with twice the work of others.
    """
    most, half = num_ctas, num_ctas // 2
    if even and 0 < num_heads <= half and total_cost < pair_cost * num_ctas and half % num_heads * 6 <= half:
        most = half
    ranges = max(1, min(total_cost // max(min_cost, 1 + segment_cost), most))
    if part_cost > 0 and num_heads > 0:
        head_cost = min(total_cost // num_heads, MOST_TILES_PER_HEAD)
        part = max(1, int(math.sqrt(part_cost * head_cost)))  # exact: a float64 holds any 53-bit integer
        ranges = min(ranges, num_heads * max(1, (head_cost + part // 2) // part))
    if num_heads > 0 and even and total_cost // ranges < SHORT_RANGE_TILES:
        if num_heads <= ranges:
            spare = ranges % num_heads
            if spare * 8 <= ranges:
                ranges -= spare
                return ranges, ranges // num_heads
        else:
            heads_each = (num_heads + ranges - 1) // ranges
            needed = (num_heads + heads_each - 1) // heads_each
            if (ranges - needed) * 32 <= ranges:
                ranges = needed
    return ranges, 0


def paired(pair_cost: int, columns: int, v_head_dim: int, kv_element_bytes: float) -> int:
    """pair_cost of a kernel whose CTA serves so many columns (query heads times query tokens): the full one where an SM
    reads twice as fast as it must, half of it where two warps share the columns, 0 for 8-bit pages."""
    if kv_element_bytes < 2:
        return 0
    return pair_cost if columns * v_head_dim <= MAX_ACCUMULATED else pair_cost // 2


def _balanced(
    shape: DecodeShape, tiles: np.ndarray, tile_tokens: int, num_ctas: int, segment_cost: int, min_cost: int,
    part_cost: int, pair_cost: int,
) -> Schedule:  # fmt: skip
    used = int(np.count_nonzero(tiles))
    total_cost = shape.num_kv_heads * (int(tiles.sum()) + used * segment_cost)
    even = used > 0 and bool((tiles[tiles > 0] == tiles.max()).all())
    num_ranges, parts = balanced_ranges(
        total_cost, used * shape.num_kv_heads, num_ctas, segment_cost, min_cost, part_cost, pair_cost, even
    )
    tasks = np.empty((used * shape.num_kv_heads + num_ranges, 5), np.int32)
    cta_offsets = np.zeros(num_ranges + 1, np.int32)
    row_splits = np.zeros(len(tiles), np.int64)
    num_tasks, partial_tasks = fill_balanced(
        tiles, shape.num_kv_heads, segment_cost, total_cost, num_ranges, parts, tasks, cta_offsets, row_splits
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
