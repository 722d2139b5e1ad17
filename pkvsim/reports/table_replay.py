"""Replays and GPUs as tables on stdout."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from pkvsim.devices.device import DeviceSpec
from pkvsim.memory.tiers import UNITS
from pkvsim.reports.grid import Column, print_grid, print_line, table_console

if TYPE_CHECKING:
    from pkvsim.fitting.fit_serving import PointErrors


def print_replay(report: dict[str, Any]) -> None:
    """The object of `pkvsim.studies.replay.replay` as a table on stdout."""
    trace, console = report["trace"], table_console()
    print_line(
        console,
        f"[bold]{trace['family']}[/], seed {trace['seed']}: {trace['requests']} requests, "
        f"{trace['max_active']} active at most, {trace['steps']} steps measured, "
        f"{trace['decode_tokens']} tokens decoded",
        markup=True,
    )
    print_line(
        console,
        f"{trace['physical_pages']:,} physical pages; per step {trace['mean_active']:.2f} rows of "
        f"{trace['distinct_lengths_mean']:.2f} distinct lengths, "
        f"{report['engines']['adaptive']['useful_kv_mib']:.1f} MiB of KV",
    )
    heads = ("laun-\nches", "mer-\nges", "CTAs\nper SM", "merge\nMiB", "non-empty\nCTAs", "predicted\nus")
    rows = [
        (
            name,
            f"{engine['launches_per_step']:.2f}",
            f"{engine['merge_launches_per_step']:.2f}",
            f"{engine['cta_work_per_sm']:.1f}",
            f"{engine['merge_mib']:.2f}",
            f"{engine['nonempty_cta_fraction']:.0%}",
            f"{engine['predicted_step_us']:.0f}",
        )
        for name, engine in report["engines"].items()
    ]
    print_grid(
        console,
        [Column("engine", "left"), *(Column(head) for head in heads)],
        rows,
        title=f"{report['device']}, {report['policy']} policy, means per step",
        styles=["bold" if name == "adaptive" else None for name in report["engines"]],
    )
    if "flashinfer_cuda_core" in report["engines"]:
        print_line(console, "flashinfer: its tensor-core kernels alone; in whatif it is the better of both")
    routes = report["engines"]["adaptive"]["routes"]
    taken = ", ".join(f"{name} {count}" for name, count in routes.items() if count)
    print_line(console, f"adaptive's routes, in steps: {taken}")


def print_catalogue(devices: list[DeviceSpec]) -> None:
    """One line a GPU."""
    console = table_console()
    heads = ("SMs", "GiB", "GB/s\npeak", "GB/s\nreached", "FP16\nTFLOPS")
    numbers = ("num_sms", "memory_gib", "peak_gb_s", "beta_gb_s", "fp16_tflops")
    columns = [Column("name", "left"), *(Column(head) for head in heads), Column("route times", "left", text=True)]
    rows = [(device.name, *(_number(device, name) for name in numbers), _routes(device)) for device in devices]
    print_grid(console, columns, rows, title="~ before a number: estimated")
    print_line(console, "Sources of every number: pkvsim devices NAME")


def print_devices(devices: list[DeviceSpec]) -> None:
    """Every number of every GPU with its status and source."""
    console = table_console()
    columns = (
        Column("number", "left"), Column("value"), Column("status", "left"), Column("source", "left", text=True)
    )  # fmt: skip
    for device in devices:
        print_line(console, f"[bold]{escape(device.name)}[/]: {escape(device.label)}", markup=True)
        rows = []
        for name in device.sources:
            value = getattr(device, name)
            shown = ".".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
            rows.append((name, shown, device.sources[name].status, device.sources[name].source))
        for name, route in device.calibration.items():
            error = route.held_out or route.in_sample
            off = f"{error.median_percent:.1f} % off" if error else ""
            rows.append((f"route {name}", off, route.status, f"{route.source}, {route.date}"))
        for tier in device.tiers.values():
            rates = f"{tier.read_bytes_per_s / 1e9:.3g} read, {tier.write_bytes_per_s / 1e9:.3g} written GB/s"
            shown = f"{tier.capacity_bytes / UNITS['GiB']:.4g} GiB"
            rows.append((f"tier {tier.name}", shown, "assumed" if tier.assumed else "calibrated",
                         f"{rates}; {tier.source}"))  # fmt: skip
        print_grid(console, columns, rows)


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
    console = table_console()
    heads = ("rule, CTAs\nper SM", "timings", "median", "mean", "held-out\nmedian", "held-out\nmean")
    rows = []
    for route in sorted(routes):
        entry = device.calibration[route]
        timings = str(entry.in_sample.measurements) if entry.in_sample else "-"
        errors = [entry.in_sample, entry.held_out]
        shown = [f"{value:.1f}" for e in errors if e for value in (e.median_percent, e.mean_percent)]
        about = (f"{entry.model.rule} {entry.model.ctas_per_sm:g}", timings)
        rows.append((route, *about, *shown, *[""] * (4 - len(shown))))
    print_grid(
        console,
        [Column("route", "left"), *(Column(head) for head in heads)],
        rows,
        title=f"{device.name}: absolute error in % of the measured time",
    )
    for route, count in sorted(skipped.items()):
        print_line(console, f"{route}: {count} measurements are too few to fit")


def print_outside_fit(device: DeviceSpec, held_out: Mapping[str, PointErrors]) -> None:
    """A line an engine: errors of its constants, and on what they were not fitted to: of TPOT where that was points."""
    console = table_console()
    heads = ("status", "points or\ntimings", "median", "mean", "held out\nmedian", "mean", "held-out TTFT\nmedian")
    rows = []
    for engine, entry in sorted(device.outside.items()):
        error, held = entry.in_sample, held_out.get(engine)
        known = ("", "", "")
        if error is not None:
            known = f"{error.measurements}", f"{error.median_percent:.1f}", f"{error.mean_percent:.1f}"
        left = ("", "", "")
        if held is not None:
            ttft = "" if held.ttft_median != held.ttft_median else f"{held.ttft_median:.1f}"
            left = (f"{held.tpot_median:.1f}", f"{held.tpot_mean:.1f}", ttft)
        elif entry.held_out is not None:
            left = (f"{entry.held_out.median_percent:.1f}", f"{entry.held_out.mean_percent:.1f}", "")
        rows.append((engine, entry.status, *known, *left))
    print_grid(
        console, [Column("engine", "left"), *(Column(head) for head in heads)], rows,
        title=f"{device.name}: absolute error in %",
    )  # fmt: skip
