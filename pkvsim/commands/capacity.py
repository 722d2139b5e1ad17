"""pkvsim capacity."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors
from pkvsim.commands.options.group import with_option_groups
from pkvsim.commands.options.server import ServerOptions
from pkvsim.commands.shared_options import AsJson, Dask, Device, Jitter, Limit, Model, Seed, WorkerCount


@with_option_groups
def capacity(
    slo: Annotated[
        str,
        typer.Option(
            help="Objectives, such as ttft_p90=2s,tpot_p90=50ms,e2e_p99=30s: ttft, tpot, e2e or queue, a percentile of "
            "the requests, or itl, one of the times between tokens; and a time in us, ms, s or min."
        ),
    ],
    over: Annotated[
        list[str],
        typer.Option(
            help="NAME=VALUE,VALUE,...; again for more axes: device, tp (GPUs that share the model), batch (most "
            "running requests), policy, model, engine, page_size, prefix_cache, weight_bits, step_tokens."
        ),
    ],
    trace: Annotated[Optional[str], typer.Option(help="Request trace, whose arrivals are scaled to each rate.")] = None,
    rate: Annotated[
        Optional[float], typer.Option(help="Requests per second to serve: finds the fewest GPUs that keep it.")
    ] = None,
    price: Annotated[
        Optional[list[str]], typer.Option(help="DEVICE=DOLLARS,... per GPU and hour; again for more.")
    ] = None,
    rank: Annotated[
        Optional[str],
        typer.Option(help="rate, rate_per_gpu, gpus or dollars; by default dollars with --price, gpus with --rate."),
    ] = None,
    device: Device = "rtx3060",
    model: Model = "llama-3.1-8b",
    policy: Annotated[
        Optional[str],
        typer.Option(
            help="paper, calibrated, flashinfer, oracle, a route's name, or engine for the --engine's own attention; "
            "by default that, or calibrated."
        ),
    ] = None,
    server: ServerOptions = ServerOptions(),
    input_tokens: Annotated[
        Optional[str],
        typer.Option(help="Instead of a trace, prompts of so many tokens: a number, 100-2000, lognormal:mean=1024."),
    ] = None,
    output_tokens: Annotated[Optional[str], typer.Option(help="Output tokens of such requests: the same.")] = None,
    requests: Annotated[Optional[int], typer.Option(help="How many such requests; 1,000 by default.")] = None,
    arrivals: Annotated[
        Optional[str], typer.Option(help="Of such requests: poisson (default), constant, or gamma:0.5.")
    ] = None,
    limit: Limit = None,
    jitter: Jitter = 0.0,
    seed: Seed = 0,
    tolerance: Annotated[
        float, typer.Option(help="Stop when a rate this part above the best one was tried and missed.")
    ] = 0.02,
    workers: WorkerCount = 1,
    dask: Dask = None,
    csv_file: Annotated[Optional[str], typer.Option("--csv", help="Write every server's figures to this file.")] = None,
    report_file: Annotated[
        Optional[str], typer.Option("--report", help="Write a self-contained .html page of the table and charts.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How many requests per second each of many servers keeps within latency objectives, and at what price.

    \b
    Examples:
      pkvsim capacity --trace requests.csv --slo ttft_p90=2s,tpot_p90=50ms \\
          --over device=rtx4090,l4,h200 --over tp=1,2,4 --workers 2
      pkvsim capacity --trace requests.csv --slo e2e_p99=30s --rate 20 \\
          --over device=l4,h200 --price l4=0.8,h200=3.5 --report capacity.html
      pkvsim capacity --input-tokens 1000 --output-tokens 200 \\
          --slo ttft_p99=1s --over device=h200 --over batch=32,64,128
    """
    with one_line_errors():
        from pkvsim.commands.load_options import RequestOptions
        from pkvsim.commands.serving_inputs import progress_bar
        from pkvsim.studies.capacity.search import CAPACITY_AXES, capacity_search
        from pkvsim.studies.cells import parse_axes
        from pkvsim.studies.objectives import parse_objectives
        from pkvsim.studies.workers import Workers

        if csv_file is not None:
            from pkvsim.reports.capacity.csv_file import check_csv_path

            check_csv_path(csv_file)
        if report_file is not None:
            from pkvsim.reports.html_page import check_report_path

            check_report_path(report_file)
        axes, objectives = parse_axes(over, CAPACITY_AXES), parse_objectives(slo)
        crew = Workers(workers, dask, forks=True)
        config = server.config(seed)
        if server.prefill_replicas:
            raise ValueError("prefill_replicas: expected none, as one server is searched at a time")
        if server.replicas != 1:
            raise ValueError(f"replicas: expected none, as --rate finds how many are needed, got {server.replicas}")
        prices = _prices(price or [])
        load = RequestOptions(
            jitter=jitter, limit=limit, seed=seed, input_tokens=input_tokens, output_tokens=output_tokens,
            requests=requests, arrivals=arrivals, rate=None if trace is not None else 1.0,
        ).load(trace)  # fmt: skip
        with progress_bar(not as_json, "servers", still=workers > 1) as bar:
            done = None if bar is None else (lambda at, total: bar("servers", at, total))
            search = capacity_search(
                axes, load, objectives, model=model, device=device, policy=policy, config=config,
                tensor_parallel=server.tensor_parallel, weight_bits=server.weight_bits, wanted_rate_per_s=rate,
                prices=prices, rank=rank, tolerance=tolerance, curve=report_file is not None, workers=crew,
                progress=done,
            )  # fmt: skip
        if csv_file is not None:
            from pkvsim.reports.capacity.csv_file import write_csv

            write_csv(search, csv_file)
        if report_file is not None:
            from pkvsim.reports.capacity.page import write_capacity

            write_capacity(search, report_file)
    if as_json:
        typer.echo(json.dumps(search.to_dict(), indent=2, allow_nan=False))
        return
    from pkvsim.reports.capacity.table import print_capacity

    print_capacity(search)


def _prices(texts: list[str]) -> dict[str, float]:
    """`device=dollars,device=dollars` each. ValueError that says what was expected."""
    prices: dict[str, float] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, _, dollars = part.rpartition("=")
        try:
            value = float(dollars.removeprefix("$"))
        except ValueError:
            value = 0.0
        name = name.strip()
        if not name or not 0 < value < float("inf"):
            raise ValueError(f"price: expected DEVICE=DOLLARS per GPU and hour, such as l4=0.8, got {part!r}")
        if name in prices:
            raise ValueError(f"price: expected each device once, got {name} twice")
        prices[name] = value
    return prices
