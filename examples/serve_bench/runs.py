"""Whole runs, measured and predicted: closed loops of fixed lengths, and traces as others published them."""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from pkvsim.devices.device import DeviceSpec
from pkvsim.reports.grid import Column, print_grid
from pkvsim.serving.results.logs import StepLog
from pkvsim.traces.distributions import constant
from pkvsim.traces.readers import load_requests
from pkvsim.traces.requests import RequestTrace, first_requests, scale_rate
from pkvsim.traces.synthetic import make_load

if TYPE_CHECKING:
    from gpu.serve.llm import LLM

LOOPS = ((1024, 256, 1), (1024, 256, 8), (1024, 256, 32), (1024, 256, 128), (8192, 256, 32), (32768, 128, 8))
LOOP_TURNS = 2  # requests of a loop for each one in flight
AZURE_REQUESTS, MOONCAKE_REQUESTS = 300, 60
TRACE_SECONDS = 60.0  # that a trace's arrivals are spread over
FIGURES = ("tokens/s", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90")


@dataclass(frozen=True, slots=True)
class RunResult:
    """One trace. Figures are (measured, predicted), seconds but for tokens/s; None where there is none."""

    name: str
    requests: int
    figures: dict[str, tuple[float | None, float | None]]
    step_error: float | None  # mean of |measured / predicted - 1| over steps of equal rows and prompt tokens
    compared: float  # the share of steps that have such a counterpart
    gap_share: float | None  # of decode steps, that the GPU waited for the host

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def loops() -> Iterator[RequestTrace]:
    """Clients that send the next request when they have an answer."""
    for prompt, output, clients in LOOPS:
        made = make_load(input_tokens=constant(prompt), output_tokens=constant(output),
                         requests=LOOP_TURNS * clients if clients > 1 else 4, concurrency=clients)
        yield RequestTrace(f"{prompt}+{output} x {clients}", made.arrival_s, made.prompt_tokens, made.output_tokens,
                           concurrency=clients)


def traces(folder: Path) -> Iterator[RequestTrace]:
    """The first requests of Azure's and Mooncake's traces in a folder, at a rate that takes about a minute."""
    for pattern, count in (("azure*code*.csv", AZURE_REQUESTS), ("mooncake*.jsonl", MOONCAKE_REQUESTS)):
        for file in sorted(folder.glob(pattern))[:1]:
            trace = first_requests(load_requests(str(file), limit=count), count)
            yield scale_rate(trace, max(1.0, trace.duration_s / TRACE_SECONDS))


def run(llm: LLM, trace: RequestTrace, device: DeviceSpec) -> RunResult:
    """Serves the trace, and asks whatif for the same."""
    from gpu.serve.replay import MEASURED, replay
    from gpu.serve.report import beside_prediction, host_gaps

    llm.server.steps.clear()
    served = replay(llm.server, trace)
    report = beside_prediction(served, llm, device)
    one, other = report.results[MEASURED], report.results["predicted"]

    def figures(summary: dict[str, Any]) -> list[float | None]:
        ttft, tpot = summary["ttft_s"], summary["tpot_s"]
        return [summary["tokens_per_s"], ttft["p50"], ttft["p90"], tpot["p50"], tpot["p90"]]

    error, compared = step_error(one.steps, other.steps)
    gaps = host_gaps(served.steps)
    pairs = dict(zip(FIGURES, zip(figures(one.summary), figures(other.summary))))
    return RunResult(trace.name, len(trace), pairs, error, compared, None if gaps is None else gaps.share)


def step_error(measured: StepLog, predicted: StepLog) -> tuple[float | None, float]:
    """(mean relative error of steps with as many decoding rows and prompt tokens in both runs, the share of measured
    steps that are so)."""

    def means(steps: StepLog) -> dict[tuple[int, int], tuple[float, int]]:
        keys = np.stack([np.rint(steps.decode_rows), np.rint(steps.prefill_tokens)], axis=1).astype(int)
        kinds, place, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        sums = np.bincount(place.reshape(-1), steps.duration_us)
        return {tuple(kind): (us / count, count) for kind, us, count in zip(kinds.tolist(), sums, counts.tolist())}

    ours, theirs = means(measured), means(predicted)
    both = [(abs(us / theirs[kind][0] - 1), count) for kind, (us, count) in ours.items() if kind in theirs]
    total, compared = len(measured.start_s), sum(count for _, count in both)
    return (sum(error * count for error, count in both) / compared if compared else None), compared / max(1, total)


def transformers_step_us(llm: LLM, rows: int, context: int, *, steps: int = 32) -> float:
    """A decode step of Transformers' generate (SDPA, its own cache) on random weights of the same shape, by the wall
    clock: what further tokens cost."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in llm.config.source.items() if key not in ("architectures", "torch_dtype")}
    family = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "MistralForCausalLM": "mistral"}
    config = AutoConfig.for_model(family.get(llm.config.architecture, "llama"), **fields)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=llm.weights.embedding.dtype,
                                                 attn_implementation="sdpa").eval()
    ids = torch.randint(3, config.vocab_size, (rows, context), device="cuda")

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens,
                       max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(2)
    few = seconds(2)
    return (seconds(2 + steps) - few) / steps * 1e6


def show(console: Console, results: list[RunResult]) -> None:
    def cells(name: str, pair: tuple[float | None, float | None]) -> tuple[str, str, str]:
        one, other = pair
        if one is None or other is None:
            return "-", "-", "-"
        scale, form = (1.0, ",.0f") if name == "tokens/s" else (1e3, ",.1f")
        return f"{one * scale:{form}}", f"{other * scale:{form}}", f"{other / one - 1:+.1%}"

    rows = []
    for result in results:
        for name, pair in result.figures.items():
            rows.append((result.name, name + ("" if name == "tokens/s" else ", ms"), *cells(name, pair)))
        error = "-" if result.step_error is None else f"{result.step_error:.1%}"
        rows.append((result.name, "steps' mean error", "", f"of {result.compared:.0%}", error))
        rows.append((result.name, "GPU idle in decode", "-" if result.gap_share is None else f"{result.gap_share:.1%}",
                     "", ""))
    columns = [Column("run", "left"), Column("", "left"), Column("measured"), Column("predicted"), Column("off")]
    print_grid(console, columns, rows)
