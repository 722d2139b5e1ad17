"""python -m gpu.serve: serves a trace on a model, and says what it took beside what pkvsim predicts."""
from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from gpu.cache.dma import ask_for_queues
from pkvsim.commands.errors import one_line_errors, tell_left_out
from pkvsim.commands.load_options import RequestOptions
from pkvsim.commands.options.group import with_option_groups


@with_option_groups
def serve(
    model: Annotated[
        str, typer.Option(help="smollm2, a .gguf file, a Hugging Face folder, or with --dummy-weights a preset.")
    ] = "smollm2",
    trace: Annotated[
        str | None, typer.Option(help="Request trace, as `pkvsim trace` reads it; or --input-tokens and so on.")
    ] = None,
    source: RequestOptions = RequestOptions(),
    dummy_weights: Annotated[bool, typer.Option(help="Random weights of the model's shape.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float16 or bfloat16; float32 on the CPU.")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="float8_e4m3fn, float8_e5m2 or int8; by default the model's.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="PyTorch on the CPU, though there is a GPU.")] = False,
    page_size: Annotated[int, typer.Option(help="Tokens per KV page.")] = 16,
    max_batch: Annotated[int, typer.Option(help="Most requests running at once.")] = 256,
    step_tokens: Annotated[int, typer.Option(help="Most tokens of a step, prefill chunks included.")] = 2048,
    max_context: Annotated[int | None, typer.Option(help="Most tokens of a request; by default the model's.")] = None,
    kv_gib: Annotated[float | None, typer.Option(help="GiB of KV pages; by default what weights leave.")] = None,
    memory_fraction: Annotated[float, typer.Option(help="Part of the GPU's memory that the server uses.")] = 0.9,
    prefix_cache: Annotated[str, typer.Option(help="Reuse of prompts' pages: none or lru.")] = "none",
    tier: Annotated[
        list[str] | None,
        typer.Option(help="KV of prompts beyond the pages, repeated: host:16GiB:50, disk0:200GiB:5=/mnt/nvme/kv."),
    ] = None,
    tier_flush: Annotated[
        float,
        typer.Option(help="Most seconds at the end in which disks write what host memory holds, for the next run."),
    ] = 0.0,
    order: Annotated[str, typer.Option(help="Who runs first of those that wait: fcfs, shortest or kvshare.")] = "fcfs",
    graphs: Annotated[bool, typer.Option("--graphs/--eager", help="Decode in captured graphs.")] = True,
    streamed_products: Annotated[
        bool | None,
        typer.Option("--streamed-products/--torch-products",
                     help="Products of few rows by our own kernel, or PyTorch's; by default ours on a GPU."),
    ] = None,
    predict: Annotated[bool, typer.Option("--predict", help="whatif's prediction of the same run beside it.")] = False,
    device: Annotated[
        str | None, typer.Option(help="With --predict: the GPU, as `pkvsim devices` lists it; by default this one.")
    ] = None,
    steps_csv: Annotated[Path | None, typer.Option(help="Write a line for every step to this file.")] = None,
    requests_csv: Annotated[
        str | None, typer.Option(help="With --predict: a line for every request, measured and predicted.")
    ] = None,
    timeline: Annotated[
        str | None, typer.Option(help="With --predict: both runs' steps and requests in one file for Perfetto.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Serves requests on this machine's GPU, every step as pkvsim's scheduler decides.

    \b
    Examples:
      python -m gpu.serve --model smollm2 --input-tokens 200 --output-tokens 100 \\
          --requests 64 --concurrency 16
      python -m gpu.serve --model smollm2 --input-tokens 2000 --turns 4 --prefix-cache lru \\
          --tier host:8GiB:50 --tier disk0:64GiB:5=/mnt/nvme/kv
      python -m gpu.serve --model llama-3.1-8b --dummy-weights --predict \\
          --trace AzureLLMInferenceTrace_code.csv --limit 300 --rate-scale 3
      python -m gpu.serve --model llama-3.1-8b --dummy-weights \\
          --torch-products --input-tokens 1000 --output-tokens 200 \\
          --concurrency 32
    """
    with one_line_errors(), ExitStack() as stack:
        check_machine(cpu)
        if tier:
            ask_for_queues()
        from gpu.serve.llm import LLM, ServeOptions
        from gpu.serve.replay import replay, warm_up
        from gpu.serve.report import beside_prediction, check_predictable, device_at_hand, show, to_dict, write_steps
        from pkvsim.commands.serving_inputs import progress_bar
        from pkvsim.devices.device import get_device
        from pkvsim.reports.plots import check_folder

        for option, given in (("device", device), ("requests_csv", requests_csv), ("timeline", timeline)):
            if given is not None and not predict:
                raise ValueError(f"{option}: expected only with --predict")
        if steps_csv is not None:
            check_folder(steps_csv, option="steps_csv")
        if timeline is not None:
            from pkvsim.reports.perfetto import check_timeline_path

            check_timeline_path(timeline)
        if requests_csv is not None:
            from pkvsim.reports.export.requests_csv import check_csv_path

            check_csv_path(requests_csv)
        options = ServeOptions(
            dtype=dtype, kv_dtype=kv_dtype, device="cpu" if cpu else None, page_size=page_size, max_batch=max_batch,
            step_tokens=step_tokens, max_context=max_context, kv_gib=kv_gib, memory_fraction=memory_fraction,
            prefix_cache=prefix_cache, tiers=tuple(tier or ()), tier_flush_s=tier_flush, order=order, graphs=graphs,
            dummy_weights=dummy_weights, streamed_products=streamed_products,
        )  # fmt: skip
        requests = source.load(trace)
        spec = None if not predict else device_at_hand() if device is None else get_device(device)
        llm = LLM(model, options, record=True, say=lambda line: typer.echo(line, err=True))
        stack.callback(llm.close)
        if spec is not None:
            check_predictable(llm, requests, spec)
        warm_up(llm.server, step_tokens=step_tokens)
        with progress_bar(not as_json, "tokens") as progress:
            report_progress = None if progress is None else (lambda done, total: progress("serving", done, total))
            run = replay(llm.server, requests, progress=report_progress)
        report = None if spec is None else beside_prediction(run, llm, spec)
        # What was measured is told first, so that a file which cannot be written loses none of it.
        if as_json:
            typer.echo(json.dumps(to_dict(run, llm, report), indent=2, allow_nan=False))
        else:
            show(run, llm, report)
        if steps_csv is not None:
            write_steps(run, steps_csv)
        if report is not None and timeline is not None:
            from pkvsim.reports.perfetto import serving_events, write_timeline

            tell_left_out(write_timeline(serving_events(report), timeline))
        if report is not None and requests_csv is not None:
            from pkvsim.reports.export.requests_csv import write_requests

            write_requests(report, requests_csv)


def check_machine(cpu: bool) -> None:
    """Says that the CPU serves where no GPU answers. Raises ValueError, saying what to install, where that lacks."""
    from gpu.measure.environment import missing

    lack = missing()
    if lack is None or (cpu and find_spec("torch") is not None):
        return
    if find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            typer.echo("no CUDA device answers: PyTorch serves on this CPU, slowly, as with --cpu", err=True)
            return
    raise ValueError(lack)


def main() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    app()


if __name__ == "__main__":
    main()
