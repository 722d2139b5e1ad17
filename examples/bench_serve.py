"""Serving on one GPU: decode steps against the memory's limit, and whole runs beside what whatif predicts.

    python examples/bench_serve.py                                        # rows x context against the roofline
    python examples/bench_serve.py --profile --cells 1x1024,32x1024       # which kernels a decode step consists of
    python examples/bench_serve.py --loops --device h200 --json serve.json
    python examples/bench_serve.py --traces FOLDER --device h200          # azure*code*.csv and mooncake*.jsonl of it
    python examples/bench_serve.py --predictions --traces FOLDER --json found.json
    python examples/bench_serve.py --transformers                         # generate() on the same cells
    python examples/bench_serve.py --soak 20000                           # bursts, cancellations, overlong prompts
    python examples/bench_serve.py --page h200_serve.md steps.json found.json   # the page of results, without a GPU

--predictions fits the constants of a step to a load that is served first. Then it serves Azure's arrivals, Mooncake's
prompts and a closed loop, and says how far whatif's figures lie from the measured ones, in three minutes on an H200.
Where FOLDER has not a trace, a load like it is drawn.

Without --model the model is Llama-3.1-8B, or the largest preset whose weights GPU memory has room for; cells whose KV
does not fit beside them are left out and named.

--soak's model without --model is qwen3-0.6b, whose shape is here, with random weights: FlashInfer computes its prompt
chunks in one launch a layer. smollm2, with its own weights, is slower where FlashInfer has no kernel for its head_dim
of 64: PyTorch then takes a call for each chunk and layer. SIGINT or SIGTERM (`timeout -s INT 200 python ...`) cuts a
soak short: what has not ended is cancelled, and what happened so far is told and written, as cut short.

The limit of a step is the bytes that it must read, weights and KV, over the rate at which this GPU streams. Weights are
random, of the model's shape.
"""
from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.script import run_script
from serve_bench import page, predictions, presets, roofline, runs, soak
from serve_bench.interrupts import until_interrupted

from pkvsim.reports.grid import PIPE_COLUMNS, print_line, table_console

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "llama-3.1-8b"
KV_BYTES = 1 << 30  # at least, that a model chosen by its size leaves for KV pages
CELL_STEP_TOKENS = 4096
CELLS = "1x1024,8x1024,32x1024,128x1024,1x32768,8x32768"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a preset of pkvsim, {', '.join(presets.SHAPES)}, or a config.json; {MODEL}, "
                                        f"or the largest that fits; with --soak {presets.SOAKED}, or smollm2")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--kv-dtype", help="float8_e4m3fn, float8_e5m2 or int8; by default the model's")
    parser.add_argument("--cells", default=CELLS, help="rows x tokens of their prompts, comma-separated")
    parser.add_argument("--steps", type=int, default=100, help="decode steps of a cell")
    parser.add_argument("--rate", type=float, help="GB/s that the GPU streams; measured by default")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    products = parser.add_mutually_exclusive_group()
    products.add_argument("--streamed-products", action="store_true", default=None,
                          help="products of few rows by our own kernel, as by default")
    products.add_argument("--torch-products", action="store_false", dest="streamed_products", help="PyTorch's products")
    parser.add_argument("--profile", action="store_true", help="the kernels of a cell's decode step")
    parser.add_argument("--loops", action="store_true", help="closed loops beside the prediction")
    parser.add_argument("--traces", type=Path, help="traces of this folder beside the prediction")
    parser.add_argument("--predictions", action="store_true", help="three loads beside what was fitted before them")
    parser.add_argument("--as-is", action="store_true", help="with --predictions: the device's own constants, no fit")
    parser.add_argument("--save-steps", type=Path, metavar="NPZ", help="with --predictions: every step, for other fits")
    parser.add_argument("--soak", type=int, metavar="N", help="N requests in bursts beyond what memory holds; exits "
                        f"with 1 if unsound; quickest with {presets.SOAKED}, its default")
    parser.add_argument("--transformers", action="store_true", help="decode steps of Transformers on the cells")
    parser.add_argument("--device", help="of the prediction, as `pkvsim devices` lists it; by default this GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", nargs="+", type=Path, metavar=("MD", "JSON"), help="write documents into a page")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: expected at least 2, as a step is from its end to the next one's, got {args.steps}")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", args.cells):
        parser.error(f"--cells: expected rows x tokens, comma-separated, as 1x1024,8x32768, got {args.cells!r}")
    return args


