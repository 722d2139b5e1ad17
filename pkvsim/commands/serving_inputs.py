"""What whatif and sweep share: a model that fits the GPU, and a progress bar."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from pkvsim.devices.device import DeviceSpec
    from pkvsim.models.presets import ModelSpec
    from pkvsim.serving.server_config import ServingConfig

KV_SHARE = 0.25  # of the GPU's memory, that narrowed weights should leave to KV pages


def load_model(
    name: str, weight_bits: Optional[int], tensor_parallel: Optional[int], device: DeviceSpec, config: ServingConfig
) -> tuple[ModelSpec, tuple[str, ...]]:
    """(model, notes). A model that does not fit as it comes is narrowed unless weight_bits says otherwise: to the
    widest weights that leave KV_SHARE of the memory to KV pages, else the narrowest; a note says so."""
    from pkvsim.models.presets import get_model, weight_bytes
    from pkvsim.models.weight_bits import WEIGHT_BITS, with_weight_bits
    from pkvsim.serving.costs import GIB, page_budget

    model = get_model(name, tensor_parallel=tensor_parallel)
    if weight_bits is not None:
        return with_weight_bits(model, weight_bits), ()
    try:
        page_budget(model, device, config)
        return model, ()
    except ValueError:
        for bits in WEIGHT_BITS[1:]:
            narrow = with_weight_bits(model, bits)
            room = device.memory_gib * (config.memory_fraction - KV_SHARE) - config.workspace_gib
            if weight_bytes(narrow) / GIB <= room:
                break
    page_budget(narrow, device, config)
    note = f"{model.name} does not fit {device.name} as it comes: layer weights in {bits} bits"
    return narrow, (note + " (--weight-bits 16 insists)",)


@contextmanager
def progress_bar(show: bool, unit: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with a rate on stderr; None, and nothing drawn, unless `show` and stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = {}
        starting = bar.add_task("starting", total=None, rate="")

        def report(name: str, done: int, total: int) -> None:
            bar.update(starting, visible=False)
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, rate="")
            speed = bar.tasks[bar.task_ids.index(tasks[name])].speed
            bar.update(tasks[name], completed=done, rate=f"{speed:,.3g} {unit}/s" if speed else "")

        yield report
