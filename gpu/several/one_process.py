"""Groups of one process: several devices that reach each other's memory, or ranks that share a device."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import cupy

from gpu.several.group import Inboxes, check_devices


class DeviceGroup:
    """A rank for each entry of `devices`, which may name a device several times: its ranks then share its SMs.

    Every rank has a stream of its own, on which everything of it runs: streams [num_ranks]. Work on other streams is
    ordered with a rank's as with any stream, by events.
    """

    in_kernel = True

    def __init__(self, devices: Sequence[int]) -> None:
        """Raises ValueError naming devices, also where one of them cannot reach another's memory."""
        self._devices = check_devices(devices, cupy.cuda.runtime.getDeviceCount())
        self.num_ranks = len(self._devices)
        self.ranks = tuple(range(self.num_ranks))
        for one in sorted(set(self._devices)):
            for other in sorted(set(self._devices) - {one}):
                if not cupy.cuda.runtime.deviceCanAccessPeer(one, other):
                    raise ValueError(f"devices: expected GPUs that reach each other's memory, but {one} does not reach "
                                     f"{other}; gpu.several.CollectiveGroup serves such")
                with cupy.cuda.Device(one):
                    _enable_peer_access(other)
        self.streams = []
        for device in self._devices:
            with cupy.cuda.Device(device):
                self.streams.append(cupy.cuda.Stream(non_blocking=True))

    def device(self, rank: int) -> int:
        return self._devices[rank]

    def sharers(self, rank: int) -> int:
        return self._devices.count(self._devices[rank])

    @contextlib.contextmanager
    def use(self, rank: int) -> Iterator[cupy.cuda.Stream]:
        stream, torch = self.streams[rank], sys.modules.get("torch")
        with contextlib.ExitStack() as stack:
            stack.enter_context(cupy.cuda.Device(self._devices[rank]))
            stack.enter_context(stream)
            if torch is not None and torch.cuda.is_available():
                own = torch.cuda.ExternalStream(stream.ptr, device=self._devices[rank])
                stack.enter_context(torch.cuda.stream(own))
            yield stream

    def inboxes(self, num_bytes: int) -> dict[int, Inboxes]:
        self.barrier()  # a step of an engine that was dropped may still write into memory that is used again here
        boxes = []
        for rank in self.ranks:
            with self.use(rank) as stream:
                boxes.append(cupy.full(num_bytes, 0xFF, dtype=cupy.uint8))
                stream.synchronize()
        reached = tuple(box.data.ptr for box in boxes)
        return {rank: Inboxes(reached[rank], reached, (boxes[rank],)) for rank in self.ranks}

    def exchange(self, rank: int, sent: object, received: object, counts: object) -> None:
        raise RuntimeError("exchange: the ranks of a DeviceGroup reach each other's memory")

    def barrier(self) -> None:
        """Waits until every rank's device has ended what it was given."""
        for rank in self.ranks:
            with cupy.cuda.Device(self._devices[rank]):
                self.streams[rank].synchronize()


def _enable_peer_access(other: int) -> None:
    """From the current device; torch may have done it already."""
    try:
        cupy.cuda.runtime.deviceEnablePeerAccess(other)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if "AlreadyEnabled" not in str(error):
            raise
