"""A process that is killed in the middle of a store: whoever opens its directory finds what was complete, and no more."""
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from pool_cases import BLOCK_BYTES, compute, device, disk, got, keys, put

from gpu.cache.tiers.disks.disk_files import DiskFiles
from gpu.cache.tiers.tiered_cache import TieredKVCache

CHILD = """
    import sys
    import numpy as np
    from pathlib import Path
    from pool_cases import *
    class Slow(FaultyReader):
        def submit(self, requests):
            import time
            time.sleep(0.002)
            super().submit(requests)
    cache = TieredKVCache(device(), disks=[disk(Path(sys.argv[1]), 24, reader=lambda d, b: Slow(lambda r, n: None, d))])
    print("ready", flush=True)
    for i in range(10**6):
        prompt = keys(str(i % 7), 9)
        compute(cache.device, prompt, range(9))
        cache.store(prompt, np.arange(9)).wait_copied()
        print(i, flush=True)
"""


def start(path: Path) -> subprocess.Popen:
    places = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "support")]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip


def complete(path: Path, slots: int) -> dict[bytes, int]:
    """Keys of the blocks that a directory lists as complete, and their slots."""
    files = DiskFiles(path, block_bytes=BLOCK_BYTES, slots=slots)
    found = dict(files.complete())
    files.close()
    return found


def leading(prompt: list[bytes], found: Collection[bytes]) -> int:
    return next((at for at, key in enumerate(prompt) if key not in found), len(prompt))


@given(first=st.sets(st.integers(0, 8)), second=st.sets(st.integers(0, 8)), torn=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_blocks_of_a_store_may_be_complete_when_it_dies(first, second, torn):
    """A store's writes are under way together, so that a kill leaves any of its blocks, and not always the first ones.
    A restart has the leading run of each prompt and nothing behind a gap; storing it again fills the gaps alone."""
    prompts = {"p": (keys("p", 9), first), "q": (keys("q", 9), second)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        with TieredKVCache(device(), disks=[disk(path, 24)]) as cache:
            for prompt, _ in prompts.values():
                put(cache, prompt)
        slot_of = complete(path, 24)
        files = DiskFiles(path, block_bytes=BLOCK_BYTES, slots=24)
        for prompt, gone in prompts.values():
            for at in gone:  # as begin() leaves a record, and a torn write the block
                files.begin(slot_of[prompt[at]])
                if torn:
                    place = path / "blocks"
                    with open(place, "r+b") as blocks:
                        blocks.seek(files.offset(slot_of[prompt[at]]) + 4096)
                        blocks.write(b"torn" * 1024)
        files.close()
        with TieredKVCache(device(), disks=[disk(path, 24)]) as cache:
            for prompt, gone in prompts.values():
                assert got(cache, prompt) == cache.lookup(prompt) == min(gone, default=9)
                compute(cache.device, prompt, range(9))
                store = cache.store(prompt, np.arange(9))
                store.wait()
                assert store.blocks == len(gone) and got(cache, prompt) == 9
            assert cache.stats()["a"]["faults"] == 0
            cache._pool.check()


def test_killed_in_the_middle_of_a_store_then_restarted(tmp_path):
    """Whenever it dies, a restart serves complete blocks and those alone; meanwhile nobody else may open the place."""
    for stores in (1, 12):
        child = start(tmp_path / "a")
        assert child.stdout.readline() == "ready\n"
        for _ in range(stores):
            child.stdout.readline()
        with pytest.raises(ValueError, match="locked"):
            DiskFiles(tmp_path / "a", block_bytes=BLOCK_BYTES, slots=24)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
        found = complete(tmp_path / "a", 24)
        assert len(found) >= min(9 * (stores - 1), 12)
        with TieredKVCache(device(), disks=[disk(tmp_path / "a", 24)]) as cache:
            assert cache.stats()["blocks"] == len(found)
            for prompt in (keys(str(i), 9) for i in range(7)):
                assert got(cache, prompt) == leading(prompt, found)  # all of which are right, or got() says so
            assert cache.stats()["a"]["faults"] == 0, "a block that was not complete counted as such"
            cache._pool.check()
