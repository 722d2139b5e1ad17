"""pkvsim whatif."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors, tell_left_out
from pkvsim.commands.load_options import RequestOptions, with_request_options
from pkvsim.commands.shared_options import (
    AsJson,
    Device,
    KVGib,
    MaxBatch,
    Model,
    Order,
    PageSize,
    PrefixCache,
    Replicas,
    RouterName,
    WeightBits,
)  # fmt: skip


@with_request_options
def whatif(
    trace: Annotated[
        Optional[str], typer.Option(help="Request trace, as `pkvsim trace` reads it; or --input-tokens and so on.")
    ] = None,
    source: RequestOptions = RequestOptions(),
    device: Device = "rtx3060",
    model: Model = "llama-3.1-8b",
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated: paper, calibrated, oracle, flashinfer (the better of its CUDA-core and tensor-core "
            "kernels, XQA not among them), or a route: split, workqueue, balanced, xqa, ..."
        ),
    ] = "paper,calibrated,flashinfer,workqueue,balanced,oracle",
    prefix_cache: PrefixCache = "none",
    order: Order = "fcfs",
    kv_ttl: Annotated[
        float, typer.Option(help="With continuum: seconds that an answer's KV is kept for the next turn.")
    ] = 10.0,
    replicas: Replicas = 1,
    router: RouterName = "round-robin",
    max_batch: MaxBatch = 256,
    step_tokens: Annotated[int, typer.Option(help="Most tokens of a step, prefill chunks included.")] = 2048,
    page_size: PageSize = 16,
    kv_gib: KVGib = None,
    memory_fraction: Annotated[float, typer.Option(help="Part of the GPU's memory that the server uses.")] = 0.9,
    workspace_gib: Annotated[float, typer.Option(help="Activations, context and graphs.")] = 1.0,
    weight_bits: WeightBits = None,
    tensor_parallel: Annotated[Optional[int], typer.Option(help="GPUs that share each layer.")] = None,
    compute_efficiency: Annotated[float, typer.Option(help="Part of the FP16 peak that matrix products reach.")] = 0.6,
    prefill_attention_efficiency: Annotated[
        float, typer.Option(help="Part of the FP16 peak that prefill attention reaches.")
    ] = 0.45,
    host_us: Annotated[
        float, typer.Option(help="Host time per step that the GPU waits for, beside attention's.")
    ] = 0.0,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs/--eager",
            help="Decode in captured graphs, or layer by layer as the host issues it (as in replay).",
        ),
    ] = False,
    splits: Annotated[Optional[int], typer.Option(help="Pin the splits of every row.")] = None,
    kv_parallel: Annotated[
        int, typer.Option(help="GPUs of each server that hold every row's KV together (policy balanced).")
    ] = 1,
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
      pkvsim whatif --input-tokens 1024 --output-tokens 128 --rate 4 \\
          --device h200 --model llama-3.1-8b
      pkvsim whatif --input-tokens 200 --output-tokens 300 --turns 1-8 \\
          --think-time exponential:mean=10 --concurrency 64 --prefix-cache lru \\
          --order continuum --replicas 2 --router prefix --requests-csv runs.csv
      pkvsim whatif --trace AzureLLMInferenceTrace_code.csv --device h200 \\
          --replicas 4 --kv-gib 2 --rate-scale 8 --lend all
    """
    with one_line_errors():
        from dataclasses import replace

        from pkvsim.commands.serving_inputs import load_model, progress_bar
        from pkvsim.devices.device import get_device
        from pkvsim.serving.server_config import ServingConfig
        from pkvsim.studies.whatif import whatif as run_whatif

        for option, path in (("plot", plot), ("timeline", timeline), ("report", report_file)):
            if path is not None and replicas > 1:  # their axes of time hold the steps of one server
                raise ValueError(f"{option}: expected one server, got --replicas {replicas}")
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
        config = ServingConfig(
            page_size=page_size,
            max_batch=max_batch,
            step_tokens=step_tokens,
            kv_gib=kv_gib,
            memory_fraction=memory_fraction,
            workspace_gib=workspace_gib,
            compute_efficiency=compute_efficiency,
            prefill_attention_efficiency=prefill_attention_efficiency,
            host_us=host_us,
            graphs=graphs,
            prefix_cache=prefix_cache,
            order=order,
            kv_ttl_s=kv_ttl,
            replicas=replicas,
            kv_parallel=kv_parallel,
            router=router,
            splits=splits,
        )
        spec = get_device(device)
        chosen, notes = load_model(model, weight_bits, tensor_parallel, spec, config)
        requests = source.load(trace)
        requests = replace(requests, notes=requests.notes + notes)
        if lend is not None:
            for option, given in (("plot", plot), ("timeline", timeline), ("report", report_file),
                                  ("requests_csv", requests_csv)):  # fmt: skip
                if given is not None:
                    raise ValueError(f"{option}: expected None with --lend, got {given}")
            from pkvsim.commands.lend import whatif_lend

            with progress_bar(not as_json, "requests") as progress:
                whatif_lend(lend, requests, chosen, spec, config, as_json=as_json, progress=progress)
            return
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
