"""Decode over several GPUs: the merge inside the kernel, NCCL's way from the same states, and one GPU alone.

    python examples/bench_several.py                        # two ranks that share one GPU, each with half its SMs
    torchrun --nproc-per-node 2 examples/bench_several.py   # a process for each GPU, with NCCL's way beside it
    python examples/bench_several.py --gpus 2               # both GPUs from one process

"one": one engine on one GPU that has all pages. "alone": every rank's pages by an engine of its own, the slowest one's
time. "several, head": this project's kernel over all ranks, each of which owns some heads; "all": all own everything;
"overlapping", of ranks that share a GPU: the next launch begins once all CTAs of the step are there, as launches of one
engine and of ranks with a GPU each do anyway.
"all-to-all", "all-gather": the same states through NCCL and a merge kernel. Results are checked against "one", and that
they repeat bit for bit, before they are timed. Times are per call in CUDA graphs that are replayed on all ranks at a
time, the slowest rank's; calls read distinct pages, over four times the L2, before any page comes back. All graphs are
enqueued before any of them starts, the ranks then start together with no word from the host, and a graph holds so many
calls that the few us between the starts do not count.

"fastest alone": the rank that is done first, where "alone" is the one that is done last; "merge adds": to "alone".
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from bench.script import chosen, print_notes, run_script

from gpu.several.inbox import OWNERS

if TYPE_CHECKING:
    from rich.console import Console

# Multicast is of no use here, and torch would set it up.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
# Streams of ranks that share a GPU must not wait for each other in one of its queues.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="devices of this process, without torchrun")
    parser.add_argument("--ranks", type=int, default=2, help="ranks that share the GPU, of one")
    parser.add_argument("--cells", default="all", help="numbers of cells, from 0, all, or long: a row of 1M tokens")
    parser.add_argument("--owners", default="head,all", help="who owns the outputs: head, row, all")
    parser.add_argument("--repeats", type=int, default=7, help="graph replays per timing")
    parser.add_argument("--json", type=pathlib.Path, help="write everything measured here")
    args = parser.parse_args(argv)
    args.owners = tuple(args.owners.split(","))
    if not set(args.owners) <= set(OWNERS):
        parser.error(f"--owners: expected some of {', '.join(OWNERS)}, got {','.join(args.owners)!r}")
    for name, least in (("gpus", 1), ("ranks", 2), ("repeats", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    return args


def make_groups(args: argparse.Namespace) -> tuple[object, object | None]:
    """(the ranks that reach each other, the same by collectives or None)."""
    import torch

    from gpu.several import CollectiveGroup, DeviceGroup, SymmetricGroup

    if "LOCAL_RANK" in os.environ:
        import torch.distributed as dist

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
        return SymmetricGroup(), CollectiveGroup()
    return DeviceGroup([0] * args.ranks if args.gpus == 1 else range(args.gpus)), None


def table(results: list, ranks: int):
    from bench.tables import Table

    ways = list(dict.fromkeys(way for result in results for way in result.ways))
    rows = []
    for result in results:
        one = result.ways["one"][0]
        cells = []
        for way in ways:
            found = result.ways.get(way)
            cells.append("-" if found is None else f"{found[0]:.1f}")
        several = next(result.ways[f"several, {owner}"][0] for owner in ("head", "all", "row")
                       if f"several, {owner}" in result.ways)
        rows.append((result.cell, *cells, f"{min(result.by_rank['alone']):.1f}", f"{several / one:.3f}",
                     f"{several - result.ways['alone'][0]:+.1f}"))
    columns = ("cell", *ways, "fastest alone", "over one", "merge adds")
    return Table(f"Decode over {ranks} ranks, us", columns, tuple(rows))


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    from several_bench.cells import CELLS, LONG, ONE_GPU
    from several_bench.measure import SeveralBench

    group, collectives = make_groups(args)
    shared = group.sharers(group.ranks[0]) > 1
    bench = SeveralBench(group, collectives, repeats=args.repeats, num_ctas=part_of_sms(group) if shared else None)
    results = []
    for cell in chosen("bench_several", args.cells, ONE_GPU if shared else CELLS, long=LONG):
        results.append(bench.measure(cell, args.owners))
        console.print(f"{cell.name}: {results[-1].ways}", markup=False)
        print_notes(console, cell.name, (f"{way}: {note}" for way, note in results[-1].notes.items()))
    table(results, group.num_ranks).print(console)
    console.print(f"{group.num_ranks} ranks, {type(group).__name__}{', which share one GPU' if shared else ''}")
    if collectives is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
    return {"ranks": group.num_ranks, "group": type(group).__name__, "share_one_gpu": shared,
            "results": [dataclasses.asdict(result) for result in results]}


def part_of_sms(group) -> int:
    """CTAs of each of the ranks that share a GPU."""
    from gpu.kernels.this_gpu import this_gpu

    return this_gpu().num_sms // group.num_ranks


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    leads = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    return run_script("bench_several", args, functools.partial(measure, args), width=170, leads=leads)


if __name__ == "__main__":
    sys.exit(main())
