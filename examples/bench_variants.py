"""What each variant of decode attention costs, against its own streaming limit and FlashInfer's same variant.

    python examples/bench_variants.py                                  # every variant on three steps
    python examples/bench_variants.py --variants "plain,window 4K" --json variants.json
    python examples/bench_variants.py --cells 64x2K --pool-gib 8
    python examples/bench_variants.py --variants "plain,int8 by token" --variant 8x4    # an 8-bit cache, and 16 bits

A limit is the time in which a kernel that only reads streams the bytes that the variant must read: with a window, those
of the rows' last tokens; of an 8-bit cache, the scales too. Every result is checked before it is timed, ours over 8-bit
caches against 16-bit pages of the same values as well. x FP16: over the time of plain attention on the same step, where
that is measured too, which 8-bit pages should about halve. error: the largest against float64, on the shortest and the
longest row with several draws of queries, of what 8-bit pages stand for; x theirs: ours over the least of FlashInfer's
backends. Times are per call inside a CUDA graph whose calls read distinct pages, over four times the L2, before any
page comes back.
"""
from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.script import in_pool, run_script
from bench.variant_cells import VARIANTS, cells, error_ratios, jobs, table, window_cost

from gpu.measure.memory import NoRoom

if TYPE_CHECKING:
    from rich.console import Console

POOL_GIB = 24.0
BY_NAME = {variant.name: variant for variant in VARIANTS}


def _chosen(parser: argparse.ArgumentParser, option: str, given: str | None, known: list[str]) -> list[str]:
    """The names of an option with a list, which may contain commas themselves; all of them without one."""
    if given is None:
        return known
    left, found = given, []
    while left:
        name = max((name for name in known if left == name or left.startswith(name + ",")), key=len, default=None)
        if name is None:
            parser.error(f"--{option}: expected some of {'; '.join(known)}, got {left!r}")
        found.append(name)
        left = left[len(name) + 1:]
    if not found:
        parser.error(f"--{option}: expected some of {'; '.join(known)}, got none")
    return found


def _kernel(given: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", given, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected positive WARPSxSTAGES, got {given!r}")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", help=f"comma-separated, of: {'; '.join(BY_NAME)}")
    parser.add_argument("--cells", help=f"comma-separated, of: {'; '.join(cells())}")
    parser.add_argument("--flashinfer", action=argparse.BooleanOptionalAction, default=True,
                        help="time FlashInfer's backends where it is installed and has the variant")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--variant", type=_kernel, metavar="WARPSxSTAGES",
                        help="of the kernels of 8-bit caches, in place of the default")
    parser.add_argument("--pool-gib", type=float, help=f"16-bit K and V pages together, by default {POOL_GIB:g} or "
                        "what fits. Codes of 8-bit caches take half as much beside them")
    parser.add_argument("--repeats", type=int, default=5, help="graph replays per timing")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args(argv)
    args.variants = _chosen(parser, "variants", args.variants, list(BY_NAME))
    args.cells = _chosen(parser, "cells", args.cells, list(cells()))
    if args.page_size < 1 or args.repeats < 1 or args.pool_gib is not None and not args.pool_gib > 0:
        parser.error("--page-size, --repeats, --pool-gib: expected positive numbers, got "
                     f"{args.page_size}, {args.repeats}, {args.pool_gib}")
    return args


def beside(args: argparse.Namespace) -> float:
    """What is allocated in proportion to the pool, the pool included: codes take half as much again."""
    return 1.5 if any(BY_NAME[name].options.kv_dtype for name in args.variants) else 1.0


def measure(args: argparse.Namespace, pool_gib: float, console: Console) -> dict[str, Any]:
    import torch
    from bench.variant_measure import VariantBench

    from gpu.measure.pools import BenchPool
    from gpu.measure.progress import note, tracked

    pool = BenchPool(pool_gib=pool_gib, dtype=getattr(torch, args.dtype), seed=20260623)
    bench = VariantBench(pool=pool, dtype=args.dtype, page_size=args.page_size, repeats=args.repeats,
                         flashinfer=args.flashinfer, kernel=args.variant)
    todo = jobs(tuple(BY_NAME[name] for name in args.variants), args.cells)
    results = []
    for variant, cell in tracked(todo, "measuring", lambda job: f"{job[0].name}, {job[1].batch_size} x {job[1].case}"):
        try:
            results += bench.measure(variant, cell)
        except NoRoom as error:
            note(f"{variant.name}, {cell.batch_size} x {cell.case}: left out, {error}")
    table(results, args.dtype).print(console)
    rms_ratios = error_ratios(results, "rms_error")
    return {
        "window_over_short_rows": window_cost(results),
        "error_over_flashinfer": [
            {"variant": variant, "case": case, "batch_size": batch_size, "ratio": ratio,
             "rms_ratio": rms_ratios.get((variant, case, batch_size))}
            for (variant, case, batch_size), ratio in error_ratios(results).items()
        ],
        "results": [dataclasses.asdict(result) for result in results],
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    measured = in_pool(args, measure, pool_gib=POOL_GIB, beside=beside(args))
    return run_script("bench_variants", args, measured, width=180)


if __name__ == "__main__":
    sys.exit(main())
