"""Matrix products of a layer at few rows: how fast each way of computing them streams the weights.

    python examples/bench_products.py --columns 1,8,32,64,128

Layers of Llama-3.1-8B's shape follow each other in one CUDA graph, as in a decode step without attention, until their
weights are far larger than L2; a line is the time of a layer and the rate of its 436 MB of weights. Ways: PyTorch's,
PyTorch's with the small kernels of rows.cu, and product.cu (at most 8 rows). --single times each product alone too.
"""
from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.script import run_script

from gpu.measure import memory

if TYPE_CHECKING:
    from rich.console import Console

    from gpu.serve.model.products import Products

HIDDEN, QKV, MLP, LAYERS = 4096, 6144, 14336, 8
SINGLES = ("normed", "out", "gated", "down")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", default="1,8,32,64,128")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--single", action="store_true", help="each product alone too")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    kind = getattr(torch, args.dtype)
    shapes = {"normed": (QKV, HIDDEN), "out": (HIDDEN, HIDDEN), "gated": (2 * MLP, HIDDEN), "down": (HIDDEN, MLP)}
    count = memory.fitting(LAYERS, bytes_each=2 * sum(rows * depth for rows, depth in shapes.values()))
    if count < LAYERS:
        console.print(f"{count} layers in place of {LAYERS}, for which GPU memory has no room")
    layers = [{name: (torch.randn(shape, device="cuda") * shape[1] ** -0.5).to(kind) for name, shape in shapes.items()}
              for _ in range(count)]
    results = []
    for columns in map(int, args.columns.split(",")):
        for name, make in ways(columns):
            products = make()
            parts = [("", SINGLES), *((f" {one}", (one,)) for one in SINGLES if args.single)]
            for what, which in parts:
                us = layer_us(products, layers, columns, which)
                gb = sum(layers[0][one].numel() * 2 for one in which) / 1e9
                console.print(f"{columns:4} {name + what:24} {us:8.2f} us {gb / us * 1e3:6.2f} TB/s", markup=False)
                results.append({"columns": columns, "way": name, "products": which, "us": us})
    return {"results": results}


def ways(columns: int) -> Iterator[tuple[str, Callable[[], Products]]]:
    """Names, and what makes the products."""
    from gpu.serve.model.product_variant import MOST_COLUMNS
    from gpu.serve.model.products import RowProducts, StreamedProducts, TorchProducts
    from gpu.serve.model.row_kernels import RowKernels

    yield "torch", lambda: TorchProducts(1e-5)
    yield "torch, rows.cu", lambda: RowProducts(1e-5, RowKernels())
    if columns <= MOST_COLUMNS:
        yield "product.cu", lambda: StreamedProducts(1e-5)


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
