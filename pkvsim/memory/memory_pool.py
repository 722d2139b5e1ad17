"""The pool's decisions in one place: what to read from where, what to store where, what to give up.

The simulator and the GPU's tiered cache call the same methods and carry out what they return. A prompt's blocks are
always given from its start, and a block counts only where everything before it is there.

    reads = pool.want(keys)            the leading blocks that are there, pinned
    pool.done(read)                    for each of them, once it is read, failed or cancelled
    writes = pool.store(keys)          the blocks to write, slots taken
    pool.stored(write, ok=True)        for each of them, once it is written or failed
    pool.failed(key, place)            a place that gave no valid block
    pool.lose_tier(tier)               a device that is gone

Nothing here waits, copies or locks: a caller with threads holds one lock around each call.
"""
from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pkvsim.memory.blocks.block_index import READY, BlockIndex, Entry, Place
from pkvsim.memory.placement import BANDWIDTH, CAPACITY, IN_ORDER, PLACEMENTS, Shares, place
from pkvsim.memory.retention import AdmitAll, Lru, Retention, TinyLfu
from pkvsim.memory.tiers import Tier, check_tiers


class Read(NamedTuple):
    """A block of a prompt to be read. The pool keeps it in place until done(read)."""

    key: Hashable
    place: Place


class Write(NamedTuple):
    """A block to be written to a place; at: where it stands among the keys that store() was given."""

    key: Hashable
    place: Place
    at: int


@dataclass(slots=True)
class PoolCounts:
    """What the pool has decided so far, in blocks."""

    asked: int = 0
    hits: int = 0
    stored: int = 0
    evicted: int = 0
    refused: int = 0  # not stored, for lack of room or by the admission policy
    failed: int = 0


