"""The serving tables of reproduce_paper: this GPU beside the paper's RTX 3060."""
from __future__ import annotations

import numpy as np
from bench.tables import Table, ratio, us
from serving.report import CLOCKS, DEFAULT, Group

PAPER_ROUTES = {"flashinfer": DEFAULT, "split": "split", "workqueue": "workqueue"}


def serving_table(group: Group, paper: dict) -> Table:
    """One family: here over the held-out seeds, and the paper's seed on its GPU."""
    theirs = {
        PAPER_ROUTES[row["engine"]]: row
        for row in paper["serving"]
        if row["family"] == group.family and row["max_active"] == group.records[0]["max_active"]
    }
    best = {clock: group.best_flashinfer(clock) for clock in CLOCKS}
    rows = []
    for name in group.engines:
        paper_row = theirs.get(name)
        cells = [name, *(us(float(np.mean(group.means(name, clock)))) for clock in CLOCKS)]
        for over in (DEFAULT, None):
            cells += [ratio(group.ratios(name, clock, over or best[clock])) for clock in CLOCKS]
        if paper_row is None:
            cells += ["-", "-", "-", "-"]
        else:
            base = theirs[DEFAULT]
            cells += [
                us(paper_row["gpu_mean_step_ms"] * 1e3),
                us(paper_row["wall_mean_step_ms"] * 1e3),
                f"{base['gpu_mean_step_ms'] / paper_row['gpu_mean_step_ms']:.2f}",
                f"{base['wall_mean_step_ms'] / paper_row['wall_mean_step_ms']:.2f}",
            ]
        rows.append(tuple(cells))
    columns = (
        "engine",
        "event us",
        "wall us",
        "x default, event",
        "x default, wall",
        "x best, event",
        "x best, wall",
        "RTX 3060 event us",
        "RTX 3060 wall us",
        "RTX 3060 x default, event",
        "RTX 3060 x default, wall",
    )
    steps = len(group.records[0]["active"])
    return Table(
        f"Serving, {group.label}, {group.family}",
        columns,
        tuple(rows),
        f"{len(group.records)} held-out seeds of {steps} steps; ratios as mean ± deviation. FlashInfer's best: "
        f"{best['event_us'] or 'none'} by events, {best['wall_us'] or 'none'} by wall. RTX 3060: seed 20260623.",
    )


def counters_table(found: list[Group], paper: dict) -> Table:
    """Structure at the paper's pinned splits: but for CTAs/SM, counts that no GPU changes."""
    rows = []
    for group in found:
        first = group.records[0]
        for engine in ("split", "workqueue", "balanced"):
            mine = first["counters"].get(engine)
            row = next(
                (
                    row
                    for row in paper["serving"]
                    if row["family"] == group.family
                    and row["engine"] == engine
                    and row["seed"] == first["seed"]
                    and row["max_active"] == first["max_active"]
                ),
                None,
            )
            if mine is None:
                continue
            rows.append(
                (
                    f"{group.label} {group.family}",
                    engine,
                    f"{mine['launches']:.2f}",
                    f"{mine['useful_kv_bytes'] / 2**20:.1f}",
                    f"{mine['merge_bytes'] / 2**20:.2f}",
                    f"{mine['cta_work_per_sm']:.1f}",
                    *(
                        ("-",) * 4
                        if row is None
                        else (
                            f"{row['launches_per_step']:.2f}",
                            f"{row['useful_kv_mib']:.1f}",
                            f"{row['merge_mib']:.2f}",
                            f"{row['cta_work_per_sm']:.1f}",
                        )
                    ),
                )
            )
    return Table(
        "Counters per step, first seed",
        (
            "run",
            "engine",
            "launches",
            "KV MiB",
            "merge MiB",
            "CTAs/SM",
            "paper launches",
            "paper KV MiB",
            "paper merge MiB",
            "paper CTAs/SM",
        ),
        tuple(rows),
        "CTAs/SM differ by the number of SMs alone (28 on the RTX 3060).",
    )
