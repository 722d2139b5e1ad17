"""What if: one trace, one model, one GPU, several policies, side by side."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.presets import ModelSpec
from pkvsim.serving.costs import check_policies, fit_note, page_budget
from pkvsim.serving.result import ServingResult
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import TOO_LONG_FOR_MODEL, TOO_LONG_FOR_POOL
from pkvsim.studies.timeline_check import TimelineCheck, check_timeline
from pkvsim.traces.requests import RequestTrace

REJECTIONS = {"too_long_for_pool": TOO_LONG_FOR_POOL, "too_long_for_model": TOO_LONG_FOR_MODEL}
PolicyProgress = Callable[[str, int, int], None]  # policy, output tokens produced, of how many


@dataclass(frozen=True, slots=True, eq=False)
class WhatIf:
    """The runs of every policy over one trace, and what a reader must know of them."""

    trace: RequestTrace
    model: ModelSpec
    device: DeviceSpec
    config: ServingConfig
    results: dict[str, ServingResult]  # by policy, in the order asked for
    checks: dict[str, TimelineCheck | None]  # by policy, a sample of its steps task by task
    notes: tuple[str, ...]

    def rejected(self) -> dict[str, np.ndarray]:
        """Places in the trace of the requests that cannot be served, int64 [k], by reason; the same in every run."""
        reasons = next(iter(self.results.values())).requests.rejected
        return {name: (reasons == reason).nonzero()[0] for name, reason in REJECTIONS.items()}

    def to_dict(self) -> dict[str, Any]:
        """The object that `pkvsim whatif --json` prints."""
        return {
            "trace": {
                "name": self.trace.name,
                "requests": len(self.trace),
                "duration_s": self.trace.duration_s,
                "prompt_tokens": int(self.trace.prompt_tokens.sum()),
                "output_tokens": int(self.trace.output_tokens.sum()),
            },
            "model": self.model.name,
            "device": self.device.name,
            "accuracy": fit_note(self.device),
            "config": asdict(self.config),
            "policies": {
                name: result.summary | {"timeline": check and asdict(check)}
                for (name, result), check in zip(self.results.items(), self.checks.values())
            },
            "rejected": {name: ids.tolist() for name, ids in self.rejected().items()},
            "notes": list(self.notes),
        }


def whatif(
    trace: RequestTrace,
    model: ModelSpec,
    device: DeviceSpec,
    policies: Sequence[str],
    config: ServingConfig = ServingConfig(),
    *,
    progress: PolicyProgress | None = None,
) -> WhatIf:
    """Serves the trace under each policy. ValueError before the first run where anything is wrong."""
    check_policies(policies)
    page_budget(model, device, config)
    results = {}
    for policy in policies:
        report = None if progress is None else (lambda done, total, name=policy: progress(name, done, total))
        results[policy] = simulate(trace, model, device, policy, config, progress=report)
    checks = {name: check_timeline(run.sample, model, device, config) for name, run in results.items()}
    return WhatIf(trace, model, device, config, results, checks, _notes(trace, model, device, config, results))


def _notes(
    trace: RequestTrace, model: ModelSpec, device: DeviceSpec, config: ServingConfig, results: dict[str, ServingResult]
) -> tuple[str, ...]:
    notes = list(trace.notes)
    first = next(iter(results.values()))
    for reason, limit in (
        (TOO_LONG_FOR_POOL, f"longer than the KV pool of {first.num_pages * first.page_size:,} tokens"),
        (TOO_LONG_FOR_MODEL, f"longer than the model's context of {model.max_context:,} tokens"),
    ):
        rejected = (first.requests.rejected == reason).nonzero()[0]
        if len(rejected):
            named = ", ".join(map(str, rejected[:5])) + (", ..." if len(rejected) > 5 else "")
            notes.append(f"{len(rejected):,} requests rejected, {limit}: requests {named}")
    saturated = [name for name, result in results.items() if result.summary["saturated"]]
    if saturated:
        notes.append(f"saturated, the queue grows to the end: {', '.join(saturated)}")
    if {"calibrated", "oracle"} <= set(results):
        notes.append("calibrated and oracle both take the cheapest price, so only tasks tell them from the best route")
    if model.tensor_parallel > 1:
        notes.append(f"one GPU's share of tensor parallel {model.tensor_parallel}: all-reduces are left out")
    if config.graphs:
        notes.append(
            "decode in captured graphs: attention waits for the host's planning alone (--eager: for each layer)"
        )
    else:
        notes.append("decode layer by layer: attention takes at least as long as the host needs to issue it")
    notes.append(f"attention prices of {device.name}: {fit_note(device)}")
    return tuple(notes)
