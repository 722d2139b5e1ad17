"""The pool beyond HBM, measured on this machine, each figure beside its roof from the same run.

    python examples/bench_pool.py --directory /tmp                      # all of it, within three minutes on an H200
    python examples/bench_pool.py --parts disk,tiers,limited,stand-in --directory /tmp   # what needs no GPU
    python examples/bench_pool.py --parts copies,decode --ways staged,DMA --json pool.json

Copies: scattered pages of 32 layers, against one cudaMemcpyAsync of everything. Disk: random blocks, compared on the
GPU, in turn with a plain C loop of the same depth over the same file. Tiers: three disks of unlike rates; they are
directories on tmpfs and on the disk behind limiters, and labelled so. First token: 128K tokens of Llama-3.1-8B's sizes
from host memory, and 3:1 from host memory and four limited disks, against host memory and then one disk by files.
Limited: these four disks alone. Stand-in: the load of the first token at a tenth of the rates and bytes, over pages
that take the time of a driver and a link. With --trace these parts say where each disk's time went, and with --variants
these two measure a load with other windows and ways of copies, and with more buffers.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.script import run_script
from bench.tables import Table
from pool_bench import disks
from pool_bench.noted import KEPT, VARIANTS

from gpu.cache.dma import ask_for_queues
from gpu.calibrate.tier_rates import link_rates
from gpu.measure import memory
from gpu.measure.environment import missing
from pkvsim.memory.placement import BANDWIDTH, EQUAL

if TYPE_CHECKING:
    from rich.console import Console

PARTS = ("copies", "decode", "disk", "tiers", "limited", "stand-in", "ttft")
NEED_GPU = ("copies", "decode", "ttft")
KIB, MIB, GIB = 2**10, 2**20, 2**30
RUNS = (4 * KIB, 16 * KIB, 64 * KIB)
DMA_RUNS = 32 * KIB, 64 * KIB, 512 * KIB
COPY_RUNS = {  # by way
    "kernels": RUNS, "DMA": DMA_RUNS, "DMA in + kernel out": (64 * KIB,),
    "staged": RUNS, "staged by 4 MiB": (64 * KIB,),
}  # fmt: skip
DECODE_RUNS = {"kernels": (32 * KIB,), "DMA": DMA_RUNS, "staged": RUNS, "staged by 4 MiB": (64 * KIB,)}
DISK_BLOCKS = (2 * MIB, 256 * KIB)
TIER_RATES = (0.6, 1.2, 0.3)  # GB/s, of the limiters
TIER_BLOCKS = 768  # of 2 MiB
TTFT_TOKENS = 128 * 1024
TTFT_RATES = (36.0, 3.0, 3.0, 3.0, 3.0)  # GB/s of host memory and four limited disks: 3:1
LIMITED_BLOCKS = 2048  # of 2 MiB: the disks' part of the prompt
SHM = Path("/dev/shm")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Options; exits with 2 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--total-gib", type=float, default=2.0, help="bytes of each copy and disk measurement")
    parser.add_argument("--tokens", type=int, default=TTFT_TOKENS, help="of the prompt of the first-token part")
    parser.add_argument("--ways", default=",".join(COPY_RUNS), help="of copies and decode, of these")
    parser.add_argument("--reader", default="auto", choices=("auto", "io_uring", "preadv"))
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in TTFT_RATES),
                        help="GB/s of host memory and of each limited disk, of these parts")  # fmt: skip
    parser.add_argument("--variants", default=KEPT, help=f"of a load: all, or of {'; '.join(VARIANTS)}")
    parser.add_argument("--trace", action="store_true", help="limited, stand-in, ttft: where each disk's time went")
    parser.add_argument("--json", type=Path, help="writes all figures there")
    args = parser.parse_args(words)
    for name, known in (("parts", PARTS), ("ways", tuple(COPY_RUNS))):
        setattr(args, name, getattr(args, name).split(","))
        unknown = [word for word in getattr(args, name) if word not in known]
        if unknown:
            parser.error(f"--{name}: expected of {', '.join(known)}, got {unknown[0]}")
    args.variants = list(VARIANTS) if args.variants == "all" else args.variants.split(";")
    unknown = [word for word in args.variants if word not in VARIANTS]
    if unknown:
        parser.error(f"--variants: expected of {'; '.join(VARIANTS)}, got {unknown[0]}")
    try:
        args.rates = [float(word) for word in args.rates.split(",")]
    except ValueError:
        args.rates = []
    if len(args.rates) < 2 or not all(0 < rate < 1000 for rate in args.rates):
        parser.error("--rates: expected GB/s of host memory and of at least one disk, 36,3,3 for instance")
    if not 0.01 <= args.total_gib <= 64:
        parser.error(f"--total-gib: expected 0.01 to 64, got {args.total_gib:g}")
    if args.tokens < 1024 or args.tokens % 256:
        parser.error(f"--tokens: expected a multiple of 256 from 1024 on, got {args.tokens}")
    if not args.directory.is_dir():
        parser.error(f"--directory: expected a directory, got {args.directory}")
    return args


def copies(total_bytes: int, ways: Sequence[str]) -> tuple[Table, dict[str, Any]]:
    """Scattered pages each way."""
    from pool_bench import copies as measured

    roof = link_rates(total_bytes)
    rows, found = [], []
    for way, run_bytes in ((one, run) for one in ways for run in COPY_RUNS[one]):
        figures = measured.scattered(run_bytes, total_bytes, way)
        found.append({"way": way, **dataclasses.asdict(figures)})
        rows.append((way, f"{run_bytes // KIB} KiB", *(f"{value:.1f}" for value in (
            figures.in_gb_s, figures.out_gb_s, figures.both_in_gb_s, figures.both_out_gb_s))))  # fmt: skip
    alone = ("in_gb_s", "out_gb_s", "both_gb_s", "both_gb_s")
    rows.append(("roof", "one piece", *(f"{roof[name]:.1f}" for name in alone)))
    table = Table("Scattered pages, GB/s", ("way", "run", "to GPU", "to host", "both: to GPU", "to host"), tuple(rows))
    return table, {"roof": roof, "scattered": found}


def decode(total_bytes: int, ways: Sequence[str]) -> tuple[Table, list[dict[str, Any]]]:
    """What a decode step loses while pages come in."""
    from pool_bench import copies as measured

    rows, found = [], []
    for way, run_bytes in ((one, run) for one in ways for run in DECODE_RUNS.get(one, ())):
        figures = measured.decode_while_loading(total_bytes, way, run_bytes=run_bytes)
        values = (figures.alone_us, figures.loading_us, figures.slower_percent, figures.in_gb_s)
        rows.append((way, f"{run_bytes // KIB} KiB", *(f"{value:.1f}" for value in values)))
        found.append({"way": way, "run_bytes": run_bytes, **dataclasses.asdict(figures),
                      "slower_percent": figures.slower_percent})  # fmt: skip
    columns = ("way", "run", "alone us", "loading us", "slower %", "GB/s in")
    return Table("Decode, 8 rows of 32K, while pages come in", columns, tuple(rows)), found


def device_for(block_bytes: int, pages: int, on_gpu: bool) -> Any:
    """Pages of a GPU, or none where there is none."""
    if not on_gpu:
        return disks.NoPages(block_bytes, pages)
    from pool_bench import copies as measured

    return measured.make_pages(pages, block_bytes // (2 * measured.LAYERS))


def disk(args: argparse.Namespace, total_bytes: int, on_gpu: bool) -> tuple[Table, list[dict[str, Any]]]:
    """One disk against the C loop."""
    rows, found = [], []
    for block_bytes in DISK_BLOCKS:
        device = device_for(block_bytes, max(disks.MIN_BLOCKS, total_bytes // block_bytes), on_gpu)
        figures = disks.one_disk(args.directory, device, total_bytes=total_bytes, reader=args.reader)
        found.append(dataclasses.asdict(figures))
        roof = figures.roof_gb_s
        rows.append((
            f"{block_bytes // KIB} KiB", f"{figures.pool_gb_s:.2f}", f"{roof:.2f}" if roof else "-",
            f"{figures.share * 100:.0f}" if roof else "-", f"{figures.cores_per_gb_s:.3f}",
            f"{figures.thread_cores_per_gb_s:.3f}",
            f"{figures.roof_cores_per_gb_s:.3f}" if roof else "-",
            figures.reader + ("" if figures.direct else ", buffered"),
        ))  # fmt: skip
    columns = (
        "block", "pool GB/s", "C loop GB/s", "%", "cores per GB/s", "thread", "C loop's", "reader",
    )  # fmt: skip
    note = (f"%: the median of {len(found[-1]['pools_gb_s'])} turns, each of the C loop's before and after it. Depth "
            f"{disks.DEPTH_BYTES // MIB} MiB, at least {disks.MIN_DEPTH} reads; cores of all threads, and of the "
            "disk's alone") + (
        "" if on_gpu else "; no GPU: blocks are read, and neither copied nor compared") + "."  # fmt: skip
    return Table(f"Random blocks of {args.directory}", columns, tuple(rows), note), found


def tiers(args: argparse.Namespace, on_gpu: bool) -> tuple[Table, dict[str, Any]]:
    """Three unlike tiers at once."""
    places = [args.directory, SHM if SHM.is_dir() else args.directory, SHM if SHM.is_dir() else args.directory]
    device = device_for(2 * MIB, TIER_BLOCKS, on_gpu)
    rates, rows, found = [rate * 1e9 for rate in TIER_RATES], [], {}
    for placement in (BANDWIDTH, EQUAL):
        figures = disks.three_tiers(places, rates, device, blocks=TIER_BLOCKS, placement=placement)
        found[placement] = figures
        rows.append((placement, f"{figures['gb_s']:.2f}", f"{figures['sum_gb_s']:.2f}", f"{figures['share'] * 100:.0f}",
                     f"{figures['predicted_error_percent']:.1f}"))  # fmt: skip
    note = f"Limiters of {', '.join(f'{rate:g}' for rate in TIER_RATES)} GB/s on {', '.join(map(str, places))}."
    columns = ("placement", "GB/s", "sum GB/s", "%", "prediction off by %")
    return Table("Three unlike tiers at once", columns, tuple(rows), note), found


def limited(args: argparse.Namespace, on_gpu: bool) -> tuple[Table, dict[str, Any], list[Table]]:
    """The first token's disks at once, with no host memory beside them."""
    from pool_bench import trace

    rates, where = args.rates[1:], SHM if SHM.is_dir() else args.directory
    blocks = min(LIMITED_BLOCKS, shutil.disk_usage(where).free // (4 * MIB))
    device = device_for(2 * MIB, blocks, on_gpu)
    gb_s, traces = trace.limited_disks(where, [rate * 1e9 for rate in rates], device, blocks=blocks)
    found = {"gb_s": gb_s, "sum_gb_s": sum(rates), "traces": [dataclasses.asdict(one) for one in traces]}
    row = f"{len(rates)}", f"{gb_s:.2f}", f"{sum(rates):.2f}", f"{gb_s / sum(rates) * 100:.0f}"
    table = Table("Limited disks at once", ("disks", "GB/s", "sum GB/s", "%"), (row,), f"Of 2 MiB blocks on {where}.")
    return table, found, [trace.table_of("The limited disks", traces)]


def stand_in(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]], list[Table]]:
    """The load of the first token without a GPU."""
    from pool_bench import stand_in as timed
    from pool_bench import trace

    where = SHM if SHM.is_dir() else args.directory
    rates, blocks = [rate * 1e9 for rate in args.rates], args.tokens // 16
    rows, found, traced = [], [], []
    for name in args.variants:
        seconds, asked_s, bound_s, traces = timed.load_beside_host(where, rates, blocks=blocks, variant=VARIANTS[name])
        found.append({
            "variant": name, "load_s": seconds, "asked_s": asked_s, "bound_s": bound_s,
            "over_bound": seconds / bound_s, "traces": [dataclasses.asdict(one) for one in traces],
        })  # fmt: skip
        copied = sum(one.copies_s for one in traces) / max(1, sum(one.copies for one in traces))
        rows.append((name, f"{seconds * 1e3:.0f}", f"{bound_s * 1e3:.0f}", f"{seconds / bound_s:.2f}",
                     f"{asked_s * 1e3:.0f}", f"{copied * 1e3:.0f}"))  # fmt: skip
        traced.append(trace.table_of(f"Its disks: {name}", traces))
    note = f"A tenth of the rates {', '.join(f'{rate:g}' for rate in args.rates)} GB/s and of the bytes."
    columns = ("variant", "ms", "bound ms", "x bound", "asked ms", "ms until a block is copied")
    return Table("Load of the first token, on a stand-in", columns, tuple(rows), note), found, traced


