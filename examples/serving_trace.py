"""Decode steps of served traces on every engine: the paper's harness, on the same pages and block tables for all.

    python examples/serving_trace.py                                  # bimodal, uniform, zipf; 8 rows; 5 held-out seeds
    python examples/serving_trace.py --max-active 1 --families bucketed,equal-buckets
    python examples/serving_trace.py --heads 32/32,32/8,32/4 --max-active 1,4,8 --exhaustive --json steps.json
    python examples/serving_trace.py --layers 32 --stride 8 --mlp --ablate

Every result is checked against FlashInfer, and on a few steps of each trace against float64, before it is timed. Times
are medians per step from cold L2: `event us` by CUDA events around the layers, `wall us` planning, running and
synchronising. A ratio is the other engine's mean step over this engine's, averaged over the seeds.
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.script import one_line_errors
from serving.options import Config, add_trace_options, comma_list, configs, make_trace, positive

from gpu.measure import memory
from gpu.measure.environment import environment, lacks_gpu, write_json
from gpu.measure.progress import note, tracked
from pkvsim.devices.route_model import ROUTES

if TYPE_CHECKING:
    from bench.tables import Table
    from serving.engines import EngineSet
    from serving.run import Bench

ENGINES = (*ROUTES, "adaptive")
POOL_GIB = 64.0


@dataclass(frozen=True, slots=True)
class Run:
    """One trace on one configuration."""

    config: Config
    family: str
    seed: int

    def __str__(self) -> str:
        return f"{self.config.label} {self.family} {self.seed}"


def engine_name(text: str) -> str:
    if text not in ENGINES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ENGINES)}, got {text!r}")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trace_options(parser)
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--engines", type=comma_list(engine_name), default=ENGINES, help=f"of {', '.join(ENGINES)} (all)"
    )
    group.add_argument(
        "--device", help="the calibrated GPU to route by: a name of pkvsim's or a .json file; by default this GPU's"
    )
    group.add_argument("--layers", type=positive, default=1, help="layers that run on one plan (1)")
    group.add_argument(
        "--repeats", type=positive, default=3, help="timings of every step and engine, of which the median counts (3)"
    )
    group.add_argument("--split-splits", type=positive, help="splits per row of split, the policy's own by default")
    group.add_argument(
        "--workqueue-splits", type=positive, help="splits per row of workqueue, the policy's own by default"
    )
    group.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    group.add_argument("--pool-gib", type=float, help=f"K and V pages together, by default {POOL_GIB:g} or what fits")
    group.add_argument(
        "--exhaustive",
        action="store_true",
        help="regret of the policy against the fastest route of every step, and the model's errors",
    )
    group.add_argument("--mlp", action="store_true", help="attention's share of a Llama-3-8B-like layer (first seed)")
    group.add_argument("--ablate", action="store_true", help="splits, merge, graphs, packing of rows (first seed)")
    group.add_argument("--quick", action="store_true", help="one seed and 12 steps, unless they are given")
    group.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no further trace after this long")
    group.add_argument("--json", type=Path, help="write every step's times here, after every trace")
    args = parser.parse_args(argv)
    if args.quick and args.seeds == parser.get_default("seeds"):
        args.seeds = args.seeds[:1]
    if args.exhaustive and "adaptive" not in args.engines:
        parser.error("--exhaustive: expected adaptive among the --engines, whose choices it judges")
    if not set(args.engines) & set(ROUTES):
        parser.error(f"--engines: expected at least one of {', '.join(ROUTES)}, got {', '.join(args.engines)}")
    if args.trace_file is not None:
        if not args.trace_file.exists():
            parser.error(f"--trace-file: expected a file, got {args.trace_file}")
        args.families = ("file",)
    for name in ("pool_gib", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number > 0, got {value}")
    return args


def make_bench(args: argparse.Namespace, *, default_gib: float = POOL_GIB) -> Bench:
    """The pool and what every trace shares. default_gib: of the pool, without --pool-gib and where memory has room."""
    import torch
    from serving.run import Bench

    from gpu.measure.pools import BenchPool
    from gpu.measure.timing import StreamLimit
    from gpu.routes.router import this_device
    from pkvsim.devices.device import get_device
    from pkvsim.policy.by_name import CalibratedPolicy

    device = this_device() if args.device is None else get_device(args.device)
    if device is None or not device.routes:
        raise ValueError(
            "--device: this GPU is not calibrated; `python -m gpu.calibrate -o mygpu.json` makes what to pass"
        )
    granted = memory.budget(default_gib, args.pool_gib)
    note(str(granted))
    pool = BenchPool(pool_gib=granted.granted_gib, dtype=getattr(torch, args.dtype), seed=20260623)
    pinned = {"split": args.split_splits, "workqueue": args.workqueue_splits}
    return Bench(
        pool=pool,
        limit=StreamLimit(pool.flat),
        device=device,
        policy=CalibratedPolicy(),
        dtype=args.dtype,
        layers=args.layers,
        repeats=args.repeats,
        stride=args.stride,
        hole_fraction=args.hole_fraction,
        pinned={route: count for route, count in pinned.items() if count is not None},
    )


def run_all(args: argparse.Namespace, bench: Bench, document: dict) -> None:
    """Fills document's runs, layers and ablations, and writes it after every trace where --json asks for it."""
    from serving.ablate import ablate
    from serving.engines import build_engines
    from serving.mlp import measure_layers
    from serving.run import run_trace

    started = time.perf_counter()
    runs = [Run(config, family, seed) for config in configs(args) for family in args.families for seed in args.seeds]
    engines: EngineSet | None = None
    for done, run in enumerate(tracked(runs, "serving")):
        if args.time_limit is not None and time.perf_counter() - started > args.time_limit:
            note(f"--time-limit: {len(runs) - done} of {len(runs)} traces left out, from {run} on")
            break
        if engines is None or engines.shape != run.config.shape:
            engines = build_engines(run.config.shape, args.dtype, args.engines, device=bench.device, layers=args.layers)
            for name, why in engines.left_out.items():
                note(f"{run.config.label}: {name} is left out: {why}")
        trace = make_trace(args, run.config, run.family, run.seed)
        try:
            document["runs"].append(run_trace(bench, engines, trace, label=run.config.label))
        except ValueError as error:
            if not str(error).startswith("--pool-gib"):
                raise
            note(f"{run} is left out: {error}")
            continue
        if args.mlp and run.seed == args.seeds[0]:
            document["layers"].append(measure_layers(bench, engines, trace, label=run.config.label))
        if args.ablate and run.seed == args.seeds[0]:
            document["ablations"].append(ablate(bench, engines, trace, label=run.config.label, quick=args.quick))
        if args.json is not None:
            document["seconds"] = time.perf_counter() - started
            write_json(args.json, document)


