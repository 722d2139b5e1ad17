"""python -m gpu.tune: measures which (warps, stages) is fastest for each shape on this GPU and writes the table.

Examples:
  python -m gpu.tune -o mygpu.json            then PKV_TUNED=mygpu.json for every program that uses DecodeEngine
  python -m gpu.tune --calculate 86 -o t.json the table of a GPU that is not at hand, by what fits its shared memory
"""
from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpu.kernels.variant import CALCULATED, DTYPES, HEAD_DIMS, KernelConfig, shared_limit_bytes, variants
from gpu.measure.environment import lacks_gpu
from gpu.measure.memory import NoRoom
from pkvsim import DecodeShape
from pkvsim.devices.route_options import MAX_GROUP_SIZE
from pkvsim.shapes import check_int

if TYPE_CHECKING:
    import torch

    from gpu.measure.cases import StepCase
    from gpu.measure.pools import BenchPool

CANDIDATES = ((8, 2), (8, 3), (8, 4), (4, 2), (4, 3), (4, 4), (4, 6), (2, 4))
GROUP_SIZES = (1, 4, 8, 16, 32)
PAGE_SIZE, KV_HEADS = 16, 8
CELLS = ((1, 8192), (8, 4096), (32, 2048), (8, 32768))  # rows, tokens of the first; the others are ragged, down to half
POOL_GIB = 12.0
LEAST_CAPABILITY = 80  # that any kernel serves
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}  # of results of the same values summed in another order


def cell_lengths(rows: int, longest: int) -> list[int]:
    """A ragged step: lengths fall evenly from `longest` to half of it."""
    return [longest - row * longest // (2 * rows) for row in range(rows)]


def calculated_table(compute_capability: int) -> dict:
    """The table by calculation: for every shape the variant with most bytes in flight that fits."""
    entries = []
    for head_dim in HEAD_DIMS:
        for group_size in GROUP_SIZES:
            for dtype in DTYPES:
                shape = DecodeShape(group_size, 1, head_dim, PAGE_SIZE)
                # Not kernel_config's, which would look a table up.
                config = variants(shape, dtype, CALCULATED[head_dim], shared_limit_bytes(compute_capability))[0]
                entries.append(entry_of(group_size, config))
    return {
        "compute_capability": compute_capability,
        "gpu": f"any of compute capability {compute_capability / 10:.1f}",
        "source": f"calculated: most bytes in flight within {shared_limit_bytes(compute_capability)} bytes of shared "
        "memory; not measured",
        "entries": entries,
    }


def entry_of(group_size: int, config: KernelConfig, **measured: float) -> dict:
    """One line of a table."""
    warps, stages = config.variant
    return {"head_dim": config.head_dim, "group_size": group_size, "dtype": config.dtype, "warps": warps,
            "stages": stages, **measured}


def _compile(defines: dict) -> None:
    from gpu.kernels.compile import load_module

    load_module("balanced.cu", defines).get_function("pkv_decode_balanced")


def _start_worker(card: str | None) -> None:
    if card is not None:
        from gpu.as_card import enter

        enter(card)


def compile_all(configs: list[KernelConfig], jobs: int) -> None:
    """Compiles into CuPy's disk cache, in processes of their own since a compilation holds one core."""
    from gpu.kernels.this_gpu import card_played

    context, card = multiprocessing.get_context("spawn"), card_played()
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (card,)) as pool:
        for done, _ in enumerate(pool.map(_compile, [config.defines() for config in configs]), 1):
            progress(f"compiled {done} of {len(configs)}")
    progress(None)


