"""examples/bench_pool.py as far as no GPU is needed: its options, and disks and tiers on a few MiB."""
from __future__ import annotations

import json
import re
from collections.abc import Callable

import bench_pool
import numpy as np
import pytest
import without_gpu
from pool_bench import copies, disks, noted, ttft
from pool_bench.noted import CopyTimes

from gpu.cache.tiers.device import HostPages
from gpu.cache.tiers.stores import DiskStore


def test_help_and_a_machine_without_a_gpu() -> None:
    assert "bench_pool needs a CUDA GPU with CuPy and PyTorch" in without_gpu.run_main("bench_pool").stderr


def test_the_parts_that_need_a_gpu_load_without_one() -> None:
    assert copies.DecodeFigures(100.0, 103.0, 48.0).slower_percent == pytest.approx(3.0)
    assert ttft.FirstToken("", 1.0, 0.55, 0.1, 0.5, 0.5).over_bound == pytest.approx(1.1)


@pytest.mark.parametrize(("words", "said"), [
    ("--parts disk,hbm", "--parts: expected of copies, decode, disk, tiers, limited, stand-in, ttft, got hbm"),
    ("--total-gib 0", "--total-gib: expected 0.01 to 64, got 0"), ("--tokens 1000", "--tokens: expected a multiple"),
    ("--rates 36", "--rates: expected GB/s of host memory and of at least one disk"),
    ("--rates 36,fast", "--rates: expected GB/s"), ("--rates 36,-1", "--rates: expected GB/s"),
    ("--variants fast", "--variants: expected of kept; two layers"),
    ("--directory /none", "--directory: expected a directory, got /none"),
])
def test_bad_options_are_named(words: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_pool.parse_args(words.split())
    assert stopped.value.code == 2 and re.search(re.escape(said), capsys.readouterr().err)


def test_disks_and_tiers_without_a_gpu(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_pool, "DISK_BLOCKS", (64 * 1024,))
    monkeypatch.setattr(bench_pool, "SHM", tmp_path)
    words = ["--parts", "disk", "--directory", str(tmp_path), "--total-gib", "0.02", "--json", str(tmp_path / "found.json")]
    assert bench_pool.main(words) == 0
    assert "Random blocks" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["disk"][0]
    assert found["pool_gb_s"] > 0 and found["block_bytes"] == 65536
    if found["roofs_gb_s"]:  # where there is a C compiler
        assert len(found["roofs_gb_s"]) == len(found["pools_gb_s"]) + 1
        shares = [pool / roof for pool in found["pools_gb_s"] for roof in found["roofs_gb_s"]]
        assert min(shares) <= found["share"] <= max(shares)
    monkeypatch.setattr(bench_pool, "LIMITED_BLOCKS", 20)
    words[1] = "limited"
    assert bench_pool.main([*words, "--rates", "1,0.2,0.1", "--trace"]) == 0
    said = capsys.readouterr().out
    assert "limiter had nothing to do" in said and "disk1" in said
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["limited"]
    assert 0.2 < found["gb_s"] / found["sum_gb_s"] < 1.1 and sum(one["blocks"] for one in found["traces"]) == 20
    words[1] = "stand-in"
    more = ["--tokens", "4096", "--variants", "kept;all staged"]
    assert bench_pool.main([*words, *more]) == 0 and "all staged" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["stand-in"][0]
    assert found["over_bound"] > 0.9 and sum(one["blocks"] for one in found["traces"]) == 64
    figures = disks.three_tiers([tmp_path] * 3, [4e7, 2e7, 1e7], disks.NoPages(65536, 70), blocks=70, placement="bandwidth")
    assert 0.5 < figures["share"] < 1.2
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]  # nothing is left on the disk


class HostModel:
    """A model whose pages are in host memory."""

    blocks = 40

    def __init__(self) -> None:
        self.device = HostPages(num_pages=self.blocks, num_layers=2, run_bytes=4096)
        self.device.pages[:] = np.random.default_rng(0).integers(0, 256, self.device.pages.shape)

    def checksums(self) -> list[float]:
        return self.device.pages.sum((1, 2)).tolist()

    def clear(self) -> None:
        self.device.pages[:] = 0

    def first_token(self, wait_layer: Callable[[int], object]) -> None:
        for layer in range(2):
            wait_layer(layer)


class Noted:
    def __init__(self, pages: HostPages) -> None:
        self._pages = pages

    def __getattr__(self, name: str) -> object:
        return getattr(self._pages, name)

    def start(self) -> None:
        pass

    def stop(self, begin: float) -> CopyTimes:
        return CopyTimes()


def test_variants_of_the_first_token_have_the_buffers_they_say(tmp_path, monkeypatch) -> None:
    """The blocks that disks hold are found again where the pool is opened with other buffers."""
    opened = []

    def limited_disk(*arguments: object, pin: bool, **options: object) -> DiskStore:
        opened.append(disks.limited_disk(*arguments, pin=False, **options))
        return opened[-1]

    monkeypatch.setattr(ttft, "limited_disk", limited_disk)
    monkeypatch.setattr(ttft, "host_store", lambda *arguments, pin: disks.host_store(*arguments, pin=False))
    monkeypatch.setattr(ttft, "NotedPages", Noted)
    monkeypatch.setattr(ttft, "pages_of", lambda variant, kept: kept)
    names = [noted.KEPT, "256 MiB", "ring 6"]
    found = ttft.from_pool(HostModel(), "x", [3e9, 1e9], [tmp_path], link_bytes_per_s=1e9, runs_bytes_per_s=1e9,
                           compute_s=0.0, variants=names)  # fmt: skip
    assert [one.what for one in found] == ["x", "x: 256 MiB", "x: ring 6"]
    assert all(one.ttft_s > 0 and one.traces[0].blocks >= 8 for one in found)
    assert [store.ring_bytes // store.bytes_under_way for store in opened] == [3, 6]
    assert not list(tmp_path.iterdir())
