"""How bench_several times graphs of several ranks, with streams whose clocks are worked out: no GPU is needed."""
from __future__ import annotations

import contextlib
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from several_bench.timing import MAX_GRAPH_US, MIN_CALLS, MIN_GRAPH_US, WayTime, rounds_of_graph

pytest.importorskip("torch")
from several_bench import ranks

CYCLES_PER_US = 2000


@given(st.floats(1.0, 2e5), st.integers(1, 64))
def test_a_graph_holds_calls_enough_and_is_not_too_long(round_us: float, layers: int) -> None:
    rounds = rounds_of_graph(round_us, layers=layers)
    assert rounds >= 1
    assert rounds == 1 or rounds * round_us <= MAX_GRAPH_US
    if (rounds + 1) * round_us <= MAX_GRAPH_US:
        assert rounds * layers >= MIN_CALLS and rounds * round_us >= MIN_GRAPH_US
    if rounds > 1:  # no more than was asked for
        assert (rounds - 1) * layers < MIN_CALLS or (rounds - 1) * round_us < MIN_GRAPH_US


def test_a_long_row_over_four_gpus_is_called_often_enough() -> None:
    """Calls of 250 us whose ranks start 5 us apart: less than 0.1 us a call."""
    assert 5 / (2 * rounds_of_graph(500, layers=2)) < 0.1


def test_the_slowest_rank_of_each_replay() -> None:
    time = WayTime.of(np.array([[10.0, 0, 30], [50, 0, 20], [20, 0, 22]]), calls=10)
    assert time == WayTime(3.0, 5.0, (2.0, 2.2), 10)


@dataclass(slots=True)
class Clock:
    """A host that takes op_us to enqueue anything, and a stream of each rank. Ranks' graphs end together where they
    wait for each other, which takes the last one that starts."""

    op_us: float
    call_us: tuple[float, ...]  # by rank
    wait: bool
    host: float = 0.0
    streams: list[float] = field(default_factory=list)
    current: int = 0
    starts: dict[int, float] = field(default_factory=dict)  # of the last replay

    def enqueue(self) -> float:
        """Returns when the current stream comes to it."""
        self.host += self.op_us
        return max(self.host, self.streams[self.current])

    def sleep(self, cycles: int) -> None:
        self.streams[self.current] = self.enqueue() + cycles / CYCLES_PER_US

    def synchronize(self, device: int) -> None:
        self.host = max(self.host, *self.streams)


def on_clock(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> ranks.Ranks:
    count = len(clock.call_us)
    clock.streams = [0.0] * count

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at, self.rank, self.calls = None, None, 0

        def record(self) -> None:
            self.at, self.rank = clock.enqueue(), clock.current

        def wait(self) -> None:
            assert self.at is not None, "an event that nobody has recorded holds nobody up"
            clock.streams[clock.current] = max(clock.enqueue(), self.at)

        def query(self) -> bool:
            return self.at <= clock.host

        def elapsed_time(self, end: Event) -> float:
            late = max(clock.starts.values()) - clock.starts[end.rank] if clock.wait else 0.0
            return (end.at + late - self.at) / 1e3

    class Graph:
        def __init__(self, calls: list) -> None:
            self.us = len(calls) * (max(clock.call_us) if clock.wait else clock.call_us[clock.current])

        def replay(self) -> None:
            clock.starts[clock.current] = clock.enqueue()
            clock.streams[clock.current] = clock.starts[clock.current] + self.us

    @contextlib.contextmanager
    def use(rank: int):
        clock.current = rank
        yield

    cuda = types.SimpleNamespace(Event=Event, _sleep=clock.sleep, synchronize=clock.synchronize)
    monkeypatch.setattr(ranks, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(ranks, "capture", lambda body: Graph(body()))
    return ranks.Ranks(types.SimpleNamespace(
        streams=[None] * count, ranks=tuple(range(count)), num_ranks=count, device=lambda rank: rank, use=use,
        barrier=lambda: None))


@pytest.mark.parametrize("op_us", [1, 20, 300])
def test_a_slow_host_is_not_counted(monkeypatch, op_us) -> None:
    """Four ranks that wait for each other, and whose host takes up to 300 us for anything: before a start after which
    nothing is left to enqueue, the ranks' first call alone would be milliseconds."""
    timed = on_clock(monkeypatch, Clock(op_us, (250.0, 249.0, 251.0, 250.0), wait=True))
    time = timed.time_us({rank: lambda layer: None for rank in range(4)}, layers=2, repeats=3)
    assert not time.apart and time.calls == 64
    assert time.median_us == pytest.approx(251) and time.by_rank_us == pytest.approx((251,) * 4)


def test_ranks_that_wait_for_nobody_have_times_of_their_own(monkeypatch) -> None:
    timed = on_clock(monkeypatch, Clock(10, (8.0, 9.5), wait=False))
    time = timed.time_us({rank: lambda layer: None for rank in range(2)}, layers=16, repeats=2)
    assert time.by_rank_us == pytest.approx((8, 9.5)) and time.median_us == pytest.approx(9.5)
    assert time.calls == 16 * rounds_of_graph(16 * 9.5, layers=16)
    only = timed.time_us({0: lambda layer: None}, layers=16, repeats=2)  # one engine on a GPU that both ranks share
    assert only.by_rank_us == pytest.approx((8,))


def test_a_host_that_is_late_all_the_same_is_told(monkeypatch) -> None:
    timed = on_clock(monkeypatch, Clock(20_000, (8.0, 8.0), wait=True))
    assert timed.time_us({rank: lambda layer: None for rank in range(2)}, layers=2, repeats=2).apart