def progress(line: str | None) -> None:
    """One changing line on a terminal, nothing in a pipe; None ends it."""
    if sys.stderr.isatty():
        print("\n" if line is None else f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def fitting_cells(shape: DecodeShape, pool: BenchPool) -> tuple[tuple[int, int], ...]:
    """Those of CELLS whose cold copies the pool has room for."""
    found = []
    for rows, longest in CELLS:
        try:
            laid_out(shape, pool, rows, longest)
        except NoRoom:
            continue
        found.append((rows, longest))
    return tuple(found)


def laid_out(shape: DecodeShape, pool: BenchPool, rows: int, longest: int) -> StepCase:
    """A cell in the pool; NoRoom where it has no room for it."""
    import numpy as np

    from gpu.measure.cases import lay_out

    return lay_out(pool, shape, np.array(cell_lengths(rows, longest), np.int32), seed=1)


def measure(config: KernelConfig, cases: list[StepCase], expected: list[torch.Tensor]) -> list[float]:
    """Kernel time of every case, us, cold L2, inside a CUDA graph.

    expected: the first variant's results, which are put there. Raises RuntimeError where this one's differ.
    """
    import torch

    from gpu.decode_engine import DecodeEngine
    from gpu.measure.cases import difference

    times = []
    for index, case in enumerate(cases):
        engine = DecodeEngine(case.shape, config.dtype, variant=config.variant)
        engine.plan(*case.on_gpu())
        lse = torch.empty(case.q.shape[:2], device="cuda")

        def attend(k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor) -> None:
            engine.run(case.q, k_pages, v_pages, out=out, lse=lse)

        found = case.result(attend)
        if index == len(expected):
            expected.append(found)
        off = difference(found, expected[index])
        if not off < TOLERANCE[config.dtype]:
            raise RuntimeError(f"{config.variant}: differs by {off:.2g} from the first variant of {case.shape}")
        times.append(case.time(attend, repeats=3).median_us)
    return times


def tuned_table(head_dims: list[int], group_sizes: list[int], dtypes: list[str], jobs: int,
                pool_gib: float | None) -> dict:
    """Measures every candidate of every shape on the current GPU; the least geometric mean over CELLS wins, over those
    that memory has room for where there is less than POOL_GIB and none is asked for.
    """
    import cupy
    import torch

    from gpu.kernels.this_gpu import this_gpu
    from gpu.measure.memory import budget, peak_line
    from gpu.measure.pools import BenchPool

    granted = budget(POOL_GIB, pool_gib)
    capability = this_gpu().compute_capability
    shapes = [(DecodeShape(KV_HEADS * group, KV_HEADS, head_dim, PAGE_SIZE), group, dtype)
              for dtype in dtypes for head_dim in head_dims for group in group_sizes]
    candidates = [variants(shape, dtype, CANDIDATES, shared_limit_bytes(capability)) for shape, _, dtype in shapes]
    compile_all([config for configs in candidates for config in configs], jobs)
    print(granted, flush=True)
    entries, pool, pool_dtype, cells = [], None, None, {}
    for (shape, group, dtype), configs in zip(shapes, candidates):
        if dtype != pool_dtype:
            pool = cases = None  # views of the last type's pages would keep them beside the new ones
            pool, pool_dtype = BenchPool(pool_gib=granted.granted_gib, dtype=getattr(torch, dtype), seed=1), dtype
        found, cells[shape] = [], fitting_cells(shape, pool)
        if not cells[shape]:
            raise NoRoom(f"pool-gib: expected more than {granted.granted_gib:.3g}, which no step of {shape} fits")
        cases = [laid_out(shape, pool, *cell) for cell in cells[shape]]
        expected: list[torch.Tensor] = []
        for config in configs:
            progress(f"head_dim {shape.head_dim}, group {group}, {dtype}: {config.variant}")
            times = measure(config, cases, expected)
            found.append((math.exp(sum(map(math.log, times)) / len(times)), config))
        found.sort(key=lambda pair: pair[0])
        best_us, best = found[0]
        entries.append(entry_of(group, best, geomean_us=round(best_us, 2)))
        progress(None)
        others = ", ".join(f"{c.variant} {us:.1f}" for us, c in found[1:])
        print(
            f"head_dim {shape.head_dim:3d}  group {group:2d}  {dtype:8s}  "
            f"{best.variant} {best_us:.1f} us; {others}",
            flush=True,
        )
    print(peak_line(), flush=True)
    gpu, smallest = str(this_gpu()), min(cells.values(), key=len)
    fewer = "" if len(smallest) == len(CELLS) else f"; of some shapes {len(smallest)} of them ({granted})"
    return {
        "compute_capability": capability,
        "gpu": gpu,
        "entries": entries,
        "source": f"python -m gpu.tune on one {gpu}, {datetime.date.today()}, CuPy {cupy.__version__}: least geometric "
        f"mean of the kernel time over ragged steps of {', '.join(f'{r} x {n}' for r, n in CELLS)} tokens{fewer}",
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Before anything is measured, which takes hours. Raises ValueError naming the argument, OSError where the table's
    folder cannot be made."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"out: expected a file that can be written, got {args.out}")
    if args.calculate is not None:
        check_int("calculate", args.calculate, LEAST_CAPABILITY)
    for group_size in args.group_sizes:
        check_int("group-sizes", group_size, 1, MAX_GROUP_SIZE)
    check_int("jobs", args.jobs, 1)
    if args.pool_gib is not None and not args.pool_gib > 0:
        raise ValueError(f"pool-gib: expected a number > 0, got {args.pool_gib}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", required=True, help="where to write the table, JSON")
    parser.add_argument(
        "--calculate", type=int, metavar="CC", help="compute capability x 10 of a GPU not at hand, such as 86"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS), choices=HEAD_DIMS)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=list(GROUP_SIZES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=8, help="compilations at a time")
    parser.add_argument("--pool-gib", type=float, help=f"page pool, by default {POOL_GIB:g} or what fits")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        if args.calculate is not None:
            table = calculated_table(args.calculate)
        elif lacks_gpu("gpu.tune"):
            return 1
        else:
            table = tuned_table(args.head_dims, args.group_sizes, args.dtypes, args.jobs, args.pool_gib)
        with open(args.out, "w", encoding="utf-8") as file:
            lines = ",\n    ".join(json.dumps(entry) for entry in table.pop("entries"))
            file.write(json.dumps(table, indent=2)[:-2] + f',\n  "entries": [\n    {lines}\n  ]\n}}\n')
    except (ValueError, OSError, ImportError) as error:
        print(f"gpu.tune: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
