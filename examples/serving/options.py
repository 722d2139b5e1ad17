"""The options of serving_trace.py, and the configurations that they span."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pkvsim import DecodeShape
from pkvsim.traces.paper_families import BUCKETS, FAMILIES, Trace, paper_trace
from pkvsim.traces.paper_families import make_trace as trace_of

EQUAL_BUCKETS = "equal-buckets"  # one row, the steps shared out equally among the four buckets
HELD_OUT_SEEDS = (20260623, 20260624, 20260625, 20260626, 20260627)
DEFAULT_FAMILIES = ("bimodal", "uniform", "zipf")


@dataclass(frozen=True, slots=True)
class Config:
    """One batch size at one head shape: what the families and seeds are run for."""

    shape: DecodeShape
    max_active: int
    requests: int
    steps: int

    @property
    def label(self) -> str:
        return f"B{self.max_active} {self.shape.num_q_heads}/{self.shape.num_kv_heads}"


def comma_list(convert: Callable[[str], object]) -> Callable[[str], tuple]:
    """An argparse type: comma-separated values, none of them empty."""

    def parse(text: str) -> tuple:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"expected comma-separated values, got {text!r}")
        return tuple(convert(part) for part in parts)

    return parse


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text!r}")
    return value


def head_pair(text: str) -> tuple[int, int]:
    """`32/8` as (query heads, KV heads)."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or int(parts[0]) % int(parts[1]):
        raise argparse.ArgumentTypeError(
            f"expected QUERY/KV heads such as 32/8, the first a multiple of the second, got {text!r}"
        )
    return int(parts[0]), int(parts[1])


def family(text: str) -> str:
    if text not in (*FAMILIES, EQUAL_BUCKETS):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(FAMILIES)}, {EQUAL_BUCKETS}, got {text!r}")
    return text


def equal_buckets(seed: int, steps: int, *, page_size: int) -> Trace:
    """One row that decodes steps // 4 tokens (at least one) at each of the paper's four lengths.

    The paper's own trace of one row spends all 64 steps at 8K, since a request's window passes while the one
    before it decodes.
    """
    share = max(1, steps // len(BUCKETS))
    arrivals = [share * index for index in range(len(BUCKETS))]
    return trace_of(
        EQUAL_BUCKETS,
        seed,
        list(BUCKETS),
        [share] * len(BUCKETS),
        arrivals,
        max_active=1,
        steps=share * len(BUCKETS),
        page_size=page_size,
    )


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """What is served: traces, head shapes, pages."""
    group = parser.add_argument_group("traces", "comma-separated lists are run in all combinations")
    group.add_argument("--families", type=comma_list(family), default=DEFAULT_FAMILIES)
    group.add_argument("--max-active", type=comma_list(positive), default=(8,), help="rows decoded at once (8)")
    group.add_argument("--requests", type=positive, help="by default three per active row, at least 16, as the paper")
    group.add_argument(
        "--steps", type=positive, help="measured steps of a trace, by default 48, and 64 with one active row"
    )
    group.add_argument("--stride", type=positive, default=1, help="time every N-th step only (1)")
    group.add_argument("--seeds", type=comma_list(int), default=HELD_OUT_SEEDS)
    group.add_argument("--trace-file", type=Path, help="CSV or JSON requests in place of the families")
    group.add_argument("--heads", type=comma_list(head_pair), default=((32, 8),), help="query/KV heads (32/8)")
    group.add_argument("--head-dim", type=positive, default=128)
    group.add_argument("--page-size", type=positive, default=16)
    group.add_argument("--hole-fraction", type=fraction, default=0.0, help="part of the pages that nobody owns (0)")


def configs(args: argparse.Namespace) -> list[Config]:
    """Every head shape and batch size asked for; --quick keeps traces short."""
    steps = args.steps or None
    return [
        Config(
            DecodeShape(heads, kv_heads, args.head_dim, args.page_size),
            rows,
            args.requests or max(16, 3 * rows),
            steps or (12 if args.quick else 64 if rows == 1 else 48),
        )
        for heads, kv_heads in args.heads
        for rows in args.max_active
    ]


def make_trace(args: argparse.Namespace, config: Config, family_name: str, seed: int) -> Trace:
    """The trace of one run: of a family, or of --trace-file with the seed shuffling its pages."""
    if args.trace_file is None and family_name == EQUAL_BUCKETS:
        return equal_buckets(seed, config.steps, page_size=args.page_size)
    if args.trace_file is None:
        return paper_trace(
            family_name, seed, config.requests, config.max_active, config.steps, page_size=args.page_size
        )
    from pkvsim.traces.paper_files import read_trace

    return read_trace(
        args.trace_file,
        seed=seed,
        requests=args.requests,
        max_active=config.max_active,
        steps=config.steps,
        page_size=args.page_size,
    )
