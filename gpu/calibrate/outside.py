"""Measures what a step costs outside paged decode attention, on the GPU at hand, in about a minute.

    python -m gpu.calibrate.outside -o mygpu_outside.csv     # kernel times, and mygpu_outside_layers.csv beside them
    python -m gpu.calibrate --outside -o mygpu_outside.csv   # the same
    pkvsim fit --outside mygpu_outside.csv --device-base mygpu.json -o mygpu.json

The second file has whole layers of Llama-3.1-8B, which no constant is fitted to. Both are written as they come: a run
cut short leaves what it has.
"""
from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

from gpu.calibrate.outside_kernels import PARTS, TINY, Sizes
from gpu.calibrate.outside_layers import STACK_COLUMNS, LayerShape, StackCell, StackTime, stack_cells, stack_times
from gpu.measure.progress import note
from pkvsim.fitting.outside_table import KernelTime, write_kernel_times

TINY_STACK = LayerShape(hidden=32, mlp_width=64, query_heads=4, kv_heads=2, head_dim=8, layers=2)
TINY_CELLS = [StackCell(rows=2, context=16), StackCell(chunk=8), StackCell(chunk=8, past=16)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.calibrate.outside", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--outside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path, required=True, help="CSV of kernel times")
    parser.add_argument("--layers", type=Path, help="CSV of whole layers, by default NAME_layers.csv beside it")
    parser.add_argument("--only", action="append", choices=[*PARTS, "layers"], help="measure this part; repeatable")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop measuring after this long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the measuring, tiny")
    args = parser.parse_args(argv)
    if args.out.suffix != ".csv":
        parser.error(f"--out: expected a file name that ends in .csv, got {args.out}")
    if args.time_limit is not None and not args.time_limit > 0:
        parser.error(f"--time-limit: expected a number > 0, got {args.time_limit}")
    if args.layers is None:
        args.layers = args.out.with_name(f"{args.out.stem}_layers.csv")
    return args


def measure(args: argparse.Namespace) -> tuple[list[KernelTime], list[StackTime]]:
    """Everything that was asked for, both files rewritten after every part."""
    import torch

    tiny = args.device == "cpu"
    sizes = TINY if tiny else Sizes()
    started = time.perf_counter()
    kernels: list[KernelTime] = []
    layers: list[StackTime] = []

    def late() -> bool:
        return args.time_limit is not None and time.perf_counter() - started > args.time_limit

    with torch.inference_mode():
        for name, part in PARTS.items():
            if args.only and name not in args.only:
                continue
            begun = time.perf_counter()
            for taken in part(sizes, device=args.device, say=note):
                kernels.append(taken)
                if late():
                    note(f"--time-limit: {name} cut short")
                    break
            write_kernel_times(args.out, kernels)
            note(f"{name}: {time.perf_counter() - begun:.1f} s")
        if not args.only or "layers" in args.only:
            begun = time.perf_counter()
            cells, shape = (TINY_CELLS, TINY_STACK) if tiny else (stack_cells(), LayerShape())
            for stacked in stack_times(cells, device=args.device, say=note, shape=shape):
                layers.append(stacked)
                if late():
                    note("--time-limit: layers cut short")
                    break
            write_layers(args.layers, layers)
            note(f"layers: {time.perf_counter() - begun:.1f} s")
    return kernels, layers


def write_layers(path: Path, times: list[StackTime]) -> None:
    """One row a cell, as STACK_COLUMNS."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(STACK_COLUMNS)
        for t in times:
            c = t.cell
            writer.writerow(
                [c.rows, c.context, c.chunk, c.past, t.attention, f"{t.layer_us:.5g}", f"{t.attention_us:.5g}"]
            )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device == "cuda":
        from gpu.measure.environment import lacks_gpu

        if lacks_gpu("calibration"):
            return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kernels, layers = measure(args)
    note(f"wrote {len(kernels)} kernel times to {args.out}, {len(layers)} layers to {args.layers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
