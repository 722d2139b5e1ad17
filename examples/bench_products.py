"""Matrix products of a layer at few rows: how fast each way of computing them streams the weights.

    python examples/bench_products.py --columns 1,8,32,64,128
    python examples/bench_products.py --columns 32 --tiles 128,256 --shared 60,110,220 --groups 0,1

Layers of Llama-3.1-8B's shape follow each other in one CUDA graph, as in a decode step without attention, until their
weights are far larger than L2; a line is the time of a layer and the rate of its 436 MB of weights. Ways: PyTorch's,
PyTorch's with the small kernels of rows.cu, product.cu (at most 8 rows), wide_product.cu of these tiles of rows, KiB of
shared memory a CTA, ways to multiply (PRODUCT_GROUPS), CTAs an SM, and so many units ahead in L2. Variants that this
GPU cannot run are left out and named. --single times each product alone too.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.script import print_notes, run_script

from gpu.measure import memory

if TYPE_CHECKING:
    from rich.console import Console

    from gpu.serve.model.product_variant import WideVariant

HIDDEN, QKV, MLP, LAYERS = 4096, 6144, 14336, 8
SHARED_KIB = 110
SINGLES = ("normed", "out", "gated", "down")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", default="1,8,32,64,128")
    parser.add_argument("--tiles", default="128")
    parser.add_argument("--shared", help=f"KiB; by default {SHARED_KIB}, or all that a CTA may have here")
    parser.add_argument("--groups", help="PRODUCT_GROUPS; by default 1 where the GPU multiplies by warpgroups, else 0")
    parser.add_argument("--ahead", default="8", help="units that are brought to L2 beyond the ring")
    parser.add_argument("--ahead-sums", default="0", help="the same of products that are added to what is there")
    parser.add_argument("--per-sm", default="1", help="CTAs")
    parser.add_argument("--let", default="8", help="units from the end at which the next kernel may start")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--single", action="store_true", help="each product alone too")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    from gpu.kernels.this_gpu import this_gpu
    from gpu.kernels.variant import shared_limit_bytes
    from gpu.serve.model.product_variant import has_groups

    capability = this_gpu().compute_capability
    limit = shared_limit_bytes(capability)
    shared = args.shared or str(min(SHARED_KIB, limit // 1024))
    if shared != (args.shared or str(SHARED_KIB)):
        console.print(f"{shared} KiB of shared memory in place of {SHARED_KIB}, which this GPU does not have")
    kind = getattr(torch, args.dtype)
    shapes = {"normed": (QKV, HIDDEN), "out": (HIDDEN, HIDDEN), "gated": (2 * MLP, HIDDEN), "down": (HIDDEN, MLP)}
    count = memory.fitting(LAYERS, bytes_each=2 * sum(rows * depth for rows, depth in shapes.values()))
    if count < LAYERS:
        console.print(f"{count} layers in place of {LAYERS}, for which GPU memory has no room")
    layers = [{name: (torch.randn(shape, device="cuda") * shape[1] ** -0.5).to(kind) for name, shape in shapes.items()}
              for _ in range(count)]
    given = {"tiles": args.tiles, "shared": shared, "groups": args.groups or str(int(has_groups(capability))),
             "ahead": args.ahead, "let": args.let, "ahead_sums": args.ahead_sums, "per_sm": args.per_sm}
    numbers = {name: list(map(int, text.split(","))) for name, text in given.items()}
    results, left_out = [], []
    for columns in map(int, args.columns.split(",")):
        for name, make in ways(columns, **numbers):
            if isinstance(make, WideShape) and (reason := make.unfit(capability, limit)) is not None:
                left_out.append(f"{columns} columns, {name}: {reason}")
                continue
            products = make()
            parts = [("", SINGLES), *((f" {one}", (one,)) for one in SINGLES if args.single)]
            for what, which in parts:
                us = layer_us(products, layers, columns, which)
                gb = sum(layers[0][one].numel() * 2 for one in which) / 1e9
                console.print(f"{columns:4} {name + what:60} {us:8.2f} us {gb / us * 1e3:6.2f} TB/s", markup=False)
                results.append({"columns": columns, "way": name, "products": which, "us": us})
    print_notes(console, "left out", left_out)
    return {"results": results, "left_out": left_out}


def ways(columns: int, *, tiles: list[int], shared: list[int], groups: list[int],
         ahead: list[int], let: list[int], ahead_sums: list[int],
         per_sm: list[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and what makes the products; of wide_product.cu a WideShape."""
    from gpu.serve.model import product_variant
    from gpu.serve.model.products import RowProducts, StreamedProducts, TorchProducts
    from gpu.serve.model.row_kernels import RowKernels

    yield "torch", lambda: TorchProducts(1e-5)
    yield "torch, rows.cu", lambda: RowProducts(1e-5, RowKernels())
    if columns <= product_variant.MOST_COLUMNS:
        yield "product.cu", lambda: StreamedProducts(1e-5)
    for tile_rows, kib, group, units, left, sums, ctas in itertools.product(
            tiles, shared, groups, ahead, let, ahead_sums, per_sm):
        room = next(wide for wide in product_variant.WIDE_COLUMNS if wide >= columns)
        stages = kib * 1024 // ((tile_rows + room) * product_variant.ROW_BYTES)
        shape = WideShape(room, tile_rows, stages, group, units, left, sums, ctas)
        yield (f"wide, tiles {tile_rows}, {stages} stages, groups {group}, ahead {units} {sums}, let {left}, "
               f"{ctas} an SM"), shape


