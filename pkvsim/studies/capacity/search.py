"""Capacity: the highest rate of a trace's requests that each of many servers keeps objectives at, and what it costs.

A server is a cell of the axes: a model on one GPU or several that share its layers (tensor parallel), a batch, a
policy. The trace's arrivals are scaled to a rate, the run is simulated, and the rate is kept if every objective is met
and the server is not saturated (pkvsim.serving.results.summary): it may then still meet an objective on single tokens,
but no server lasts so. Waits in bursts that it works off are no saturation; objectives on ttft, e2e or queue bound
them. Between a kept and a missed rate the search goes where its latencies let it expect the edge; the result is the
kept end.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec, get_device
from pkvsim.models.model_spec import ModelSpec
from pkvsim.models.presets import get_model
from pkvsim.serving.costs import check_policies, default_policy, fit_note
from pkvsim.serving.fit_model import fit_model
from pkvsim.serving.results.result import ServingResult
from pkvsim.serving.results.summary import SATURATED
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.simulate import simulate
from pkvsim.serving.state import SERVED
from pkvsim.studies.capacity.bisection import highest_kept
from pkvsim.studies.capacity.expected_edge import PART_TOLERANCE, expected_edge, first_part, overshoot
from pkvsim.studies.capacity.result import RANKS, Capacity, CapacityCell, CapacitySearch, Point, standing
from pkvsim.studies.cells import CellNotes, Place, check_axes, places
from pkvsim.studies.objectives import Objective, evaluate, goodput
from pkvsim.studies.provenance import basis_note
from pkvsim.studies.whatif import run_basis, run_notes
from pkvsim.studies.workers import Failed, Progress, Workers, each_result
from pkvsim.traces.requests import RequestTrace, at_rate

CAPACITY_AXES = ("device", "tp", "batch", "policy", "model", "page_size", "prefix_cache", "weight_bits", "step_tokens",
                 "engine")  # fmt: skip
TOLERANCE = 0.02  # a rate this much higher than the one found was tried and missed
MIN_TOLERANCE = 1e-4
# A run whose arrivals last less than so many times what a request takes says little of a server that runs for good.
LONG_ENOUGH = 10
FULL_QUEUE_RATE = 1e4  # requests/s, at which every server has all requests in its queue
CURVE = (0.25, 0.5, 0.75, 0.9)  # of the highest rate: runs beside the search's own, for a chart
# Fields of ServingConfig by axis.
_OF_CONFIG = {"batch": "max_batch"} | {name: name for name in ("page_size", "prefix_cache", "step_tokens", "engine")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A cell of the search: one combination of the axes."""

    place: Place  # its value on every axis
    model: ModelSpec
    device: DeviceSpec
    policy: str
    config: ServingConfig
    weight_bits: int | None


