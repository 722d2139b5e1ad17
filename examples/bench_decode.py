"""Decode attention against the streaming limit and FlashInfer's backends, on the same pages in the same run.

    python examples/bench_decode.py                       # the default grid: 46 uniform cells and 20 ragged ones
    python examples/bench_decode.py --cells groups --json groups.json
    python examples/bench_decode.py --cells azure         # rows of a code service; azure-64/8 with --head-dim 64
    python examples/bench_decode.py --cells short --backends balanced,workqueue,tensor_core --pool-gib 4

Every result is checked before it is timed. Kernel time is per call inside a CUDA graph whose calls read
distinct pages, over four times the L2, before any page comes back; --layers asks for more copies.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys

from bench.script import in_pool, print_notes, run_script

from gpu.measure.memory import NoRoom

OURS = ("balanced", "workqueue", "split")
POOL_GIB = 40.0
FLASHINFER = ("cuda_core", "tensor_core", "xqa", "batch_attention")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells", default="default",
        choices=("default", "uniform", "ragged", "short", "groups", "azure", "azure-64/8", "chat", "all"),
    )
    parser.add_argument("--backends", default=",".join(("balanced", *FLASHINFER)),
                        help=f"comma-separated, of {', '.join(OURS + FLASHINFER)}")
    parser.add_argument("--pool-gib", type=float, help=f"K and V pages together, by default {POOL_GIB:g} or what fits")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2, help="at least this many disjoint copies of every step's KV")
    parser.add_argument("--seeds", type=int, default=1, help="page layouts per cell; the median is reported")
    parser.add_argument("--repeats", type=int, default=5, help="graph replays per timing")
    parser.add_argument("--wall-repeats", type=int, default=10, help="0 skips wall time")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured here")
    args = parser.parse_args(argv)
    unknown = set(args.backends.split(",")) - set(OURS + FLASHINFER)
    if unknown:
        parser.error(f"--backends: expected of {', '.join(OURS + FLASHINFER)}, got {', '.join(sorted(unknown))}")
    return args


def median_of_seeds(runs: list) -> object:
    """One Result out of the same cell and route measured on several page layouts."""
    times = {name: [value for run in runs if (value := getattr(run, name)) is not None]
             for name in ("kernel_us", "spread", "wall_eager_us", "wall_graph_us")}
    return dataclasses.replace(runs[0], **{name: statistics.median(values) for name, values in times.items() if values})


def run_cells(args: argparse.Namespace, pool_gib: float, console) -> tuple[list, int]:
    """The results, and how many cells the pool has no room for."""
    import torch
    from bench.cells import GRIDS
    from bench.measure import CellBench

    from gpu.measure.pools import BenchPool
    from gpu.measure.progress import tracked
    from gpu.routes import flashinfer_decode as fi

    routes = args.backends.split(",")
    if not fi.installed():
        routes = [name for name in routes if name in OURS]
        console.print("FlashInfer is not installed: its columns stay empty (pip install flashinfer-python)")
    cells = GRIDS[args.cells]()
    pool = BenchPool(pool_gib=pool_gib, dtype=getattr(torch, args.dtype), seed=20260623)
    bench = CellBench(pool=pool, dtype=args.dtype, head_dim=args.head_dim, page_size=args.page_size,
                      repeats=args.repeats, wall_repeats=args.wall_repeats, check=args.check, min_layers=args.layers)
    results, left_out = [], 0
    for cell in tracked(cells, "measuring", lambda cell: f"{cell.case} x {cell.batch_size}"):
        try:
            seeds = [bench.measure(cell, routes, seed=seed) for seed in range(args.seeds)]
        except NoRoom as error:
            console.print(f"{cell.case} batch {cell.batch_size}: left out, {error}")
            seeds, left_out = [], left_out + 1
        results += [median_of_seeds(list(runs)) for runs in zip(*seeds)]
    return results, left_out


def measure(args: argparse.Namespace, pool_gib: float, console) -> dict:
    from bench import report

    results, left_out = run_cells(args, pool_gib, console)
    report.print_table(console, results)
    console.print(f"{args.dtype}, page {args.page_size}, head_dim {args.head_dim}, {left_out} cells left out")
    report.print_summary(console, results)
    print_notes(console, "not timed", sorted({f"{r.route}: {r.note}" for r in results if r.note}))
    return {"left_out": left_out, "summary": report.summary(results),
            "results": [dataclasses.asdict(result) for result in results]}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("bench_decode", args, in_pool(args, measure, pool_gib=POOL_GIB), width=110)


if __name__ == "__main__":
    sys.exit(main())
