"""What a capacity search found: rates that were tried, what each server keeps, and the servers in their order."""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pkvsim.studies.cells import Place
from pkvsim.studies.objectives import Goodput, Objective, Outcome
from pkvsim.studies.provenance import Basis
from pkvsim.traces.requests import RequestTrace

RANKS = ("rate", "rate_per_gpu", "gpus", "dollars")


@dataclass(frozen=True, slots=True)
class Point:
    """A rate that was tried."""

    rate_per_s: float
    outcomes: tuple[Outcome, ...]  # in the order of the objectives
    saturated: bool

    @property
    def kept(self) -> bool:
        """Whether every objective is met, and the server is not saturated."""
        return not self.saturated and all(outcome.met for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        values = {outcome.objective.name: outcome.value_s for outcome in self.outcomes}
        return {"rate_per_s": self.rate_per_s, "kept": self.kept, "saturated": self.saturated, "values_s": values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a server keeps: figures at its highest rate, of one replica unless they say otherwise."""

    rate_per_s: float  # requests, the highest rate that was kept
    missed_rate_per_s: float | None  # the lowest rate that was tried and missed; None: none is, up to the highest tried
    missed: tuple[str, ...]  # objectives that are not met there, and "saturated"
    output_tokens_per_s: float  # that the requests of this rate ask for, rejected ones left out
    prompt_tokens_per_s: float
    outcomes: tuple[Outcome, ...]
    goodput: Goodput
    gpus_per_replica: int
    replicas: int  # 1, or as many as the wanted rate needs
    dollars_per_hour: float | None  # of all replicas
    dollars_per_million_output_tokens: float | None
    dollars_per_million_tokens: float | None  # prompt and output
    summary: dict[str, Any]  # of the run at the highest rate, as pkvsim whatif has it

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.gpus_per_replica

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        told = {name: getattr(self, name) for name in (
            "rate_per_s", "missed_rate_per_s", "output_tokens_per_s", "prompt_tokens_per_s", "gpus_per_replica",
            "replicas", "gpus", "dollars_per_hour", "dollars_per_million_output_tokens", "dollars_per_million_tokens",
        )}  # fmt: skip
        return told | {
            "missed": list(self.missed),
            "objectives": {outcome.objective.name: outcome.to_dict() for outcome in self.outcomes},
            "goodput": self.goodput.to_dict(),
            "summary": self.summary,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityCell:
    """What the search found of one server, or why there is nothing."""

    place: Place
    model: str
    device: str
    capacity: Capacity | None
    reason: str = ""  # where there is none
    points: tuple[Point, ...] = ()  # every rate tried, lowest first
    notes: tuple[str, ...] = ()
    basis: tuple[Basis, ...] = ()  # what the figures stand on

    @property
    def label(self) -> str:
        """The values that name it: `h200, 2 GPUs, batch 64`."""
        words = []
        for name, value in self.place.items():
            if name == "tp":
                words.append("1 GPU" if value == 1 else f"{value} GPUs")
            else:
                words.append(value if isinstance(value, str) else f"{name.replace('_', ' ')} {value}")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return self.place | {
            "result": None if self.capacity is None else self.capacity.to_dict(),
            "reason": self.reason or None,
            "points": [point.to_dict() for point in self.points],
            "basis": [row.to_dict() for row in self.basis],
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CapacitySearch:
    """The servers, best first; those without a result last, in the order of the axes."""

    trace: RequestTrace
    axes: dict[str, tuple[Any, ...]]
    objectives: tuple[Objective, ...]
    tolerance: float
    wanted_rate_per_s: float | None
    prices: dict[str, float]  # dollars per GPU and hour, by device
    rank: str  # of RANKS
    cells: tuple[CapacityCell, ...]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The object that `pkvsim capacity --json` prints."""
        return {
            "trace": {
                "name": self.trace.name,
                "requests": len(self.trace),
                "rate_per_s": self.trace.rate_per_s,
                "prompt_tokens": int(self.trace.prompt_tokens.sum()),
                "output_tokens": int(self.trace.output_tokens.sum()),
            },
            "axes": {name: list(values) for name, values in self.axes.items()},
            "objectives": {one.name: asdict(one) for one in self.objectives},
            "tolerance": self.tolerance,
            "wanted_rate_per_s": self.wanted_rate_per_s,
            "prices": self.prices,
            "rank": self.rank,
            "cells": [cell.to_dict() for cell in self.cells],
            "notes": list(self.notes),
        }


def standing(cell: CapacityCell, *, rank: str) -> tuple[float, ...]:
    """What cells are sorted by; equal ones stay in the order of the axes."""
    one = cell.capacity
    if one is None:
        return (2.0,)
    per_gpu = -one.rate_per_s / one.gpus_per_replica
    if rank == "dollars":
        dollars = one.dollars_per_million_tokens
        return (1.0, per_gpu) if dollars is None else (0.0, dollars, one.gpus, -one.rate_per_s)
    if rank == "gpus":
        return (0.0, one.gpus, per_gpu)
    return (0.0, per_gpu) if rank == "rate_per_gpu" else (0.0, -one.rate_per_s, one.gpus)