def capacity_search(
    axes: Mapping[str, Sequence[Any]],
    trace: RequestTrace,
    objectives: Sequence[Objective],
    *,
    model: str = "llama-3.1-8b",
    device: str = "rtx3060",
    policy: str | None = None,
    config: ServingConfig = ServingConfig(),
    tensor_parallel: int | None = None,
    weight_bits: int | None = None,
    wanted_rate_per_s: float | None = None,
    prices: Mapping[str, float] = {},
    rank: str | None = None,
    tolerance: float = TOLERANCE,
    curve: bool = False,
    workers: Workers = Workers(),
    progress: Progress | None = None,
) -> CapacitySearch:
    """The highest rate of every server, or with wanted_rate_per_s as many replicas of it as that rate needs.

    axes: values for names of CAPACITY_AXES; what no axis sets is as the arguments say. prices: dollars per GPU and hour
    by device. rank: of RANKS; by default dollars where there are prices, else GPUs for a wanted rate, else the rate.
    curve: also tries the rates of CURVE. ValueError before the first run where anything is wrong; a server that cannot
    be, or keeps the objectives at no rate, is a cell without a result. policy: by default the engine's own
    attention, or the calibrated choice of our routes.
    """
    _check(axes, trace, objectives, wanted_rate_per_s, tolerance)
    servers, impossible = _servers(axes, model, device, policy, config, tensor_parallel, weight_bits)
    used = {server.device.name for server in servers} | {*axes.get("device", (device,))}
    prices = _checked_prices(prices, used)
    rank = rank or ("dollars" if prices else "gpus" if wanted_rate_per_s is not None else "rate")
    if rank not in RANKS or (rank == "dollars" and not prices):
        raise ValueError(f"rank: expected {', '.join(RANKS)}, the last with prices, got {rank!r}")
    find = partial(
        find_capacity, trace=trace, objectives=tuple(objectives), tolerance=tolerance, curve=curve,
        wanted_rate_per_s=wanted_rate_per_s, prices=prices,
    )  # fmt: skip
    found: dict[int, CapacityCell] = {}
    for at, result in each_result(find, servers, workers):
        if isinstance(result, Failed):
            server = servers[at]
            result = _empty(server.place, server.model.name, server.device.name, result.reason)
        found[at] = result
        if progress is not None:
            progress(len(found), len(servers))
    order = {tuple(place.items()): at for at, place in enumerate(places(axes))}
    cells = [*impossible, *(found[at] for at in range(len(servers)))]
    cells.sort(key=lambda cell: order[tuple(cell.place.items())])
    notes = CellNotes(len(cells))
    for cell in cells:
        notes.add(cell.place, cell.notes if cell.capacity is not None else (*cell.notes, f"empty: {cell.reason}"))
    return CapacitySearch(
        trace=trace, axes={name: tuple(values) for name, values in axes.items()}, objectives=tuple(objectives),
        tolerance=tolerance, wanted_rate_per_s=wanted_rate_per_s, prices=prices, rank=rank,
        cells=tuple(sorted(cells, key=partial(standing, rank=rank))),
        notes=(*trace.notes, *_search_notes(wanted_rate_per_s, tolerance), *notes.lines()),
    )  # fmt: skip


def _check(
    axes: Mapping[str, Sequence[Any]], trace: RequestTrace, objectives: Sequence[Objective],
    wanted_rate_per_s: float | None, tolerance: float,
) -> None:  # fmt: skip
    check_axes(axes, CAPACITY_AXES)
    if not objectives:
        raise ValueError("slo: expected at least one objective")
    if trace.rate_per_s is None:
        raise ValueError(f"trace: {trace.name}: expected requests spread over time, got all at one time")
    if trace.concurrency is not None:
        raise ValueError("trace: expected arrivals that a rate scales, got a bound on the requests in flight")
    if wanted_rate_per_s is not None and not 0 < wanted_rate_per_s < np.inf:
        raise ValueError(f"rate: expected requests per second > 0, got {wanted_rate_per_s!r}")
    if not MIN_TOLERANCE <= tolerance <= 1:
        raise ValueError(f"tolerance: expected a number in [{MIN_TOLERANCE:g}, 1], got {tolerance!r}")


def _checked_prices(prices: Mapping[str, float], devices: set[str]) -> dict[str, float]:
    for name, dollars in prices.items():
        if name not in devices:
            raise ValueError(f"price: expected a device of the search ({', '.join(sorted(devices))}), got {name!r}")
        if not 0 < dollars < np.inf:
            raise ValueError(f"price: {name}: expected dollars per GPU and hour > 0, got {dollars!r}")
    return dict(prices)


