"""Prediction beside measurement: constants are fitted to a server's steps on a load of its own, then three other loads
are served and predicted: arrivals of Azure's code service, Mooncake's long prompts with shared blocks, a closed loop.

The trace files are used where they are; else loads of the same lengths are drawn, whose names say so.
"""
from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.reports.grid import Column, print_grid, print_line
from pkvsim.traces.distributions import Lognormal, Uniform, constant
from pkvsim.traces.readers import load_requests
from pkvsim.traces.requests import RequestTrace, first_requests, scale_rate
from pkvsim.traces.synthetic import Gaps, make_load

if TYPE_CHECKING:
    from gpu.serve.llm import LLM
    from gpu.serve.replay import Replay
    from gpu.serve.step_prices import StepErrors

AZURE, MOONCAKE = (300, 40.0), (60, 15.0)  # requests, and seconds that their arrivals are spread over
FILES = {"azure": "azure*code*.csv", "mooncake": "mooncake*.jsonl"}
BOUNDS = {"tokens/s": 0.03, "TPOT p50": 0.05, "TPOT p90": 0.05, "TTFT p50": 0.10, "TTFT p90": 0.10}
STEP_BOUND = 0.08


@dataclass(frozen=True, slots=True)
class Prediction:
    """One load. figures: (measured, predicted), seconds but for tokens/s; None where there is none."""

    name: str
    requests: int
    figures: dict[str, tuple[float | None, float | None]]
    steps: list[StepErrors]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"off": {name: off(pair) for name, pair in self.figures.items()}}

    @property
    def within(self) -> bool:
        """Whether every figure is within its bound, and steps on average."""
        offs = {name: off(pair) for name, pair in self.figures.items()}
        return (all(offs[name] is None or abs(offs[name]) <= bound for name, bound in BOUNDS.items())
                and all(error.mean <= STEP_BOUND for error in self.steps if error.kind == "all"))


def off(pair: tuple[float | None, float | None]) -> float | None:
    """Predicted over measured, less 1."""
    measured, predicted = pair
    return None if not measured or predicted is None else predicted / measured - 1


