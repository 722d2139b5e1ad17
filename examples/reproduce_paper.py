"""Every table of the paper on the GPU at hand, in one run, beside the paper's RTX 3060 figures.

    python examples/reproduce_paper.py                    # examples/results/<gpu>_paper.md
    python examples/reproduce_paper.py -o mine.md --json mine.json --quick

Isolated calls, held-out serving at 8, 4 and 1 rows, counters, split counts, raggedness and group sizes. One row is
measured on the paper's 64 steps, which are all at 8K tokens, and on equal shares of its four lengths. The page is
rewritten after every part, so that a run cut short leaves what it has.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.script import one_line_errors
from serving.options import EQUAL_BUCKETS, HELD_OUT_SEEDS, Config, equal_buckets, positive

from gpu.measure import memory
from gpu.measure.environment import environment, gpu_slug, lacks_gpu, write_json
from gpu.measure.progress import note, tracked

if TYPE_CHECKING:
    from serving.engines import EngineSet
    from serving.run import Bench

POOL_GIB = 32.0
HEADS = (32, 8)
# (rows, requests, steps) and the splits that the paper pins by family: split's, workqueue's
SERVING = {
    (8, 24, 48): {"bimodal": (32, 20), "uniform": (32, 24), "zipf": (32, 28)},
    (4, 16, 48): {"bimodal": (32, 20), "uniform": (32, 24), "zipf": (32, 28)},
    (1, 16, 64): {"bucketed": (32, 24), EQUAL_BUCKETS: (32, 24)},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="the Markdown page, by default examples/results/<gpu>_paper.md")
    parser.add_argument("--json", type=Path, help="write everything measured here, after every part")
    parser.add_argument(
        "--device", help="the calibrated GPU to route by: a name of pkvsim's or a .json file; by default this GPU's"
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="timings of every step and engine, of which the median counts (3)"
    )
    parser.add_argument("--pool-gib", type=float, help=f"K and V pages together, by default {POOL_GIB:g} or what fits")
    parser.add_argument("--quick", action="store_true", help="one seed, every 8th step, few cells")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no further part after this long")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".md":
        parser.error(f"--out: expected a file name that ends in .md, got {args.out}")
    for name in ("pool_gib", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number > 0, got {value}")
    return args


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A piece of the page: `measure` returns what is added to the document's list `key`."""

    name: str
    key: str
    measure: Callable[[], list[dict]]

    def __str__(self) -> str:
        return self.name


def make_parts(args: argparse.Namespace, bench: Bench) -> list[Part]:
    """All measurements in the page's order of importance."""
    from paper import cells as paper_cells
    from serving.engines import build_engines
    from serving.run import run_trace

    from pkvsim import DecodeShape
    from pkvsim.devices.route_model import ROUTES
    from pkvsim.traces.paper_families import paper_trace

    built: dict[tuple[int, int], EngineSet] = {}

    def engines(heads: tuple[int, int] = HEADS) -> EngineSet:
        if heads not in built:
            built.clear()  # FlashInfer's workspaces of one shape at a time
            built[heads] = build_engines(
                DecodeShape(*heads, 128, 16), bench.dtype, (*ROUTES, "adaptive"), device=bench.device, layers=1
            )
            for name, why in built[heads].left_out.items():
                note(f"{heads[0]}/{heads[1]} heads: {name} is left out: {why}")
        return built[heads]

    def serve(config: Config, family: str, seed: int, pinned: tuple[int, int]) -> list[dict]:
        trace = (
            equal_buckets(seed, config.steps, page_size=16)
            if family == EQUAL_BUCKETS
            else paper_trace(family, seed, config.requests, config.max_active, config.steps)
        )
        pins = dataclasses.replace(bench, pinned=dict(zip(("split", "workqueue"), pinned, strict=True)))
        return [run_trace(pins, engines(), trace, label=config.label)]

    cells = [
        Part("isolated calls", "isolated", lambda: paper_cells.isolated(bench, engines(), quick=args.quick)),
        Part("split counts", "splits", lambda: paper_cells.split_sweep(bench, engines(), quick=args.quick)),
        Part("raggedness", "ragged", lambda: paper_cells.raggedness(bench, engines(), quick=args.quick)),
    ]
    serving = []
    for seed in HELD_OUT_SEEDS[:1] if args.quick else HELD_OUT_SEEDS:
        for (rows, requests, steps), families in SERVING.items():
            config = Config(DecodeShape(*HEADS, 128, 16), rows, requests, steps)
            serving += [
                Part(
                    f"{config.label} {family} {seed}",
                    "serving",
                    lambda c=config, f=family, s=seed, p=pins: serve(c, f, s, p),
                )
                for family, pins in families.items()
            ]
    groups = [
        Part(
            f"group size {heads[0] // heads[1]}",
            "groups",
            lambda h=heads: paper_cells.group_sweep(bench, engines(h), quick=args.quick),
        )
        for heads in paper_cells.GROUP_HEADS
    ]
    return cells + serving + groups


def measure(args: argparse.Namespace, out: Path, document: dict) -> None:
    """Runs every part, rewriting the page (and the JSON) after each."""
    from paper.markdown import render
    from serving_trace import make_bench

    started = time.perf_counter()
    shared = argparse.Namespace(
        device=args.device,
        pool_gib=args.pool_gib,
        dtype="float16",
        layers=1,
        repeats=args.repeats,
        stride=8 if args.quick else 1,
        hole_fraction=0.0,
        split_splits=None,
        workqueue_splits=None,
    )
    parts = make_parts(args, make_bench(shared, default_gib=POOL_GIB))
    out.parent.mkdir(parents=True, exist_ok=True)
    for done, part in enumerate(tracked(parts, "reproducing")):
        if args.time_limit is not None and time.perf_counter() - started > args.time_limit:
            note(f"--time-limit: {len(parts) - done} of {len(parts)} parts left out, from {part} on")
            break
        document.setdefault(part.key, []).extend(part.measure())
        document |= {"seconds": time.perf_counter() - started, "peak_gpu_bytes": memory.peak_bytes()}
        out.write_text(render(document), encoding="utf-8")
        if args.json is not None:
            write_json(args.json, document)


@one_line_errors("reproduce_paper")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if lacks_gpu("reproduce_paper"):
        return 1
    about = environment()
    note(", ".join(f"{key} {value}" for key, value in about.items()))
    out = args.out or Path(__file__).parent / "results" / f"{gpu_slug(about['gpu'])}_paper.md"
    document = {"environment": about, "options": {key: str(value) for key, value in vars(args).items()}}
    measure(args, out, document)
    print(f"wrote {out}")
    print(memory.peak_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
