"""Replays and GPUs as tables on stdout."""
from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pkvsim.devices.device import NUMBER_FIELDS, DeviceSpec


def print_replay(report: dict[str, Any]) -> None:
    """The object of `pkvsim.studies.replay.replay` as a table on stdout."""
    trace, console = report["trace"], Console(highlight=False)
    console.print(
        f"[bold]{trace['family']}[/], seed {trace['seed']}: {trace['requests']} requests, "
        f"{trace['max_active']} active at most, {trace['steps']} steps measured, "
        f"{trace['decode_tokens']} tokens decoded"
    )
    console.print(
        f"{trace['physical_pages']:,} physical pages; per step {trace['mean_active']:.2f} rows of "
        f"{trace['distinct_lengths_mean']:.2f} distinct lengths, "
        f"{report['engines']['adaptive']['useful_kv_mib']:.1f} MiB of KV"
    )
    table = Table(title=f"{report['device']}, {report['policy']} policy, means per step", title_justify="left")
    table.add_column("engine", overflow="fold", min_width=max(map(len, report["engines"])))
    for name in ("laun-\nches", "mer-\nges", "CTAs\nper SM", "merge\nMiB", "non-empty\nCTAs", "predicted\nus"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, engine in report["engines"].items():
        table.add_row(
            name,
            f"{engine['launches_per_step']:.2f}",
            f"{engine['merge_launches_per_step']:.2f}",
            f"{engine['cta_work_per_sm']:.1f}",
            f"{engine['merge_mib']:.2f}",
            f"{engine['nonempty_cta_fraction']:.0%}",
            f"{engine['predicted_step_us']:.0f}",
            style="bold" if name == "adaptive" else None,
        )
    console.print(table)
    routes = report["engines"]["adaptive"]["routes"]
    taken = ", ".join(f"{name} {count}" for name, count in routes.items() if count)
    console.print(f"adaptive's routes, in steps: {taken}")


def print_catalogue(devices: list[DeviceSpec]) -> None:
    """One line a GPU."""
    table = Table(title="~ before a number: estimated", title_justify="left")
    table.add_column("name", no_wrap=True)
    for name in ("SMs", "GiB", "GB/s\npeak", "GB/s\nreached", "FP16\nTFLOPS"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("route times")
    numbers = ("num_sms", "memory_gib", "peak_gb_s", "beta_gb_s", "fp16_tflops")
    for device in devices:
        table.add_row(escape(device.name), *(_number(device, name) for name in numbers), _routes(device))
    console = Console(highlight=False)
    console.print(table)
    console.print("Sources of every number: pkvsim devices NAME")


def print_devices(devices: list[DeviceSpec]) -> None:
    """Every number of every GPU with its status and source."""
    console = Console(highlight=False)
    for device in devices:
        title = f"[bold]{escape(device.name)}[/]: {escape(device.label)}"
        table = Table(title=title, title_justify="left")
        table.add_column("number", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("source", overflow="fold")  # addresses are copied whole
        for name in NUMBER_FIELDS:
            value = getattr(device, name)
            shown = ".".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
            table.add_row(name, shown, device.sources[name].status, escape(device.sources[name].source))
        for name, route in device.calibration.items():
            error = route.held_out or route.in_sample
            off = f"{error.median_percent:.1f} % off" if error else ""
            table.add_row(f"route {name}", off, route.status, escape(f"{route.source}, {route.date}"))
        console.print(table)


def _number(device: DeviceSpec, name: str) -> str:
    return ("~" if device.sources[name].status == "estimated" else "") + f"{getattr(device, name):,g}"


def _routes(device: DeviceSpec) -> str:
    """Where the times of attention's routes come from, and how far they are from measurements."""
    if not device.calibration:
        return "datasheet only"
    fitted = [route for route in device.calibration.values() if route.status == "calibrated"]
    if not fitted:
        return "estimated"
    errors = [route.held_out or route.in_sample for route in fitted]
    known = [error.median_percent for error in errors if error]
    return "calibrated" + (f", {max(known):.1f} % off at most (median)" if known else "")


def print_fit(device: DeviceSpec, routes: set[str], skipped: dict[str, int]) -> None:
    """How well the fitted routes of a device meet their measurements, on stdout."""
    table = Table(title=f"[bold]{device.name}[/]: absolute error in % of the measured time", title_justify="left")
    table.add_column("route", overflow="fold")
    for name in ("rule, CTAs\nper SM", "timings", "median", "mean", "held-out\nmedian", "held-out\nmean"):
        table.add_column(name, justify="right", no_wrap=True)
    for route in sorted(routes):
        entry = device.calibration[route]
        timings = str(entry.in_sample.measurements) if entry.in_sample else "-"
        errors = [entry.in_sample, entry.held_out]
        shown = [f"{value:.1f}" for e in errors if e for value in (e.median_percent, e.mean_percent)]
        table.add_row(route, f"{entry.model.rule} {entry.model.ctas_per_sm:g}", timings, *shown)
    console = Console(highlight=False)
    console.print(table)
    for route, count in sorted(skipped.items()):
        console.print(f"{route}: {count} measurements are too few to fit")
