"""The pages that blocks are loaded into and stored from: what a tiered cache asks of them, and pages of host memory.

A block is one page of every layer. Outside the device it is one run of bytes, layer after layer, and within a layer the
page of K before that of V, so that a disk reads it whole and the GPU takes it layer by layer.
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from pkvsim.memory.blocks.block_sums import SUMS, block_sums


class Ticket(Protocol):
    """Copies that have been asked for. Either call may raise where they failed."""

    def done(self) -> bool:
        """Whether they have ended."""

    def wait(self) -> None:
        """Until they have."""


class Sums(Ticket, Protocol):
    """Sums that have been asked for."""

    def values(self) -> np.ndarray:
        """[n, SUMS] uint64 of pkvsim.memory.blocks.block_sums, once they have ended."""


def has_ended(ticket: Ticket) -> bool:
    """Whether copies have ended, well or not: their buffers and pages are free then."""
    try:
        return ticket.done()
    except Exception:  # of the GPU, whoever uses what was copied meets it
        return True


def wait_ended(ticket: Ticket) -> str | None:
    """Waits until copies have ended, well or not; what went wrong, None where nothing did."""
    try:
        ticket.wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class Device(Protocol):
    """Pages of all layers. Copies go to streams of their own, one for each direction, and in the order asked for. Where
    a call raises, nothing of what it was asked for is under way."""

    num_layers: int
    block_bytes: int  # of one page of all layers
    num_pages: int

    @property
    def load_steps(self) -> int:
        """In how many parts the layers of a load arrive."""

    def mark(self) -> object:
        """This point of the caller's stream: everything launched before it."""

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[Ticket]:  # fmt: skip
        """Host blocks at addresses [n] int64 into pages [n] int32, once the mark is reached; a ticket for each layer
        in their order, or one for all of them."""

    def copy_layers(self, addresses: np.ndarray, pages: np.ndarray, *, after: object) -> Iterator[Ticket]:
        """As copy_in() with each layer's ticket, but what is under way at once is bounded, so that what other threads
        ask for meanwhile does not wait behind all of it: the iterator blocks its thread until earlier copies have
        arrived, and gives a layer's ticket when all copies of that layer have been asked for. Whoever stops early has
        tickets of all that was asked for, and where it raises, nothing is under way but what they are of."""

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> Ticket:
        """Pages [n] int32 to host blocks at addresses [n] int64, once the mark is reached."""

    def sums(self, pages: np.ndarray, *, after: object) -> Sums:
        """Of the blocks that pages [n] int32 hold once a mark is reached, or copies that a ticket is of have ended."""

    def wait(self, ticket: Any) -> None:
        """Lets what the caller's stream is given next wait for the ticket; this thread goes on."""


class DoneTicket:
    """Copies that ended before they were told of."""

    __slots__ = ()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class DoneSums(DoneTicket):
    """Sums that are known."""

    __slots__ = ("_values",)

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def values(self) -> np.ndarray:
        return self._values


class _LayerByLayer:
    __slots__ = ()

    num_layers: int

    @property
    def load_steps(self) -> int:
        return self.num_layers

    def copy_layers(self: Device, addresses: np.ndarray, pages: np.ndarray, *, after: object) -> Iterator[Ticket]:
        yield from self.copy_in(addresses, pages, after=after, each_layer=True)


class NoPages(_LayerByLayer):
    """A device that takes every block, keeps none and looks at none: disks alone are measured where there is no GPU."""

    __slots__ = ("num_layers", "block_bytes", "num_pages")

    def __init__(self, block_bytes: int, num_pages: int, num_layers: int = 32) -> None:
        self.block_bytes, self.num_pages, self.num_layers = block_bytes, num_pages, num_layers

    def mark(self) -> object:
        return None

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[Ticket]:  # fmt: skip
        return [DoneTicket()] * (self.num_layers if each_layer else 1)

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> Ticket:
        return DoneTicket()

    def sums(self, pages: np.ndarray, *, after: object) -> Sums:
        return DoneSums(np.zeros((len(pages), SUMS), np.uint64))

    def wait(self, ticket: Ticket) -> None:
        return None


