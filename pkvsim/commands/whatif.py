"""pkvsim whatif."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors, tell_left_out
from pkvsim.commands.load_options import RequestOptions
from pkvsim.commands.options.group import with_option_groups
from pkvsim.commands.options.server import ServerOptions
from pkvsim.commands.options.tiers import TierChoices
from pkvsim.commands.shared_options import AsJson, Device, Model


@with_option_groups
def whatif(
    trace: Annotated[
        Optional[str], typer.Option(help="Request trace, as `pkvsim trace` reads it; or --input-tokens and so on.")
    ] = None,
    source: RequestOptions = RequestOptions(),
    device: Device = "rtx3060",
    model: Model = "llama-3.1-8b",
    policies: Annotated[
        Optional[str],
        typer.Option(
            help="Comma-separated: paper, calibrated, oracle, flashinfer (the better of its CUDA-core and tensor-core "
            "kernels, XQA not among them), a route (split, workqueue, balanced, xqa, ...), or engine, the --engine's "
            "own attention; by default that, or six side by side."
        ),
    ] = None,
    server: ServerOptions = ServerOptions(),
    tiers: TierChoices = TierChoices(),
    lend: Annotated[
        Optional[str],
        typer.Option(
            help="Instead of policies: what --replicas do whose KV pages run out, some of borrow, preempt, move, "
            "recompute, or all."
        ),
    ] = None,
    plot: Annotated[
        Optional[str], typer.Option(help="Draw time splits and latencies to this .png or .svg file.")
    ] = None,
    timeline: Annotated[
        Optional[str], typer.Option(help="Write steps and requests to this .json file, for Perfetto.")
    ] = None,
    requests_csv: Annotated[
        Optional[str], typer.Option(help="Write a line for every request and policy to this .csv file.")
    ] = None,
    report_file: Annotated[
        Optional[str], typer.Option("--report", help="Write a self-contained .html page of tables and charts.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serves requests under several policies: what would this policy do on that GPU with my traffic.

    \b
    Examples:
      pkvsim whatif --trace conversation_trace.jsonl --device rtx3060 \\
          --policies paper,calibrated
      pkvsim whatif --trace AzureLLMInferenceTrace_code.csv --device h200 \\
          --model qwen3-30b-a3b --rate-scale 4
      pkvsim whatif --trace conversation_trace.jsonl --device h200 \\
          --prefix-cache lru --json
      pkvsim whatif --trace conversation_trace.jsonl --device h200 \\
          --prefix-cache lru --policies balanced --no-shared-reads
      pkvsim whatif --input-tokens 1024 --output-tokens 128 --rate 4 \\
          --device h200 --model llama-3.1-8b
      pkvsim whatif --input-tokens 200 --output-tokens 300 --turns 1-8 \\
          --think-time exponential:mean=10 --concurrency 64 --prefix-cache lru \\
          --order continuum --replicas 2 --router prefix --requests-csv runs.csv
      pkvsim whatif --trace requests.csv --device h200 --engine vllm \\
          --policies engine,balanced
      pkvsim whatif --trace requests.csv --device h200 --model llama-3.1-70b-tp4 \\
          --query-tokens 4 --acceptance 0.7 --draft-cost 0.05
      pkvsim whatif --trace conversation_trace.jsonl --device h200 \\
          --prefix-cache lru --tier host:256GiB:50 --tier disk:2TiB:7
      pkvsim whatif --trace conversation_trace.jsonl --device h200 \\
          --policies balanced --select mean_std:0.1
      pkvsim whatif --trace AzureLLMInferenceTrace_code.csv --device h200 \\
          --replicas 4 --kv-gib 2 --rate-scale 8 --lend all
      pkvsim whatif --trace requests.csv --device h200 --kv-parallel 2 \\
          --policies balanced
      pkvsim whatif --trace requests.csv --device h200 \\
          --replicas 2 --prefill-replicas 1
    """
    with one_line_errors():
        from dataclasses import replace

        from pkvsim.commands.serving_inputs import load_model, progress_bar
        from pkvsim.devices.device import get_device
        from pkvsim.serving.costs import default_policies
        from pkvsim.studies.whatif import whatif as run_whatif

        servers = server.replicas + server.prefill_replicas
        for option, path in (("plot", plot), ("timeline", timeline), ("report", report_file)):
            if path is not None and servers > 1:  # their axes of time hold the steps of one server
                raise ValueError(f"{option}: expected one server, got {servers}")
        if plot is not None:
            from pkvsim.reports.plots import check_plot_path

            check_plot_path(plot)
        if timeline is not None:
            from pkvsim.reports.perfetto import check_timeline_path

            check_timeline_path(timeline)
        if requests_csv is not None:
            from pkvsim.reports.export.requests_csv import check_csv_path

            check_csv_path(requests_csv)
        if report_file is not None:
            from pkvsim.reports.html_page import check_report_path

            check_report_path(report_file)
        spec = get_device(device)
        config = replace(server.config(source.seed), tiers=tiers.setup(spec))
        chosen, notes = load_model(model, server.weight_bits, server.tensor_parallel, spec, config)
        requests = source.load(trace)
        requests = replace(requests, notes=requests.notes + notes)
        if lend is not None:
            for option, given in (("policies", policies), ("plot", plot), ("timeline", timeline),
                                  ("report", report_file), ("requests_csv", requests_csv)):  # fmt: skip
                if given is not None:
                    raise ValueError(f"{option}: expected None with --lend, got {given}")
            from pkvsim.commands.several.lend import whatif_lend

            with progress_bar(not as_json, "requests") as progress:
                whatif_lend(lend, requests, chosen, spec, config, as_json=as_json, progress=progress)
            return
        names = list(default_policies(config))
        if policies is not None:
            names = [name.strip() for name in policies.split(",") if name.strip()]
        with progress_bar(not as_json, "tokens") as progress:
            report = run_whatif(requests, chosen, spec, names, config, progress=progress)
        if plot is not None:
            from pkvsim.reports.plot_serving import plot_whatif

            plot_whatif(report, plot)
        if timeline is not None:
            from pkvsim.reports.perfetto import serving_events, write_timeline

            tell_left_out(write_timeline(serving_events(report), timeline))
        if requests_csv is not None:
            from pkvsim.reports.export.requests_csv import write_requests

            write_requests(report, requests_csv)
        if report_file is not None:
            from pkvsim.reports.html_page import write_html

            write_html(report, report_file)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        return
    from pkvsim.reports.table_serving import print_whatif

    print_whatif(report)
