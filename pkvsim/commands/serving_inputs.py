"""What whatif and sweep share: a model that fits the GPU, and a progress bar."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from pkvsim.devices.device import DeviceSpec
    from pkvsim.models.presets import ModelSpec
    from pkvsim.serving.server_config import ServingConfig


def load_model(
    name: str, weight_bits: Optional[int], tensor_parallel: Optional[int], device: DeviceSpec, config: ServingConfig
) -> tuple[ModelSpec, tuple[str, ...]]:
    """(model, notes): the model by name, as pkvsim.serving.fit_model makes it fit."""
    from pkvsim.models.presets import get_model
    from pkvsim.serving.fit_model import fit_model

    return fit_model(get_model(name, tensor_parallel=tensor_parallel), device, config, weight_bits)


@contextmanager
def progress_bar(show: bool, unit: str, *, still: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with a rate on stderr; None, and nothing drawn, unless `show` and stderr is a terminal. still: the bar
    moves with what is reported alone, and has no thread that redraws it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from pkvsim.reports.table_serving import digits

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, auto_refresh=not still) as bar:
        tasks = {}
        starting = bar.add_task("starting", total=None, rate="")

        def report(name: str, done: int, total: int) -> None:
            bar.update(starting, visible=False)
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, rate="")
            speed = bar.tasks[bar.task_ids.index(tasks[name])].speed
            bar.update(tasks[name], completed=done, rate=f"{digits(speed, 3)} {unit}/s" if speed else "", refresh=still)

        yield report
