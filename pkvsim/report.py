"""Tables for people. The only table printer."""
from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pkvsim.device import NUMBER_FIELDS, DeviceSpec


def print_replay(report: dict[str, Any]) -> None:
    """The object of `pkvsim.replay.replay` as a table on stdout."""
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
    table.add_column("engine", no_wrap=True)
    for name in ("launches", "of them\nmerges", "CTAs\nper SM", "merge\nMiB", "non-empty\nCTAs", "predicted\nus"):
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


def print_devices(devices: list[DeviceSpec]) -> None:
    """Every number of every GPU with its status and source, on stdout."""
    console = Console(highlight=False)
    for device in devices:
        table = Table(title=f"[bold]{device.name}[/]: {device.label}", title_justify="left")
        table.add_column("number", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("source")
        for name in NUMBER_FIELDS:
            value = getattr(device, name)
            shown = ".".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
            table.add_row(name, shown, device.sources[name].status, device.sources[name].source)
        console.print(table)
