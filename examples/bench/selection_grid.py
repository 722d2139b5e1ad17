"""Cells to which the prices of selected steps are fitted: dense, attend, select, both and the summaries, no checks.

"policy": what PagedSelection does in the step, lists with their summaries or, where these do not pay, all pages.

bench_selection measures its own cells in full, against float64 and FlashInfer; these are many and cheap.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from bench.selection_measure import MOST_LAYERS, PINS, SHAPE, Result, SelectionBench, summary_bytes

from gpu import DecodeEngine, PageSelector, PageSummaries
from gpu.measure import memory
from gpu.measure.cases import lay_out
from gpu.measure.timing import graph_time_us, l2_bytes, rotation_length
from gpu.routes.router import this_device
from gpu.selection.paged_selection import PagedSelection
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.selection.rules import Budget

# Rows, tokens of each, part of the pages that is listed. Cells of one row are where a list's own work shows, those of
# many rows where the streaming rate does; no two differ in one number alone, so that a half of them tells of the other.
GRID = (
    (1, 2048, 0.1), (1, 8192, 0.2), (1, 16384, 0.05), (1, 32768, 0.1), (1, 65536, 0.2), (1, 131072, 0.05),
    (2, 65536, 0.1), (4, 8192, 0.05), (4, 32768, 0.2), (8, 4096, 0.1), (8, 16384, 0.05), (8, 65536, 0.1),
    (16, 8192, 0.2), (16, 32768, 0.05), (32, 2048, 0.2), (32, 16384, 0.1), (64, 4096, 0.05), (64, 16384, 0.2),
    (128, 2048, 0.1), (128, 8192, 0.1),
)  # fmt: skip


def measure_grid(bench: SelectionBench) -> Iterator[Result | str]:
    """Every cell's result, or the reason why it was left out."""
    for rows, length, fraction in GRID:
        try:
            yield measure_cell(bench, rows, length, fraction)
        except memory.NoRoom as error:  # a pool that is too small for the cell
            yield f"{rows} x {length}, {fraction:g}: {error}"


def measure_cell(bench: SelectionBench, rows: int, length: int, fraction: float) -> Result:
    """Times of one cell, microseconds per call in a CUDA graph."""
    lens, budget = np.full(rows, length, np.int32), Budget(fraction, 0)
    read = max(1, int(useful_kv_bytes(SHAPE, lens) * fraction))
    layers = min(MOST_LAYERS, rotation_length(read, l2_size=l2_bytes()))
    case = lay_out(bench.pool, SHAPE, lens, seed=rows, min_layers=layers)
    # PagedSelection keeps summaries of its own beside those that are timed alone.
    memory.expect_room(2 * sum(summary_bytes(k.nbytes) for k, _ in case.layers), "page summaries")
    result = Result(rows, length, fraction, case.kv_bytes, bench.limit.time_us(case.kv_bytes))
    seq_lens, table = case.on_gpu()
    engine = DecodeEngine(SHAPE)
    engine.plan(seq_lens, table)
    lse = torch.empty(case.q.shape[:2], device=case.q.device)
    summaries = [PageSummaries(SHAPE, k) for k, _ in case.layers]
    for own, (k, _) in zip(summaries, case.layers):
        own.update(k, seq_lens, table)
    selector = PageSelector(SHAPE, budget=budget, pins=PINS)
    selector.plan(seq_lens, table)
    out = torch.empty_like(case.q)

    def attend(i: int, **more: object) -> None:
        engine.run(case.q, *case.layers[i], out=out, lse=lse, **more)

    def time_of(name: str, run: Callable[[int], object]) -> None:
        found = graph_time_us(run, variants=len(case.layers), repeats=bench.repeats)
        result.times[name] = found.median_us

    lists = selector.select(case.q, summaries[0])
    time_of("dense", attend)
    time_of("attend", lambda i: attend(i, selected=lists))
    time_of("select", lambda i: selector.select(case.q, summaries[i]))
    time_of("everything", lambda i: attend(i, selected=selector.select(case.q, summaries[i])))
    paged = PagedSelection(budget=budget, pins=PINS, dense_layers=0, device=this_device())
    for i, (k, _) in enumerate(case.layers):  # of all tokens, as a prompt's step leaves them
        paged.keep(i, SHAPE.num_q_heads, k, seq_lens, table, length)

    def by_policy(i: int) -> None:
        k, v = case.layers[i]
        if paged.keep(i, SHAPE.num_q_heads, k, seq_lens, table, 1):
            paged.attend(i, case.q, k, v, seq_lens, table)
        else:
            attend(i)

    time_of("policy", by_policy)
    time_of("summarize_one_token", lambda i: summaries[i].update(case.layers[i][0], seq_lens, table, new_tokens=1))
    return result
