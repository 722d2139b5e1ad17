"""A pool of blocks beyond a StubRunner's pages, whose loads and stores end some looks later, and may fail."""
from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from stub_runner import StubRunner


class StubLoad:
    """Writes its blocks one by one as it is looked at; behind a fault, nonsense."""

    def __init__(self, runner: StubRunner, blocks: list[np.ndarray], pages: list[int], valid: int, rng: random.Random) -> None:
        self._runner, self._blocks, self._pages, self._valid, self._rng = runner, blocks, pages, valid, rng
        self._written, self._cancelled, self.ended_s = 0, False, math.nan
        self.blocks = len(blocks)

    @property
    def is_done(self) -> bool:
        assert not self._cancelled
        for _ in range(self._rng.randrange(4)):
            self._write()
        return self._written == len(self._blocks)

    def _write(self) -> None:
        if self._written < len(self._blocks):
            at = self._written
            self._runner.store[self._pages[at]] = self._blocks[at] if at < self._valid else -1
            self._written += 1

    def wait(self) -> int:
        while self._written < len(self._blocks):
            self._write()
        return self._valid

    def cancel(self) -> None:
        """It may have written to its pages until now."""
        for _ in range(self._rng.randrange(4)):
            self._write()
        self._cancelled = True


class StubStore:
    """Reads its pages when it is looked at for the last time."""

    def __init__(self, pool: StubPool, keys: list[bytes], pages: list[int], looks: int) -> None:
        self._pool, self._keys, self._pages, self._looks = pool, keys, pages, looks
        self.blocks = len(keys)

    @property
    def is_copied(self) -> bool:
        self._looks -= 1
        if self._looks <= 0:
            self.wait_copied()
        return self._looks <= 0

    def wait_copied(self) -> None:
        for key, page in zip(self._keys, self._pages):
            self._pool.kept[key] = self._pool.runner.store[page].copy()
        self._looks = 0


class StubPool:
    """Keeps what it is given, and loses some of it; faults: of loads, the part that brings fewer blocks than it began."""

    def __init__(self, runner: StubRunner, *, seed: int, faults: float) -> None:
        self.runner, self.kept = runner, dict[bytes, np.ndarray]()
        self._rng, self._faults = random.Random(seed), faults
        self.loads = 0

    def lookup(self, keys: Sequence[bytes]) -> int:
        found = 0
        while found < len(keys) and keys[found] in self.kept:
            found += 1
        return found

    def load(self, keys: Sequence[bytes], pages: np.ndarray) -> StubLoad:
        self.loads += 1
        valid = self._rng.randrange(len(keys)) if self._rng.random() < self._faults else len(keys)
        return StubLoad(self.runner, [self.kept[key] for key in keys], pages.tolist(), valid, self._rng)

    def store(self, keys: Sequence[bytes], pages: np.ndarray) -> StubStore:
        new = [(key, page) for key, page in zip(keys, pages.tolist()) if key not in self.kept]
        for key in self._rng.sample(sorted(self.kept), min(len(self.kept), self._rng.randrange(3))):
            del self.kept[key]
        return StubStore(self, [key for key, _ in new], [page for _, page in new], self._rng.randrange(1, 5))

    def stats(self) -> dict:
        return {}
