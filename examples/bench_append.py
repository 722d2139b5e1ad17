"""Writing a step's K and V into the cache: one launch against torch's separate steps, alone and with decode behind it.

    python examples/bench_append.py                          # 8 to 256 rows and a prefill, 16-bit and quantised pages
    python examples/bench_append.py --batches 64 --kv-dtypes float16,float8_e4m3fn --json append.json

Separate steps are torch operations: rotate K and queries, quantise, index_put K and V; pages and slots are at hand, as
a slot mapping made once a step would have them. Each result is checked before it is timed. Times are per call inside a
CUDA graph that goes round layers with pages of their own: decode reads them cold, the new tokens are in the L2 as a
projection leaves them. GB/s counts each token's bytes once in and once out.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bench.script import run_script
from bench.tables import Table, us

from gpu.measure import memory
from pkvsim import DecodeShape
from pkvsim.reference.rope import Rope, make_cos_sin

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from gpu.cache.writer import CacheWriter

KV_DTYPES = ("float16", "float8_e4m3fn", "float8_e5m2", "int8")
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
SCALE = 0.05  # of FP8 pages
CHECKED_PAGES = 4096  # compared at a time, in float32
CONTEXT, MAX_POSITIONS = 4096, 8192  # tokens of a row when decode follows; positions of the table


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    case: str
    num_tokens: int
    kv_dtype: str
    route: str
    time_us: float
    launches: int | None  # of the append or the separate steps alone
    moved_bytes: int  # by the append, each token's bytes once in and once out
    separate_us: float | None = None  # the same work in separate steps


@dataclass(frozen=True, slots=True)
class Case:
    """A step's arrays: layers of pages that share a block table."""

    name: str
    shape: DecodeShape
    q: torch.Tensor  # [num_tokens, num_q_heads, head_dim], as k_new and v_new a slice of one projection
    k_new: torch.Tensor
    v_new: torch.Tensor
    seq_lens: torch.Tensor  # [batch_size] int32
    block_table: torch.Tensor  # [batch_size, max_pages] int32
    token_offsets: torch.Tensor | None
    positions: torch.Tensor  # [num_tokens] int64, as pages and slots for the separate steps
    pages: torch.Tensor
    slots: torch.Tensor
    layers: list[tuple[torch.Tensor, ...]]  # (k_pages, v_pages) and INT8's (k scales, v scales)

    def moved_bytes(self) -> int:
        """K, V and q read and written once, scales written once."""
        new = self.k_new.numel()
        written = sum(new * part[0].nbytes // self.layers[0][0][0].numel() for part in self.layers[0])
        return 2 * new * self.k_new.element_size() + written + 2 * self.q.numel() * self.q.element_size()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="8,64,256", help="rows of the decode steps, comma-separated")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill, 0 leaves it out")
    parser.add_argument("--kv-dtypes", default=",".join(KV_DTYPES), help=f"comma-separated, of {', '.join(KV_DTYPES)}")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="graph replays per timing")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args(argv)
    unknown = set(args.kv_dtypes.split(",")) - set(KV_DTYPES)
    if unknown:
        parser.error(f"--kv-dtypes: expected of {', '.join(KV_DTYPES)}, got {', '.join(sorted(unknown))}")
    try:
        args.batches = [int(word) for word in args.batches.split(",")]
        query_heads, kv_heads = (int(word) for word in args.heads.split("/"))
        args.shape = DecodeShape(query_heads, kv_heads, args.head_dim, args.page_size)
    except ValueError as error:
        parser.error(f"--batches, --heads: expected integers, as 8,64 and 32/8: {error}")
    if min(args.batches) < 1 or args.prefill < 0 or args.repeats < 1:
        parser.error("--batches, --prefill, --repeats: expected positive numbers")
    return args


