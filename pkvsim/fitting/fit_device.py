"""Fits every route of a table of measurements into a DeviceSpec."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import CONSTANTS
from pkvsim.fitting.fit_routes import MIN_MEASUREMENTS, calibrate
from pkvsim.fitting.fit_starts import fit_starts, free_constants
from pkvsim.fitting.measurements import Measurement


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
) -> tuple[DeviceSpec, dict[str, int]]:
    """(base with the fitted routes, measurements by route of those that have too few to fit).

    free: constants to fit, by default those of each route (pkvsim.fitting.fit_starts); named, the
    others stay as base has them. source, date: what the file shall say of
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
    return replace(base, name=name or base.name, calibration=base.calibration | fitted), skipped
