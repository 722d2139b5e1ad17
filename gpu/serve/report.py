"""What a served trace took, beside what pkvsim predicts of it: tables, JSON, CSV and timelines."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gpu.serve.llm import KEEP_FREE_FRACTION, LLM
from gpu.serve.model.config import known_to_pkvsim
from gpu.serve.replay import MEASURED, Replay, as_result
from gpu.serve.step import StepRecord
from gpu.serve.step_prices import StepErrors, price_steps, step_errors
from gpu.serve.tiers.prompt_tiers import PromptTiers
from pkvsim.devices.device import DEVICES, DeviceSpec, device_named_by, get_device
from pkvsim.kv_types import KV_DTYPES
from pkvsim.memory.tier_options import ALWAYS_LOAD, TierSetup
from pkvsim.memory.tier_presets import find_tiers
from pkvsim.models.model_spec import ModelSpec
from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.reports.table_serving import print_whatif, seconds
from pkvsim.serving.costs import cache_bytes_per_token
from pkvsim.serving.results.logs import StepLog
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import limits_of, requests_of
from pkvsim.studies.whatif import WhatIf, whatif, why_left_out
from pkvsim.traces.requests import RequestTrace

GIB = 2**30
PREDICTED = "predicted"  # beside MEASURED, in tables and files
KINDS = ("decode", "mixed", "prefill")
CSV_COLUMNS = [field.name for field in fields(StepRecord) if field.type != "np.ndarray"]


@dataclass(frozen=True, slots=True)
class StepKind:
    """Steps of one kind: how many, their times and what they computed."""

    kind: str  # of KINDS
    steps: int
    mean_us: float
    p50_us: float
    p90_us: float
    decode_rows: float  # mean
    prefill_tokens: float  # mean


@dataclass(frozen=True, slots=True)
class HostGaps:
    """How long the device waited between steps that followed each other, of decode steps behind decode steps."""

    steps: int
    p50_us: float
    p90_us: float
    share: float  # of these steps' time


def serving_config(llm: LLM, trace: RequestTrace) -> ServingConfig:
    """The same server as the simulator has it. What it caches of prompts it knows by the trace's block hashes."""
    o = llm.options
    config = ServingConfig(
        page_size=o.page_size, max_batch=o.max_batch, step_tokens=o.step_tokens,
        kv_dtype=llm.pages.dtype if llm.pages.dtype in KV_DTYPES else None, graphs=o.graphs,
        prefix_cache="none" if trace.block_hashes is None else o.prefix_cache, order=o.order,
        keep_free_fraction=KEEP_FREE_FRACTION, steps_in_flight=2,
        shared_reads=False,  # its decode steps are planned without groups
        tiers=None if trace.block_hashes is None else _tier_setup(o.tiers),
    )  # fmt: skip
    page = cache_bytes_per_token(known_to_pkvsim(llm.config), config) * o.page_size
    pages = llm.server.scheduler.limits.num_pages + 0.5  # half a page, against rounding down
    return replace(config, kv_gib=pages * page / GIB)


def _tier_setup(tiers: Sequence[str]) -> TierSetup | None:
    """The tiers of a server that loads all that they have of a prompt."""
    if not tiers:
        return None
    return TierSetup(tiers=tuple(find_tiers([text.partition("=")[0] for text in tiers], {})), load=ALWAYS_LOAD)


def _served_model(llm: LLM) -> ModelSpec:
    """The model as pkvsim knows it, with the context that the server takes requests of."""
    return replace(known_to_pkvsim(llm.config), max_context=llm.server.max_context)


