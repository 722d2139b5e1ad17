"""Sweeps: a serving run, or the price of one synthetic step, at every combination of a few settings."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.models.model_spec import ModelSpec, with_kv_heads
from pkvsim.policy.by_name import make_policy
from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.serving.costs import check_policies
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int
from pkvsim.traces.requests import RequestTrace, scale_rate

SERVING_AXES = ("device", "policy", "rate", "max_batch", "page_size", "splits", "group_size", "prefix_cache")
STEP_AXES = ("device", "policy", "batch", "length", "group_size", "splits")
STEP_DEFAULTS = {"batch": 8, "length": 8192}
_WORDS = ("device", "policy", "prefix_cache")
Progress = Callable[[int, int], None]  # cells done, of how many


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """The cells of a sweep in the order of its axes, the last one changing fastest."""

    axes: dict[str, tuple[Any, ...]]
    cells: tuple[dict[str, Any], ...]  # figures of each cell: a run's summary, or a step's prices

    def values(self, metric: str) -> np.ndarray:
        """One figure of every cell, float64 [len(axis) for every axis]; NaN where a cell has none.

        metric: a key of a cell, with dots into its parts (`ttft_s.p99`). ValueError naming what there is.
        """
        numbers = [_figure(cell, metric) for cell in self.cells]
        return np.array(numbers, np.float64).reshape([len(values) for values in self.axes.values()])

    def to_dict(self) -> dict[str, Any]:
        """The object that `pkvsim sweep --json` prints: every cell with its place on the axes."""
        places = itertools.product(*self.axes.values())
        cells = [dict(zip(self.axes, place)) | {"result": cell} for place, cell in zip(places, self.cells)]
        return {"axes": {name: list(values) for name, values in self.axes.items()}, "cells": cells}


def parse_axes(texts: Sequence[str], known: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`name=value,value,...` each; ValueError naming the axis and what was expected."""
    axes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ValueError(f"over: expected NAME=VALUE,VALUE,... with a name of {', '.join(known)}, got {text!r}")
        if name in axes:
            raise ValueError(f"over: expected each name once, got {name} twice")
        axes[name] = tuple(_value(name, part.strip()) for part in values.split(","))
        if len(set(axes[name])) < len(axes[name]):
            raise ValueError(f"over: {name}: expected each value once, got {values}")
    if not axes:
        raise ValueError("over: expected at least one axis")
    return axes


def _value(name: str, text: str) -> Any:
    if name in _WORDS:
        if not text:
            raise ValueError(f"over: {name}: expected names, got an empty one")
        return text
    try:
        number = float(text) if name == "rate" else int(text)
    except ValueError:
        kind = "numbers" if name == "rate" else "integers"
        raise ValueError(f"over: {name}: expected {kind}, got {text!r}") from None
    if not 0 < number < np.inf:
        raise ValueError(f"over: {name}: expected numbers > 0, got {text}")
    return number


def with_group_size(model: ModelSpec, group_size: int) -> ModelSpec:
    """The model with as many query heads on fewer or more KV heads; its weights stay as they are."""
    check_int("group_size", group_size, 1)
    if model.num_q_heads % group_size:
        raise ValueError(f"group_size: expected a divisor of {model.num_q_heads} query heads, got {group_size}")
    return with_kv_heads(model, model.num_q_heads // group_size)


def serving_sweep(
    axes: Mapping[str, Sequence[Any]],
    trace: RequestTrace,
    model: ModelSpec,
    device: DeviceSpec,
    policy: str,
    config: ServingConfig = ServingConfig(),
    *,
    metric: str | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """A serving run for every combination of SERVING_AXES; what no axis sets is as the arguments say.

    metric: a figure that the cells will be asked for, so that a wrong one is refused after the first run.
    """
    _check_axes(axes, SERVING_AXES)
    runs = []
    for place in _places(axes):
        check_policies([place.get("policy", policy)])
        names = ("max_batch", "page_size", "splits", "prefix_cache")
        settings: dict[str, Any] = {name: place[name] for name in names if name in place}
        if "max_batch" in settings:
            settings["step_tokens"] = max(config.step_tokens, settings["max_batch"])
        runs.append(
            (
                scale_rate(trace, place["rate"]) if "rate" in place else trace,
                with_group_size(model, place["group_size"]) if "group_size" in place else model,
                get_device(place["device"]) if "device" in place else device,
                place.get("policy", policy),
                replace(config, **settings),
            )
        )
    cells = []
    for run in runs:
        cells.append(simulate(*run).summary)
        if metric is not None:
            _figure(cells[0], metric)
        if progress is not None:
            progress(len(cells), len(runs))
    return Sweep({name: tuple(values) for name, values in axes.items()}, tuple(cells))


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
    _check_axes(axes, STEP_AXES)
    cells = []
    for place in _places(axes):
        place = STEP_DEFAULTS | place
        batch = check_int("batch", place["batch"], 1, 1 << 16)
        seq_lens = np.full(batch, check_int("length", place["length"], 1, MAX_TOKENS), np.int32)
        gpu = get_device(place["device"]) if "device" in place else device
        heads = shape
        if "group_size" in place:
            if shape.num_q_heads % place["group_size"]:
                raise ValueError(
                    f"group_size: expected a divisor of {shape.num_q_heads} query heads, got {place['group_size']}"
                )
            heads = replace(shape, num_kv_heads=shape.num_q_heads // place["group_size"])
        splits = place.get("splits")
        rules = make_policy(place.get("policy", policy), split_splits=splits, workqueue_splits=splits)
        decision = rules.decide(heads, seq_lens, gpu, layers=layers)
        us = decision.prices[decision.route]
        cells.append(
            {
                "batch": batch,
                "length": place["length"],
                "route": decision.route,
                "us": us,
                "kv_gb_s": layers * useful_kv_bytes(heads, seq_lens) / us / 1e3,
                "routes_us": dict(decision.prices),
            }
        )
    return Sweep({name: tuple(values) for name, values in axes.items()}, tuple(cells))


def _check_axes(axes: Mapping[str, Sequence[Any]], known: Sequence[str]) -> None:
    for name, values in axes.items():
        if name not in known or not len(values):
            raise ValueError(f"axes: expected values for names of {', '.join(known)}, got {name}={list(values)}")
    if not axes:
        raise ValueError("axes: expected at least one")


def _places(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def _figure(cell: dict[str, Any], metric: str) -> float:
    value: Any = cell
    for part in metric.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"metric: expected a figure such as {', '.join(figures(cell))}, got {metric!r}")
        value = value[part]
    if isinstance(value, (dict, str)):
        raise ValueError(f"metric: expected a number such as {', '.join(figures(cell))}, got {metric!r}")
    return np.nan if value is None else float(value)


def figures(cell: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of a cell's numbers, with dots into its parts."""
    names = []
    for name, value in cell.items():
        if isinstance(value, dict):
            names += figures(value, f"{prefix}{name}.")
        elif not isinstance(value, str):
            names.append(prefix + name)
    return names
