"""Decode over 8-bit caches against the same step over a 16-bit one, and against reading the bytes alone.

    python examples/bench_kv_types.py                            # every type and kind of scales, short to long steps
    python examples/bench_kv_types.py --kinds float8_e4m3fn/tensor,int8/token --cells 8x32768 --json kv_types.json

A kind is TYPE/SCALES, or TYPE with the scales that CacheWriter gives it. Kernel time in a CUDA graph that goes round
disjoint copies of the step's cache, cold in L2; every result is checked before it is timed. x limit: over the time to
stream the bytes of K, V and scales; x 16-bit: over the 16-bit cache's time, which 8-bit pages should about halve where
the step is long.
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpu.environment import environment, missing, write_json
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.cost import useful_kv_bytes
from pkvsim.kv_types import KV_DTYPES, KV_SCALES
from result_tables import Table, us

if TYPE_CHECKING:
    import torch

    from gpu.bench_pool import BenchPool
    from gpu.timing import StreamLimit

CELLS = ((1, 8192), (8, 8192), (8, 32768), (32, 32768), (64, 4096))  # rows, tokens each
UNIT = {"float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 16, "int8": 1 / 32}  # scale of pages of about normal values
MAX_ERROR = 2e-2  # against 16-bit pages of the same values


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    cell: str
    kind: str
    variant: str
    time_us: float
    kv_bytes: int
    limit_us: float  # to stream kv_bytes


def kind_of(text: str) -> AttentionOptions:
    """TYPE, TYPE/SCALES or "16-bit". Raises ValueError."""
    if text == "16-bit":
        return AttentionOptions()
    name, _, scales = text.partition("/")
    return AttentionOptions(kv_dtype=name, kv_scales=scales or None)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(f"{kv}/{scales}" for kv in KV_DTYPES for scales in KV_SCALES))
    parser.add_argument("--cells", default=",".join(f"{rows}x{tokens}" for rows, tokens in CELLS), help="rows x tokens")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="of queries and outputs")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--variant", help="WARPSxSTAGES of the 8-bit kernels in place of the default")
    parser.add_argument("--pool-gib", type=float, default=24.0, help="K and V pages of 16 bits together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    try:
        for kind in args.kinds.split(","):
            kind_of(kind)
        args.cells = [tuple(map(int, cell.split("x", 1))) for cell in args.cells.split(",")]
        args.variant = tuple(map(int, args.variant.split("x", 1))) if args.variant else None
        args.shape = DecodeShape(*map(int, args.heads.split("/", 1)), args.head_dim, args.page_size)
    except (ValueError, TypeError) as error:
        parser.error(f"--kinds, --cells, --variant, --heads: {error}")
    if min(min(cell) for cell in args.cells) < 1 or any(len(cell) != 2 for cell in args.cells):
        parser.error(f"--cells: expected positive ROWSxTOKENS, got {args.cells}")
    return args


def quantised_pool(plain: BenchPool, kv_dtype: str | None) -> BenchPool:
    """The pool's values as 8-bit codes of UNIT each."""
    import torch

    from gpu.bench_pool import BenchPool

    if kv_dtype is None:
        return plain
    pool = BenchPool(pool_gib=0, dtype=plain.flat.dtype, seed=0)
    pool.flat = torch.empty_like(plain.flat, dtype=torch.uint8)
    for to, values in zip(pool.flat.split(2**28), plain.flat.split(2**28)):
        steps = values.float() / UNIT[kv_dtype]
        int8 = kv_dtype == "int8"
        codes = steps.round().clamp(-127, 127).to(torch.int8) if int8 else steps.to(getattr(torch, kv_dtype))
        to.copy_(codes.view(torch.uint8))
    return pool


