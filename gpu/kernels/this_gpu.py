"""The GPU at hand, as everything in gpu/ asks for it: one value, in whose place gpu.as_card puts another card."""
from __future__ import annotations

import functools
from dataclasses import dataclass

CLUSTERS_FROM = 90  # compute capability from which there are programmatic dependent launches and clusters of CTAs


@dataclass(frozen=True, slots=True)
class Gpu:
    """What kernels, schedules and scripts depend on."""

    name: str
    compute_capability: int  # major * 10 + minor
    num_sms: int
    memory_bytes: int  # that programs can have
    played_by: str | None = None  # the GPU that stands in for this one, in whose time everything is measured
    card: str | None = None  # by which name gpu.as_card knows it, where it is played

    @property
    def overlaps(self) -> bool:
        """Whether launches may be programmatic dependent ones and clusters."""
        return self.compute_capability >= CLUSTERS_FROM

    def __str__(self) -> str:
        return self.name if self.played_by is None else f"{self.name}, played by {self.played_by}"


_card: Gpu | None = None  # one process has one, from before its first kernel to its end


def this_gpu() -> Gpu:
    """CuPy's current device, or the card that the process plays."""
    return real_gpu() if _card is None else _card


def card_played() -> str | None:
    """The name of the card that the process plays, for the processes that it starts; needs no GPU."""
    return None if _card is None else _card.card


def real_gpu() -> Gpu:
    """CuPy's current device, whatever card the process plays."""
    import cupy

    return _properties(cupy.cuda.Device().id)


@functools.cache
def _properties(device: int) -> Gpu:
    """Of a device. The driver takes a millisecond to tell, and launches ask."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(device)
    return Gpu(
        name=found["name"].decode(),
        compute_capability=found["major"] * 10 + found["minor"],
        num_sms=found["multiProcessorCount"],
        memory_bytes=found["totalGlobalMem"],
    )


def play(card: Gpu | None) -> None:
    """Makes this_gpu() that card, or the real one again; gpu.as_card does what else belongs to it."""
    global _card
    _card = card