class HostPages(_LayerByLayer):
    """Pages in host memory, for tests and for machines without a GPU: pages[p, l] is a layer's part of a block."""

    __slots__ = ("pages", "num_layers", "block_bytes", "num_pages")

    def __init__(self, *, num_pages: int, num_layers: int, run_bytes: int) -> None:
        """run_bytes: K and V of one page in one layer."""
        self.pages = np.zeros((num_pages, num_layers, run_bytes), np.uint8)
        self.num_pages, self.num_layers, self.block_bytes = num_pages, num_layers, num_layers * run_bytes

    def mark(self) -> object:
        return None

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[Ticket]:  # fmt: skip
        for address, page in zip(addresses.tolist(), pages.tolist()):
            ctypes.memmove(self.pages[page].ctypes.data, address, self.block_bytes)
        return [DoneTicket()] * (self.num_layers if each_layer else 1)

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> Ticket:
        for address, page in zip(addresses.tolist(), pages.tolist()):
            ctypes.memmove(address, self.pages[page].ctypes.data, self.block_bytes)
        return DoneTicket()

    def sums(self, pages: np.ndarray, *, after: object) -> Sums:
        return DoneSums(block_sums(self.pages[pages].reshape(len(pages), -1)))

    def wait(self, ticket: Ticket) -> None:
        return None


class HostLayers(_LayerByLayer):
    """Pages in host memory as a model keeps them: an array of K and one of V for each layer."""

    __slots__ = ("num_layers", "block_bytes", "num_pages", "_arrays", "_run_bytes")

    def __init__(self, k_pages: Sequence[np.ndarray], v_pages: Sequence[np.ndarray]) -> None:
        """[num_pages, ...] uint8 each, of one shape, a page's bytes in one piece, which may be written. ValueError
        naming the argument."""
        if not len(k_pages) or len(k_pages) != len(v_pages):
            raise ValueError(f"k_pages, v_pages: expected one of each a layer, got {len(k_pages)} and {len(v_pages)}")
        self._arrays = [array for pair in zip(k_pages, v_pages) for array in pair]
        first = self._arrays[0]
        if any(not one.size or one.shape != first.shape or one.dtype != np.uint8 or not one[0].flags.c_contiguous
               for one in self._arrays):  # fmt: skip
            raise ValueError("k_pages, v_pages: expected uint8 arrays of one shape, pages without gaps")
        if not all(one.flags.writeable for one in self._arrays):  # copies go by address, past NumPy's own check
            raise ValueError("k_pages, v_pages: expected arrays that may be written")
        self._run_bytes = first[0].size
        self.num_pages, self.num_layers = len(first), len(k_pages)
        self.block_bytes = len(self._arrays) * self._run_bytes

    def mark(self) -> object:
        return None

    def copy_in(
        self, addresses: np.ndarray, pages: np.ndarray, *, after: object, each_layer: bool
    ) -> Sequence[Ticket]:  # fmt: skip
        for address, page in zip(addresses.tolist(), pages.tolist()):
            for at, array in enumerate(self._arrays):
                ctypes.memmove(array[page].ctypes.data, address + at * self._run_bytes, self._run_bytes)
        return [DoneTicket()] * (self.num_layers if each_layer else 1)

    def copy_out(self, pages: np.ndarray, addresses: np.ndarray, *, after: object) -> Ticket:
        for address, page in zip(addresses.tolist(), pages.tolist()):
            for at, array in enumerate(self._arrays):
                ctypes.memmove(address + at * self._run_bytes, array[page].ctypes.data, self._run_bytes)
        return DoneTicket()

    def sums(self, pages: np.ndarray, *, after: object) -> Sums:
        blocks = np.stack([array[pages].reshape(len(pages), -1) for array in self._arrays], 1)
        return DoneSums(block_sums(blocks.reshape(len(pages), -1)))

    def wait(self, ticket: Ticket) -> None:
        return None