def scaled(trace: RequestTrace, scale: float) -> RequestTrace:
    """The trace with prompts, outputs and arrivals of that share; blocks of a prompt that it no longer has are cut."""
    if scale == 1:
        return trace
    prompts = np.maximum(1, (trace.prompt_tokens * scale).astype(np.int64))
    given: dict[str, Any] = {"prompt_tokens": prompts, "arrival_s": trace.arrival_s * scale,
                             "output_tokens": np.maximum(1, (trace.output_tokens * scale).astype(np.int64))}
    if trace.block_hashes is not None and trace.block_offsets is not None:
        counts = -(-prompts // trace.block_tokens)
        kept = [trace.block_hashes[begin : begin + count] for begin, count in zip(trace.block_offsets, counts)]
        given |= {"block_hashes": np.concatenate(kept), "block_offsets": np.append(0, np.cumsum(counts))}
    return replace(trace, **given)


def fitted_load(scale: float) -> Iterator[RequestTrace]:
    """What constants are fitted on: prompts of all lengths beside many and few rows that decode, an idle server, and a
    few long prompts, as attention's share of a chunk's time grows with what is cached before it."""
    for clients, requests, prompts, outputs, rate in (
        (80, 80, Lognormal(math.log(1500), 1.0, 16_000), Uniform(60, 200), None),
        (4, 12, Uniform(200, 6000), Uniform(20, 60), None),
        (None, 10, Uniform(200, 2000), constant(12), 2.5),
        (2, 3, Uniform(24_000, 80_000), Uniform(20, 60), None),
    ):
        made = make_load(input_tokens=prompts, output_tokens=outputs, requests=requests, concurrency=clients,
                         rate_per_s=rate, seed=requests)
        lengths = "long, " if prompts.mean > 20_000 else ""
        yield scaled(replace(made, name=f"fitted on, {lengths}{clients or 'few'} in flight"), scale)


def loads(folder: Path | None, scale: float) -> Iterator[RequestTrace]:
    """What is predicted."""
    yield scaled(_azure(folder), scale)
    yield scaled(_mooncake(folder), scale)
    loop = make_load(input_tokens=constant(1024), output_tokens=constant(256), requests=64, concurrency=32)
    yield scaled(replace(loop, name="1024+256 x 32"), scale)


def _azure(folder: Path | None) -> RequestTrace:
    """Drawn by the trace's medians and 99th percentiles."""
    count, seconds = AZURE
    file = _file(folder, "azure")
    if file is not None:
        return _first(file, count, seconds)
    made = make_load(input_tokens=Lognormal(math.log(1469), 0.98, 7437), requests=count, rate_per_s=count / seconds,
                     output_tokens=Lognormal(math.log(13), 1.1, 1899), gaps=Gaps(burstiness=0.3), seed=1)
    return replace(made, name="like Azure code")


def _mooncake(folder: Path | None) -> RequestTrace:
    count, seconds = MOONCAKE
    file = _file(folder, "mooncake")
    if file is not None:
        return _first(file, count, seconds)
    made = make_load(input_tokens=Lognormal(math.log(6909), 1.0, 90_000), requests=count, rate_per_s=count / seconds,
                     output_tokens=Lognormal(math.log(350), 0.5, 1200), shared_prefix_tokens=512, seed=2)
    return replace(made, name="like Mooncake conversation")


def _first(file: Path, count: int, seconds: float) -> RequestTrace:
    trace = first_requests(load_requests(str(file), limit=count), count)
    return scale_rate(trace, max(1.0, trace.duration_s / seconds))


def _file(folder: Path | None, name: str) -> Path | None:
    found = sorted(folder.glob(FILES[name])) if folder is not None else []
    return found[0] if found else None


def compile_prices(model: str, device: str) -> multiprocessing.process.BaseProcess:
    """Starts a process that compiles what predictions run, into Numba's cache, while the model is loaded."""
    process = multiprocessing.get_context("spawn").Process(target=_compile_prices, args=(model, device))
    process.start()
    return process


def _compile_prices(model: str, device: str) -> None:
    from pkvsim.models.presets import catalogue, get_model
    from pkvsim.serving.server_config import ServingConfig
    from pkvsim.studies.whatif import whatif

    load = make_load(input_tokens=constant(64), output_tokens=constant(8), requests=4, concurrency=2,
                     shared_prefix_tokens=64)
    config = ServingConfig(prefix_cache="lru", graphs=True, shared_reads=False)
    known = get_model(model if model in catalogue() else "llama-3.1-8b")
    whatif(load, known, get_device(device), ["balanced"], config)


def predictions(
    llm: LLM, device: DeviceSpec, folder: Path | None, *, scale: float = 1.0, fit: bool = True,
    say: Callable[[str], None] = lambda line: None, ready: Callable[[], None] = lambda: None,
) -> tuple[DeviceSpec, list[Prediction], list[Replay]]:  # fmt: skip
    """(the device that predicts, the loads' figures, all runs, those that were fitted first). fit: by the server's own
    steps; else the device's constants as they are. scale: of all lengths and arrivals. ready: is called before anything
    is priced. An interrupt ends it with the loads that were predicted by then."""
    from gpu.serve.model.config import known_to_pkvsim
    from gpu.serve.report import serving_config
    from gpu.serve.step_prices import fit_device

    runs = []
    if fit:
        runs = [_served(llm, trace, say) for trace in fitted_load(scale)]
        steps = [step for run in runs for step in run.steps]
        ready()
        device = fit_device(steps, known_to_pkvsim(llm.config), device, serving_config(llm, runs[0].trace),
                            source=f"{len(steps)} steps of gpu.serve on {llm.config.name}")
        say(f"constants are fitted to {len(steps):,} steps")
    ready()
    found: list[Prediction] = []
    try:
        for trace in loads(folder, scale):
            runs.append(_served(llm, trace, say))
            found.append(_beside(llm, runs[-1], device))
    except KeyboardInterrupt:
        if not found:
            raise
        say(f"interrupted after {len(found)} loads")
    return device, found, runs


def _served(llm: LLM, trace: RequestTrace, say: Callable[[str], None]) -> Replay:
    """The trace served with an empty cache."""
    from gpu.serve.replay import replay

    llm.restart(prefix_cache="none" if trace.block_hashes is None else "lru")
    run = replay(llm.server, trace)
    say(f"{trace.name}: {len(trace)} requests served in {len(run.steps):,} steps")
    return run


def _beside(llm: LLM, run: Replay, device: DeviceSpec) -> Prediction:
    from gpu.serve.replay import MEASURED
    from gpu.serve.report import beside_prediction
    from gpu.serve.step_prices import price_steps, step_errors

    report = beside_prediction(run, llm, device)
    summaries = [report.results[name].summary for name in (MEASURED, "predicted")]
    figures = {"tokens/s": tuple(s["tokens_per_s"] for s in summaries)}
    for label, key in (("TPOT", "tpot_s"), ("TTFT", "ttft_s")):
        figures |= {f"{label} {p}": tuple(s[key][p] for s in summaries) for p in ("p50", "p90")}
    priced = price_steps(run.steps, report.model, device, report.config)
    return Prediction(run.trace.name, len(run.trace), figures, step_errors(run.steps, priced))


def show(console: Console, found: list[Prediction], device: DeviceSpec, constants: str) -> None:
    rows = []
    for one in found:
        for name, (measured, predicted) in one.figures.items():
            scale, form = (1.0, ",.1f") if name == "tokens/s" else (1e3, ",.2f")
            cells = ("-" if value is None else f"{value * scale:{form}}" for value in (measured, predicted))
            apart = off((measured, predicted))
            rows.append((one.name, name if name == "tokens/s" else f"{name}, ms", *cells,
                         "-" if apart is None else f"{apart:+.1%}", f"{BOUNDS[name]:.0%}"))
        for error in one.steps:
            rows.append((one.name, f"steps, {error.kind}", f"{error.steps:,}", f"bias {error.bias:+.1%}",
                         f"{error.mean:.1%}", f"{STEP_BOUND:.0%}" if error.kind == "all" else ""))
    columns = [Column("load", "left"), Column("", "left"), Column("measured"), Column("predicted"), Column("off"),
               Column("bound")]
    print_grid(console, columns, rows)
    entry = device.outside.get(constants)
    if entry is not None and entry.status == "fitted" and entry.in_sample is not None:
        print_line(console, f"constants fitted to {entry.source}: mean error {entry.in_sample.mean_percent}%")


def save_steps(path: Path, runs: list[Replay]) -> None:
    """All steps of the runs with what they computed, for fits elsewhere, as a compressed NumPy file: run, start_us,
    end_us, follows, rows, chunks [steps]; lens [sum of rows]; chunk_begins, chunk_tokens [sum of chunks]."""
    steps = [(number, step) for number, run in enumerate(runs) for step in run.steps]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(step, name) for _, step in steps]).astype(np.int32)

    np.savez_compressed(
        path, names=np.array([run.trace.name for run in runs]), run=np.array([number for number, _ in steps], np.int16),
        start_us=np.array([step.start_us for _, step in steps]), end_us=np.array([step.end_us for _, step in steps]),
        follows=np.array([step.follows for _, step in steps]),
        rows=np.array([step.decode_rows for _, step in steps], np.int16),
        chunks=np.array([step.chunks for _, step in steps], np.int16), lens=joined("decode_lens"),
        chunk_begins=joined("chunk_begins"), chunk_tokens=joined("chunk_tokens"),
    )  # fmt: skip