def _servers(
    axes: Mapping[str, Sequence[Any]], model: str, device: str, policy: str | None, config: ServingConfig,
    tensor_parallel: int | None, weight_bits: int | None,
) -> tuple[list[Server], list[CapacityCell]]:  # fmt: skip
    """(servers to search, cells that cannot be). ValueError where a name is unknown or no server can be."""
    check_policies(axes.get("policy", (policy or "calibrated",)))
    devices = {name: get_device(name) for name in axes.get("device", (device,))}
    for name in axes.get("model", (model,)):
        get_model(name)
    servers, impossible = [], []
    for place in places(axes):
        gpu = place.get("device", device)
        try:
            settings = {name: place[axis] for axis, name in _OF_CONFIG.items() if axis in place}
            if "batch" in place and "step_tokens" not in place:
                settings["step_tokens"] = max(config.step_tokens, place["batch"] * config.query_tokens)
            server = replace(config, **settings)
            servers.append(Server(
                place=place,
                model=get_model(place.get("model", model), tensor_parallel=place.get("tp", tensor_parallel)),
                device=devices[gpu],
                policy=place.get("policy", policy or default_policy(server)),
                config=server,
                weight_bits=place.get("weight_bits", weight_bits),
            ))  # fmt: skip
        except ValueError as error:
            impossible.append(_empty(place, place.get("model", model), gpu, str(error)))
    if not servers:
        raise ValueError(impossible[0].reason)
    # Slow servers run at low rates, where batches are small and steps many, so that their searches take longest. They
    # begin first, so that no worker is left with one at the end.
    servers.sort(key=lambda server: server.device.beta_gb_s * server.model.tensor_parallel)
    return servers, impossible


def _empty(place: Place, model: str, device: str, reason: str) -> CapacityCell:
    return CapacityCell(place=place, model=model, device=device, capacity=None, reason=reason)


def find_capacity(
    server: Server, *, trace: RequestTrace, objectives: tuple[Objective, ...], tolerance: float, curve: bool,
    wanted_rate_per_s: float | None, prices: Mapping[str, float],
) -> CapacityCell:  # fmt: skip
    """The search of one server. ValueError where it cannot be."""
    place, gpu, config = server.place, server.device, server.config
    model, notes = fit_model(server.model, gpu, config, server.weight_bits)
    full = simulate(at_rate(trace, FULL_QUEUE_RATE), model, gpu, server.policy, config)
    points: dict[float, Point] = {}
    best: list[ServingResult] = []  # the run at the highest rate kept, last

    def point(requests: RequestTrace, rate: float) -> tuple[Point, ServingResult]:
        run = simulate(at_rate(requests, rate), model, gpu, server.policy, config)
        return Point(rate, evaluate(objectives, run.requests, run.gaps), bool(run.summary["saturated"])), run

    def keeps(rate: float) -> bool:
        points[rate], run = point(trace, rate)
        if points[rate].kept:
            best.append(run)
        return points[rate].kept

    start, part, guide = full.summary["requests_per_s"], first_part(trace), dict[float, Point]()
    near = None
    if part is not None:

        def part_keeps(rate: float) -> bool:
            guide[rate] = point(part, rate)[0]
            return guide[rate].kept

        expect = partial(_edge, guide, None)
        about = highest_kept(part_keeps, start, max(tolerance, PART_TOLERANCE), edge=expect)
        near = expect(about.kept, about.missed) or about.kept
    bracket = highest_kept(keeps, start, tolerance, edge=partial(_edge, points, guide), near=near)
    if bracket.kept is None:
        lowest = points[min(points)]
        return CapacityCell(
            place=place, model=model.name, device=gpu.name, capacity=None, reason=_why_none(lowest, full),
            points=_sorted(points),
            notes=(*notes, f"attention prices of {gpu.name}: {fit_note(gpu)}"),
            basis=run_basis(model, gpu, config, [full]),
        )  # fmt: skip
    run = best[-1]
    if curve:
        for share in CURVE:
            if bracket.kept * share not in points:
                keeps(bracket.kept * share)
    basis = run_basis(model, gpu, config, [run])
    served = run.requests.rejected == SERVED
    tokens = [int(lengths[served].sum()) for lengths in (trace.output_tokens, trace.prompt_tokens)]
    replicas = 1 if wanted_rate_per_s is None else replicas_for(wanted_rate_per_s, bracket.kept)
    rate = bracket.kept if wanted_rate_per_s is None else wanted_rate_per_s
    hourly = None if gpu.name not in prices else prices[gpu.name] * replicas * model.tensor_parallel
    missed = None if bracket.missed is None else points[bracket.missed]
    notes += (*_too_short(trace, run, bracket.kept), *run_notes(trace, model, gpu, config, {server.policy: run}))
    return CapacityCell(
        place=place,
        model=model.name,
        device=gpu.name,
        capacity=Capacity(
            rate_per_s=bracket.kept,
            missed_rate_per_s=bracket.missed,
            missed=() if missed is None else _missed(missed),
            output_tokens_per_s=bracket.kept * tokens[0] / len(trace),
            prompt_tokens_per_s=bracket.kept * tokens[1] / len(trace),
            outcomes=points[bracket.kept].outcomes,
            goodput=goodput(objectives, run),
            gpus_per_replica=model.tensor_parallel,
            replicas=replicas,
            dollars_per_hour=hourly,
            dollars_per_million_output_tokens=_per_million(hourly, rate * tokens[0] / len(trace)),
            dollars_per_million_tokens=_per_million(hourly, rate * sum(tokens) / len(trace)),
            summary=run.summary,
        ),
        points=_sorted(points),
        notes=(*notes, f"attention prices of {gpu.name}: {fit_note(gpu)}", basis_note(basis)),
        basis=basis,
    )


