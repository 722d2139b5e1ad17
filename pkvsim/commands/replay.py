"""pkvsim replay."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors
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


def replay(
    family: Annotated[str, typer.Option(help="uniform, bimodal, zipf, bucketed or homogeneous.")] = "bimodal",
    requests: Annotated[
        Optional[int], typer.Option(help="Requests in the trace: 24 by default, all of a trace file.")
    ] = None,
    max_active: Annotated[int, typer.Option(help="Most rows decoded at once.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps to measure, idle ones not counted.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of the requests; seed + 99 shuffles the pages.")] = 20260623,
    device: Device = "rtx3060",
    policy: Annotated[
        str, typer.Option(help="How the adaptive engine routes a step: calibrated, paper, oracle or a route.")
    ] = "calibrated",
    min_context: Annotated[
        Optional[int], typer.Option(help="The paper's gate: shorter steps (tokens) go to FlashInfer; 16384 by default.")
    ] = None,
    trace_file: Annotated[
        Optional[str], typer.Option(help="CSV or JSON requests to replay in place of a family.")
    ] = None,
    num_q_heads: NumQHeads = 32,
    num_kv_heads: NumKVHeads = 8,
    head_dim: HeadDim = 128,
    page_size: PageSize = 16,
    layers: Layers = 1,
    window: Window = None,
    query_tokens: QueryTokens = 1,
    hole_fraction: Annotated[float, typer.Option(help="Part of the page pool that nobody owns.")] = 0.0,
    split_splits: Annotated[
        Optional[int], typer.Option(help="Splits per row of the split engine; the policy's own by default.")
    ] = None,
    workqueue_splits: Annotated[
        Optional[int], typer.Option(help="Splits per row of the workqueue engine; the policy's own by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replays a trace and prints what each engine does and costs per step.

    \b
    Examples:
      pkvsim replay --family zipf --max-active 16 --device h200
      pkvsim replay --trace-file requests.csv --policy paper --json
      pkvsim replay --device h200 --window 4096 --query-tokens 4
    """
    with one_line_errors():
        from pkvsim.devices.device import get_device
        from pkvsim.options import AttentionOptions
        from pkvsim.policy.by_name import make_policy
        from pkvsim.shapes import DecodeShape, check_int
        from pkvsim.studies.replay import replay as run_replay
        from pkvsim.traces.paper_families import MAX_REQUESTS, paper_trace
        from pkvsim.traces.paper_files import read_trace

        options = AttentionOptions(window=window, query_tokens=query_tokens)
        shape = DecodeShape(num_q_heads, num_kv_heads, head_dim, page_size)
        rules = make_policy(
            policy, min_context=min_context, split_splits=split_splits, workqueue_splits=workqueue_splits
        )
        spec = get_device(device)
        if requests is not None:
            check_int("requests", requests, 1, MAX_REQUESTS)
        if trace_file is None:
            trace = paper_trace(family, seed, requests or 24, max_active, steps, page_size=page_size)
        else:
            trace = read_trace(
                trace_file, seed=seed, requests=requests, max_active=max_active, steps=steps, page_size=page_size
            )
        report = run_replay(trace, shape, spec, rules, hole_fraction=hole_fraction, layers=layers, options=options)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from pkvsim.reports.table_replay import print_replay

    print_replay(report)
