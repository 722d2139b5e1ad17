"""What callers pass that cannot be: each is named before anything is opened, taken or written."""
import numpy as np
import pytest
from pool_cases import device, disk, got, host, keys, put, tier

from gpu.cache.tiers.device import HostLayers
from gpu.cache.tiers.stores import DiskStore, parse_stores
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.tiers import Tier


@pytest.mark.parametrize("pages", [
    [2**32, 1], np.array([2**32, 1]), [0.5, 1.5], [True, False], [[0, 1]], [[0], [1, 2]], [2**64, 1], ["0", "1"],
    np.array([2**63, 1], np.uint64), [-1, 1],
])  # fmt: skip
def test_page_numbers_that_are_none_reach_no_page(pages):
    """2^32 taken as 32 bits is page 0, and 1.5 as an integer page 1: another prompt's."""
    with TieredKVCache(device(), host=[host(4)]) as cache:
        put(cache, keys("p", 2))
        for call in (cache.load, cache.store):
            with pytest.raises(ValueError, match="pages: expected"):
                call(keys("p", 2), pages)
        assert (cache.device.pages == 0xEE).all() and got(cache, keys("p", 2)) == 2


def test_what_cannot_be_is_named_before_anything_is_opened(tmp_path):
    place = tmp_path / "a"
    for options, said in (
        ({"link_bytes_per_s": 0}, "link_bytes_per_s: expected > 0"), ({"link_bytes_per_s": np.nan}, "link_bytes_per_s"),
        ({"retention": "lru"}, "retention: expected what makes a policy"), ({"admission": "tinylfu"}, "admission: "),
        ({"host": [host(0)]}, "host: expected room for a block of 12,288 bytes, host has 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            TieredKVCache(device(), disks=[disk(place)], **options)
    for options, said in (
        ({"ring_bytes": 0}, "ring_bytes"), ({"ring_bytes": 2.5e8}, "ring_bytes"), ({"stall_s": np.nan}, "stall_s"),
        ({"bytes_under_way": -1}, "bytes_under_way"), ({"stall_s": 0}, "stall_s"), ({"directory": ""}, "directory"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{said}: expected"):
            DiskStore(**{"tier": tier("a", 4), "directory": str(place)} | options)
    assert not place.exists()
    with TieredKVCache(device(), host=[host(4)]) as cache:
        for call, said in ((lambda: cache.lookup(["a"]), "key: expected"), (lambda: cache.hold([b"a"], np.nan), "until_s")):
            with pytest.raises(ValueError, match=said):
                call()


def test_a_tilde_behind_an_equals_sign_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_stores(["disk:1GiB:2=~/kv"])[1][0].directory == "/home/someone/kv"


def test_a_reader_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("gpu.cache.tiers.disks.open_reader.IoUringReader", refuse)
    with pytest.raises(ValueError, match="reader: io_uring cannot be had: .*Operation not permitted"):
        TieredKVCache(device(), disks=[disk(tmp_path / "a", reader="io_uring")])
    with TieredKVCache(device(), disks=[disk(tmp_path / "a", reader="auto")]) as cache:
        assert cache.stats()["a"]["reader"] == "preadv"


def test_pages_that_copies_by_address_must_not_write_to():
    """Memory that is mapped to be read ends the process, and that of an immutable object changes under it."""
    fixed = np.frombuffer(bytes(64), np.uint8).reshape(4, 16)
    for pages, said in ((fixed, "that may be written"), (np.zeros((0, 16), np.uint8), "uint8 arrays of one shape")):
        with pytest.raises(ValueError, match=f"k_pages, v_pages: expected .*{said}"):
            HostLayers([pages], [pages])


def test_a_tier_is_what_it_says():
    for name, rate in ((" ", 1.0), ("disk", "7")):
        with pytest.raises(ValueError, match="name: expected|read_bytes_per_s: expected"):
            Tier(name=name, kind="disk", capacity_bytes=1, read_bytes_per_s=rate, write_bytes_per_s=1.0)
