"""pkvsim sweep."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors
from pkvsim.commands.load_options import RequestOptions
from pkvsim.commands.options.group import with_option_groups
from pkvsim.commands.options.server import ServerOptions
from pkvsim.commands.options.tiers import TierChoices
from pkvsim.commands.shared_options import AsJson, Dask, Device, Model, WorkerCount


@with_option_groups
def sweep(
    over: Annotated[
        list[str],
        typer.Option(
            help="NAME=VALUE,VALUE,...; again for more axes. With a trace: device, policy, rate, max_batch, page_size, "
            "splits, group_size, prefix_cache, shared_reads (on, off), select (METHOD:BUDGET[:8bit], off), order, "
            "replicas, router, engine, tensor_parallel, prefill_replicas, tiers (or none; + between several), "
            "placement, retention, tier_admission, tier_hold_cost, load_or_recompute, serial_reads (on, off), "
            "host_link; rate is a factor of the trace's own: rate=2 halves every gap. Without: device, policy, batch, "
            "length, group_size, splits, select."
        ),
    ],
    trace: Annotated[
        Optional[str],
        typer.Option(help="Request trace to serve; without one, and without --input-tokens, steps are priced."),
    ] = None,
    source: RequestOptions = RequestOptions(),
    device: Device = "rtx3060",
    model: Model = "llama-3.1-8b",
    policy: Annotated[
        Optional[str],
        typer.Option(
            help="paper, calibrated, flashinfer, oracle, a route's name, or engine for the --engine's own attention; "
            "by default that, or calibrated."
        ),
    ] = None,
    metric: Annotated[
        Optional[str], typer.Option(help="Figure to tabulate, as in --json: tokens_per_s, ttft_s.p99, us, ...")
    ] = None,
    server: ServerOptions = ServerOptions(),
    tiers: TierChoices = TierChoices(),
    layers: Annotated[int, typer.Option(help="Layers that a step plans once for, without a trace.")] = 1,
    plot: Annotated[Optional[str], typer.Option(help="Draw the figures to this .png or .svg file.")] = None,
    route_map: Annotated[
        Optional[str], typer.Option(help="Draw which route each step takes to this .png or .svg file, without a trace.")
    ] = None,
    workers: WorkerCount = 1,
    dask: Dask = None,
    as_json: AsJson = False,
) -> None:
    """Runs every combination of a few settings: two axes make a heat map.

    \b
    Examples:
      pkvsim sweep --over batch=1,8,64 --over length=1024,8192,65536 --device h200
      pkvsim sweep --over length=8192,65536 --over select=off,mean_std:0.1 \\
          --device h200 --layers 32
      pkvsim sweep --over length=8192,65536 --over splits=1,4,16 --policy split
      pkvsim sweep --over batch=1,4,16,64 --over length=1024,8192,65536 \\
          --device l4 --route-map routes.png
      pkvsim sweep --trace requests.csv --over device=rtx3060,l4 \\
          --over rate=0.5,1,2 --metric ttft_s.p99
      pkvsim sweep --input-tokens 1024 --output-tokens 128 --rate 4 \\
          --over device=l4,h200 --over max_batch=16,64
    """
    with one_line_errors():
        from pkvsim.commands.serving_inputs import progress_bar
        from pkvsim.devices.device import get_device
        from pkvsim.models.presets import get_model
        from pkvsim.serving.costs import default_policy, fit_note
        from pkvsim.shapes import MAX_TOKENS, check_int
        from pkvsim.studies.cells import parse_axes
        from pkvsim.studies.sweep import SERVING_AXES, STEP_AXES, check_used, serving_sweep, step_sweep
        from pkvsim.studies.workers import Workers

        serving = trace is not None or source.input_tokens is not None or source.output_tokens is not None
        axes = parse_axes(over, SERVING_AXES if serving else STEP_AXES)
        for option, path in (("plot", plot), ("route_map", route_map)):
            if path is not None:
                from pkvsim.reports.plot_sweep import check_axes
                from pkvsim.reports.plots import check_plot_path

                check_plot_path(path, option=option)
                check_axes(axes, option=option, trace=serving)
        crew = Workers(workers, dask, forks=True)
        spec = get_device(device)
        config = server.config(source.seed)
        metric = metric or ("tokens_per_s" if serving else "us")
        check_used(
            serving, layers=layers != 1, **source.given(), **server.given() | {"page_size": False}, **tiers.given(),
            workers=workers != 1, dask=dask is not None,
        )  # fmt: skip
        if not serving:
            shape = get_model(model, tensor_parallel=server.tensor_parallel).shape(server.page_size)
            layers = check_int("layers", layers, 1, MAX_TOKENS)
            report = step_sweep(axes, shape, spec, policy or default_policy(config), layers=layers)
        else:
            requests = source.load(trace)
            chosen = model if "tensor_parallel" in axes else get_model(model, tensor_parallel=server.tensor_parallel)
            with progress_bar(not as_json, "cells", still=workers > 1) as bar:
                done = None if bar is None else (lambda at, total: bar("sweep", at, total))
                report = serving_sweep(
                    axes, requests, chosen, spec, policy, config,
                    metric=metric, weight_bits=server.weight_bits, workers=crew, progress=done,
                    tiers=tiers.named(elsewhere="tiers" in axes),
                )  # fmt: skip
        report.values(metric)
        devices = [get_device(name) for name in axes.get("device", [])] or [spec]
        prices = tuple(f"attention prices of {gpu.name}: {fit_note(gpu)}" for gpu in devices)
        if not serving and set(axes.get("select", ())) - {"off"}:
            from pkvsim.devices.derive import selection_entry
            from pkvsim.studies.selection.notes import price_note

            prices += tuple(f"{gpu.name}: {price_note(selection_entry(gpu))}" for gpu in devices)
        notes = report.notes + (() if serving else prices)
        if plot is not None:
            from pkvsim.reports.plot_sweep import plot_sweep

            plot_sweep(report, metric, plot, note="\n".join(prices))
        if route_map is not None:
            from pkvsim.reports.plot_sweep import plot_routes

            plot_routes(report, route_map, note="\n".join(prices))
    if as_json:
        typer.echo(json.dumps(report.to_dict() | {"notes": list(notes)}, indent=2, allow_nan=False))
        return
    from pkvsim.reports.table_sweep import print_sweep

    print_sweep(report, metric, notes)
