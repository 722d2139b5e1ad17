"""Groups of one process: several devices that reach each other's memory, or ranks that share a device."""
from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence

import cupy

from gpu.several.group import Inboxes, check_devices

PEER_ACCESS_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled of CUDA's driver_types.h


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
        pairs = list(itertools.permutations(sorted(set(self._devices)), 2))
        for one, other in pairs:
            if not cupy.cuda.runtime.deviceCanAccessPeer(one, other):
                raise ValueError(f"devices: expected GPUs that reach each other's memory, but {one} does not reach "
                                 f"{other}; gpu.several.CollectiveGroup serves such")
        for one, other in pairs:
            _enable_peer_access(one, other)
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


@functools.cache
def _enable_peer_access(device: int, peer: int) -> None:
    """Lets `device` reach the memory of `peer`, once a process: CUDA has no question whether it does already, and a
    second call is an error, which tools such as compute-sanitizer report. So is the first one here where torch came
    before; it changes nothing, and CuPy resets CUDA's last error before it raises."""
    try:
        with cupy.cuda.Device(device):
            cupy.cuda.runtime.deviceEnablePeerAccess(peer)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != PEER_ACCESS_ALREADY_ENABLED:
            raise
