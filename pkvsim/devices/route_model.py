"""RouteModel: the named constants that price one route on one GPU, and their order as a row of numbers."""
from __future__ import annotations

import math
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np

from pkvsim.schedule.costs import MEASURED_COSTS, BalancedCosts, check_costs

ROUTES = ("flashinfer_cuda_core", "flashinfer_tensor_core", "xqa", "split", "workqueue", "balanced")
OWN_ROUTES = ("split", "workqueue", "balanced")  # always there; the others need FlashInfer

# How a route cuts rows into tasks. The index is the number that a row of constants carries.
RULES = (
    "whole",  # one task a (row, KV head)
    "chunk",  # FlashInfer: the least chunk whose tasks fit the CTA slots, unsplit when the rows alone fill them
    "even",  # every row in equally many splits, as many as fit the CTA slots
    "buckets",  # the paper's split: rows of one length a launch, each launch with its own split count
    "queue",  # the paper's workqueue: splits in proportion to length, one launch
    "balanced",  # equal-cost ranges, one a CTA slot
)


UNPAIRED_COSTS = MEASURED_COSTS._replace(pair=0)
OLD_PAIR = "pair_cost"  # of device files


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteModel:
    """What one route costs on one GPU; drives the closed form (pkvsim.pricing) and the timeline (pkvsim.timeline).

    GB = 1e9 bytes, MB = 1e6 bytes. A route's kernel time for one layer after another is fixed_us, plus launch_us for
    every launch after the first, plus the time its tasks take on num_sms * ctas_per_sm slots, plus the merge where rows
    are cut. pkvsim.pricing.step_times adds up layers and the host's part. Raises ValueError naming the field.
    """

    rule: str  # one of RULES
    bandwidth_gb_s: float  # what all CTAs together read from memory
    cta_read_gb_s: float  # what one CTA alone reads
    fixed_us: float  # a step's first launch: ramp-up to the first byte, and draining
    launch_us: float = 0.0  # every further launch of the step
    task_us: float = 0.0  # a CTA slot's time for a task beside its bytes
    segment_us: float = 0.0  # balanced: a CTA's time for every (row, KV head) segment beside its bytes
    merge_us: float = 0.0  # merging rows that are cut, whatever their number of splits
    merge_split_us: float = 0.0  # merging, for every split of the longest row: they are read one after the other
    merge_columns: float = math.inf  # columns of a KV head that merge at a time; more take merge_split_us once a turn
    merge_gb_s: float = math.inf  # what merges one KV head's partial states reads, its splits times group_size states
    isolated_us: float = 0.0  # GPU: what the first layer of a step takes above one that follows another
    plan_us: float = 0.0  # host time of planning, per step whatever the layers
    plan_row_us: float = 0.0  # planning, for every row
    plan_length_us: float = 0.0  # planning, for every distinct length after the first (split: one launch each)
    host_us: float = 0.0  # a step's wall time beside planning and the GPU's: issuing the first layer, synchronising
    run_us: float = 0.0  # host time of issuing one layer, which limits layers that the GPU ends sooner
    l2_gb_s: float = math.inf  # what all CTAs read from L2, for KV that a warm l2_mb holds
    l2_mb: float = 0.0  # KV that is found in L2 at the start of a step; 0: cold
    sm_heads_gb_s: float = math.inf  # arithmetic: GB/s of KV one SM serves, times the query heads it serves them to
    base_heads: float = 0.0  # arithmetic per KV token that does not depend on the group, in query heads
    head_pad: float = 1.0  # the group is padded to a multiple of this (rows of a tensor-core tile)
    ctas_per_sm: float = 1.0  # CTA slots of an SM
    tile_tokens: float = 16.0  # splits are cut at multiples of this
    min_split_tokens: float = 128.0  # no split is shorter
    # buckets and queue. 1: a CTA a slot, CTA b taking tasks b, b + CTAs, ..; 0: a CTA a task, as slots fall free.
    strided: float = 0.0
    costs: BalancedCosts = UNPAIRED_COSTS  # balanced: what the engine weighs, whatever the kernel

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        check_costs(self.costs)
        for name in CONSTANTS:
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            most = math.inf if name in _UNLIMITED else sys.float_info.max
            if not good or not 0 <= value <= most or (name in _POSITIVE and value == 0):
                least = "> 0" if name in _POSITIVE else ">= 0"
                raise ValueError(f"{name}: expected a finite number {least}, got {value!r}")

    def to_row(self) -> np.ndarray:
        """The constants as float64 [NUM_CONSTANTS], rule first, in field order, and the costs last."""
        numbers = (getattr(self, name) for name in CONSTANTS)
        return np.array([RULES.index(self.rule), *numbers, *self.costs], np.float64)


