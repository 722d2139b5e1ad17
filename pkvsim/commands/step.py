"""pkvsim step."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors, tell_left_out
from pkvsim.commands.shared_options import (
    AsJson,
    Device,
    HeadDim,
    Layers,
    NumKVHeads,
    NumQHeads,
    PageSize,
    QueryTokens,
    Window,
)  # fmt: skip


def step(
    seq_lens: Annotated[
        str, typer.Option(help="Tokens in cache of every row: 65536,2048 or, for sixteen rows alike, 2048x16.")
    ],
    shared: Annotated[
        Optional[str],
        typer.Option(help="Tokens that the first rows share: 8192x48 or, for several groups, 8192x48,4096x16."),
    ] = None,
    device: Device = "rtx3060",
    num_q_heads: NumQHeads = 32,
    num_kv_heads: NumKVHeads = 8,
    head_dim: HeadDim = 128,
    page_size: PageSize = 16,
    routes: Annotated[
        Optional[str], typer.Option(help="Comma-separated routes; by default all that the device has.")
    ] = None,
    splits: Annotated[Optional[int], typer.Option(help="Pin the splits of every row (split and workqueue).")] = None,
    layers: Layers = 1,
    window: Window = None,
    query_tokens: QueryTokens = 1,
    select: Annotated[
        Optional[str],
        typer.Option(
            help="Beside all pages: those that a method chooses, METHOD:BUDGET, such as mean_std:0.1 or "
            "centroids:0.1, or mean_std:0.1:8bit by summaries in 8 bits."
        ),
    ] = None,
    select_every: Annotated[int, typer.Option(help="Layers that read the lists which the first of them selects.")] = 1,
    kv_parallel: Annotated[
        int, typer.Option(help="GPUs that hold the rows' pages together, page by page in turn (balanced only).")
    ] = 1,
    plot: Annotated[
        Optional[str], typer.Option(help="Draw the tasks on their CTA slots to this .png or .svg file.")
    ] = None,
    timeline: Annotated[
        Optional[str], typer.Option(help="Write them to this .json file in Chrome's trace format, for Perfetto.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explains one decode step: every route's price, its tasks on CTA slots, and what bounds it.

    \b
    Examples:
      pkvsim step --seq-lens 65536,2048x15 --device rtx3060
      pkvsim step --seq-lens 8192x8 --device h200 \\
          --routes balanced,workqueue --plot step.png
      pkvsim step --seq-lens 65536x8 --device h200 \\
          --window 4096 --query-tokens 4
      pkvsim step --seq-lens 8704x48,1000x4 --shared 8192x48 \\
          --device h200
      pkvsim step --seq-lens 131072,1024x63 --device l4 --timeline step.json
      pkvsim step --seq-lens 131072 --device h200 --kv-parallel 2
      pkvsim step --seq-lens 32768x64 --device h200 --select mean_std:0.1
    """
    with one_line_errors():
        from pkvsim.devices.device import get_device
        from pkvsim.options import AttentionOptions
        from pkvsim.selection.setup import parse_selection
        from pkvsim.shapes import DecodeShape
        from pkvsim.studies.explain_step import explain_step, parse_seq_lens
        from pkvsim.studies.shared_step import parse_shared

        if plot is not None:
            from pkvsim.reports.plots import check_plot_path

            check_plot_path(plot)
        if timeline is not None:
            from pkvsim.reports.perfetto import check_timeline_path

            check_timeline_path(timeline)
        shape, lens = DecodeShape(num_q_heads, num_kv_heads, head_dim, page_size), parse_seq_lens(seq_lens)
        options = AttentionOptions(window=window, query_tokens=query_tokens)
        names = None if routes is None else [name.strip() for name in routes.split(",") if name.strip()]
        groups = None if shared is None else parse_shared(shared, lens, page_size)
        setup = None if select is None else parse_selection(select, every=select_every)
        if select_every != 1 and setup is None:
            raise ValueError(f"select_every: expected with --select alone, got {select_every}")
        if setup is not None:
            for option, given in (("shared", groups is not None), ("kv_parallel", kv_parallel != 1)):
                if given:
                    raise ValueError(f"{option}: expected none with --select, whose lists no kernel shares out")
        if kv_parallel != 1:
            if groups is not None:
                raise ValueError(f"shared: expected none over several GPUs, got {shared}")
            from pkvsim.commands.several.step_over_gpus import step_over_gpus

            step_over_gpus(shape, lens, device, kv_parallel, options, names=names, splits=splits, layers=layers,
                           plot=plot, timeline=timeline, as_json=as_json)
            return
        report = explain_step(
            shape, lens, get_device(device), routes=names, layers=layers, splits=splits, options=options, groups=groups
        )
        if setup is not None:
            from pkvsim.studies.selection.step import with_selection

            report = with_selection(report, setup)
        if plot is not None:
            from pkvsim.reports.plot_step import plot_step

            plot_step(report, plot)
        if timeline is not None:
            from pkvsim.reports.perfetto import step_events, write_timeline

            tell_left_out(write_timeline(step_events(report), timeline))
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        return
    from pkvsim.reports.table_step import print_step

    print_step(report)
