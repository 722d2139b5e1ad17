"""One choice varied at a time: split counts, the merge's launch, CUDA graphs, and how rows are put into launches."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from bench.tables import Table, us
from serving.engines import EngineSet, StepInputs, own_counters

from gpu.inputs.block_tables import StepTables
from gpu.measure.timing import capture, graph_time_us, shared_stream, wall_time_us
from pkvsim.traces.paper_families import Trace

if TYPE_CHECKING:
    from serving.run import Bench, TracePages

SPLITS = (1, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
SAMPLED_STEPS = 3
WALL_REPEATS = 15
TILE_TOKENS = 32
BUCKET_SPLITS = 24  # of the row-packing ablation, within the paper's pinned counts


def ablate(bench: Bench, engines: EngineSet, trace: Trace, *, label: str, quick: bool) -> dict[str, object]:
    """All ablations on a few steps of one trace; times are means over those steps, us."""
    from serving.run import TracePages

    pages = TracePages(bench, engines, trace, rotate=True)
    steps = list(trace.iter_steps())
    picked = [
        steps[i]
        for i in sorted(set(np.linspace(0, len(steps) - 1, 1 if quick else SAMPLED_STEPS).astype(int).tolist()))
    ]
    inputs = [pages.step(bench, engines, step) for step in picked]
    counts = SPLITS[::3] if quick else SPLITS
    routes = [route for route in ("split", "workqueue") if route in engines.engines]

    def at(route: str, count: int) -> float:
        return _mean(
            [
                _kernel_us(bench, pages, engines, step, route, np.full(len(step.seq_lens), count, np.int64))
                for step in inputs
            ]
        )

    sensitivity = {route: {str(count): at(route, count) for count in counts} for route in routes}
    return {
        "label": label,
        "family": trace.family,
        "seed": trace.seed,
        "steps": len(inputs),
        "splits": sensitivity,
        "graphs": {name: _graphs(bench, pages, engines, inputs, name) for name in engines.routes},
        "packing": _packing(bench, pages, engines, inputs),
    }


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 2)


def _kernel_us(
    bench: Bench, pages: TracePages, engines: EngineSet, step: StepInputs, route: str, splits: np.ndarray | None
) -> float:
    """Cold kernel time in a CUDA graph."""
    engine, out = engines.engines[route], step.q.clone()
    with shared_stream():
        engine.plan(replace(step, splits={route: splits}))
    timing = graph_time_us(
        lambda index: engine.run(step, *pages.caches[index], out),
        variants=len(pages.caches),
        repeats=max(3, bench.repeats),
    )
    return timing.median_us


def _graphs(
    bench: Bench, pages: TracePages, engines: EngineSet, inputs: list[StepInputs], name: str
) -> dict[str, float | None]:
    """Wall time of a step launched eagerly, and replayed from a graph that holds planning too where it can be captured:
    balanced's, its lengths uploaded before the replay. The others' graph replays a run already planned."""
    engine, eager, replayed = engines.engines[name], [], []
    plans_in_graph = name == "balanced"
    for step in inputs:
        out = step.q.clone()

        def whole() -> None:
            engine.plan(step)
            engine.run(step, *pages.caches[0], out)

        def captured() -> None:
            if plans_in_graph:
                engine.engine.plan(StepTables(step.on_gpu, step.table))
            engine.run(step, *pages.caches[0], out)

        def replay() -> None:
            if plans_in_graph:
                step.on_gpu.copy_(step.pinned, non_blocking=True)
            graph.replay()

        with shared_stream():
            eager.append(wall_time_us(whole, WALL_REPEATS, before=bench.limit.flush))
            graph = capture(captured)
            replayed.append(wall_time_us(replay, WALL_REPEATS, before=bench.limit.flush))
    return {"eager_us": _mean(eager), "graph_us": _mean(replayed), "plans_in_graph": plans_in_graph}


def _packing(
    bench: Bench, pages: TracePages, engines: EngineSet, inputs: list[StepInputs]
) -> dict[str, dict[str, float]]:
    """Rows to launches in four ways, the first three cutting with BUCKET_SPLITS for the longest row.

    masked: one launch whose grid is that of the longest row for all; the CTAs past a row's end find nothing. Our
    kernel runs a task list, so it is timed without those CTAs, which are counted: a bound from below.
    exact: a launch per distinct length. workqueue: the non-empty tasks of all rows, each row with as many splits as
    the longest. balanced: ranges of equal cost.
    """
    ways: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray | None]]] = {
        "single masked bucket": ("workqueue", masked_splits),
        "exact buckets": ("split", lambda lens: np.full(len(lens), BUCKET_SPLITS, np.int64)),
        "workqueue": ("workqueue", lambda lens: np.full(len(lens), BUCKET_SPLITS, np.int64)),
        "balanced, merge fused": ("balanced", lambda lens: None),
    }
    found = {}
    for way, (route, splits_of) in ways.items():
        if route not in engines.engines:
            continue
        times, counters = [], []
        for step in inputs:
            splits = splits_of(step.seq_lens)
            times.append(_kernel_us(bench, pages, engines, step, route, splits))
            counters.append(own_counters(engines, route, step.seq_lens, splits, device=bench.device))
        grid = [
            len(step.seq_lens) * BUCKET_SPLITS * engines.shape.num_kv_heads / one.cta_work_per_sm / bench.device.num_sms
            for step, one in zip(inputs, counters, strict=True)
        ]
        nonempty = (
            1 / np.mean(grid) if way == "single masked bucket" else np.mean([c.nonempty_cta_fraction for c in counters])
        )
        found[way] = {
            "kernel_us": _mean(times),
            "launches": _mean([c.launches for c in counters]),
            "merge_mib": _mean([c.merge_bytes / 2**20 for c in counters]),
            "nonempty_ctas": round(float(nonempty), 3),
        }
    return found


def masked_splits(seq_lens: np.ndarray) -> np.ndarray:
    """Of each row, the splits of a grid cut for the longest row that hold any of its tiles, int64 [batch_size]."""
    tiles = -(-seq_lens.astype(np.int64) // TILE_TOKENS)
    cut = max(1, -(-int(tiles.max()) // BUCKET_SPLITS))
    return np.maximum(1, -(-tiles // cut))


def ablation_tables(records: list[dict]) -> list[Table]:
    counts = list(
        dict.fromkeys(count for record in records for by_count in record["splits"].values() for count in by_count)
    )
    splits = tuple(
        (f"{r['label']} {r['family']}", route, *(us(times.get(count)) for count in counts))
        for r in records
        for route, times in r["splits"].items()
    )
    graphs = tuple(
        (
            f"{r['label']} {r['family']}",
            name,
            us(t["eager_us"]),
            us(t["graph_us"]),
            "plan and run" if t["plans_in_graph"] else "run alone",
        )
        for r in records
        for name, t in r["graphs"].items()
    )
    packing = tuple(
        (
            f"{r['label']} {r['family']}",
            way,
            us(t["kernel_us"]),
            f"{t['launches']:.0f}",
            f"{t['merge_mib']:.2f}",
            f"{t['nonempty_ctas']:.0%}",
        )
        for r in records
        for way, t in r["packing"].items()
    )
    return [
        Table("kernel us by splits per row", ("run", "route", *counts), splits),
        Table(
            "plan and run by wall, us, without and with a CUDA graph",
            ("run", "engine", "eager", "graph", "in the graph"),
            graphs,
            "FlashInfer's and the task lists' plans are made on the host: their graph replays a run already planned.",
        ),
        Table(
            "rows to launches",
            ("run", "way", "kernel us", "launches", "merge MiB", "non-empty CTAs"),
            packing,
            "single masked bucket is timed without its empty CTAs.",
        ),
    ]