CONSTANTS = tuple(f.name for f in fields(RouteModel) if f.name not in ("rule", "costs"))
NUM_CONSTANTS = 1 + len(CONSTANTS) + len(BalancedCosts._fields)
_REQUIRED = tuple(f.name for f in fields(RouteModel) if f.name in CONSTANTS and f.default is MISSING)
NO_LIMIT = "no limit"  # infinity in a device file, which is strict JSON
_UNLIMITED = ("merge_columns", "merge_gb_s", "l2_gb_s", "sm_heads_gb_s")  # infinity means that this never limits
_POSITIVE = (
    "bandwidth_gb_s", "cta_read_gb_s", "head_pad", "ctas_per_sm", "tile_tokens", "min_split_tokens", *_UNLIMITED,
)  # fmt: skip


def constants_matrix(models: dict[str, RouteModel], available: tuple[str, ...] = ROUTES) -> np.ndarray:
    """float64 [len(ROUTES), NUM_CONSTANTS], one row a route in the order of ROUTES; NaN where a route is missing from
    models or from `available`, which prices it as infinite."""
    rows = np.full((len(ROUTES), NUM_CONSTANTS), np.nan)
    for index, route in enumerate(ROUTES):
        if route in models and route in available:
            rows[index] = models[route].to_row()
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """How far a model lies from measurements: absolute errors in percent of the measured time."""

    measurements: int
    median_percent: float
    mean_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedRoute:
    """A route's model on one GPU, and where it comes from."""

    model: RouteModel
    status: str  # "calibrated" (fitted to measurements) or "estimated"
    source: str  # file or command
    date: str  # of the fit, YYYY-MM-DD
    in_sample: FitError | None = None  # of the shipped constants, on all measurements
    held_out: FitError | None = None  # of a fit to a random half, on the other half

    def to_dict(self) -> dict[str, Any]:
        """The catalogue's file format, which `read_route` reads back."""
        data: dict[str, Any] = {"status": self.status, "source": self.source, "date": self.date}
        for name in ("in_sample", "held_out"):
            error = getattr(self, name)
            if error is not None:
                data[name] = asdict(error)
        constants = {name: getattr(self.model, name) for name in ("rule", *CONSTANTS)}
        model: dict[str, Any] = {name: NO_LIMIT if value == math.inf else value for name, value in constants.items()}
        if self.model.rule == "balanced":
            model["costs"] = self.model.costs._asdict()
        return data | {"model": model}


def read_route(where: str, route: str, entry: Any, *, costs: BalancedCosts = UNPAIRED_COSTS) -> CalibratedRoute:
    """One entry of a device file's routes; ValueError that starts with `where` and names the field.

    costs: what a balanced route weighs where the entry does not say it.
    """
    if route not in ROUTES and "/" not in route:  # system/version/kernel names another system's, which no policy takes
        raise ValueError(f"{where}: expected one of {', '.join(ROUTES)}, or system/version/kernel")
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), dict):
        raise ValueError(f"{where}: expected an object with status, source, date and model, got {entry!r}")
    known = {"status", "source", "date", "model", "in_sample", "held_out"}
    if set(entry) - known:
        raise ValueError(f"{where}: unknown: {', '.join(sorted(set(entry) - known))}")
    for key in ("status", "source", "date"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ValueError(f"{where}.{key}: expected text, got {entry.get(key)!r}")
    if entry["status"] not in ("calibrated", "estimated"):
        raise ValueError(f"{where}.status: expected calibrated or estimated, got {entry['status']!r}")
    errors = {name: read_error(f"{where}.{name}", entry[name]) for name in ("in_sample", "held_out") if name in entry}
    constants = dict(entry["model"])
    costs = _read_costs(f"{where}.model", constants, costs)
    odd = ({"rule", *_REQUIRED} - set(constants)) | (set(constants) - {"rule", *CONSTANTS})
    if odd:
        raise ValueError(f"{where}.model: missing or unknown: {', '.join(sorted(odd))}")
    try:
        numbers = {k: math.inf if v == NO_LIMIT and k in _UNLIMITED else v for k, v in constants.items()}
        model = RouteModel(**numbers, costs=costs)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}.model.{error}") from None
    return CalibratedRoute(model=model, status=entry["status"], source=entry["source"], date=entry["date"], **errors)


def _read_costs(where: str, constants: dict[str, Any], default: BalancedCosts) -> BalancedCosts:
    """Takes the costs of the balanced schedule out of an entry's constants.

    Files written before the four were one value have the pair's alone, on every route, as a number.
    """
    fields_of = BalancedCosts._fields
    given = constants.pop("costs", {})
    if not isinstance(given, dict) or set(given) - set(fields_of):
        raise ValueError(f"{where}.costs: expected an object of {', '.join(fields_of)}, got {given!r}")
    pair = constants.pop(OLD_PAIR, None)
    if isinstance(pair, float) and pair.is_integer():
        pair = int(pair)
    given = ({} if pair is None else {"pair": pair}) | given
    try:
        return check_costs(default._replace(**given))
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def read_error(where: str, entry: Any) -> FitError:
    """The error of a fit as a device file has it; ValueError that starts with `where`."""
    names = {f.name for f in fields(FitError)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ValueError(f"{where}: expected {', '.join(sorted(names))}, got {entry!r}")
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{where}.{name}: expected a finite number >= 0, got {value!r}")
    return FitError(**entry)
