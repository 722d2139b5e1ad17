"""What a step over several GPUs asks of a group of ranks. Needs no GPU."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from pkvsim.schedule.shares import MAX_RANKS
from pkvsim.shapes import check_int


@dataclass(frozen=True, slots=True)
class Inboxes:
    """One rank's inbox, and every rank's where this one reaches them."""

    own: int  # address
    reached: tuple[int, ...]  # [num_ranks] addresses
    kept: tuple  # what the addresses are of


class Group(Protocol):
    """Ranks, of which this process has some. What all ranks must call together is said so."""

    num_ranks: int
    ranks: tuple[int, ...]  # of this process, ascending
    in_kernel: bool  # ranks reach each other's memory, so that kernels exchange the states

    def device(self, rank: int) -> int:
        """The device of one of this process's ranks."""

    def sharers(self, rank: int) -> int:
        """How many ranks are on that rank's device: their CTAs have to fit there at a time."""

    def use(self, rank: int) -> AbstractContextManager:
        """Makes the rank's device and stream current, in CuPy and, where it is loaded, torch."""

    def inboxes(self, num_bytes: int) -> dict[int, Inboxes]:
        """Memory of each rank, whose bytes are all 0xFF, by this process's ranks. All ranks call it together."""

    def exchange(self, rank: int, sent: object, received: object, counts: tuple[tuple[int, ...], tuple[int, ...]] | None
                 ) -> None:
        """Where kernels do not: on the current stream, sends the bytes `sent` [n] uint8, counts[0][r] of them to rank
        r, and receives counts[1][r] from each; without counts all ranks get everything."""

    def barrier(self) -> None:
        """Returns when all ranks have called it."""


def check_group(group: Any) -> Group:
    """Raises ValueError naming group."""
    if not all(hasattr(group, name) for name in ("num_ranks", "ranks", "in_kernel", "inboxes")):
        raise ValueError(f"group: expected a group of gpu.several, got {type(group).__name__}")
    check_int("group.num_ranks", group.num_ranks, 2, MAX_RANKS)
    return group


def check_devices(devices: Sequence[int], available: int) -> tuple[int, ...]:
    """The device of each rank. Raises ValueError naming devices."""
    if not hasattr(devices, "__iter__"):
        raise ValueError(f"devices: expected a device for each rank, such as [0, 1], got {devices!r}")
    found = tuple(check_int(f"devices[{i}]", device, 0, available - 1) for i, device in enumerate(devices))
    if not 2 <= len(found) <= MAX_RANKS:
        raise ValueError(f"devices: expected one for each of 2 to {MAX_RANKS} ranks, got {len(found)}")
    return found
