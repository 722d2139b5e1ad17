"""Steps that read a tenth of their pages: attention over lists, selection, summaries and page masses, over dense steps.

    python examples/bench_selection.py                      # every cell, FlashInfer's decode where it is installed
    python examples/bench_selection.py --fraction 0.05 --json selection.json
    python examples/bench_selection.py --cells 1,2 --no-flashinfer

32 query and 8 KV heads of 128, pages of 16, FP16. Results are checked against float64 before they are timed. Times are
per call inside a CUDA graph, cold in L2 where a step is large enough. "attend": lists at rest; "everything": scores,
selection and attention, every list new in every call; "8bit": of summaries in 8-bit codes; "skewed": half the heads
read 8 times what the others do, the same bytes in all; "page_lse": the dense step with the mass of every page;
FlashInfer: heads folded into the batch, planned, the plan not counted.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time

from gpu.measure.environment import environment, lacks_gpu, write_json

POOL_GIB = 18.0
SHOWN = ("dense", "attend", "attend_skewed", "select", "everything", "select_8bit", "everything_8bit", "dense_page_lse",
         "summarize_one_token", "flashinfer_tensor_core", "flashinfer_cuda_core")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="all", help="numbers of cells, from 0, or all")
    parser.add_argument("--fraction", type=float, default=0.1, help="of a row's pages that each KV head reads")
    parser.add_argument("--pool-gib", type=float, help=f"K and V pages together; {POOL_GIB:g}, or what fits of it")
    parser.add_argument("--repeats", type=int, default=5, help="graph replays per timing")
    parser.add_argument("--no-flashinfer", action="store_true", help="without FlashInfer's decode, which may be built")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured here")
    args = parser.parse_args(argv)
    if not 0 < args.fraction <= 1:
        parser.error(f"--fraction: expected a part of a row's pages in (0, 1], got {args.fraction:g}")
    return args


def chosen(text: str, cells: tuple) -> list:
    if text == "all":
        return list(cells)
    try:
        return [cells[int(number)] for number in text.split(",")]
    except (ValueError, IndexError):
        raise SystemExit(
            f"bench_selection: --cells: expected numbers from 0 to {len(cells) - 1}, got {text!r}"
        ) from None


def tables(results: list) -> list:
    from bench.tables import Table, us

    times = [(f"{r.rows} x {r.length}", us(r.limit_us), *(us(r.times.get(name)) for name in SHOWN)) for r in results]

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    shares = [(f"{r.rows} x {r.length}", *(ratio(r.over_dense(name)) for name in SHOWN[1:]),
               ratio(r.times["attend_skewed"] / r.times["attend"])) for r in results]  # fmt: skip
    host = [(f"{r.rows} x {r.length}", name, f"{value:.1f}") for r in results for name, value in r.host_us.items()]
    return [
        Table("Times, us", ("step", "limit", *SHOWN), tuple(times),
              "limit: the dense step's bytes at the streaming rate."),
        Table("Over the dense step", ("step", *SHOWN[1:], "skewed over even"), tuple(shares)),
        Table("Host time of a call outside graphs, us", ("step", "what", "us"), tuple(host)),
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if lacks_gpu("bench_selection"):
        return 1
    from bench.selection_measure import CELLS, SelectionBench
    from rich.console import Console

    from gpu.measure import memory

    console = Console(width=None if sys.stdout.isatty() else 200)
    about = environment()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    start = time.perf_counter()
    try:
        granted = memory.budget(POOL_GIB, args.pool_gib)
    except ValueError as error:
        print(f"bench_selection: error: {error}", file=sys.stderr)
        return 2
    bench = SelectionBench(pool_gib=granted.granted_gib, repeats=args.repeats, fraction=args.fraction)
    results, left_out = [], []
    for rows, length in chosen(args.cells, CELLS):
        try:
            results.append(bench.measure(rows, length, flashinfer=not args.no_flashinfer))
        except ValueError as error:  # a pool that is too small for the cell
            if not str(error).startswith("pool-gib"):
                raise
            left_out.append(f"{rows} x {length}: {error}")
    for table in tables(results):
        table.print(console)
    for result in results:
        for name, note in result.notes.items():
            console.print(f"not timed: {result.rows} x {result.length}: {name}: {note}", markup=False)
    for note in left_out:
        console.print(f"left out: {note}", markup=False)
    console.print(f"{granted}, {time.perf_counter() - start:.0f} s")
    if args.json is not None:
        write_json(args.json, {
            "environment": about, "options": {key: str(value) for key, value in vars(args).items()},
            "results": [dataclasses.asdict(result) for result in results], "left_out": left_out,
            "pool": dataclasses.asdict(granted), "peak_gpu_bytes": memory.peak_bytes()})  # fmt: skip
        console.print(f"wrote {args.json}")
    console.print(memory.peak_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
