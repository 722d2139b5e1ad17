"""Fits every route of a table of measurements into a DeviceSpec."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import CONSTANTS, CalibratedRoute
from pkvsim.fitting.fit_routes import MIN_MEASUREMENTS, calibrate
from pkvsim.fitting.fit_starts import fit_starts, free_constants
from pkvsim.fitting.fit_steps import HOST_CONSTANTS
from pkvsim.fitting.measurements import Measurement

HOST_FROM = "; the host's times: "  # between the two sources of a route


def select(
    measurements: Sequence[Measurement], *, table_device: str | None = None, routes: Sequence[str] | None = None
) -> list[Measurement]:
    """The measurements of one GPU, and of these routes where given. Raises ValueError naming the argument."""
    devices = sorted({m.device for m in measurements})
    if table_device is None and len(devices) > 1:
        raise ValueError(f"table_device: expected one of {', '.join(devices)}, of which the table has all")
    if table_device is not None and table_device not in devices:
        raise ValueError(f"table_device: expected one of {', '.join(devices)}, got {table_device!r}")
    known = sorted({m.route for m in measurements})
    for route in routes or ():
        if route not in known:
            raise ValueError(f"route: expected one of {', '.join(known)}, got {route!r}")
    return [m for m in measurements if table_device in (None, m.device) and (not routes or m.route in routes)]


def fit_device(
    base: DeviceSpec,
    measurements: Sequence[Measurement],
    *,
    source: str,
    date: str,
    free: Sequence[str] | None = None,
    name: str | None = None,
    keep_host: bool = False,
) -> tuple[DeviceSpec, dict[str, int]]:
    """(base with the fitted routes, measurements by route of those that have too few to fit).

    free: constants to fit, by default those of each route (pkvsim.fitting.fit_starts); named, the
    others stay as base has them. keep_host: the host's times stay those of base too, for kernels that were measured
    beside another host than the one to predict. source, date: what the file shall say of
    where the constants come from. Raises ValueError naming the argument, also where no route can be fitted.
    """
    for constant in free or ():
        if constant not in CONSTANTS:
            raise ValueError(f"free: expected names of {', '.join(CONSTANTS)}, got {constant!r}")
    by_route: dict[str, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        by_route[measurement.route].append(measurement)
    skipped = {route: len(group) for route, group in by_route.items() if len(group) < MIN_MEASUREMENTS}
    if len(skipped) == len(by_route):
        raise ValueError(f"measurements: expected a route with at least {MIN_MEASUREMENTS}, got {skipped or 'none'}")
    for route in by_route if keep_host else ():
        if route not in base.calibration:
            raise ValueError(f"keep_host: expected a model of {route} in {base.name}, whose host's times to keep")
    fitted = {
        route: calibrate(
            group,
            fit_starts(route, base, from_known=free is not None),
            free or free_constants(route),
            num_sms=base.num_sms,
            source=source,
            date=date,
        )
        for route, group in sorted(by_route.items())
        if route not in skipped
    }
    if keep_host:
        fitted = {route: _with_host_of(base.calibration[route], entry) for route, entry in fitted.items()}
    return replace(base, name=name or base.name, calibration=base.calibration | fitted), skipped


def _with_host_of(old: CalibratedRoute, fitted: CalibratedRoute) -> CalibratedRoute:
    """The fitted route with the host's times of the old one, which its source says."""
    kept = {name: getattr(old.model, name) for name in HOST_CONSTANTS}
    source = f"{fitted.source}{HOST_FROM}{old.source.rpartition(HOST_FROM)[2]}"
    return replace(fitted, model=replace(fitted.model, **kept), source=source)