def check(shape: DecodeShape, options: AttentionOptions, q: torch.Tensor, out: torch.Tensor, lens: torch.Tensor,
          table: np.ndarray, layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The output against that of a 16-bit cache of the same values. Raises RuntimeError."""
    import torch

    from gpu import DecodeEngine

    used, places = np.unique(table, return_inverse=True)
    kind = torch.int8 if options.kv_dtype == "int8" else getattr(torch, options.kv_dtype)
    ids = torch.from_numpy(used.astype(np.int64)).cuda()
    values = [(pages[ids].view(kind).float() * UNIT[options.kv_dtype]).to(q.dtype) for pages in layer]
    engine = DecodeEngine(shape, str(q.dtype).removeprefix("torch."))
    engine.plan(lens, torch.from_numpy(places.reshape(table.shape).astype(np.int32)).cuda())
    error = float((out.float() - engine.run(q, *values)[0].float()).abs().max())
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{options}: error {error:.3g} against a 16-bit cache, expected at most {MAX_ERROR}")


def measure(cell: tuple[int, int], options: AttentionOptions, pool: BenchPool, limit: StreamLimit,
            args: argparse.Namespace) -> Result:
    import torch

    from gpu import DecodeEngine
    from gpu.timing import graph_time_us, l2_bytes

    shape, kv_dtype = args.shape, options.kv_dtype
    lens = np.full(cell[0], cell[1], np.int32)
    kv_bytes = useful_kv_bytes(shape, lens, options)
    laid = pool.lay_out(shape, lens, kv_bytes=kv_bytes, l2_size=l2_bytes(), seed=1)
    layers = [tuple(p.view(torch.int8) if kv_dtype == "int8" else p for p in layer) for layer in laid.layers]
    engine = DecodeEngine(shape, args.dtype, options=options, variant=args.variant if kv_dtype else None)
    seq_lens = torch.from_numpy(lens).cuda()
    engine.plan(seq_lens, torch.from_numpy(laid.block_table).cuda())
    q = torch.randn(cell[0], shape.num_q_heads, shape.head_dim, device="cuda").to(getattr(torch, args.dtype))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    scales: list[dict] = [{} for _ in layers]
    if kv_dtype is not None:
        whole = len(layers[0][0]), shape.num_kv_heads, shape.page_size
        size = {"tensor": (1,), "page": whole[:2], "token": whole}[options.kv_scales]
        scales = [{name: torch.full(size, UNIT[kv_dtype], device="cuda") for name in ("k_scale", "v_scale")}
                  for _ in layers]

    def attend(index: int) -> None:
        engine.run(q, *layers[index], out=out, lse=lse, **scales[index])

    attend(0)
    if kv_dtype is not None:
        check(shape, options, q, out, seq_lens, laid.block_table, layers[0])
    time_us = graph_time_us(attend, variants=len(layers), repeats=args.repeats).median_us
    return Result(f"{cell[0]}x{cell[1]}", name_of(options), f"{engine.config.warps}x{engine.config.stages}", time_us,
                  kv_bytes, limit.time_us(kv_bytes))


def name_of(options: AttentionOptions) -> str:
    return "16-bit" if options.kv_dtype is None else f"{options.kv_dtype}/{options.kv_scales}"


def table(results: list[Result]) -> Table:
    plain = {r.cell: r.time_us for r in results if r.kind == "16-bit"}
    rows = tuple((r.cell, r.kind, r.variant, us(r.time_us), f"{r.kv_bytes / r.time_us / 1e3:.0f}",
                  f"{r.time_us / r.limit_us:.2f}", f"{r.time_us / plain[r.cell]:.3f}" if r.cell in plain else "-")
                 for r in results)
    return Table("decode by type of cache, kernel time in a CUDA graph",
                 ("rows x tokens", "cache", "warps x stages", "us", "GB/s", "x limit", "x 16-bit"), rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    lack = missing()
    if lack is not None:
        print(f"bench_kv_types needs a CUDA GPU with CuPy and PyTorch; {lack}.", file=sys.stderr)
        return 1
    import torch
    from rich.console import Console

    from gpu.bench_pool import BenchPool, fitting_gib
    from gpu.progress import tracked
    from gpu.timing import StreamLimit

    torch.manual_seed(20260623)
    about = environment()
    plain = BenchPool(pool_gib=fitting_gib(args.pool_gib), dtype=getattr(torch, args.dtype), seed=20260623)
    limit, results, pool, held = StreamLimit(plain.flat), [], plain, None
    kinds = [AttentionOptions(), *sorted(map(kind_of, args.kinds.split(",")), key=name_of)]
    jobs = [(options, cell) for options in kinds for cell in args.cells]
    for options, cell in tracked(jobs, "measuring", lambda job: f"{name_of(job[0])} {job[1][0]}x{job[1][1]}"):
        if options.kv_dtype != held:
            pool, held = quantised_pool(plain, options.kv_dtype), options.kv_dtype
        results.append(measure(cell, options, pool, limit, args))
    results.sort(key=lambda result: args.cells.index(tuple(map(int, result.cell.split("x")))))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    table(results).print(console)
    if args.json is not None:
        write_json(args.json, {"environment": about, "results": [dataclasses.asdict(result) for result in results]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
