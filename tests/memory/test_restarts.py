"""What is kept over a restart: of every prompt its beginning, the most recently used first, and no slot is lost."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pkvsim.memory.blocks.block_index import READY
from pkvsim.memory.device_clock import DeviceClock
from pkvsim.memory.memory_pool import MemoryPool
from pkvsim.memory.restarts import blocks_to_move, restart, volatile_blocks
from pkvsim.memory.retention import TinyLfu
from pkvsim.memory.simulate_tiers import BlockRequests, simulate_tiers
from pkvsim.memory.tier_options import TierOptions
from pkvsim.memory.tiers import DISK, HOST, Tier, parse_tier

BLOCK = 10


def tier(name, kind, blocks, *, read=1e9, write=1e9):
    return Tier(name=name, kind=kind, capacity_bytes=blocks * BLOCK, read_bytes_per_s=read, write_bytes_per_s=write)


def prompt(branch, length):
    """Branches of a tree, as test_memory_pool has them."""
    return [(depth, branch if depth >= 3 else branch % 2) for depth in range(length)]


class Machine(RuleBasedStateMachine):
    """Prompts are stored, loaded and touched whole; a restart may come at any time, with as much time as it likes."""

    @initialize(hosts=st.lists(st.integers(0, 9), min_size=1, max_size=2), rates=st.lists(st.integers(1, 9), min_size=4, max_size=4),
                disks=st.lists(st.integers(0, 12), min_size=1, max_size=2), admission=st.sampled_from([None, TinyLfu(64)]))
    def begin(self, hosts, rates, disks, admission):
        tiers = [tier(f"host{i}", HOST, count, read=rates[i] * 1e9) for i, count in enumerate(hosts)]
        tiers += [tier(f"disk{i}", DISK, count, read=rates[2 + i] * 1e9, write=BLOCK) for i, count in enumerate(disks)]
        self.pool, self.disk_slots = MemoryPool(tiers, block_bytes=BLOCK, admission=admission), sum(disks)
        self.lost, self.latest = False, []

    @rule(branch=st.integers(0, 5), length=st.integers(1, 8))
    def serve(self, branch, length):
        keys = prompt(branch, length)
        reads = self.pool.want(keys)
        self.pool.done_all(reads)
        writes = self.pool.store(keys)
        for write in sorted(writes, key=lambda write: hash(write.place) % 5):  # in any order
            self.pool.stored(write)
        self.pool.touch(keys)
        self.latest = keys

    @rule(branch=st.integers(0, 5), length=st.integers(1, 8), depth=st.integers(0, 7))
    def fail(self, branch, length, depth):
        entry = self.pool.index.get((depth, branch))
        if entry is not None:
            self.pool.failed((depth, branch), entry.place)

    @precondition(lambda self: not self.lost and len(self.pool.tiers) > 2)
    @rule()
    def lose_a_disk(self):
        last = len(self.pool.tiers) - 1
        self.disk_slots -= self.pool.tiers[last].slots(BLOCK)
        self.pool.lose_tier(last)
        self.lost = True

    @rule(seconds=st.integers(0, 12) | st.just(float("inf")))
    def restart(self, seconds):
        pool, index = self.pool, self.pool.index
        prompts = [prompt(branch, 8) for branch in range(6)]
        before = [pool.ready_prefix(keys) for keys in prompts]
        entries = {key: index.get(key) for key in index.keys()}
        on_disk = {key for key, entry in entries.items() if pool.tiers[entry.place.tier].is_lasting}
        by_use = sorted(entries, key=lambda key: -entries[key].used)
        moves, volatile = blocks_to_move(pool), volatile_blocks(pool)
        clock = DeviceClock(pool.tiers)
        found = restart(pool, clock, now_s=100.0, flush_s=seconds)
        pool.check()
        assert found.kept + found.left == len(volatile) and found.begin_s == 100.0 <= found.end_s <= 100.0 + seconds
        assert clock.read(np.array([BLOCK] * len(pool.tiers)), 100.0).begins_s.min() >= found.end_s
        assert all(pool.tiers[entry.place.tier].is_lasting for entry in map(index.get, index.keys()))
        if seconds == 0:
            assert set(index.keys()) == on_disk
        if seconds == float("inf"):
            # Disks have the blocks used last, as many as they have slots: of each prompt what it had of these.
            kept = set(by_use[: self.disk_slots])
            assert set(index.keys()) == kept and found.kept == len(moves)
            for keys, had in zip(prompts, before):
                wanted = next((at for at, key in enumerate(keys[:had]) if key not in kept), had)
                assert pool.ready_prefix(keys) == wanted
            if len(entries) <= self.disk_slots:
                assert [pool.ready_prefix(keys) for keys in prompts] == before and found.left == 0
        else:
            # A part of them: blocks were moved in order of their use.
            moved = [key for key in volatile if key in pool]
            assert moved == volatile[: found.kept]
        # Nothing is kept behind a gap that the restart has made into what was used since the last one.
        assert len(index.keys()) <= self.disk_slots

    @invariant()
    def what_was_used_last_is_a_beginning(self):
        """By which the beginnings of prompts are what is kept: whatever comes before a block was used later."""
        if hasattr(self, "pool"):
            self.pool.check()
            for branch in range(6):
                used = [entry.used for key in prompt(branch, 8) if (entry := self.pool.index.get(key)) is not None]
                if not self.pool.counts.failed:
                    assert used == sorted(used, reverse=True)
            assert all(self.pool.index.get(key).state == READY for key in self.pool.index.keys())


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_held_blocks_are_worth_more_than_later_ones():
    pool = MemoryPool([tier("host", HOST, 8), tier("disk", DISK, 2)], block_bytes=BLOCK, placement="in_order")
    for keys in (["a", "b"], ["c", "d"]):
        for write in pool.store(keys):
            pool.stored(write)
        pool.touch(keys)
    assert pool.hold(["a", "b"], 10.0) == 2
    assert volatile_blocks(pool) == ["a", "b", "c", "d"] and blocks_to_move(pool) == [("a", 1), ("b", 1)]


def test_disks_end_together_by_what_they_write():
    tiers = [tier("host", HOST, 9), tier("fast", DISK, 9, read=1.0, write=20), tier("slow", DISK, 9, read=9.0, write=10)]
    pool = MemoryPool(tiers, block_bytes=BLOCK, placement="in_order")
    for write in pool.store(range(9)):
        pool.stored(write)
    pool.touch(range(9))
    found = restart(pool, DeviceClock(tiers), now_s=0.0, flush_s=2.0)
    assert (found.kept, found.left, found.end_s) == (6, 3, 2.0)  # 2 blocks a second and 1
    assert pool.ready_prefix(range(9)) == 6


def requests(prompts):
    lengths = [len(one) for one in prompts]
    return BlockRequests(
        np.arange(len(prompts)) * 1e3, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        np.array([block for one in prompts for block in one], np.int64),
    )  # fmt: skip


TIERS = [tier("host", HOST, 70, read=7.0, write=7.0), tier("disk", DISK, 70, read=BLOCK, write=BLOCK)]


def test_a_simulated_restart_with_a_flush_loads_what_it_had():
    """8 of 18 blocks lie on the disk, and not the first: without a flush nothing of the prompt comes back."""
    asked = requests([range(18)] * 4)
    without, short, whole = (
        simulate_tiers(asked, TIERS, block_bytes=BLOCK, options=TierOptions(flush_s=seconds), restarts_s=[1500.0])
        for seconds in (0.0, 4.0, 60.0)
    )  # fmt: skip
    never = simulate_tiers(asked, TIERS, block_bytes=BLOCK)
    assert never.hits.tolist() == [0, 18, 18, 18] and never.restarts == ()
    on_disk = int(never.bytes_by_tier[1, 1]) // BLOCK
    assert without.hits[2] <= 1 and whole.hits.tolist() == never.hits.tolist()
    assert without.hits[2] < short.hits[2] < 18
    assert whole.restarts[0].kept == 18 - on_disk and whole.restarts[0].left == 0
    assert whole.restarts[0].end_s == 1500.0 + 18 - on_disk and short.restarts[0].end_s == 1504.0
    assert without.restarts[0].end_s == 1500.0
    for one in (without, short, whole):
        assert one.hits[3] == 18  # what was computed again is there again


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=30), st.integers(0, 30),
       st.sampled_from([0.0, 2.0, 5.0]))
def test_no_restart_hits_more_than_none_and_no_flush_less_than_without(pairs, at, seconds):
    """Where there is room for all, which a flush changes nothing about."""
    asked = requests([[10 * branch * (depth > 1) + depth for depth in range(length)] for branch, length in pairs])
    found = [
        simulate_tiers(asked, TIERS, block_bytes=BLOCK, options=TierOptions(flush_s=time), restarts_s=restarts)
        for time, restarts in ((0.0, [at * 1e3 + 500]), (seconds, [at * 1e3 + 500]), (1e9, [at * 1e3 + 500]), (0.0, []))
    ]  # fmt: skip
    for less, more in zip(found, found[1:]):
        assert (less.hits <= more.hits).all()
    assert (found[2].hits == found[3].hits).all()


@pytest.mark.slow
def test_what_the_page_says_of_a_flush():
    """docs/pool.md's figures: conversations that grow, before and behind a restart."""
    rng, sessions, prompts = np.random.default_rng(0), 60, []
    lengths = np.zeros(sessions, int)
    for _ in range(6):
        for session in rng.permutation(sessions):
            lengths[session] += int(rng.integers(32, 256))
            prompts.append(range(int(session) * 10**6, int(session) * 10**6 + int(lengths[session])))
    asked = requests(prompts)._replace(arrival_s=np.arange(len(prompts)) * 2.0)
    turn = slice(4 * sessions, 5 * sessions)
    restart_s = float(asked.arrival_s[turn.start]) - 1

    def compute_s(request, blocks):
        return (len(prompts[request]) - blocks) * 16 / 20_000 + 0.002

    found = {}
    for rate in (7, 2):
        tiers = [parse_tier("host:64GiB:50"), parse_tier(f"disk:1TiB:{rate}")]
        for flush_s, restarts in ((0.0, []), (0.0, [restart_s]), (60.0, [restart_s])):
            loads = simulate_tiers(asked, tiers, block_bytes=2**21, compute_s=compute_s, restarts_s=restarts,
                                   options=TierOptions(flush_s=flush_s, num_layers=32))
            found[rate, flush_s, len(restarts)] = (
                round(loads.hits[turn].sum() / loads.blocks[turn].sum(), 2), round(float(np.median(loads.ttft_s[turn])), 2),
                *(round(one.end_s - one.begin_s, 1) for one in loads.restarts),
            )  # fmt: skip
    assert found[7, 0.0, 0] == (0.81, 0.15) and found[7, 0.0, 1] == (0.0, 0.58, 0.0) and found[7, 60.0, 1] == (0.81, 0.3, 9.4)
    assert found[2, 60.0, 1] == (0.81, 0.58, 34.4)


def test_times_that_are_none_are_refused():
    for seconds in (-1.0, float("nan"), "5", True, None):
        with pytest.raises(ValueError, match="flush_s: expected seconds >= 0"):
            TierOptions(flush_s=seconds)
    with pytest.raises(ValueError, match="restarts_s: expected seconds"):
        simulate_tiers(requests([[1]]), TIERS, block_bytes=BLOCK, restarts_s=[float("nan")])
