"""Groups of one process enable peer access by calls that succeed, and take it silently where torch has enabled it."""
from __future__ import annotations

import itertools

import pytest

ALREADY_ENABLED, TOO_MANY_PEERS = 704, 711  # of CUDA's driver_types.h


class RuntimeFails(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError as far as its status goes."""

    def __init__(self, status: int) -> None:
        super().__init__(f"error {status}")
        self.status = status


class Peers:
    """Peer access of several devices as the CUDA runtime has it, behind CuPy's names."""

    def __init__(self) -> None:
        self.enabled: set[tuple[int, int]] = set()
        self.calls: list[tuple[int, int]] = []
        self.failed: list[int] = []
        self.apart: set[tuple[int, int]] = set()
        self.most, self.current = 8, [0]

    def enable(self, peer: int) -> None:
        pair = self.current[-1], peer
        self.calls.append(pair)
        status = ALREADY_ENABLED if pair in self.enabled else TOO_MANY_PEERS if len(self.enabled) >= self.most else 0
        if status:
            self.failed.append(status)
            raise RuntimeFails(status)
        self.enabled.add(pair)


@pytest.fixture
def peers(gpu, monkeypatch) -> Peers:
    import gpu.several.one_process as one_process

    peers, cuda = Peers(), gpu.cupy.cuda

    class Device(cuda.Device):
        def __init__(self, index: int = 0) -> None:
            self.index = index

        def __enter__(self):
            peers.current.append(self.index)
            return self

        def __exit__(self, *_):
            peers.current.pop()

    monkeypatch.setattr(cuda, "Device", Device)
    for name, value in {
        "getDeviceCount": lambda: 4, "deviceCanAccessPeer": lambda one, other: (one, other) not in peers.apart,
        "deviceEnablePeerAccess": peers.enable, "CUDARuntimeError": RuntimeFails,
    }.items():
        monkeypatch.setattr(cuda.runtime, name, value, raising=False)
    one_process._enable_peer_access.cache_clear()
    yield peers
    one_process._enable_peer_access.cache_clear()


def groups(*of: list[int]) -> None:
    from gpu.several.one_process import DeviceGroup

    for devices in of:
        DeviceGroup(devices)


def test_no_call_of_a_process_fails(peers) -> None:
    groups([0, 1], [1, 0], [0, 1, 1, 2], [2, 2], [0, 1, 2])
    assert sorted(peers.calls) == list(itertools.permutations(range(3), 2)) and not peers.failed
    assert peers.current == [0]


def test_what_torch_has_enabled_is_taken_silently_and_asked_once(peers) -> None:
    peers.enabled.add((1, 0))
    groups([0, 1], [0, 1])
    assert peers.failed == [ALREADY_ENABLED] and peers.enabled == {(0, 1), (1, 0)}
    assert peers.current == [0]


def test_other_errors_come_through_every_time(peers) -> None:
    peers.most = 1
    for _ in range(2):
        with pytest.raises(RuntimeFails, match="711"):
            groups([0, 1])
    peers.most = 8
    groups([0, 1])
    assert peers.enabled == {(0, 1), (1, 0)}


def test_nothing_is_enabled_where_a_pair_is_apart(peers) -> None:
    peers.apart.add((2, 1))
    with pytest.raises(ValueError, match=r"2 does not reach 1; gpu\.several\.CollectiveGroup"):
        groups([0, 1, 2])
    assert not peers.calls