def choose_model(args: argparse.Namespace, console: Console) -> None:
    """Sets the model where none was asked for, and says which where it is not the usual one."""
    if args.model is not None:
        args.model = presets.SHAPES.get(args.model, args.model)
        return
    import torch

    from gpu.serve.llm import ServeOptions, weights_room
    from gpu.serve.model.weights import weights_bytes

    dtype, room = getattr(torch, args.dtype), weights_room(ServeOptions()) - KV_BYTES
    args.model = presets.largest_preset(MODEL, room=room, weights_bytes=lambda config: weights_bytes(config, dtype))
    if args.model != MODEL:
        console.print(f"{args.model} in place of {MODEL}, for whose weights GPU memory has no room", markup=False)


def soak_model(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """A long life of the model with too few pages; its weights are its own where there are any."""
    from gpu.serve.llm import LLM, ServeOptions

    args.model = args.model or presets.SOAKED
    choose_model(args, console)
    with until_interrupted() as stopped:
        llm = LLM(args.model, ServeOptions(
            dtype=args.dtype, kv_dtype=args.kv_dtype, dummy_weights=args.model != "smollm2", max_context=2048,
            max_batch=64, num_pages=800, prefix_cache="lru", graphs=not args.eager,
            streamed_products=args.streamed_products,
        ), say=lambda line: print(line, file=sys.stderr))  # fmt: skip
        print_line(console, f"{llm.config.name}: prompt chunks by {llm.prefill}, {llm.pages.num_pages} KV pages")
        result = soak.soak(llm, args.soak, stopped=stopped)
    print_line(console, str(result))
    return asdict(result) | {"sound": result.sound, "model": llm.config.name, "prefill": llm.prefill}


def measure(args: argparse.Namespace, told: Console) -> dict[str, Any]:
    """Runs what was asked for, and returns what --json writes."""
    from gpu.serve.llm import LLM, ServeOptions

    choose_model(args, told)
    if args.predictions:
        return measure_predictions(args)
    cells = [tuple(map(int, cell.split("x"))) for cell in args.cells.split(",")]
    whole = args.loops or args.traces is not None
    console, rate = table_console(), args.rate
    if not whole:
        rate = rate or roofline.streaming_rate()
        sizes = {"max_context": roofline.longest(cells, args.steps, step_tokens=CELL_STEP_TOKENS),
                 "max_batch": max(rows for rows, _ in cells), "step_tokens": CELL_STEP_TOKENS}
    else:
        sizes = {"prefix_cache": "lru"}
    options = ServeOptions(dtype=args.dtype, kv_dtype=args.kv_dtype, dummy_weights=True, graphs=not args.eager,
                           streamed_products=args.streamed_products, **sizes)
    llm = LLM(args.model, options, record=True, say=lambda line: print(line, file=sys.stderr))
    print_line(console, f"{llm.config.name}, {args.dtype}, cache {llm.pages.dtype}: {llm.weights.step_bytes / 1e9:.2f} "
                        f"GB of weights a step; prompt chunks by {llm.prefill}")
    found: dict[str, Any] = {"model": llm.config.name, "dtype": args.dtype, "prefill": llm.prefill,
                             "products": "torch" if args.streamed_products is False else "streamed"}
    if whole:
        return found | {"runs": measure_runs(llm, args)}
    left_out = {cell: why for cell in cells if (why := roofline.lacks_room(llm, *cell, args.steps)) is not None}
    found["left_out"] = {}

    def leave_out(rows: int, context: int, why: object) -> None:
        print_line(console, f"left out {rows} x {context}: {why}")
        found["left_out"][f"{rows}x{context}"] = str(why)

    for cell, why in left_out.items():
        leave_out(*cell, why)
    cells = [cell for cell in cells if cell not in left_out]
    if args.profile:
        for rows, context in cells:
            try:
                roofline.profile(llm, rows, context, args.steps)
            except roofline.CellError as error:
                leave_out(rows, context, error)
        return found
    if args.transformers:
        del llm.pages, llm.server, llm.runner
        times = {f"{rows}x{context}": runs.transformers_step_us(llm, rows, context) for rows, context in cells}
        for cell, us in times.items():
            print_line(console, f"Transformers, {cell}: {us:,.0f} us a step")
        import transformers

        return found | {"transformers_us": times, "transformers": transformers.__version__}
    results = []
    for rows, context in cells:
        try:
            results.append(roofline.measure(llm, rows, context, steps=args.steps, rate=rate))
        except roofline.CellError as error:
            leave_out(rows, context, error)
            continue
        r = results[-1]
        print(f"  {rows} x {context}: {r.step_us:.0f} us, limit {r.limit_us:.0f}, {r.over_limit:.3f} x, gap "
              f"{r.gap_us:.1f} us, plan {r.plan_us:.0f} us", file=sys.stderr, flush=True)
    roofline.show(console, results)
    return found | {"gb_per_s": rate, "cells": [asdict(r) | {"over_limit": r.over_limit} for r in results]}


def measure_predictions(args: argparse.Namespace) -> dict[str, Any]:
    """Serves and predicts the loads of serve_bench.predictions."""
    from gpu.serve.llm import LLM, ServeOptions
    from gpu.serve.replay import warm_up
    from gpu.serve.report import device_at_hand, serving_config
    from pkvsim.devices.device import get_device

    begin = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", file=sys.stderr, flush=True)

    device = get_device(args.device) if args.device else device_at_hand()
    compiling = predictions.compile_prices(args.model, device.name)
    llm = LLM(args.model, ServeOptions(dtype=args.dtype, kv_dtype=args.kv_dtype, dummy_weights=True, max_batch=128,
                                       graphs=not args.eager, streamed_products=args.streamed_products),
              record=True, say=say)
    say(f"{llm.config.name} is loaded, {llm.pages.num_pages:,} pages; prompt chunks by {llm.prefill}")
    warm_up(llm.server, step_tokens=llm.options.step_tokens)

    def ready() -> None:
        if compiling.is_alive():
            compiling.join()
            say("whatif is compiled")

    device, found, served = predictions.predictions(llm, device, args.traces, fit=not args.as_is, say=say, ready=ready)
    constants = serving_config(llm, served[-1].trace).profile.constants
    predictions.show(table_console(), found, device, constants)
    if args.save_steps:
        predictions.save_steps(args.save_steps, served)
    return {"model": llm.config.name, "dtype": args.dtype, "prefill": llm.prefill,
            "within": all(prediction.within for prediction in found),
            "constants": None if args.as_is else device.outside[constants].to_dict(),
            "predictions": [prediction.to_dict() for prediction in found]}


def measure_runs(llm: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    from gpu.serve.replay import warm_up
    from gpu.serve.report import device_at_hand
    from pkvsim.devices.device import get_device

    device = get_device(args.device) if args.device else device_at_hand()
    warm_up(llm.server, step_tokens=llm.options.step_tokens)
    results = []
    for trace in [*(runs.loops() if args.loops else ()), *(runs.traces(args.traces) if args.traces else ())]:
        print(f"  {trace.name}: {len(trace)} requests", file=sys.stderr, flush=True)
        results.append(runs.run(llm, trace, device))
    runs.show(table_console(), results)
    return [result.to_dict() for result in results]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.page:
        try:
            page.write(args.page[0], args.page[1:])
        except ValueError as error:
            print(f"bench_serve: error: {error}", file=sys.stderr)
            return 2
        return 0
    return run_script("bench_serve", args, functools.partial(soak_model if args.soak else measure, args),
                      width=PIPE_COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
