"""The pool under random use: no slot lost, none with two owners, capacities kept, hits never behind a miss."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pkvsim.memory.blocks.block_index import READY, BlockIndex, Place
from pkvsim.memory.memory_pool import MemoryPool
from pkvsim.memory.retention import Belady, Lru, TinyLfu
from pkvsim.memory.tiers import Tier, parse_bytes, parse_tier


def tier(name: str, blocks: int, rate: float = 1e9) -> Tier:
    return Tier(name=name, kind="host", capacity_bytes=blocks * 10, read_bytes_per_s=rate, write_bytes_per_s=rate)


class Machine(RuleBasedStateMachine):
    """Prompts are branches of a tree: key (d, b) is block d of branch b, shared up to where branches part."""

    @initialize(
        slots=st.lists(st.integers(0, 9), min_size=1, max_size=3),
        kind=st.sampled_from(["lru", "belady", "tinylfu"]),
        placement=st.sampled_from(["bandwidth", "equal", "capacity", "in_order"]),
    )
    def begin(self, slots, kind, placement):
        self.slots = slots
        self.pool = MemoryPool(
            [tier(f"t{i}", count, (i + 1) * 1e9) for i, count in enumerate(slots)], block_bytes=10, placement=placement,
            retention=(lambda: Belady(lambda key: float(hash(key) % 7))) if kind == "belady" else Lru,
            admission=TinyLfu(64) if kind == "tinylfu" else None,
        )  # fmt: skip
        self.reads, self.writes, self.now = [], [], 0.0
        self.busy: dict[Place, tuple] = {}  # slots under way, and for whom
        self.complete: dict = {}  # key -> place, as their writers said
        self.lost: set[int] = set()
        self.held: list = []  # (until, key, entry) of what is held and has not failed

    @staticmethod
    def prompt(branch: int, length: int) -> list:
        return [(depth, branch if depth >= 3 else branch % 2) for depth in range(length)]

    @rule(branch=st.integers(0, 3), length=st.integers(0, 8))
    def store(self, branch, length):
        keys = self.prompt(branch, length)
        known = [key in self.pool for key in keys]
        writes = self.pool.store(keys)
        assert [w.key for w in writes] == [key for key, there in zip(keys, known) if not there][: len(writes)]
        for write in writes:
            assert keys[write.at] == write.key and write.place.tier not in self.lost
            assert write.place not in self.busy, "a slot that somebody still uses was given out"
            self.busy[write.place] = ("write", write.key)
        self.writes += writes

    @precondition(lambda self: self.writes)
    @rule()
    def end_writes(self):
        while self.writes:
            self.end(self.writes.pop(0), True)

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), ok=st.booleans())
    def end_write(self, data, ok):
        self.end(self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1))), ok)

    def end(self, write, ok):
        del self.busy[write.place]
        self.pool.stored(write, ok=ok)
        entry = self.pool.index.get(write.key)
        if entry is not None and entry.place == write.place and entry.state == READY:
            assert ok
            self.complete[write.key] = write.place

    @rule(branch=st.integers(0, 3), length=st.integers(0, 8), limit=st.none() | st.integers(0, 4))
    def want(self, branch, length, limit):
        keys = self.prompt(branch, length)
        reads = self.pool.want(keys, limit=limit)
        assert [read.key for read in reads] == keys[: len(reads)], "a hit behind a miss"
        for read in reads:
            assert self.complete[read.key] == read.place, "a block was read where it is not"
            self.busy[read.place] = ("read", read.key)
        self.reads += reads

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), bad=st.booleans())
    def end_read(self, data, bad):
        read = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        if bad:
            self.pool.failed(read.key, read.place)
            self.held = [one for one in self.held if one[2].place != read.place]
            assert read.key not in self.pool or self.pool.index.get(read.key).place != read.place
        if not any(other.place == read.place for other in self.reads):
            self.busy.pop(read.place)
        self.pool.done(read)

    @rule(branch=st.integers(0, 3), length=st.integers(0, 8), ttl=st.integers(0, 5))
    def hold(self, branch, length, ttl):
        keys = self.prompt(branch, length)
        kept = self.pool.hold(keys, self.now + ttl)
        assert kept == self.pool.ready_prefix(keys)
        self.held += [(self.now + ttl, key, self.pool.index.get(key)) for key in keys[:kept]]

    @rule(seconds=st.integers(0, 3))
    def later(self, seconds):
        self.now += seconds
        self.pool.expire(self.now)
        self.held = [one for one in self.held if one[0] > self.now]

    @rule(branch=st.integers(0, 3), length=st.integers(0, 8))
    def touch(self, branch, length):
        self.pool.touch(self.prompt(branch, length))

    @rule(data=st.data())
    def lose(self, data):
        if len(self.lost) + 1 < len(self.slots):
            lost = data.draw(st.integers(0, len(self.slots) - 1))
            self.lost.add(lost)
            self.pool.lose_tier(lost)
            self.held = [one for one in self.held if one[2].place.tier != lost]

    @invariant()
    def what_is_held_stays(self):
        for _, key, entry in getattr(self, "held", ()):
            assert self.pool.index.get(key) is entry and not entry.evictable

    @invariant()
    def slots_and_lists_agree(self):
        if hasattr(self, "pool"):
            self.pool.check()
            pinned = {place for place, (what, _) in self.busy.items() if what == "write"}
            pinned |= {read.place for read in self.reads}
            for place in pinned:
                assert place.slot < self.slots[place.tier]

    def teardown(self):
        if hasattr(self, "pool"):
            for write in self.writes:
                self.pool.stored(write)
            for read in self.reads:
                self.pool.done(read)
            self.pool.check()
            assert self.pool.index.quarantined == 0
            self.pool.expire(float("inf"))
            evictable = sum(self.pool.evictable(i) for i in range(len(self.slots)))
            assert evictable == len(self.pool), "something is pinned for ever"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def fill(pool, keys):
    for write in pool.store(keys):
        pool.stored(write)
    pool.touch(keys)


def test_shares_of_a_group_are_those_of_the_rates():
    pool = MemoryPool([tier("a", 1000, 6e9), tier("b", 1000, 3e9), tier("c", 1000, 1e9)], block_bytes=10)
    fill(pool, range(100))
    assert [pool.places(range(100)).count(t) for t in range(3)] == [60, 30, 10]
    # What was measured moves what comes after it.
    for _ in range(60):
        pool.shares.observe(0, 10**9, 1.0)
    fill(pool, range(1000, 1100))
    assert pool.places(range(1000, 1100)).count(0) < 30


def test_in_order_fills_one_device_before_the_next():
    pool = MemoryPool([tier("a", 4), tier("b", 6)], block_bytes=10, placement="in_order")
    fill(pool, range(7))
    fill(pool, range(10, 16))
    assert pool.places(range(4)) == [0] * 4 and pool.places(range(10, 16)) == [1] * 6


def test_the_deepest_block_of_the_oldest_prompt_goes_first():
    pool = MemoryPool([tier("a", 6)], block_bytes=10)
    fill(pool, [1, 2, 3])
    fill(pool, [11, 12, 13])
    fill(pool, [21])
    assert pool.ready_prefix([1, 2, 3]) == 2 and pool.counts.evicted == 1
    reads = pool.want([1, 2])
    fill(pool, [21, 22, 23, 24])
    assert pool.ready_prefix([1, 2]) == 2 and pool.ready_prefix([11]) == 0  # what is being read stays
    pool.done_all(reads)


def _hold(pool: MemoryPool, prompt: list[int]) -> None:
    pool.hold(prompt, 1.0)
    pool.expire(1.0)


USES = {
    "read": lambda pool, prompt: pool.done_all(pool.want(prompt)),
    "stored again": lambda pool, prompt: pool.store(prompt),
    "touched": lambda pool, prompt: pool.touch(prompt),
    "held": _hold,
}


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(sorted(USES))), max_size=8))
def test_the_prompt_that_was_used_last_goes_last_and_its_deepest_block_first(uses):
    """Whatever it was used for: a block is of use where all before it are there."""
    prompts = [[10 * at + depth for depth in range(3)] for at in range(3)]
    pool, order = MemoryPool([tier("a", 9)], block_bytes=10), [0, 1, 2]
    for prompt in prompts:
        fill(pool, prompt)
        pool.touch(prompt)
    for at, use in uses:
        USES[use](pool, prompts[at])
        order = [other for other in order if other != at] + [at]
    for new, gone in enumerate(block for at in order for block in reversed(prompts[at])):
        assert gone in pool
        fill(pool, [100 + new])
        assert gone not in pool


def test_what_was_there_already_is_not_refused():
    pool = MemoryPool([tier("a", 3)], block_bytes=10)
    fill(pool, [1, 2])
    assert len(pool.store([1, 2, 3, 4, 5])) == 1 and pool.counts.refused == 2


def test_a_read_of_a_slot_that_was_given_up_ends_there_alone():
    index = BlockIndex([2])
    for loads in (1, 2):
        place = index.reserve("a", 0)
        assert index.complete("a", place)
        index.get("a").loads = loads
        if loads == 1:
            old = index.remove("a")
    assert not index.unpin("a", old) and index.get("a").loads == 2 and index.quarantined == 0
    assert not index.unpin("a", place) and index.unpin("a", place)
    index.check()


def test_a_hold_ends_for_the_block_that_was_held_alone():
    """A block that was lost and stored again is no newer for the end of the hold on what was lost."""
    pool = MemoryPool([tier("a", 2)], block_bytes=10)
    fill(pool, [1])
    assert pool.hold([1], 10.0) == 1
    pool.failed(1, pool.index.get(1).place)
    fill(pool, [1])
    fill(pool, [2])
    pool.expire(10.0)
    fill(pool, [3])
    assert 1 not in pool and 2 in pool


def test_a_prompt_does_not_displace_itself():
    pool = MemoryPool([tier("a", 4)], block_bytes=10)
    fill(pool, list(range(9)))
    assert pool.ready_prefix(list(range(9))) == 4 and pool.counts.refused == 5
    fill(pool, list(range(9)))
    assert pool.ready_prefix(list(range(9))) == 4 and pool.counts.evicted == 0


def test_what_is_asked_once_does_not_displace_what_is_asked_often():
    pool = MemoryPool([tier("a", 4)], block_bytes=10, admission=TinyLfu(256))
    fill(pool, [1, 2, 3, 4])
    for _ in range(3):
        pool.done_all(pool.want([1, 2, 3, 4]))
    pool.want([11])
    fill(pool, [11])
    assert 11 not in pool and pool.ready_prefix([1, 2, 3, 4]) == 4
    for _ in range(5):
        pool.want([11])
    fill(pool, [11])
    assert 11 in pool


def test_a_held_session_outlives_pressure_until_its_time():
    pool = MemoryPool([tier("a", 3)], block_bytes=10)
    fill(pool, [1, 2])
    assert pool.hold([1, 2], 10.0) == 2
    fill(pool, [11, 12, 13])
    assert pool.ready_prefix([1, 2]) == 2
    pool.expire(10.0)
    fill(pool, [11, 12, 13])
    assert pool.ready_prefix([11, 12, 13]) == 3


def test_a_restart_takes_in_what_a_device_kept():
    pool = MemoryPool([tier("a", 3), tier("b", 3)], block_bytes=10)
    assert pool.restore(1, [("x", 2), ("y", 0), ("x", 1), ("z", 7)]) == ["x", "y"]
    assert [read.place for read in pool.want(["x", "y"])] == [Place(1, 2), Place(1, 0)]
    pool.check()


def test_refusals():
    for text, said in (("host:1GiB", "NAME:CAPACITY"), ("host:1XiB:3", "capacity"), ("d:1GiB:x", "READ"), (":1:1", "name"),
                       ("d:1GiB:0", "read_bytes_per_s")):
        with pytest.raises(ValueError, match=said):
            parse_tier(text)
    assert parse_tier("host:1.5GiB:50").kind == "host" and parse_tier("d:2TB:7:5").write_bytes_per_s == 5e9
    assert parse_bytes("3 MiB") == 3 * 2**20
    with pytest.raises(ValueError, match="distinct"):
        MemoryPool([tier("a", 1), tier("a", 1)], block_bytes=10)
    with pytest.raises(ValueError, match="block_bytes"):
        MemoryPool([tier("a", 1)], block_bytes=0)
    with pytest.raises(ValueError, match="placement"):
        MemoryPool([tier("a", 1)], block_bytes=1, placement="best")
    index = BlockIndex([1])
    index.reserve("a", 0)
    for call in (lambda: index.reserve("a", 0), lambda: index.reserve("b", 0),
                 lambda: index.remove("b"), lambda: index.unpin("b", Place(0, 0))):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("placement", ["bandwidth", "equal", "capacity"])
def test_no_device_gives_up_a_block_while_another_has_a_free_slot(placement):
    """A fast device with 4 slots and a slow one with 40: the first is full long before the second."""
    tiers = [Tier(name=name, kind="disk", capacity_bytes=slots, read_bytes_per_s=rate, write_bytes_per_s=rate)
             for name, slots, rate in (("fast", 4, 9.0), ("slow", 40, 1.0))]  # fmt: skip
    pool = MemoryPool(tiers, block_bytes=1, placement=placement)
    for prompt in range(11):
        for write in pool.store([(prompt, at) for at in range(4)]):
            pool.stored(write)
        pool.check()
    assert len(pool) == 44 and pool.counts.evicted == 0
    for write in pool.store([(11, at) for at in range(4)]):
        pool.stored(write)
    assert len(pool) == 44 and pool.counts.evicted == 4
    if placement == "capacity":  # a new prompt takes the place of one old one, on each device as much
        assert pool.places([(11, at) for at in range(4)]).count(1) >= 3


def test_a_device_of_any_size_takes_no_memory_before_it_is_used():
    """900 TiB of slots: a list of them would be ended by the system before anybody says that there is no such room."""
    index = BlockIndex([10**12, 4])
    assert index.free_slots(0) == 10**12
    assert index.restore(1, [("c", 2), ("far", 9)]) == ["c"]
    assert [index.reserve(key, 0).slot for key in "ab"] == [0, 1]
    assert [index.reserve(key, 1).slot for key in "def"] == [0, 1, 3] and index.free_slots(1) == 0
