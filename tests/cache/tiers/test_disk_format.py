"""What a slot's header and record say, bit by bit: no flipped bit and no block of elsewhere is taken for the block."""
from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu.cache.tiers.disks.disk_files import HEADER_BYTES, RECORD_BYTES, DiskFiles, read_header, seal

BLOCK, KEY, SLOT = 100, b"block", 3
SUMS = 2**64 - 1, 12345
CHECKED_HEADER, CHECKED_RECORD = 84, 44  # bytes, each with the CRC that closes them


def sealed(key: bytes = KEY, slot: int = SLOT, block_bytes: int = BLOCK) -> bytearray:
    """A header and its block."""
    buffer = (ctypes.c_char * (HEADER_BYTES + block_bytes))()
    buffer[HEADER_BYTES:] = bytes(range(block_bytes))
    seal(ctypes.addressof(buffer), block_bytes, key, slot, np.array(SUMS, np.uint64))
    return bytearray(buffer.raw)


def fault(data: bytearray, *, key: bytes = KEY, slot: int = SLOT, block_bytes: int = BLOCK) -> str | None:
    found, sums = read_header(memoryview(data), block_bytes, key, slot)
    assert found is not None or sums == SUMS
    return found


@given(st.integers(0, 8 * CHECKED_HEADER - 1))
def test_every_flipped_bit_is_seen(bit: int) -> None:
    data = sealed()
    assert fault(data) is None
    data[bit // 8] ^= 1 << bit % 8
    assert fault(data) == "no valid header"


@pytest.mark.parametrize("wanted", [{"key": b"bloc"}, {"key": b"blocks"}, {"key": b"other"}, {"slot": SLOT + 1},
                                    {"block_bytes": BLOCK - 1}])  # fmt: skip
def test_a_block_of_elsewhere_is_none(wanted: dict) -> None:
    assert fault(sealed(), **wanted) == "another block's header"


@given(st.integers(0, 8 * CHECKED_RECORD - 1))
def test_a_record_with_a_flipped_bit_is_none(bit: int) -> None:
    read, write = os.pipe()
    os.close(write)
    files = DiskFiles.__new__(DiskFiles)  # its records alone
    files.slots, files.fd, files._lock = 2, read, -1
    files._complete = os.memfd_create("complete")
    try:
        files.finish(0, KEY)
        files.finish(1, b"k" * 32)
        assert files.complete() == [(KEY, 0), (b"k" * 32, 1)]
        byte = os.pread(files._complete, 1, bit // 8)[0]
        os.pwrite(files._complete, bytes([byte ^ 1 << bit % 8]), bit // 8)
        assert files.complete() == [(b"k" * 32, 1)]
        files.begin(1)
        assert files.complete() == []
        os.pwrite(files._complete, bytes([byte]), bit // 8)
        os.ftruncate(files._complete, RECORD_BYTES + 7)
        assert files.complete() == [(KEY, 0)]
    finally:
        files.close()


def test_a_directory_of_other_blocks_is_refused(tmp_path) -> None:
    DiskFiles(tmp_path, block_bytes=BLOCK, slots=2, contents="model").close()
    for other in ({"contents": "another"}, {"block_bytes": BLOCK + 1}):
        with pytest.raises(ValueError, match="^directory: expected blocks of"):
            DiskFiles(tmp_path, **{"block_bytes": BLOCK, "slots": 2, "contents": "model"} | other)
    DiskFiles(tmp_path, block_bytes=BLOCK, slots=2, contents="model").close()
