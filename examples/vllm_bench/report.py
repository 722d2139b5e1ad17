"""Tables that bench_vllm prints: step times by backend, and served cases."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from vllm_bench.cases import GROUPS, SHARED_GROUPS, label


def times_table(found: Iterable[dict[str, Any]]) -> Table:
    """Median step times: a line for each shape, a column for each backend and type of cache, and ours over the best."""
    found = list(found)
    names = [name_of(one) for one in found]
    medians = {(name_of(one), shape["shape"]): shape["median_ms"] for one in found for shape in one["shapes"]}
    table = Table("shape", *names, "ours over the best other, %", "reference, ms",
                  title="decode steps, median ms; reference: FlashAttention 3, vLLM 0.24.0, H200")
    others = [name_of(one) for one in found if one["backend"] != "CUSTOM" and one["kv_cache_dtype"] == "auto"]
    for shape in (shape for group in (*GROUPS, *SHARED_GROUPS) for shape in group.shapes):
        times = [medians.get((name, shape.name)) for name in names]
        best = min((medians[name, shape.name] for name in others if (name, shape.name) in medians), default=None)
        own = medians.get(("CUSTOM", shape.name))
        over = "" if own is None or best is None else f"{100 * (own / best - 1):+.1f}"
        if any(time is not None for time in times):
            table.add_row(shape.name, *("" if time is None else f"{time:.3f}" for time in times), over,
                          "" if shape.reference_ms is None else f"{shape.reference_ms:.2f}")
    return table


def served_table(found: Iterable[dict[str, Any]]) -> Table:
    """Throughput and mean TPOT of served cases, a line for each case and backend, beside the file's own."""
    table = Table("case", "backend", "tokens/s", "TPOT mean, ms", "TTFT mean, s", "file: tokens/s", "TPOT", "TTFT",
                  title="requests served at their arrivals; file: what the CSV file says another run took")
    rows = [(case, name_of(one), served) for one in found for case, served in one.get("cases", {}).items()]
    for case, name, served in sorted(rows, key=lambda row: row[0]):
        figures = [_figures(served.get(side)) for side in ("own", "reference")]
        table.add_row(case, name, *figures[0], *figures[1])
    return table


def case_line(served: dict[str, Any]) -> str:
    """One case in a line."""
    if not served["complete"]:
        return "cut off"
    own, theirs = (_figures(served[side]) for side in ("own", "reference"))
    return (f"{served['requests']} requests, {own[0]} tokens/s, TPOT {own[1]} ms, TTFT {own[2]} s; "
            f"the file's {theirs[0]}, {theirs[1]}, {theirs[2]}")


def _figures(of: dict[str, float] | None) -> tuple[str, str, str]:
    return ("", "", "") if of is None else (f"{of['tokens_per_s']:.1f}", f"{of['tpot_mean_ms']:.2f}",
                                            f"{of['ttft_mean_s']:.3f}")


def name_of(one: dict[str, Any]) -> str:
    told = {name: one.get(name, False) for name in ("vllm_append", "shared_prefixes", "cascade")}
    return label(one["backend"], one["kv_cache_dtype"], **told)