def ttft(args: argparse.Namespace) -> tuple[Table, list[dict[str, Any]], list[Table]]:
    """The first token of a long prompt, of as many tokens as GPU memory has room for."""
    import cupy
    from pool_bench import copies as measured
    from pool_bench import trace
    from pool_bench import ttft as first

    link = link_rates(GIB)["in_gb_s"] * 1e9
    cupy.get_default_memory_pool().free_all_blocks()  # of the parts before, which PyTorch may need
    blocks = memory.fitting(args.tokens // first.PAGE, bytes_each=first.BLOCK_BYTES)
    tokens = blocks * first.PAGE
    model = first.Model(blocks)
    compute_s = first.median_s(lambda: model.first_token(lambda layer: None), lambda: None)
    rates = [rate * 1e9 for rate in args.rates]
    runs = measured.scattered(model.device.run_bytes // 2, GIB, "chosen").in_gb_s * 1e9
    shared = {"link_bytes_per_s": link, "runs_bytes_per_s": runs, "compute_s": compute_s}
    found = first.from_pool(model, "host memory", [link], [], **shared)
    if SHM.is_dir():
        disks = [SHM] * (len(rates) - 1)
        found += first.from_pool(model, "host and limited disks", rates, disks, variants=args.variants, **shared)
        found.append(first.from_files(model, link, rates[1], SHM, host_share=0.75, compute_s=compute_s))
    rows = tuple(
        (one.what, f"{one.gb:.1f}", f"{one.ttft_s * 1e3:.0f}", f"{one.bound_s * 1e3:.0f}", f"{one.over_bound:.2f}",
         f"{one.predicted_s * 1e3:.0f}", f"{found[-1].ttft_s / one.ttft_s:.1f}", f"{one.asked_s * 1e3:.0f}",
         f"{one.arrived_s * 1e3:.0f}") for one in found
    )  # fmt: skip
    note = (f"Bound: bytes over the rates or the link, and the last chunk's compute of {compute_s * 1e3:.0f} ms. "
            f"Rates for placement: {', '.join(f'{rate:g}' for rate in args.rates)} GB/s, of host memory and of limited "
            f"disks on {SHM}. Asked: load() had returned; arrived: disks had handed all over.")  # fmt: skip
    columns = ("KV in", "GB", "TTFT ms", "bound ms", "x bound", "predicted ms", "files / this", "asked", "arrived")
    if tokens < args.tokens:
        note += f" {tokens:,} tokens in place of {args.tokens:,}, as GPU memory has room for."
    return Table(f"First token of {tokens / 1024:.0f}K tokens, Llama-3.1-8B's sizes", columns, rows, note), [
        {**dataclasses.asdict(one), "over_bound": one.over_bound} for one in found
    ], [trace.table_of(f"Disks of: {one.what}", one.traces, one.copies.said()) for one in found if one.traces]


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    on_gpu, total, found = missing() is None, int(args.total_gib * GIB), {}
    for part in args.parts:
        traces: list[Table] = []
        if part == "copies":
            table, found[part] = copies(total, args.ways)
        elif part == "decode":
            table, found[part] = decode(total, args.ways)
        elif part == "disk":
            table, found[part] = disk(args, total // 2, on_gpu)
        elif part == "tiers":
            table, found[part] = tiers(args, on_gpu)
        elif part == "limited":
            table, found[part], traces = limited(args, on_gpu)
        elif part == "stand-in":
            table, found[part], traces = stand_in(args)
        else:
            table, found[part], traces = ttft(args)
        table.print(console)
        for one in traces if args.trace else ():
            one.print(console)
    return {"parts": found}


def main(words: list[str] | None = None) -> int:
    args = parse_args(words)
    ask_for_queues()
    needs_gpu = any(part in NEED_GPU for part in args.parts)
    return run_script("bench_pool", args, functools.partial(measure, args), width=130, needs_gpu=needs_gpu)


if __name__ == "__main__":
    sys.exit(main())
