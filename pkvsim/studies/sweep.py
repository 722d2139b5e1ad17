"""Sweeps: a serving run, or the price of one synthetic step, at every combination of a few settings."""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.memory.tier_presets import NamedTiers
from pkvsim.models.model_spec import ModelSpec, with_kv_heads
from pkvsim.models.presets import get_model
from pkvsim.policy.by_name import Policy, make_policy, policy_routes
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.selection.setup import parse_selection
from pkvsim.serving.apart.stages import serve
from pkvsim.serving.costs import check_policies, default_policy, fit_note
from pkvsim.serving.fit_model import fit_model
from pkvsim.serving.server_config import ServingConfig
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int
from pkvsim.studies.cells import CellNotes, Place, check_axes, places, switch
from pkvsim.studies.provenance import basis_note
from pkvsim.studies.selection.cells import selected_cell
from pkvsim.studies.tiers.axes import TIER_AXES, tiers_at
from pkvsim.studies.whatif import run_basis, run_notes
from pkvsim.studies.workers import Failed, Progress, Workers, each_result
from pkvsim.traces.requests import RequestTrace, scale_rate

SERVING_AXES = (
    "device", "policy", "rate", "max_batch", "page_size", "splits", "group_size", "prefix_cache", "order", "replicas",
    "router", "engine", "tensor_parallel", "shared_reads", "select", "prefill_replicas", *TIER_AXES,
)  # fmt: skip
STEP_AXES = ("device", "policy", "batch", "length", "group_size", "splits", "select")
STEP_DEFAULTS = {"batch": 8, "length": 8192}
IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """The cells of a sweep in the order of its axes, the last one changing fastest."""

    axes: dict[str, tuple[Any, ...]]
    # Figures of each cell: a run's summary, or a step's prices; of a cell that cannot be, its reason under IMPOSSIBLE.
    cells: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()  # what a reader must know of the cells

    def values(self, metric: str) -> np.ndarray:
        """One figure of every cell, float64 [len(axis) for every axis]; NaN where a cell has none.

        metric: a key of a cell, with dots into its parts (`ttft_s.p99`). ValueError naming what there is.
        """
        numbers = [np.nan if IMPOSSIBLE in cell else _figure(cell, metric) for cell in self.cells]
        return np.array(numbers, np.float64).reshape([len(values) for values in self.axes.values()])

    def to_dict(self) -> dict[str, Any]:
        """The object that `pkvsim sweep --json` prints: every cell with its place on the axes."""
        cells = []
        for place, cell in zip(itertools.product(*self.axes.values()), self.cells):
            result = {"result": None, "reason": cell[IMPOSSIBLE]} if IMPOSSIBLE in cell else {"result": cell}
            cells.append(dict(zip(self.axes, place)) | result)
        return {"axes": {name: list(values) for name, values in self.axes.items()}, "cells": cells}


def check_used(has_trace: bool, **given: bool) -> None:
    """ValueError naming an option that was given (True) and that the sweep would ignore: `layers` with a trace, all
    others without one."""
    for name, is_given in given.items():
        if is_given and has_trace == (name == "layers"):
            where = "without a trace alone" if name == "layers" else "with a trace alone"
            raise ValueError(f"{name}: means something {where}")


