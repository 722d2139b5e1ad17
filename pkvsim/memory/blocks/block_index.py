"""Where each block is: slots of devices, who reads and writes them, who holds them.

A block is a run of tokens named by a key that covers everything before it, so equal keys are equal KV. Each device has
numbered slots of one block each. A slot is free, or owned by exactly one block, or quarantined: given up by its block
while somebody still reads or writes it, and free again when the last of them lets go.
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

STORING, READY = "storing", "ready"


class Place(NamedTuple):
    """One slot of one device."""

    tier: int
    slot: int


class Entry:
    """What the index knows of a block: its place, its state, how many load it or hold it, and when it was last used."""

    __slots__ = ("place", "state", "loads", "holds", "used")

    def __init__(self, place: Place, state: str) -> None:
        self.place = place
        self.state = state
        self.loads = 0  # reads under way
        self.holds = 0  # sessions that keep it
        self.used = 0  # of two blocks, the one that was used later has the larger number

    @property
    def evictable(self) -> bool:
        return self.state == READY and not self.loads and not self.holds


class BlockIndex:
    """The blocks of a pool and the slots of its devices. ValueError, and nothing changed, where a call does not fit."""

    __slots__ = ("_entries", "_free", "_fresh", "_slots", "_quarantine")

    def __init__(self, slots: Sequence[int]) -> None:
        """slots [devices]: how many each has."""
        self._slots = tuple(int(count) for count in slots)
        self._free: list[list[int]] = [[] for _ in self._slots]  # that have been used
        self._fresh = [0] * len(self._slots)  # the first slot from which on none has been used
        self._entries: dict[Hashable, Entry] = {}
        self._quarantine: dict[Place, int] = {}  # users left

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Entry | None:
        return self._entries.get(key)

    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._entries)

    def free_slots(self, tier: int) -> int:
        return len(self._free[tier]) + self._slots[tier] - self._fresh[tier]

    @property
    def quarantined(self) -> int:
        """Slots that have no block and are not free yet."""
        return len(self._quarantine)

    def reserve(self, key: Hashable, tier: int) -> Place:
        """A free slot for a block that is about to be written there."""
        if key in self._entries:
            raise ValueError(f"key: expected a block that is nowhere, got {key!r}")
        if not self.free_slots(tier):
            raise ValueError(f"tier: expected one with a free slot, got {tier}")
        if not self._free[tier]:
            self._free[tier].append(self._fresh[tier])
            self._fresh[tier] += 1
        place = Place(tier, self._free[tier].pop())
        self._entries[key] = Entry(place, STORING)
        return place

    def restore(self, tier: int, found: Sequence[tuple[Hashable, int]]) -> list[Hashable]:
        """Takes in (key, slot) found complete on a device; returns the keys that are not known already."""
        end = max((slot + 1 for _, slot in found if slot < self._slots[tier]), default=0)
        free = {*self._free[tier], *range(self._fresh[tier], end)}
        self._fresh[tier] = max(self._fresh[tier], end)
        taken = []
        for key, slot in found:
            if key not in self._entries and slot in free:
                free.discard(slot)
                self._entries[key] = Entry(Place(tier, slot), READY)
                taken.append(key)
        self._free[tier] = sorted(free, reverse=True)
        return taken

    def complete(self, key: Hashable, place: Place) -> bool:
        """The block is written. False where the block gave up that place meanwhile: the slot is free from here on."""
        entry = self._entries.get(key)
        if entry is not None and entry.place == place and entry.state == STORING:
            entry.state = READY
            return True
        self._leave(place)
        return False

    def unpin(self, key: Hashable, place: Place) -> bool:
        """Ends a read, which its beginner counted in the entry's `loads`; True where the block is there and may go."""
        entry = self._entries.get(key)
        if entry is not None and entry.place == place and entry.loads:
            entry.loads -= 1
            return entry.evictable
        self._leave(place)
        return False

    def remove(self, key: Hashable) -> Place:
        """Forgets a block; its slot is free at once, or when the last read or the write of it ends."""
        entry = self._entries.pop(key, None)
        if entry is None:
            raise ValueError(f"key: expected a block of the pool, got {key!r}")
        users = entry.loads + (entry.state == STORING)
        if users:
            self._quarantine[entry.place] = users
        else:
            self._free[entry.place.tier].append(entry.place.slot)
        return entry.place

    def _leave(self, place: Place) -> None:
        users = self._quarantine.get(place)
        if users is None:
            raise ValueError(f"place: expected one that somebody uses, got {place}")
        if users > 1:
            self._quarantine[place] = users - 1
        else:
            del self._quarantine[place]
            self._free[place.tier].append(place.slot)

    def check(self) -> None:
        """AssertionError unless every slot is free, quarantined or owned by one block, and none is anything twice."""
        for tier, count in enumerate(self._slots):
            owned = [entry.place.slot for entry in self._entries.values() if entry.place.tier == tier]
            given_up = [place.slot for place in self._quarantine if place.tier == tier]
            slots = [*owned, *given_up, *self._free[tier], *range(self._fresh[tier], count)]
            assert sorted(slots) == list(range(count)), f"tier {tier}: slots lost or owned twice"
