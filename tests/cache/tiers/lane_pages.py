"""Pages of host memory whose copies are made later, by a thread for each of a GPU's streams, and may fail."""
from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable

import numpy as np
from pool_cases import LAYERS, RUN_BYTES

from gpu.cache.tiers.device import HostPages
from pkvsim.memory.blocks.block_sums import block_sums


class LaneTicket:
    """Raises what its copies raised, as an event of a GPU does after an error."""

    def __init__(self) -> None:
        self._ended, self._error = threading.Event(), None

    def end(self, error: Exception | None) -> None:
        self._error = error
        self._ended.set()

    def done(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._ended.is_set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error


class LaneSums(LaneTicket):
    """With what has been added up."""

    def values(self) -> np.ndarray:
        return self.found


class LanePages(HostPages):
    """fault(name) is asked before each "in", "out" and "sums" call, before each "copy" and before each "sum": an exception
    to raise there, or None. Copies wait up to slow_s, at random."""

    __slots__ = ("fault", "_lanes", "_slow_s", "_random")

    def __init__(self, num_pages: int, *, slow_s: float = 0.0, seed: int = 0) -> None:
        super().__init__(num_pages=num_pages, num_layers=LAYERS, run_bytes=RUN_BYTES)
        self.fault: Callable[[str], Exception | None] = lambda name: None
        self._slow_s, self._random = slow_s, random.Random(seed)
        self._lanes: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(4)]
        for lane in self._lanes:
            threading.Thread(target=self._run, args=(lane,), daemon=True).start()

    def _run(self, lane: queue.SimpleQueue) -> None:
        while (work := lane.get()) is not None:
            moves, ticket = work
            if self._slow_s:
                time.sleep(self._random.random() * self._slow_s)
            if isinstance(ticket, LaneSums):
                pages, after = moves
                error = self.fault("sum")
                if after is not None:
                    after._ended.wait()
                    error = error or after._error
                ticket.found = block_sums(self.pages[pages].reshape(len(pages), -1))
                ticket.end(error)
                continue
            error = self.fault("copy")
            if error is None:
                for target, source, num_bytes in moves:
                    ctypes.memmove(target, source, num_bytes)
            ticket.end(error)

    def close(self) -> None:
        """Ends the lanes behind what they have been given."""
        for lane in self._lanes:
            lane.put(None)

    def _copy(self, lane: int, moves: list[tuple[int, int, int]]) -> LaneTicket:
        ticket = LaneTicket()
        self._lanes[lane].put((moves, ticket))
        return ticket

    def _check(self, name: str) -> None:
        error = self.fault(name)
        if error is not None:
            raise error

    def copy_in(self, addresses, pages, *, after, each_layer):
        self._check("in")
        ends = self._ends(addresses, pages)
        if not each_layer:
            return [self._copy(1, [(page, address, self.block_bytes) for page, address in ends])]
        return [self._copy_layer(0, ends, layer) for layer in range(LAYERS)]

    def copy_layers(self, addresses, pages, *, after):
        """Two layers are under way at most. fault("in") is asked before each."""
        ends, tickets = self._ends(addresses, pages), []
        for layer in range(LAYERS):
            if len(tickets) > 1 and not tickets[-2]._ended.wait(20):
                raise AssertionError("a copy has not ended")
            try:
                self._check("in")
            except Exception:
                for ticket in tickets:
                    ticket._ended.wait()
                raise
            tickets.append(self._copy_layer(1, ends, layer))
            yield tickets[-1]

    def _ends(self, addresses, pages):
        return [(self.pages[page].ctypes.data, address) for address, page in zip(addresses.tolist(), pages.tolist())]

    def _copy_layer(self, lane, ends, layer):
        at = layer * RUN_BYTES
        return self._copy(lane, [(page + at, address + at, RUN_BYTES) for page, address in ends])

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> LaneTicket:
        self._check("out")
        ends = zip(addresses.tolist(), pages.tolist())
        return self._copy(2, [(address, self.pages[page].ctypes.data, self.block_bytes) for address, page in ends])

    def sums(self, pages: np.ndarray, *, after: LaneTicket | None) -> LaneSums:
        self._check("sums")
        ticket = LaneSums()
        self._lanes[3].put(((pages, after), ticket))
        return ticket

    def wait(self, ticket: LaneTicket) -> None:
        ticket.wait()
