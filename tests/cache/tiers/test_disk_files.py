"""A directory's files where the file system, the disk or somebody else at work there is not as usual."""
import errno
import os

import pytest
from pool_cases import BLOCK_BYTES, SLOT, device, disk, got, keys, put

from gpu.cache.tiers.disks.disk_files import MAX_SLOT_BYTES, DiskFiles
from gpu.cache.tiers.tiered_cache import MOST_FAULTS, TieredKVCache


@pytest.mark.parametrize("left", [0, 3 * SLOT + 9])
def test_more_blocks_cut_off_than_a_disk_may_have_faults_cost_hits_and_no_disk(tmp_path, left):
    blocks = MOST_FAULTS + 30
    prompt = keys("p", blocks)
    with TieredKVCache(device(blocks), disks=[disk(tmp_path / "a", blocks)]) as cache:
        put(cache, prompt)
    os.truncate(tmp_path / "a" / "blocks", left)
    with TieredKVCache(device(blocks), disks=[disk(tmp_path / "a", blocks)]) as cache:
        assert got(cache, prompt) <= left // SLOT and cache.stats()["a"]["faults"] == 0
        put(cache, prompt)
        assert got(cache, prompt) == blocks


@pytest.mark.parametrize("blocks", [(40, 10, 40), (10, 40, 10)])
def test_a_directory_that_gets_fewer_slots_and_more_again(tmp_path, blocks):
    for count in blocks:
        with TieredKVCache(device(), disks=[disk(tmp_path / "a", count)]) as cache:
            assert cache.stats()["blocks"] <= count
            for name in "pq":
                put(cache, keys(name, 8))
                assert got(cache, keys(name, 8)) == 8
            assert cache.stats()["a"]["faults"] == 0
            cache._pool.check()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_promises_no_room_is_used_all_the_same(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with TieredKVCache(device(), disks=[disk(tmp_path / "a")]) as cache:
        put(cache, keys("p", 8))
        assert got(cache, keys("p", 8)) == 8 and os.stat(tmp_path / "a" / "blocks").st_size == 32 * SLOT


def test_a_disk_that_fills_while_it_is_allocated_gives_back_what_it_took(tmp_path, monkeypatch):
    def fill(fd, offset, length):
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(ValueError, match="directory: .* cannot hold the blocks: .*No space left"):
        DiskFiles(tmp_path / "a", block_bytes=BLOCK_BYTES, slots=8)
    assert os.stat(tmp_path / "a" / "blocks").st_size == 0


def test_blocks_that_no_call_reads_whole_are_refused(tmp_path):
    """A read of 2 GiB and more comes back short, so that every block would be a fault."""
    with pytest.raises(ValueError, match="block_bytes: expected at most 2,147,475,456"):
        DiskFiles(tmp_path / "a", block_bytes=MAX_SLOT_BYTES - 4095, slots=1)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="No space left on device: expected .* bytes, got"):
        DiskFiles(tmp_path / "a", block_bytes=MAX_SLOT_BYTES - 4096, slots=2**40)
