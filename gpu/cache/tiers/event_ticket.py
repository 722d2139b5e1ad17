"""Copies of a GPU that have ended once an event is reached: a Ticket of gpu.cache.tiers.device."""
from __future__ import annotations

from collections.abc import Sequence


class EventTicket:
    """Copies up to an event. Keeps what they read of this process until they have ended."""

    __slots__ = ("event", "_kept", "_device")

    def __init__(self, event: object, device: int, kept: Sequence[object]) -> None:
        self.event, self._device, self._kept = event, device, kept

    def done(self) -> bool:
        return self.event.done

    def wait(self) -> None:
        import cupy

        with cupy.cuda.Device(self._device):
            self.event.synchronize()
