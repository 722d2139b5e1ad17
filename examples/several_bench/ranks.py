"""Times graphs that all ranks of a group replay at a time, and that start together."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from several_bench.timing import WayTime, rounds_of_graph

from gpu.measure.timing import capture

# What a stream is kept busy for while the host enqueues what follows on every rank: about 2 and 32 ms at 2 GHz.
AHEAD_CYCLES = 4_000_000
MAX_AHEAD_CYCLES = 16 * AHEAD_CYCLES

RunOne = Callable[[int], None]  # launches a layer's step of one rank


class Ranks:
    """This process's ranks of a group, each with a stream that torch and CuPy share."""

    def __init__(self, group: Any, meet: Callable[[], None] | None = None) -> None:
        """meet: makes the current stream wait until those of all processes are there; None with one process."""
        self.group, self._meet, self._streams = group, meet, {}
        self._ahead_cycles = AHEAD_CYCLES
        if not hasattr(group, "streams"):
            with torch.cuda.device(group.device(group.ranks[0])):
                self._streams = {rank: torch.cuda.Stream() for rank in group.ranks}

    @contextlib.contextmanager
    def on(self, rank: int) -> Iterator[None]:
        with self.group.use(rank), contextlib.ExitStack() as stack:
            if rank in self._streams:
                import cupy

                stack.enter_context(torch.cuda.stream(self._streams[rank]))
                stack.enter_context(cupy.cuda.ExternalStream(self._streams[rank].cuda_stream))
            yield

    def synchronize(self) -> None:
        for rank in self.group.ranks:
            torch.cuda.synchronize(self.group.device(rank))

    def together(self, values: list[float]) -> list[float]:
        """The largest of each number over all processes."""
        if self._meet is None:
            return values
        import torch.distributed as dist

        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def time_us(self, run_one: dict[int, RunOne], *, layers: int, repeats: int) -> WayTime:
        """The time of a call, of graphs that start together on all ranks of run_one and hold the calls of all layers in
        turn, as often as rounds_of_graph says. All processes call it together."""
        for layer in range(min(layers, 2)):  # first use: compile, load, allocate outside the capture
            for rank, run in run_one.items():
                with self.on(rank):
                    run(layer)
        self.synchronize()
        rounds, times, apart = 1, np.zeros((1, 1)), False
        for timed in (False, True):
            graphs = {}
            for rank, run in run_one.items():
                with self.on(rank):
                    graphs[rank] = capture(lambda run=run, n=rounds: [run(i) for _ in range(n) for i in range(layers)])
            self._replay(graphs)  # a graph's first launch takes the host longer
            times, apart = self._replays(graphs, repeats if timed else 1)
            if not timed:
                rounds = rounds_of_graph(float(times.max()), layers=layers)
        return WayTime.of(times, calls=layers * rounds, apart=apart)

    def _replays(self, graphs: dict[int, Any], repeats: int) -> tuple[np.ndarray, bool]:
        """(us of each replay [repeats, num_ranks], 0 of a rank without a graph; whether the host was late at last).

        Where the host was late on any process, streams are kept busy for twice as long, and all is done again.
        """
        while True:
            replays = [self._replay(graphs) for _ in range(repeats)]
            given = [of.get(rank, 0.0) for of, _ in replays for rank in range(self.group.num_ranks)]
            *found, late = self.together([*given, float(any(late for _, late in replays))])
            if not late or self._ahead_cycles >= MAX_AHEAD_CYCLES:
                return np.array(found).reshape(repeats, self.group.num_ranks), late > 0
            self._ahead_cycles *= 2

    def _replay(self, graphs: dict[int, Any]) -> tuple[dict[int, float], bool]:
        """(us of each rank's graph, whether a rank could start before the host had enqueued all ranks' graphs).

        Every stream is busy until the host has enqueued all that follows; then the streams meet, with no word from the
        host, and each rank's time begins. Without that, a rank's time would hold the host's way to the last rank.
        """
        self.synchronize()
        self.group.barrier()
        there = {rank: torch.cuda.Event() for rank in graphs}
        begin, end = ({rank: torch.cuda.Event(enable_timing=True) for rank in graphs} for _ in range(2))
        for rank in graphs:
            with self.on(rank):
                torch.cuda._sleep(self._ahead_cycles)
                there[rank].record()
        for rank, graph in graphs.items():
            with self.on(rank):
                for other in graphs:
                    if other != rank:
                        there[other].wait()
                if self._meet is not None:
                    self._meet()
                begin[rank].record()
                graph.replay()
                end[rank].record()
        late = any(event.query() for event in begin.values())
        self.synchronize()
        return {rank: begin[rank].elapsed_time(end[rank]) * 1e3 for rank in graphs}, late


def processes_meet(group: Any) -> Callable[[], None]:
    """What Ranks is to call where every process has one rank: a barrier of torch's symmetric memory, which is a kernel
    on the current stream that waits for those of the peers. All processes of torch.distributed call it together."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    device = group.device(group.ranks[0])
    with torch.cuda.device(device):
        memory = symmetric.empty(32, dtype=torch.int32, device=f"cuda:{device}")
        kept = memory, symmetric.rendezvous(memory, dist.group.WORLD)
        torch.cuda.synchronize()
    group.barrier()
    return lambda: kept[1].barrier(channel=0)