def row_bytes(shape: DecodeShape, kv_dtype: str, context: int) -> int:
    """GPU memory that a row of `context` tokens takes in one layer: its pages, and INT8's scales."""
    slots = 2 * -(-context // shape.page_size) * shape.page_size * shape.num_kv_heads
    return slots * (shape.head_dim * (2 if kv_dtype == "float16" else 1) + (4 if kv_dtype == "int8" else 0))


def make_case(name: str, shape: DecodeShape, kv_dtype: str, *, rows: int, new_tokens: int, context: int) -> Case:
    """`rows` rows of `context` tokens, the last new_tokens of them new. Layers enough to keep the L2 cold."""
    import torch

    from gpu.measure.timing import l2_bytes, rotation_length

    tokens, pages_per_row = rows * new_tokens, -(-context // shape.page_size)
    widths = [heads * shape.head_dim for heads in (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)]
    fused = torch.randn(tokens, sum(widths), device="cuda").half()
    q, k_new, v_new = (part.unflatten(1, (-1, shape.head_dim)) for part in fused.split(widths, dim=1))
    num_pages = rows * pages_per_row
    table = torch.randperm(num_pages, device="cuda", dtype=torch.int32).view(rows, pages_per_row)
    page = (num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
    count = max(2, min(64, rotation_length(rows * row_bytes(shape, kv_dtype, context), l2_size=l2_bytes())))
    layers = []
    for _ in range(count):
        pools = [torch.zeros(page, dtype=getattr(torch, kv_dtype), device="cuda") for _ in "kv"]
        scales = [torch.zeros(page[:3], device="cuda") for _ in "kv"] if kv_dtype == "int8" else []
        layers.append((*pools, *scales))
    offsets = None if new_tokens == 1 else torch.arange(rows + 1, device="cuda", dtype=torch.int32) * new_tokens
    lens = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    positions = torch.arange(context - new_tokens, context, device="cuda").repeat(rows)
    of_row = torch.arange(rows, device="cuda").repeat_interleave(new_tokens)
    pages, slots = table[of_row, positions // shape.page_size].long(), positions % shape.page_size
    return Case(name, shape, q, k_new, v_new, lens, table, offsets, positions, pages, slots, layers)


def separate_steps(case: Case, cos_sin: torch.Tensor, layer: tuple[torch.Tensor, ...], q_out: torch.Tensor) -> None:
    """The same append by torch operations, none of which waits for the host."""
    import torch

    cosine, sine = cos_sin[case.positions][:, None].chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)

    q_out.copy_(rotate(case.q))
    for side, values in enumerate((rotate(case.k_new), case.v_new)):
        pool = layer[side]
        if pool.dtype == torch.int8:
            scale = values.float().abs().amax(dim=-1) / 127
            layer[2 + side].transpose(1, 2)[case.pages, case.slots] = scale
            values = (values.float() / scale[..., None]).round()
        elif pool.element_size() == 1:
            largest = LARGEST[str(pool.dtype).removeprefix("torch.")]
            values = (values.float() / SCALE).clamp(-largest, largest).to(pool.dtype).view(torch.uint8)
            pool = pool.view(torch.uint8)
        pool.transpose(1, 2)[case.pages, case.slots] = values.to(pool.dtype)


def fused_step(case: Case, writer: CacheWriter, layer: tuple[torch.Tensor, ...], q_out: torch.Tensor) -> None:
    options = {"k_token_scales": layer[2], "v_token_scales": layer[3]} if len(layer) == 4 else {}
    if "float8" in writer.kv_dtype:
        options = {"k_scale": SCALE, "v_scale": SCALE}
    writer.append(case.k_new, case.v_new, *layer[:2], seq_lens=case.seq_lens, block_table=case.block_table,
                  token_offsets=case.token_offsets, q=case.q, q_out=q_out, **options)


def check(case: Case, fused: Callable[..., None], separate: Callable[..., None]) -> None:
    """Stops unless both write the same, up to a step of the cache's type, since torch rounds once more on the way."""
    import torch

    q_outs = [torch.empty_like(case.q, memory_format=torch.contiguous_format) for _ in range(2)]
    fused(case.layers[0], q_outs[0])
    separate(case.layers[1], q_outs[1])
    torch.cuda.synchronize()
    kind = str(case.layers[0][0].dtype).removeprefix("torch.")
    step = {"float16": 2e-3, "float8_e4m3fn": 0.13, "float8_e5m2": 0.26, "int8": 1.01}[kind]
    for ours, theirs in (*zip(case.layers[0], case.layers[1]), (q_outs[0], q_outs[1])):
        tolerance = step if ours.element_size() == 1 else 2e-3
        for mine, other in zip(ours.split(CHECKED_PAGES), theirs.split(CHECKED_PAGES)):
            difference, most = (mine.float() - other.float()).abs(), other.float().abs().clamp(min=1)
            if not bool((difference <= tolerance * most).all()):
                sys.exit(f"bench_append: {case.name} {kind}: results differ by up to {float(difference.max()):.3g}")


def count_launches(body: Callable[[], None]) -> int:
    """Kernels and copies that one call puts on the GPU."""
    import torch

    body()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        body()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure(case: Case, kv_dtype: str, cos_sin: torch.Tensor, *, repeats: int, decode: bool) -> list[Result]:
    import torch

    from gpu import CacheWriter, DecodeEngine
    from gpu.measure.timing import graph_time_us

    writer = CacheWriter(case.shape, kv_dtype=kv_dtype, rope=Rope(style="half", cos_sin=cos_sin))
    q_out = torch.empty_like(case.q, memory_format=torch.contiguous_format)

    def fused(layer: tuple[torch.Tensor, ...], to: torch.Tensor = q_out) -> None:
        fused_step(case, writer, layer, to)

    def separate(layer: tuple[torch.Tensor, ...], to: torch.Tensor = q_out) -> None:
        separate_steps(case, cos_sin, layer, to)

    check(case, fused, separate)
    routes = {"append": fused, "separate steps": separate}
    launches = {name: count_launches(lambda route=route: route(case.layers[0])) for name, route in routes.items()}
    if decode:
        engine = DecodeEngine(case.shape)
        engine.plan(case.seq_lens, case.block_table)
        out = torch.empty_like(q_out)
        lse = torch.empty(q_out.shape[:2], device="cuda")

        def attend(layer: tuple[torch.Tensor, ...]) -> None:
            engine.run(q_out, *layer[:2], out=out, lse=lse)

        routes |= {"decode": attend, "append + decode": lambda layer: (fused(layer), attend(layer)),
                   "separate steps + decode": lambda layer: (separate(layer), attend(layer))}
    times = {name: graph_time_us(lambda i, route=route: route(case.layers[i]), variants=len(case.layers),
                                 repeats=repeats).median_us for name, route in routes.items()}
    against = {"append": "separate steps", "append + decode": "separate steps + decode"}
    return [Result(case.name, len(case.positions), kv_dtype, name, time_us, launches.get(name), case.moved_bytes(),
                   times.get(against.get(name, "")))
            for name, time_us in times.items()]


def table(results: list[Result], shrunk: tuple[str, ...] = ()) -> Table:
    """shrunk: sentences on what was measured in a smaller form."""
    rows = tuple((r.case, str(r.num_tokens), r.kv_dtype, r.route,
                  "-" if r.launches is None else str(r.launches), us(r.time_us),
                  f"{r.moved_bytes / r.time_us / 1e3:.1f}" if r.route in ("append", "separate steps") else "-",
                  "-" if r.separate_us is None else f"{r.separate_us / r.time_us:.2f}") for r in results)
    return Table("writing the cache, kernel time in a CUDA graph",
                 ("case", "tokens", "pages", "route", "launches", "us", "GB/s", "x separate"), rows, "\n".join(shrunk))


def measure_all(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every step of every type of cache, in as many rows as GPU memory has room for."""
    import torch

    from gpu.measure.progress import tracked

    torch.manual_seed(20260623)
    inv_freq = 500000.0 ** (-np.arange(args.head_dim // 2) / (args.head_dim // 2))
    cos_sin = torch.from_numpy(make_cos_sin(inv_freq, MAX_POSITIONS)).cuda()
    jobs = [(f"decode {rows}", rows, 1, CONTEXT, kv) for rows in args.batches for kv in args.kv_dtypes.split(",")]
    if args.prefill:
        jobs += [("prefill", -(-args.prefill // CONTEXT), min(args.prefill, CONTEXT), CONTEXT, kv)
                 for kv in args.kv_dtypes.split(",")]
    results, shrunk = [], []
    for name, rows, new_tokens, context, kv_dtype in tracked(jobs, "measuring", lambda job: f"{job[0]} {job[4]}"):
        # Two layers at the least; the decode step's workspace and the separate steps' copies take the rest.
        room = memory.fitting(rows, bytes_each=2 * row_bytes(args.shape, kv_dtype, context))
        if room < rows:
            shrunk.append(f"{name} {kv_dtype}: {room} rows in place of {rows}, for which GPU memory has no room")
            name = f"{name.split()[0]} {room}"
        case = make_case(name, args.shape, kv_dtype, rows=room, new_tokens=new_tokens, context=context)
        results += measure(case, kv_dtype, cos_sin, repeats=args.repeats,
                           decode=kv_dtype == "float16" and new_tokens == 1)
        del case
    table(results, tuple(shrunk)).print(console)
    return {"shrunk": shrunk, "results": [dataclasses.asdict(result) for result in results]}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("bench_append", args, functools.partial(measure_all, args), width=120)


if __name__ == "__main__":
    sys.exit(main())
