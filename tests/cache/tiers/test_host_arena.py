"""Host memory of tiers: what cannot be had, or cannot be pinned, is refused before anything is killed or left."""
import sys
import types

import pytest
from pool_cases import BLOCK_BYTES, device, disk, tier

from gpu.cache.tiers import host_arena
from gpu.cache.tiers.host_arena import HostArena
from gpu.cache.tiers.host_room import free_host_bytes
from gpu.cache.tiers.stores import HostStore
from gpu.cache.tiers.tiered_cache import TieredKVCache


class Runtime:
    """CUDA's, which registers two pieces of memory and no third."""

    def __init__(self):
        self.registered, self.sizes = [], []

    def hostRegister(self, address, num_bytes, flags):  # noqa: N802
        if len(self.registered) == 2:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.registered.append(address)
        self.sizes.append(num_bytes)

    def hostUnregister(self, address):  # noqa: N802
        self.registered.remove(address)


def test_memory_that_cannot_be_pinned_is_let_go(monkeypatch):
    runtime = Runtime()
    cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(host_arena, "CHUNK_BYTES", 8192)
    HostArena(slots=4, slot_bytes=4096, pin=True).close()
    assert not runtime.registered
    HostArena(slots=3, slot_bytes=4096, pin=True).close()
    assert not runtime.registered and runtime.sizes == [8192, 8192, 8192, 4096]  # no byte beyond the arena
    with pytest.raises(ValueError, match="pin: 24,576 bytes of host memory cannot be registered.*out of memory"):
        HostArena(slots=6, slot_bytes=4096, pin=True)
    assert not runtime.registered, "pieces stay registered that nobody has"


def test_pinning_without_cupy_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ValueError, match="pin: .* cannot be registered with CUDA"):
        TieredKVCache(device(), host=[HostStore(tier=tier("host", 4, kind="host"))], disks=[disk(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


def test_more_memory_than_there_is_is_refused_and_not_touched(monkeypatch):
    free = free_host_bytes()
    assert 2**20 < free < 2**50
    with pytest.raises(ValueError, match="host memory cannot be had: .* are free"):
        HostArena(slots=2 * free // BLOCK_BYTES, slot_bytes=BLOCK_BYTES)
    with pytest.raises(ValueError, match="host memory cannot be had"):
        HostArena(slots=2**60, slot_bytes=2**40)


def test_free_memory_is_within_the_limits_of_a_container(tmp_path):
    proc, system = tmp_path / "proc", tmp_path / "sys"
    own = system / "fs/cgroup/pod/box"
    for place in (proc / "self", own, system / "devices/system/node/node1"):
        place.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    (system / "devices/system/node/node1/meminfo").write_text("Node 1 MemFree: 100 kB\nNode 1 FilePages: 50 kB\n")
    where = {"proc": proc, "sys": system}
    assert free_host_bytes(**where) == 3000 * 1024  # a kernel without control groups
    (proc / "self/cgroup").write_text("1:name=systemd:/x\n0::/pod/box\n")
    for group, limit in ((own, "max"), (own.parent, str(2000 * 1024))):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{1500 * 1024}\n")
        (group / "memory.stat").write_text(f"anon 9\ninactive_file {200 * 1024}\nactive_file {100 * 1024}\n")
    assert free_host_bytes(**where) == (2000 - 1500 + 300) * 1024
    assert free_host_bytes(1, **where) == 150 * 1024
    (own / "memory.max").write_text("4096")
    assert free_host_bytes(**where) == 0
