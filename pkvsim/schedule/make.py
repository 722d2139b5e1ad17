"""Split, workqueue and balanced: the only task decomposition in the project.

The GPU runs these tasks and the simulator prices them.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pkvsim.schedule.balanced import SHORT_RANGE_TILES, balanced_ranges, balanced_schedule
from pkvsim.schedule.costs import BalancedCosts, SharedCosts, check_costs, check_shared_costs
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.queue import check_splits, queue_schedule
from pkvsim.schedule.spans import balanced_spans, find_reads, queue_spans
from pkvsim.schedule.task_list import TASK_DTYPE, Schedule
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens

__all__ = ["SHORT_RANGE_TILES", "TASK_DTYPE", "Schedule", "balanced_ranges", "make_schedule", "skipped_tiles"]

MAX_CTAS = 2**20  # far above any GPU; keeps i * total_cost within 64 bits
FREE = BalancedCosts()
SHARED = SharedCosts()
SCHEDULES = ("split", "workqueue", "balanced")


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
    groups: PrefixGroups | None = None,
    query_tokens: int = 1,
    shared_costs: SharedCosts = SHARED,
) -> Schedule:
    """Plans one step.

    name: "split", "workqueue" or "balanced". seq_lens: integers [batch_size], tokens, 0 allowed.
    splits (split and workqueue): one count or one per row, >= 1, cut down to the row's tiles.
    num_ctas (balanced): most ranges to cut into. costs (balanced): what it weighs, in tiles.
    window: tokens at a row's end that are read (AttentionOptions.reach); tiles before them have no task.
    groups (workqueue and balanced): rows whose leading pages are read together, as pkvsim.schedule.spans says; a step
    in which no two rows may is planned as one without groups. query_tokens: of each row, beside the shape's query
    heads. shared_costs: what reads for several rows cost, and how many columns they serve.
    Raises ValueError naming the argument.
    """
    if not isinstance(shape, DecodeShape):
        raise ValueError(f"shape: expected a DecodeShape, got {shape!r}")
    if groups is not None and not isinstance(groups, PrefixGroups):
        raise ValueError(f"groups: expected pkvsim.schedule.groups.PrefixGroups or None, got {type(groups).__name__}")
    lens = check_seq_lens(seq_lens)
    tile_tokens = check_int("tile_tokens", tile_tokens, 1, MAX_TOKENS)
    tiles = -(-lens.astype(np.int64) // tile_tokens)  # [batch_size]
    if groups is not None:
        shared_costs = check_shared_costs(shared_costs)
        if window is not None:
            raise ValueError(f"window: expected None with groups, of whose pages it may hide some, got {window!r}")
        if name == "split":
            raise ValueError("groups: expected None for split, whose launches are by length, got PrefixGroups")
        query_tokens = check_int("query_tokens", query_tokens, 1, MAX_TOKENS)
        found = find_reads(groups, shape, lens, tile_tokens, query_tokens, shared_costs.columns)
        if len(found.reads):
            if name == "balanced":
                num_ctas, costs = _check_balanced(splits, num_ctas, costs)
                num_groups = len(groups.prefix_pages)
                return balanced_spans(shape, found, num_groups, tile_tokens, num_ctas, costs, shared_costs)
            return queue_spans(shape, found, _check_queue(name, splits, num_ctas, len(lens)), tile_tokens)
    if window is not None:
        window = min(check_int("window", window, 1), MAX_TOKENS)  # which no row is longer than
        skipped = skipped_tiles(lens.astype(np.int64), window, tile_tokens)  # [batch_size]
        schedule = _plan(name, shape, lens, tiles - skipped, tile_tokens, splits, num_ctas, costs)
        for field in ("tile_begin", "tile_end"):
            schedule.tasks[field] += skipped[schedule.tasks["row"]].astype(np.int32)
        return schedule
    return _plan(name, shape, lens, tiles, tile_tokens, splits, num_ctas, costs)


def skipped_tiles(lengths: Any, reach: int, tile_tokens: int) -> Any:
    """Tiles at the start of rows of these lengths (int64, one or [batch_size]) before the last `reach` tokens."""
    return (lengths > reach) * (lengths - reach) // tile_tokens


def _plan(
    name: str, shape: DecodeShape, lens: np.ndarray, tiles: np.ndarray, tile_tokens: int,
    splits: int | Sequence[int] | np.ndarray | None, num_ctas: int | None, costs: BalancedCosts,
) -> Schedule:  # fmt: skip
    """As make_schedule, of rows of so many tiles [batch_size]."""
    if name == "balanced":
        num_ctas, costs = _check_balanced(splits, num_ctas, costs)
        return balanced_schedule(shape, tiles, tile_tokens, num_ctas, costs)
    return queue_schedule(name, shape, lens, tiles, _check_queue(name, splits, num_ctas, len(lens)), tile_tokens)


def _check_balanced(splits: object, num_ctas: int | None, costs: BalancedCosts) -> tuple[int, BalancedCosts]:
    if splits is not None:
        raise ValueError(f"splits: expected None for balanced, which cuts by num_ctas, got {splits!r}")
    return check_int("num_ctas", num_ctas, 1, MAX_CTAS), check_costs(costs)


def _check_queue(
    name: str, splits: int | Sequence[int] | np.ndarray | None, num_ctas: int | None, batch_size: int
) -> np.ndarray:
    """Splits asked of each row, int64 [batch_size]."""
    if name not in SCHEDULES:
        raise ValueError(f"name: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    if num_ctas is not None:
        raise ValueError(f"num_ctas: expected None for {name}, which runs one CTA per task, got {num_ctas!r}")
    return check_splits(splits, batch_size)