class MemoryPool:
    """Blocks of equal size over unlike devices."""

    __slots__ = ("tiers", "block_bytes", "shares", "counts", "_placement", "_index", "_retention", "_admission",
                 "_held", "_held_count", "_uses")  # fmt: skip

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        block_bytes: int,
        placement: str = BANDWIDTH,
        retention: Callable[[], Retention] = Lru,
        admission: AdmitAll | TinyLfu | None = None,
        drift: float = 0.2,
    ) -> None:
        """block_bytes: what a block takes of a device. retention: makes the policy of one device. Raises ValueError
        naming the argument."""
        check_tiers(tiers)
        if not isinstance(block_bytes, int) or block_bytes < 1:
            raise ValueError(f"block_bytes: expected an integer >= 1, got {block_bytes!r}")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}, got {placement!r}")
        if not callable(retention):
            raise ValueError(f"retention: expected what makes a policy, such as Lru, got {retention!r}")
        if admission is not None and not callable(getattr(admission, "admits", None)):
            raise ValueError(f"admission: expected a policy, such as TinyLfu(), or None, got {admission!r}")
        self.tiers = tuple(tiers)
        self.block_bytes = block_bytes
        self.shares = Shares([tier.read_bytes_per_s for tier in tiers], drift=drift)
        self.counts = PoolCounts()
        self._placement = placement
        self._index = BlockIndex([tier.slots(block_bytes) for tier in tiers])
        self._retention = [retention() for _ in tiers]
        self._admission = AdmitAll() if admission is None else admission
        self._held: list[tuple[float, int, tuple[tuple[Hashable, Entry], ...]]] = []  # heap by end
        self._held_count = self._uses = 0

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._index

    @property
    def index(self) -> BlockIndex:
        return self._index

    def evictable(self, tier: int) -> int:
        """Blocks of a device that may go."""
        return len(self._retention[tier])

    def ready_prefix(self, keys: Sequence[Hashable]) -> int:
        """How many of the leading blocks can be read; nothing is pinned or counted."""
        for at, key in enumerate(keys):
            entry = self._index.get(key)
            if entry is None or entry.state != READY:
                return at
        return len(keys)

    def places(self, keys: Sequence[Hashable]) -> list[int]:
        """The device of each of these blocks. KeyError where one is nowhere."""
        entries = [self._index.get(key) for key in keys]
        if None in entries:
            raise KeyError(keys[entries.index(None)])
        return [entry.place.tier for entry in entries if entry is not None]

    def want(self, keys: Sequence[Hashable], *, limit: int | None = None) -> tuple[Read, ...]:
        """The reads of the leading blocks that are there, at most `limit` of them, each pinned until done()."""
        if not isinstance(self._admission, AdmitAll):
            for key in keys:
                self._admission.seen(key)
        reads = []
        for key in keys if limit is None else keys[:limit]:  # one pass: the GPU's first copy waits for it
            entry = self._index.get(key)
            if entry is None or entry.state != READY:
                break
            if entry.evictable:
                self._retention[entry.place.tier].remove(key)
            entry.loads += 1
            reads.append(Read(key, entry.place))
        self.counts.asked += len(keys)
        self.counts.hits += len(reads)
        return tuple(reads)

    def done(self, read: Read) -> None:
        """A read has ended, well or not."""
        if self._index.unpin(read.key, read.place):
            self._may_go(read.key)

    def done_all(self, reads: Sequence[Read]) -> None:
        """All reads of a prompt have ended; its deepest block becomes the one that goes first."""
        for read in reversed(reads):
            self.done(read)

    def store(self, keys: Sequence[Hashable]) -> tuple[Write, ...]:
        """Places for the blocks of a prompt that are not there, in its order, up to the first for which there is none.

        keys: the prompt's blocks from its start, whole ones alone. Older blocks go as the policies say; the prompt's
        own blocks do not go for its others.
        """
        keys = list(dict.fromkeys(keys))
        known = [key for key in keys if key in self._index]
        missing = [(at, key) for at, key in enumerate(keys) if key not in self._index]
        protected = [key for key in reversed(known) if self._protect(key)]
        already = np.zeros(len(self.tiers), np.int64)
        for key in known:
            already[self._index.get(key).place.tier] += 1  # type: ignore[union-attr]
        weights = self.shares.weights
        free = [self._index.free_slots(tier) if weights[tier] > 0 else 0 for tier in range(len(self.tiers))]
        room = [slots + len(policy) for slots, policy in zip(free, self._retention)]
        if self._placement == IN_ORDER:  # earlier devices keep what they hold; the last one alone gives up blocks
            room[:-1] = free[:-1]
        elif sum(free) >= len(missing):  # no device gives up a block while another has a free slot for its share
            room = free
        if self._placement == CAPACITY:
            weights = np.where(weights > 0, [tier.slots(self.block_bytes) for tier in self.tiers], 0.0)
        devices = place(len(missing), weights, room, already=already, placement=self._placement)
        writes = []
        for (at, key), tier in zip(missing, devices.tolist()):
            if not self._make_room(key, tier):
                break
            writes.append(Write(key, self._index.reserve(key, tier), at))
        for key in protected:
            self._let_go(key)
        self.counts.refused += len(missing) - len(writes)
        return tuple(writes)

    def stored(self, write: Write, *, ok: bool = True) -> None:
        """A write has ended. Not ok: the block is forgotten and its slot free."""
        if not ok:
            self.failed(write.key, write.place)
        if self._index.complete(write.key, write.place):
            self._may_go(write.key)
            self.counts.stored += 1

    def stored_all(self, writes: Sequence[Write], *, ok: bool = True) -> None:
        """Several writes have ended alike."""
        for write in writes:
            self.stored(write, ok=ok)

    def touch(self, keys: Sequence[Hashable]) -> None:
        """Marks a prompt's blocks as just used, so that its deepest goes first."""
        for key in reversed(keys):
            if self._protect(key):
                self._let_go(key)

    def failed(self, key: Hashable, at: Place) -> None:
        """A place has no valid block: it is forgotten. Reads and writes under way still end with done() or stored()."""
        entry = self._index.get(key)
        if entry is not None and entry.place == at:
            self._protect(key)
            self._index.remove(key)
            self.counts.failed += 1

    def lose_tier(self, tier: int) -> None:
        """A device is gone: its blocks are forgotten and it gets no others."""
        self.empty_tier(tier)
        self.shares.lose(tier)

    def empty_tier(self, tier: int) -> None:
        """A device has lost all that it held."""
        for key in self._index.keys():
            entry = self._index.get(key)
            if entry is not None and entry.place.tier == tier:
                self.failed(key, entry.place)

    def move(self, key: Hashable, tier: int) -> tuple[Place, Write] | None:
        """(Where a block lies, its write to another device), for whom others go there as the device's policy says; None
        where it is not there any more, or none may go. The block is the pool's again once that is stored(). Its old
        slot is free at once: for pools that close and store nothing else."""
        entry = self._index.get(key)
        if entry is None or entry.state != READY or not self._make_room(key, tier, admits=True):
            return None
        self._protect(key)
        return self._index.remove(key), Write(key, self._index.reserve(key, tier), 0)

    def forget(self, keys: Sequence[Hashable]) -> int:
        """Gives up blocks that nobody reads, writes or holds; returns how many."""
        gone = [key for key in keys if self._protect(key)]
        for key in gone:
            self._index.remove(key)
        return len(gone)

    def restore(self, tier: int, found: Sequence[tuple[Hashable, int]]) -> list[Hashable]:
        """Takes in the complete blocks (key, slot) that a device kept over a restart; returns the keys taken."""
        taken = self._index.restore(tier, found)
        for key in taken:
            self._may_go(key)
        return taken

    def hold(self, keys: Sequence[Hashable], until_s: float) -> int:
        """Keeps the leading blocks that are there until that time (retention.choose_ttl_s); returns how many.
        ValueError where it is NaN, a time that never comes."""
        if math.isnan(until_s):
            raise ValueError("until_s: expected a time, got nan")
        kept: list[tuple[Hashable, Entry]] = []
        for key in keys[: self.ready_prefix(keys)]:
            self._protect(key)
            entry = self._index.get(key)
            assert entry is not None  # it is ready
            entry.holds += 1
            kept.append((key, entry))
        self._held_count += 1
        heapq.heappush(self._held, (until_s, self._held_count, tuple(kept)))
        return len(kept)

    def expire(self, now_s: float) -> None:
        """Ends the holds whose time is over."""
        while self._held and self._held[0][0] <= now_s:
            for key, entry in reversed(heapq.heappop(self._held)[2]):
                entry.holds -= 1
                if self._index.get(key) is entry:  # and not one stored again after this one was lost
                    self._let_go(key)

    def _protect(self, key: Hashable) -> bool:
        """Takes a block out of those that may go; whether it was one."""
        entry = self._index.get(key)
        if entry is None or not entry.evictable:
            return False
        self._retention[entry.place.tier].remove(key)
        return True

    def _let_go(self, key: Hashable) -> None:
        entry = self._index.get(key)
        if entry is not None and entry.evictable:
            self._may_go(key)

    def _may_go(self, key: Hashable) -> None:
        """A block was used just before, and nobody reads, writes or holds it."""
        entry = self._index.get(key)
        assert entry is not None  # or nothing of it could be used
        self._uses += 1
        entry.used = self._uses
        self._retention[entry.place.tier].add(key)

    def _make_room(self, key: Hashable, tier: int, *, admits: bool = False) -> bool:
        """admits: whatever the admission policy says."""
        if self._index.free_slots(tier):
            return True
        victim = self._retention[tier].victim()
        if victim is None or not (admits or self._admission.admits(key, victim)):
            return False
        self._retention[tier].remove(victim)
        self._index.remove(victim)
        self.counts.evicted += 1
        return True

    def check(self) -> None:
        """AssertionError unless slots, blocks and the policies' lists agree."""
        self._index.check()
        for tier, policy in enumerate(self._retention):
            entries = [self._index.get(key) for key in self._index.keys()]
            may_go = sum(entry is not None and entry.evictable and entry.place.tier == tier for entry in entries)
            assert may_go == len(policy), f"tier {tier}: {may_go} blocks may go, its policy knows {len(policy)}"