def device_at_hand() -> DeviceSpec:
    """The catalogue's entry of the GPU here. ValueError where there is none."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    known = None if name is None else device_named_by(name)
    if known is not None:
        return get_device(known)
    why = f"none of them is {name}" if name is not None else "no CUDA device answers"
    raise ValueError(f"device: expected --device with one of {', '.join(DEVICES)}, as {why}")


def check_predictable(llm: LLM, trace: RequestTrace, device: DeviceSpec) -> None:
    """ValueError where whatif has no price for the model on that GPU, or has no request to serve: to be asked before
    serving."""
    model, config = _served_model(llm), serving_config(llm, trace)
    reason = why_left_out(model, device, "balanced", config)
    if reason is not None:
        raise ValueError(f"predict: {reason}")
    requests_of(trace, model, config, limits_of(model, device, config))


def beside_prediction(run: Replay, llm: LLM, device: DeviceSpec) -> WhatIf:
    """whatif's report of the trace on the schedule that ran, with the measured run as one more of its results."""
    model, config = _served_model(llm), serving_config(llm, run.trace)
    predicted = whatif(run.trace, model, device, ["balanced"], config)
    results = {MEASURED: as_result(run, llm.server),
               PREDICTED: replace(predicted.results["balanced"], policy=PREDICTED)}
    checks = {MEASURED: None, PREDICTED: predicted.checks["balanced"]}
    return WhatIf(run.trace, model, device, config, results, checks, (*predicted.notes, *llm.notes),
                  predicted.left_out, predicted.basis)


def step_kinds(steps: StepLog) -> list[StepKind]:
    """The steps of a run by kind; of a long simulated run entries are means over several steps, which count as one."""
    decode, prefill = steps.decode_rows > 0, steps.prefill_tokens > 0
    found = []
    for kind, chosen in zip(KINDS, (decode & ~prefill, decode & prefill, prefill & ~decode)):
        if chosen.any():
            us = steps.duration_us[chosen]
            p50_us, p90_us = _percentiles(us, 50, 90)
            found.append(StepKind(kind, int(steps.steps[chosen].sum()), float(us.mean()), p50_us, p90_us,
                                  float(steps.decode_rows[chosen].mean()), float(steps.prefill_tokens[chosen].mean())))
    return found


def host_gaps(steps: Sequence[StepRecord]) -> HostGaps | None:
    """Of decode steps that were planned while another one ran; None where there are none."""
    pairs = [(two.start_us - one.end_us, two.end_us - two.start_us) for one, two in zip(steps, steps[1:])
             if two.follows and one.kind == two.kind == "decode"]
    if not pairs:
        return None
    gaps, times = np.array(pairs).T
    p50_us, p90_us = _percentiles(gaps, 50, 90)
    return HostGaps(len(pairs), p50_us, p90_us, float(gaps.sum() / (gaps.sum() + times.sum())))


def _percentiles(values: np.ndarray, *which: int) -> list[float]:
    return [float(value) for value in np.percentile(values, which)]


def to_dict(run: Replay, llm: LLM, report: WhatIf | None) -> dict[str, Any]:
    """The object that `python -m gpu.serve --json` prints."""
    measured = as_result(run, llm.server) if report is None else report.results[MEASURED]
    results = {MEASURED: measured} if report is None else report.results
    gaps = host_gaps(run.steps)
    ended: dict[str, int] = {}
    for request in run.requests:
        ended[request.status] = ended.get(request.status, 0) + 1
    return {
        "model": llm.config.name,
        "trace": {"name": run.trace.name, "requests": len(run.trace), "notes": list(run.trace.notes)},
        "kv_pages": llm.server.scheduler.limits.num_pages,
        "prefill": llm.prefill,
        "weights_bytes": llm.weights.num_bytes,
        "ended": ended,
        "free_pages": llm.server.num_free_pages,
        "tiers": None if llm.tiers is None else llm.tiers.stats(),
        "results": {name: result.summary for name, result in results.items()},
        "steps": {name: [_named(kind) for kind in step_kinds(result.steps)] for name, result in results.items()},
        "step_errors": [] if report is None else [_named(error) for error in _errors(run, report)],
        "host_gaps": None if gaps is None else _named(gaps),
        "notes": list(llm.notes if report is None else report.notes),
    }


