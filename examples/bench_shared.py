"""Rows that share leading pages: one read for all, against reading them apart and FlashInfer, on the same pages.

    python examples/bench_shared.py                            # every cell, FlashInfer's decode where it is installed
    python examples/bench_shared.py --cascade --json shared.json
    python examples/bench_shared.py --cells 0,2 --calibrate    # which costs and variants are the best
    python examples/bench_shared.py --drawn 48 --json grid.json  # random steps, for the prices of the simulator
    python examples/bench_shared.py --drawn 24 --costs merge=0 tile=16,merge=4  # plans by other costs beside ours
    python examples/bench_shared.py --fit grid.json              # these prices, and their error; needs no GPU

Results are checked against float64 before they are timed. Times are per call inside a CUDA graph whose calls read
distinct pages, over four times the L2, before any page comes back. "told": the groups are given; "found":
groups="auto", which finds them once a graph. The cascade's time has a copy of its output in it.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from bench.script import chosen, in_pool, one_line_errors, print_notes, run_script

ROUTES = ("plain", "told", "found", "tensor_core", "cuda_core", "cascade")
# What --calibrate tries, one field at a time from the best so far.
TILES = (8, 12, 16, 20, 24, 28, 32, 40)
SWEEP = (("tile", TILES), ("merge", (0, 1, 2, 4, 8)), ("segment", (1, 2, 3, 5, 8)), ("least", (8, 12, 16)),
         ("tile", TILES))  # fmt: skip
VARIANTS = ((64, None), (64, 6), (64, 4), (32, None))  # columns of a read, stages of its rings

POOL_GIB = 16.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="all", help="numbers of cells, from 0, or all")
    parser.add_argument("--pool-gib", type=float, help=f"K and V pages together; {POOL_GIB:g}, or what fits of it")
    parser.add_argument("--repeats", type=int, default=5, help="graph replays per timing")
    parser.add_argument("--cascade", action="store_true", help="FlashInfer's cascade too, which may be built first")
    parser.add_argument("--costs", nargs="+", default=[], metavar="FIELD=N,..",
                        help="told once more for each of these, planned with other SharedCosts: merge=0,tile=12")
    parser.add_argument("--calibrate", action="store_true", help="sweep over the costs of shared reads instead")
    parser.add_argument("--drawn", type=int, metavar="N", help="N random steps instead of the cells, ours alone")
    parser.add_argument("--seed", type=int, default=20260623, help="of the random steps (20260623)")
    parser.add_argument("--fit", type=pathlib.Path, nargs="+", metavar="JSON",
                        help="fit pkvsim's prices to what this script wrote, with and without --drawn")
    parser.add_argument("--device", default="h200", help="for --fit: the GPU of pkvsim's that was measured (h200)")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured here")
    return parser.parse_args(argv)


def calibrate(bench, cells: list, console) -> list[dict]:
    """The time of every variant and of the costs around the best ones, cell by cell."""
    import torch
    from bench.tables import Table

    from gpu.measure.timing import graph_time_us
    from pkvsim.schedule.costs import SharedCosts

    found = []
    for cell in cells:
        pages = bench.lay_out(cell, 0)
        q = torch.randn(cell.rows, cell.num_q_heads, cell.head_dim, device="cuda").half()
        out = torch.empty_like(q)

        def time_us(costs, stages, cell=cell, pages=pages, q=q, out=out) -> float:
            run = bench.ours(cell, pages, q, "told", costs, stages)
            us = graph_time_us(lambda i: run(*pages.layers[i], out), variants=len(pages.layers), repeats=3).median_us
            found.append({"cell": cell.name, **costs._asdict(), "stages": stages, "us": us})
            return us

        best_us, best, best_stages = float("inf"), SharedCosts(), None
        for columns, stages in VARIANTS:
            try:
                us = time_us(SharedCosts(columns=columns), stages)
            except ValueError as error:
                console.print(f"{cell.name}: {columns} columns, {stages} stages: {error}", markup=False)
                continue
            if us < best_us:
                best_us, best, best_stages = us, SharedCosts(columns=columns), stages
        for name, values in SWEEP:
            for value in values:
                costs = best._replace(**{name: value})
                if costs != best and (us := time_us(costs, best_stages)) < best_us:
                    best_us, best = us, costs
        fields = ("columns", "stages", "tile", "least", "segment", "merge")
        own = sorted((entry for entry in found if entry["cell"] == cell.name), key=lambda entry: entry["us"])
        rows = tuple((*(str(entry[name] or "-") for name in fields), f"{entry['us']:.1f}") for entry in own[:8])
        Table(cell.name, (*fields, "us"), rows).print(console)
    return found


def fit(paths: list[pathlib.Path], device: str) -> int:
    """Prints the constants of pkvsim.pricing.shared that the files' steps ask for, and the cells furthest off."""
    from bench.shared_cells import read_measured

    from pkvsim.devices.device import get_device
    from pkvsim.fitting.fit_shared import errors, fit_shared
    from pkvsim.schedule.prefixes import sharing_rule

    gpu = get_device(device)
    steps = [step for path in paths for step in read_measured(path)]
    bandwidth = gpu.routes["balanced"].bandwidth_gb_s
    steps = [step for step in steps
             if sharing_rule(step.shape, bandwidth_gb_per_s=bandwidth).worth(step.saved_tokens())]
    if not steps:
        raise ValueError(f"fit: expected steps that save enough to be read together, found none in "
                         f"{', '.join(map(str, paths))}")
    found = fit_shared(steps, gpu)
    shipped = errors(steps, gpu, None)
    print(f"{len(steps)} steps that save enough to be read together: the shipped constants are off by "
          f"{abs(shipped).mean():.1%} in the mean and {abs(shipped).max():.1%} at most, these by {found.in_sample:.1%} "
          f"and {found.largest:.1%}, and in the mean by {found.held_out:.1%} on the half that each half's fit has not "
          "seen")
    print(found.prices)
    for step, error in sorted(zip(steps, errors(steps, gpu, found.prices)), key=lambda pair: -abs(pair[1]))[:8]:
        print(f"{error:+.1%}  {step.us:8.1f} us  {step.name}")
    return 0


