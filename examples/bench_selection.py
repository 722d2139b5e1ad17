"""Steps that read a tenth of their pages: attention over lists, selection, summaries and page masses, over dense steps.

    python examples/bench_selection.py                      # every cell, FlashInfer's decode where it is installed
    python examples/bench_selection.py --fraction 0.05 --json selection.json
    python examples/bench_selection.py --cells 1,2 --no-flashinfer
    python examples/bench_selection.py --grid --json grid.json   # what `pkvsim fit --selection grid.json` reads

32 query and 8 KV heads of 128, pages of 16, FP16. Results are checked against float64 before they are timed. Times are
per call inside a CUDA graph, cold in L2 where a step is large enough. "attend": lists at rest; "everything": scores,
selection and attention, every list new in every call; "8bit": of summaries in 8-bit codes; "centroids": of
centroids in place of mean and deviation; "skewed": half the heads
read 8 times what the others do, the same bytes in all; "policy" (of --grid): lists with their summaries or all pages,
as prices say; "page_lse": the dense step with the mass of every page; FlashInfer: heads folded into the batch, planned,
the plan not counted.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

from bench.script import chosen, in_pool, print_notes, run_script

from gpu.measure.memory import NoRoom

POOL_GIB = 18.0
SHOWN = ("dense", "attend", "attend_skewed", "select", "everything", "select_8bit", "everything_8bit",
         "select_centroids", "everything_centroids", "policy", "dense_page_lse", "summarize_one_token",
         "summarize_one_token_centroids", "flashinfer_tensor_core", "flashinfer_cuda_core")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="all", help="numbers of cells, from 0, or all")
    parser.add_argument("--fraction", type=float, default=0.1, help="of a row's pages that each KV head reads")
    parser.add_argument("--pool-gib", type=float, help=f"K and V pages together; {POOL_GIB:g}, or what fits of it")
    parser.add_argument("--repeats", type=int, default=5, help="graph replays per timing")
    parser.add_argument("--no-flashinfer", action="store_true", help="without FlashInfer's decode, which may be built")
    parser.add_argument("--grid", action="store_true", help="cells to fit prices to in place of the others, no checks")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured here")
    args = parser.parse_args(argv)
    if not 0 < args.fraction <= 1:
        parser.error(f"--fraction: expected a part of a row's pages in (0, 1], got {args.fraction:g}")
    return args


def tables(results: list) -> list:
    from bench.tables import Table, us

    times = [(r.label, us(r.limit_us), *(us(r.times.get(name)) for name in SHOWN)) for r in results]

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    shares = [(r.label, *(ratio(r.over_dense(name)) for name in SHOWN[1:]),
               ratio(r.times.get("attend_skewed", float("nan")) / r.times["attend"])) for r in results]  # fmt: skip
    host = [(r.label, name, f"{value:.1f}") for r in results for name, value in r.host_us.items()]
    return [
        Table("Times, us", ("step", "limit", *SHOWN), tuple(times),
              "limit: the dense step's bytes at the streaming rate."),
        Table("Over the dense step", ("step", *SHOWN[1:], "skewed over even"), tuple(shares)),
        Table("Host time of a call outside graphs, us", ("step", "what", "us"), tuple(host)),
    ]


def measure(args: argparse.Namespace, pool_gib: float, console) -> dict:
    from bench.selection_measure import CELLS, SelectionBench

    bench = SelectionBench(pool_gib=pool_gib, repeats=args.repeats, fraction=args.fraction)
    results, left_out = [], []
    if args.grid:
        from bench.selection_grid import measure_grid

        for found in measure_grid(bench):
            (left_out if isinstance(found, str) else results).append(found)
    for rows, length in () if args.grid else chosen("bench_selection", args.cells, CELLS):
        try:
            results.append(bench.measure(rows, length, flashinfer=not args.no_flashinfer))
        except NoRoom as error:  # a pool that is too small for the cell
            left_out.append(f"{rows} x {length}: {error}")
    for table in tables(results):
        table.print(console)
    print_notes(console, "not timed", (f"{result.rows} x {result.length}: {name}: {note}"
                                       for result in results for name, note in result.notes.items()))  # fmt: skip
    print_notes(console, "left out", left_out)
    return {"results": [dataclasses.asdict(result) for result in results], "left_out": left_out}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def measured(console) -> dict:
        from bench.selection_measure import beside

        of_layer = 2 if args.grid else 1  # summaries: the grid's "policy" has its own
        return in_pool(args, measure, pool_gib=POOL_GIB, beside=beside(of_layer))(console)

    return run_script("bench_selection", args, measured, width=240)


if __name__ == "__main__":
    sys.exit(main())