def with_group_size(model: ModelSpec, group_size: int) -> ModelSpec:
    """The model with as many query heads on fewer or more KV heads; its weights stay as they are."""
    check_int("group_size", group_size, 1)
    if model.num_q_heads % group_size:
        raise ValueError(f"group_size: expected a divisor of {model.num_q_heads} query heads, got {group_size}")
    return with_kv_heads(model, model.num_q_heads // group_size)


def serving_sweep(
    axes: Mapping[str, Sequence[Any]],
    trace: RequestTrace,
    model: ModelSpec | str,
    device: DeviceSpec,
    policy: str | None = None,
    config: ServingConfig = ServingConfig(),
    *,
    metric: str | None = None,
    weight_bits: int | None = None,
    workers: Workers = Workers(),
    progress: Progress | None = None,
    tiers: NamedTiers | None = None,
) -> Sweep:
    """A serving run for every combination of SERVING_AXES; what no axis sets is as the arguments say. model: by name
    where an axis is tensor_parallel. policy: by default the engine's own attention, or the calibrated choice of our
    routes. tiers: by name, so that each cell has them behind its own GPU; else those of config, which no axis changes.

    Every cell stands for itself: a model that does not fit its GPU as it comes has narrower weights there (weight_bits:
    these everywhere), and a cell that cannot be is empty with its reason. Notes say of which cells they hold. metric: a
    figure that the cells will be asked for, so that a wrong one is refused after the first run. ValueError where an
    axis is wrong, or no cell can be.
    """
    check_axes(axes, SERVING_AXES)
    where = places(axes)
    for place in where:
        check_policies([place.get("policy", policy or "calibrated")])
    if "tensor_parallel" in axes and not isinstance(model, str):
        raise ValueError(f"axes: tensor_parallel: expected the model by name, got one of {model.tensor_parallel} GPUs")
    if config.tiers is not None and (tiers is not None or set(axes) & set(TIER_AXES)):
        raise ValueError("config: expected no tiers beside tiers by name, and beside axes of them")
    devices = {name: get_device(name) for name in axes.get("device", ())}
    run = partial(
        _serving_cell, trace=trace, model=model, device=device, devices=devices, policy=policy, config=config,
        weight_bits=weight_bits, tiers=tiers or NamedTiers(names=()),
    )  # fmt: skip
    cells: list[dict[str, Any]] = [{} for _ in where]
    said: list[tuple[str, ...]] = [() for _ in where]
    for done, (at, result) in enumerate(each_result(run, where, workers), 1):
        if isinstance(result, Failed):
            cells[at], said[at] = {IMPOSSIBLE: result.reason}, (f"empty: {result.reason}",)
        else:
            cells[at], said[at] = result
        if metric is not None and IMPOSSIBLE not in cells[at]:
            _figure(cells[at], metric)
        if progress is not None:
            progress(done, len(where))
    notes = CellNotes(len(where))
    for place, lines in zip(where, said):
        notes.add(place, lines)
    return _swept(axes, cells, (*trace.notes, *notes.lines()))


def _serving_cell(
    place: Place, *, trace: RequestTrace, model: ModelSpec | str, device: DeviceSpec,
    devices: Mapping[str, DeviceSpec], policy: str | None, config: ServingConfig, weight_bits: int | None,
    tiers: NamedTiers,
) -> tuple[dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """(summary, notes) of one run."""
    set_by_axes = (
        "max_batch", "page_size", "splits", "prefix_cache", "order", "replicas", "router", "engine", "prefill_replicas",
    )  # fmt: skip
    settings: dict[str, Any] = {name: place[name] for name in set_by_axes if name in place}
    if "max_batch" in settings:
        settings["step_tokens"] = max(config.step_tokens, settings["max_batch"] * config.query_tokens)
    if "shared_reads" in place:
        settings["shared_reads"] = switch("shared_reads", place["shared_reads"])
    if "select" in place:
        settings["select"] = parse_selection(place["select"], every=config.select.every if config.select else 1)
    gpu = devices[place["device"]] if "device" in place else device
    config = replace(config, **settings, tiers=tiers_at(place, tiers, gpu) or config.tiers)
    name = place.get("policy", policy or default_policy(config))
    heads = get_model(model, tensor_parallel=place.get("tensor_parallel")) if isinstance(model, str) else model
    if "group_size" in place:
        heads = with_group_size(heads, place["group_size"])
    fitted, notes = fit_model(heads, gpu, config, weight_bits)
    requests = scale_rate(trace, place["rate"]) if "rate" in place else trace
    run = serve(requests, fitted, gpu, name, config)
    basis = run_basis(fitted, gpu, config, [run])
    notes += run_notes(requests, fitted, gpu, config, {name: run})
    return run.summary, (*notes, f"attention prices of {gpu.name}: {fit_note(gpu)}", basis_note(basis))


def _swept(axes: Mapping[str, Sequence[Any]], cells: list[dict[str, Any]], notes: tuple[str, ...]) -> Sweep:
    """ValueError where no cell can be."""
    if all(IMPOSSIBLE in cell for cell in cells):
        raise ValueError(cells[0][IMPOSSIBLE])
    return Sweep({name: tuple(values) for name, values in axes.items()}, tuple(cells), notes)


def step_sweep(
    axes: Mapping[str, Sequence[Any]],
    shape: DecodeShape,
    device: DeviceSpec,
    policy: str = "calibrated",
    *,
    layers: int = 1,
) -> Sweep:
    """Prices of a decode step of equally long rows for every combination of STEP_AXES, host planning included.

    A cell has batch, length, the route
    that the policy (pkvsim.policy.by_name.POLICIES) takes, its us, the GB/s of KV that
    this makes, and the us of every route that the policy prices.
    """
    check_axes(axes, STEP_AXES)
    where = places(axes)
    cells, notes = [], CellNotes(len(where))
    for place in where:
        name = place.get("policy", policy)
        gpu = get_device(place["device"]) if "device" in place else device
        rules = make_policy(name, split_splits=place.get("splits"), workqueue_splits=place.get("splits"))
        try:
            cell = _step_cell(STEP_DEFAULTS | place, shape, gpu, rules, layers)
            if "select" in place and "balanced" in policy_routes(name):
                cell |= selected_cell(cell, parse_selection(place["select"]), heads_at(place, shape), gpu, layers)
        except ValueError as error:
            cell = {IMPOSSIBLE: str(error)}
            notes.add(place, (f"empty: {error}",))
        cells.append(cell)
    return _swept(axes, cells, notes.lines())


def _step_cell(
    place: dict[str, Any], shape: DecodeShape, device: DeviceSpec, policy: Policy, layers: int
) -> dict[str, Any]:
    """Prices of one step."""
    batch = check_int("batch", place["batch"], 1, 1 << 16)
    seq_lens = np.full(batch, check_int("length", place["length"], 1, MAX_TOKENS), np.int32)
    heads = heads_at(place, shape)
    decision = policy.decide(heads, seq_lens, device, layers=layers)
    us = decision.prices[decision.route]
    return {
        "batch": batch,
        "length": place["length"],
        "route": decision.route,
        "us": us,
        "kv_gb_s": layers * useful_kv_bytes(heads, seq_lens) / us / 1e3,
        "routes_us": dict(decision.prices),
    }


def heads_at(place: Mapping[str, Any], shape: DecodeShape) -> DecodeShape:
    """The shape of one cell. ValueError naming group_size."""
    if "group_size" not in place:
        return shape
    if shape.num_q_heads % place["group_size"]:
        raise ValueError(
            f"group_size: expected a divisor of {shape.num_q_heads} query heads, got {place['group_size']}"
        )
    return replace(shape, num_kv_heads=shape.num_q_heads // place["group_size"])


def _figure(cell: dict[str, Any], metric: str) -> float:
    value: Any = cell
    for part in metric.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"metric: expected a figure such as {', '.join(figures(cell))}, got {metric!r}")
        value = value[part]
    if isinstance(value, (dict, str, list)):
        raise ValueError(f"metric: expected a number such as {', '.join(figures(cell))}, got {metric!r}")
    return np.nan if value is None else float(value)


def figures(cell: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of a cell's numbers, with dots into its parts."""
    names = []
    for name, value in cell.items():
        if isinstance(value, dict):
            names += figures(value, f"{prefix}{name}.")
        elif not isinstance(value, (str, list)):
            names.append(prefix + name)
    return names