@dataclasses.dataclass(frozen=True, slots=True)
class WideShape:
    """What the variants of wide_product.cu that a way consists of have in common; called, it makes the products."""

    columns: int  # that it is compiled for
    tile_rows: int
    stages: int
    groups: int  # PRODUCT_GROUPS
    ahead: int
    let: int
    ahead_sums: int
    per_sm: int

    def variant(self, depth: int, end: int, bfloat16: bool) -> WideVariant:
        from gpu.serve.model.product_variant import ADD, WideVariant

        return WideVariant(depth, self.columns, end, bfloat16, self.tile_rows, self.stages, self.groups,
                           self.ahead_sums if end == ADD else self.ahead, self.let, self.per_sm)

    def unfit(self, capability: int, shared_limit: int) -> str | None:
        """Why a GPU does not run it, None where it does. shared_limit: bytes of a CTA."""
        from gpu.serve.model.product_variant import STORE

        return self.variant(HIDDEN, STORE, False).unfit(capability, shared_limit)

    def __call__(self) -> WideAlone:
        return WideAlone(self)


class WideAlone:
    """Every product by wide_product.cu, of variants of one shape."""

    def __init__(self, shape: WideShape) -> None:
        from gpu.serve.model.products import WideProducts
        from gpu.serve.model.row_kernels import RowKernels

        self._wide, self._rows, self._shape = WideProducts(), RowKernels(), shape

    def _run(self, x, weight, end, out):
        variant = self._shape.variant(weight.shape[1], end, str(x.dtype) == "torch.bfloat16")
        return self._wide.run(variant, x, weight, None, out)

    def normed(self, x, norm, weight, bias):
        return self._run(self._rows.rms_norm(x, norm, 1e-5), weight, 0, x.new_empty((len(x), len(weight))))

    def gated(self, x, norm, weight, bias):
        return self._run(self._rows.rms_norm(x, norm, 1e-5), weight, 2, x.new_empty((len(x), len(weight) // 2)))

    def add(self, x, given, weight, bias):
        return self._run(given, weight, 1, x)


def layer_us(products, layers, columns: int, which: tuple[str, ...], repeats: int = 5) -> float:
    """Of a layer, by graphs of all layers."""
    import torch

    kind = layers[0]["out"].dtype
    norm = torch.ones(HIDDEN, device="cuda", dtype=kind)
    start, wide = (torch.randn(columns, size, device="cuda").to(kind) for size in (HIDDEN, MLP))

    def chain(x):
        for layer in layers:
            mixed, gated = start, wide
            if "normed" in which:
                mixed = products.normed(x, norm, layer["normed"], None)
            if "out" in which:
                x = products.add(x, mixed[:, :HIDDEN], layer["out"], None)
            if "gated" in which:
                gated = products.gated(x, norm, layer["gated"], None)
            if "down" in which:
                x = products.add(x, gated, layer["down"], None)
        return x

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.stream(stream):
        x = start.clone()
        chain(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            chain(x)
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeats / len(layers)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_script("bench_products", args, functools.partial(measure, args), width=100)


if __name__ == "__main__":
    sys.exit(main())
