"""NVMe passthrough on a stand-in that obeys commands as a controller does; no hardware has run it."""
import ctypes
import errno
import os

import numpy as np
import pytest
from pool_cases import BLOCK_BYTES, device, disk, got, keys, put

from gpu.cache.tiers.disks.disk_reads import Done, Request
from gpu.cache.tiers.disks.io_uring import CQE
from gpu.cache.tiers.disks.nvme_passthrough import COMMAND, NVME_URING_CMD_IO, SQE128, NvmePassthroughReader
from gpu.cache.tiers.tiered_cache import TieredKVCache


class Controller:
    """A ring whose commands read and write a bytearray of logical blocks."""

    def __init__(self, num_bytes=2**20, entries=4, block=512):
        self.memory, self.entries, self.block = np.zeros(num_bytes, np.uint8), entries, block
        self.sqes = np.zeros((entries, 128), np.uint8)
        self._tail, self._ended, self.status = 0, [], {}

    def places(self, count):
        return (self._tail + np.arange(count)) % self.entries

    def push(self, count):
        for entry in self.sqes[self.places(count)].view(SQE128)[:, 0]:
            assert (entry["opcode"], entry["command_op"]) == (46, NVME_URING_CMD_IO)
            command = entry["command"]
            assert command["nsid"] == 7
            first = int(command["cdw10"]) | int(command["cdw11"]) << 32
            length = (int(command["cdw12"]) + 1) * self.block
            assert length == command["data_length"] <= 8192
            status = self.status.get(first, 0)
            if not status:
                memory = self.memory[first * self.block :].ctypes.data
                ends = (memory, int(command["address"])) if command["opcode"] == 1 else (int(command["address"]), memory)
                ctypes.memmove(*ends, length)
            self._ended.append((entry["user_data"], status, 0))
        self._tail += count

    def wait(self, seconds, few=1):
        pass

    def pop(self):
        ended, self._ended = np.array(self._ended, CQE), []
        return ended

    def close(self):
        pass


def reader(controller, **options):
    return NvmePassthroughReader(fd=os.open("/dev/null", os.O_RDWR), nsid=7, ring=controller, max_command_bytes=8192, **options)


def test_structures_are_the_kernels():
    assert COMMAND.itemsize == 72 and COMMAND.fields["address"][1] == 24 and COMMAND.fields["cdw10"][1] == 40
    assert SQE128.itemsize == 128 and SQE128.fields["command"][1] == 48 and SQE128.fields["user_data"][1] == 32


def test_a_pool_over_a_namespace(tmp_path):
    controller = Controller(2**20 * 2)
    make = lambda depth, buffers: reader(controller, first_byte=4096)  # noqa: E731
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", 20, reader=make)]) as cache:
        put(cache, keys("p", 12))
        assert got(cache, keys("p", 12)) == 12
        assert "untested" in cache.stats()["a"]["reader"]
    assert controller.memory[:4096].sum() == 0 and controller.memory[4096 : 4096 + 8] .tobytes() == b"PKVBLK02"
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", 20, reader=make)]) as cache:
        assert got(cache, keys("p", 12)) == 12


def test_a_status_is_an_error_of_the_request():
    controller, buffer = Controller(), np.zeros(4 * 8192, np.uint8)
    controller.status[16] = 0x281  # unrecovered read error, in the second of four commands
    one = reader(controller)
    one.submit([Request(3, -1, 0, buffer.ctypes.data, 4 * 8192), Request(4, -1, 2**16, buffer.ctypes.data, BLOCK_BYTES)])
    ended = []
    while len(ended) < 2:
        ended += one.poll(0.0)
    assert ended == [Done(3, -errno.EIO), Done(4, BLOCK_BYTES)] and one.poll(0.0) == []
    one.close()
    with pytest.raises(ValueError, match="multiples"):
        reader(controller, logical_block_bytes=4096, first_byte=512)