def _errors(run: Replay, report: WhatIf) -> list[StepErrors]:
    """The measured steps against the prices of what they computed."""
    return step_errors(run.steps, price_steps(run.steps, report.model, report.device, report.config))


def _named(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _print_tiers(console: Console, tiers: PromptTiers) -> None:
    stats, ms = tiers.stats(), tiers.load_s / max(1, tiers.loads) * 1e3
    faults = stats["device_faults"] + sum(one["faults"] for one in stats.values() if isinstance(one, dict))
    print_line(console, f"tiers: {stats['blocks']:,} blocks are kept; {tiers.loads:,} loads brought "
                        f"{tiers.loaded_tokens:,} tokens of prompts, in {ms:.1f} ms each; {faults:,} faults")


def show(run: Replay, llm: LLM, report: WhatIf | None) -> None:
    """Prints the tables."""
    console = table_console()
    if report is not None:
        print_whatif(report)
        results = report.results
    else:
        results = {MEASURED: as_result(run, llm.server)}
        _print_measured(console, run, llm, results[MEASURED])
    rows = []
    for name, result in results.items():
        for kind in step_kinds(result.steps):
            rows.append((f"{name}, {kind.kind}", f"{kind.steps:,}", *(seconds(us / 1e6) for us in (
                kind.mean_us, kind.p50_us, kind.p90_us)), f"{kind.decode_rows:.1f}", f"{kind.prefill_tokens:.0f}"))
    columns = [Column("steps", "left"), *(Column(head) for head in (
        "count", "mean", "p50", "p90", "decode\nrows", "prefill\ntokens"))]
    print_grid(console, columns, rows)
    if report is not None:
        found = ", ".join(f"{error.kind} {error.mean:.1%} ({error.bias:+.1%})" for error in _errors(run, report))
        print_line(console, f"steps against their prices, mean error (bias): {found}")
    gaps = host_gaps(run.steps)
    if gaps is not None:
        print_line(console, f"between decode steps the GPU waited {gaps.p50_us:.1f} us (p90 {gaps.p90_us:.1f}), "
                            f"{gaps.share:.1%} of the time")
    if llm.tiers is not None:
        _print_tiers(console, llm.tiers)
    refused = [request for request in run.requests if request.status == "refused"]
    for request in refused[:5]:
        print_line(console, f"- refused: {request.reason}")
    if len(refused) > 5:
        print_line(console, f"- and {len(refused) - 5:,} more were refused")


def _print_measured(console: Any, run: Replay, llm: LLM, result: ServingResult) -> None:
    s = result.summary
    print_line(console, f"{llm.config.name}: {s['finished']:,} of {s['requests']:,} requests served, "
                        f"{s['output_tokens']:,} tokens in {seconds(s['makespan_s'])}; {result.num_pages:,} KV "
                        f"pages of {llm.pages.page_size} tokens; prompt chunks by {llm.prefill}")
    rows = [("tokens/s", f"{s['tokens_per_s'] or 0:,.1f}")]
    for label, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("between tokens", "itl_s"), ("end to end", "e2e_s")):
        rows += [(f"{label} {p}", seconds(s[key][p]) or "-") for p in ("p50", "p90", "p99")]
    rows += [("preemptions", f"{s['preemptions']:,}"), ("prompt tokens cached", f"{s['prefix_hit_tokens']:,}")]
    print_grid(console, [Column("", "left"), Column("measured")], rows)
    for note in llm.notes:
        print_line(console, f"- {note}")


def write_steps(run: Replay, path: Path) -> None:
    """A line for each step as CSV, times from the trace's first arrival on. ValueError where it cannot be written."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(CSV_COLUMNS)
            for step in run.steps:
                start, end, *others = (getattr(step, name) for name in CSV_COLUMNS)
                lines.writerow([f"{start - run.begin_us:.1f}", f"{end - run.begin_us:.1f}",
                                *(f"{value:.1f}" if isinstance(value, float) else value for value in others)])
    except OSError as error:
        raise ValueError(f"steps_csv: cannot write {path}: {error.strerror or error}") from None
