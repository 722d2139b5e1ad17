"""What if: one trace, one model, one GPU, several policies, side by side."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.model_costs import state_bytes
from pkvsim.models.presets import ModelSpec
from pkvsim.serving.apart.stages import serve, transfer_gb_s
from pkvsim.serving.costs import attention_costs, check_policies, fit_note, page_budget, state_pages
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.results.summary import SATURATED, half_wait_longer
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.state import TOO_LONG_FOR_MODEL, TOO_LONG_FOR_POOL
from pkvsim.serving.tiers.start import block_bytes
from pkvsim.studies.provenance import Basis, serving_basis
from pkvsim.studies.selection.notes import selection_basis, selection_notes
from pkvsim.studies.side_by_side import side_by_side
from pkvsim.studies.tiers.notes import tier_notes
from pkvsim.studies.timeline_check import TimelineCheck, check_timeline
from pkvsim.traces.requests import RequestTrace

REJECTIONS = {"too_long_for_pool": TOO_LONG_FOR_POOL, "too_long_for_model": TOO_LONG_FOR_MODEL}
ORDER_NOTES = {
    "shortest": "shortest remaining first: every output length is known, which no server knows",
    "batchllm": "BatchLLM's order: all requests and output lengths are known from the start, as in offline batches",
    "kvshare": "KVShare's order: the largest cached part of the prompt first; others may wait long",
    "continuum": "Continuum's order: conversations first come first served, KV kept for the next turn",
}
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
    left_out: dict[str, str]  # policies that cannot serve the model on this GPU, and why
    basis: tuple[Basis, ...]  # what the figures stand on

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
            "config": self.config.to_dict(),
            "policies": {
                name: result.summary | {"timeline": check and asdict(check)}
                for (name, result), check in zip(self.results.items(), self.checks.values())
            },
            "rejected": {name: ids.tolist() for name, ids in self.rejected().items()},
            "notes": list(self.notes),
            "left_out": self.left_out,
            "basis": [row.to_dict() for row in self.basis],
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
    """Serves the trace under each policy, several at a time; those that cannot serve the model on this GPU are left out
    with the reason.

    ValueError before the first run where anything is wrong, or no policy is left.
    """
    check_policies(policies)
    page_budget(model, device, config)
    left_out = {policy: reason for policy in policies if (reason := why_left_out(model, device, policy, config))}
    if len(left_out) == len(policies):
        raise ValueError("; ".join(left_out.values()))
    results = side_by_side(
        lambda policy, report: serve(trace, model, device, policy, config, progress=report),
        [name for name in policies if name not in left_out], progress,
    )  # fmt: skip
    checks = {name: check_timeline(run.sample, model, device, config) for name, run in results.items()}
    basis = run_basis(model, device, config, results.values())
    notes = (
        *trace.notes,
        *run_notes(trace, model, device, config, results),
        *(f"left out: {reason}" for reason in left_out.values()),
        f"attention prices of {device.name}: {fit_note(device)}",
    )
    return WhatIf(trace, model, device, config, results, checks, notes, left_out, basis)


def why_left_out(model: ModelSpec, device: DeviceSpec, policy: str, config: ServingConfig) -> str | None:
    """Why the GPU cannot run the policy on this model, None where it can."""
    try:
        attention_costs(model, device, policy, config)
    except ValueError as error:
        return str(error)
    return None


def run_basis(
    model: ModelSpec, device: DeviceSpec, config: ServingConfig, results: Iterable[ServingResult]
) -> tuple[Basis, ...]:
    """What the figures of these runs stand on; shares of time are the first run's."""
    runs = list(results)
    routes = dict.fromkeys(name for run in runs for name in run.summary["routes"])
    policies = dict.fromkeys(run.policy for run in runs)
    rows = serving_basis(
        model, device, config, policies=policies, routes=routes, shares=runs[0].summary["part_shares"]
    )
    return rows if config.select is None else (*rows, selection_basis(device))


def run_notes(
    trace: RequestTrace, model: ModelSpec, device: DeviceSpec, config: ServingConfig, results: dict[str, ServingResult]
) -> tuple[str, ...]:
    """What a reader must know of these runs beside what their figures stand on."""
    notes = []
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
        notes.append(f"saturated, {SATURATED}: {', '.join(saturated)}")
    bursty = [name for name, result in results.items() if name not in saturated and half_wait_longer(result.requests)]
    if bursty:
        notes.append(
            "not saturated, as there is time to spare between bursts, and yet half of the requests wait longer for "
            f"admission than half of them then take: {', '.join(bursty)}"
        )
    if {"calibrated", "oracle"} <= set(results):
        notes.append("calibrated and oracle both take the cheapest price, so only tasks tell them from the best route")
    if config.order != "fcfs":
        notes.append(ORDER_NOTES[config.order] + (f" ({config.kv_ttl_s:g} s)" if config.order == "continuum" else ""))
        if config.prefix_cache == "belady":
            notes.append("belady looks ahead in trace order, which is not the order of admission: no bound")
    if config.kv_parallel > 1:
        notes.append(
            f"{config.kv_parallel} GPUs a server hold every row's KV together, each with all weights; the merge of "
            "their states is an assumption"
        )
    if any(result.summary["shared_reads"]["steps"] > 0 for result in results.values()):
        notes.append(
            "rows whose prompts begin with the same blocks read these once where balanced costs less so "
            "(--no-shared-reads: each for itself); prices fitted to one H200, of other GPUs an assumption; "
            "what rows that read apart find in L2 is left out, so less is saved in practice"
        )
    notes += selection_notes(config.select, model, device, config.page_size, results.values())
    if config.replicas > 1:
        notes.append(f"{config.replicas} servers, {config.router}; KV pages are each one's")
    if config.prefill_replicas:
        notes.append(
            f"{config.prefill_replicas} servers compute prompts, {config.replicas} decode; KV goes over at "
            f"{transfer_gb_s(device, config):g} GB/s, transfers beside each other, an assumption; steps, shares and "
            "pages are the decode servers'"
        )
    if model.tensor_parallel > 1:
        notes.append(f"tensor parallel {model.tensor_parallel}: one GPU's share of the layers, with all-reduces")
    if state := state_bytes(model):
        notes.append(
            f"recurrent states of {state / 1e6:.4g} MB take the room of {state_pages(model, config):,} KV pages of "
            "every running request"
        )
    if config.query_tokens > 1:
        notes.append(
            f"{config.query_tokens} query tokens a row and step, {config.query_tokens - 1} of them drafts that are "
            f"accepted with probability {config.acceptance:g}, one by one; times between tokens are those between steps"
        )
    if config.engine == "pkv" and config.profile.constants not in device.outside:
        notes.append(
            "pkv: all but decode attention at the prices of PyTorch's kernels, as nobody has timed gpu.serve on "
            f"{device.name}; its own take less (by 16 to 39 % of a decode step of Llama-3.1-8B on an H200), so other "
            "engines look better beside it than they are"
        )
    if config.profile.graph_sizes:
        notes.append("decode in captured graphs of padded sizes: attention waits for the host's planning alone")
    else:
        notes.append("decode layer by layer: a step takes at least as long as the host needs to issue it")
    if config.tiers is not None:
        notes += tier_notes(config.tiers, device, block_bytes(trace, model, config))
    return (*notes, *model.notes)