def _edge(
    points: Mapping[float, Point], guide: Mapping[float, Point] | None, kept: float | None, missed: float | None
) -> float | None:
    """Where highest_kept is to expect the edge, by the rates that were tried, also of the first part."""
    tried, guided = (
        {rate: overshoot(point.outcomes, saturated=point.saturated) for rate, point in (of or {}).items()}
        for of in (points, guide)
    )
    return expected_edge(tried, kept, missed, guided)


def replicas_for(wanted_rate_per_s: float, rate_per_s: float) -> int:
    """Replicas that keep a rate together, each at most rate_per_s: requests are dealt out so that each replica sees the
    trace's own pattern at its share of the rate."""
    return max(1, math.ceil(wanted_rate_per_s / rate_per_s * (1 - 1e-12)))


def _too_short(trace: RequestTrace, run: ServingResult, rate_per_s: float) -> tuple[str, ...]:
    """A note where the requests come and go before the server could have fallen behind."""
    arrivals_s = len(trace) / rate_per_s
    took_s = float(np.nanmedian(run.requests.finish_s - run.requests.arrival_s))
    if arrivals_s >= LONG_ENOUGH * took_s:
        return ()
    return ("too short a trace: at the highest rate its requests arrive within less than ten times what one takes, so "
            "a server that runs for long keeps less",)  # fmt: skip


def _per_million(dollars_per_hour: float | None, tokens_per_s: float) -> float | None:
    return None if dollars_per_hour is None or not tokens_per_s else dollars_per_hour / 3600 / tokens_per_s * 1e6


def _sorted(points: Mapping[float, Point]) -> tuple[Point, ...]:
    return tuple(points[rate] for rate in sorted(points))


def _missed(point: Point) -> tuple[str, ...]:
    names = [outcome.objective.name for outcome in point.outcomes if not outcome.met]
    return (*names, *(("saturated",) if point.saturated else ()))


def _why_none(lowest: Point, full: ServingResult) -> str:
    """What the lowest rate that was tried misses."""
    parts = []
    for outcome in lowest.outcomes:
        if outcome.value_s is None:
            share = np.count_nonzero(full.requests.rejected != SERVED) / len(full.requests.rejected)
            parts.append(f"{outcome.objective} cannot be met: {share:.1%} of the requests are rejected as too long")
        elif not outcome.met:
            parts.append(f"{outcome.objective.name} is {outcome.value_s:.4g} s, not {outcome.objective.bound_s:g} s")
    if lowest.saturated and not parts:
        parts.append(SATURATED)
    return f"even at {lowest.rate_per_s:.3g} requests/s " + ", ".join(parts)


def _search_notes(wanted_rate_per_s: float | None, tolerance: float) -> tuple[str, ...]:
    notes = [
        f"a rate is kept if every objective is met and the server is not saturated ({SATURATED}); a rate at most "
        f"{100 * tolerance:g} % above the highest one was tried and missed"
    ]
    if wanted_rate_per_s is not None:
        notes.append(
            f"replicas for {wanted_rate_per_s:g} requests/s: that rate over one replica's, rounded up, each replica "
            "taking its share of the same pattern of arrivals"
        )
    return tuple(notes)