def table(results: list, costs: Sequence[str]):
    from bench.tables import Table, us

    def over(best: float | None, ours: float | None) -> str:
        return "-" if best is None or ours is None else f"{best / ours:.2f}"

    routes = (*ROUTES[:2], *costs, *ROUTES[2:])
    rows = [(r.cell, us(r.limit_us), *(us(r.times.get(name)) for name in routes),
             over(r.best_other(), r.times.get("told")), over(r.best_flashinfer(), r.times.get("found")))
            for r in results]  # fmt: skip
    return Table("Rows that share pages, us", ("cell", "limit", *routes, "told x", "found x"), tuple(rows),
                 "limit: the distinct bytes at the streaming rate. told x: over the best of FlashInfer and plain; "
                 "found x: over FlashInfer's best.")  # fmt: skip


def measure(args: argparse.Namespace, pool_gib: float, console) -> dict:
    from bench.shared_cells import CELLS, NOTHING_SHARED, SharedCell, costs_of, drawn
    from bench.shared_measure import SharedBench

    costs = {text: costs_of(text) for text in args.costs}
    bench = SharedBench(pool_gib=pool_gib, repeats=args.repeats, cascade=args.cascade)
    if args.calibrate:
        return {"calibration": calibrate(bench, chosen("bench_shared", args.cells, CELLS), console)}
    if args.drawn is not None:
        cells = drawn(args.drawn, args.seed)
        results = [bench.measure(cell, only_ours=True, costs=costs) for cell in cells]
        table(results, args.costs).print(console)
        return {"results": [{**dataclasses.asdict(cell), **dataclasses.asdict(result)}
                            for cell, result in zip(cells, results)]}  # fmt: skip
    results = [bench.measure(cell, costs=costs)
               for cell in chosen("bench_shared", args.cells, (*CELLS, *NOTHING_SHARED))]
    found, others = SharedCell(256, 2047 * 16, 16), SharedCell(256, 2000 * 16, 48 * 16, groups=4)
    find_us, find_others_us = bench.find_us(found), bench.find_us(found, others)
    table(results, args.costs).print(console)
    console.print(f"groups of 256 rows x 2,048 pages found in {find_us:.2f} us, others than the last in "
                  f"{find_others_us:.2f} us")
    print_notes(console, "not timed", (f"{result.cell}: {name}: {note}"
                                       for result in results for name, note in result.notes.items()))  # fmt: skip
    return {"results": [dataclasses.asdict(result) for result in results], "find_us": find_us,
            "find_others_us": find_others_us}


@one_line_errors("bench_shared")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.fit is not None:
        return fit(args.fit, args.device)
    return run_script("bench_shared", args, in_pool(args, measure, pool_gib=POOL_GIB), width=150)


if __name__ == "__main__":
    sys.exit(main())