def print_document(document: dict, *, exhaustive: bool) -> list[Table]:
    """Prints every table on stdout, the one line a run last, and returns them."""
    from rich.console import Console
    from serving.ablate import ablation_tables
    from serving.mlp import layers_table
    from serving.report import all_tables

    console = Console(width=None if sys.stdout.isatty() else 190)
    tables = ablation_tables(document["ablations"]) if document["ablations"] else []
    tables += [layers_table(document["layers"])] if document["layers"] else []
    tables += all_tables(document["runs"], exhaustive=exhaustive) if document["runs"] else []
    for table in tables:
        table.print(console)
    return tables


@one_line_errors("serving_trace")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if lacks_gpu("serving_trace"):
        return 1
    about = environment()
    note(", ".join(f"{key} {value}" for key, value in about.items()))
    document = {
        "environment": about,
        "options": {key: str(value) for key, value in vars(args).items()},
        "runs": [],
        "layers": [],
        "ablations": [],
    }
    try:
        bench = make_bench(args)
        run_all(args, bench, document)
    finally:
        tables = print_document(document, exhaustive=args.exhaustive)
        document["peak_gpu_bytes"] = memory.peak_bytes()
        note(memory.peak_line())
        if args.json is not None:
            write_json(args.json, document | {"tables": [asdict(table) for table in tables]})
    return 0 if document["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
