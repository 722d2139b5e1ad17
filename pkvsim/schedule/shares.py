"""Which pages of a row lie on which rank, where several GPUs hold the rows' KV together."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int, check_seq_lens

MAX_RANKS = 8  # RANKS in cuda_src/variant.cuh


@dataclass(frozen=True, slots=True)
class RankShare:
    """The tokens of a row that are one rank's: of every `cycle` those in [begin, begin + tokens). As RankShare in
    cuda_src/plan.cuh."""

    begin: int
    tokens: int
    cycle: int  # at least 2

    def numbers(self) -> tuple[int, int, int, int, int]:
        """The kernel's fields: these, and with which it divides by the cycle without a division.

        For n of 31 bits floor(n / cycle) is n * magic >> (32 + shift), with l = ceil(log2(cycle)), shift = l - 1 and
        magic = floor(2^(31 + l) / cycle) + 1 (Granlund and Montgomery, Division by Invariant Integers using
        Multiplication, 1994, theorem 4.2). magic has 32 bits and is given as an int32.
        """
        bits = (self.cycle - 1).bit_length()
        magic = (1 << (31 + bits)) // self.cycle + 1
        return self.begin, self.tokens, self.cycle, magic - ((magic >> 31) << 32), bits - 1

    def of(self, seq_lens: np.ndarray) -> np.ndarray:
        """Tokens that the rank has of rows of seq_lens (integers of any shape), int64."""
        lens = np.asarray(seq_lens, np.int64)
        return lens // self.cycle * self.tokens + np.clip(lens % self.cycle - self.begin, 0, self.tokens)


WHOLE = RankShare(0, 2, 2)  # lengths are the rank's own already


@dataclass(frozen=True, slots=True)
class PageShares:
    """Pages are dealt out in cycles: rank r gets pages_of_rank[r] pages in a run, then rank r + 1 its own, and so on.

    One rule for all rows, so that a rank knows how many tokens it has of a row from the row's length. A rank keeps its
    pages in the row's order, and the row's last page may be partly filled. Interleaving costs every rank the same to a
    page of each row. Raises ValueError naming the field.
    """

    page_size: int
    pages_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1, MAX_TOKENS)
        if not isinstance(self.pages_of_rank, (list, tuple)):
            raise ValueError(f"pages_of_rank: expected pages of each rank, such as (7, 3), got {self.pages_of_rank!r}")
        ranks, most = len(self.pages_of_rank), MAX_TOKENS // self.page_size
        if not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"pages_of_rank: expected 1 to {MAX_RANKS} ranks, got {ranks}")
        object.__setattr__(self, "pages_of_rank", tuple(check_int(f"pages_of_rank[{rank}]", pages, 0, most)
                                                        for rank, pages in enumerate(self.pages_of_rank)))
        if not 0 < sum(self.pages_of_rank) <= most:
            raise ValueError(f"pages_of_rank: expected 1 to {most} pages together, got {sum(self.pages_of_rank)}")

    @property
    def num_ranks(self) -> int:
        return len(self.pages_of_rank)

    @property
    def cycle_pages(self) -> int:
        return sum(self.pages_of_rank)

    def of_rank(self, rank: int) -> RankShare:
        check_int("rank", rank, 0, self.num_ranks - 1)
        before = sum(self.pages_of_rank[:rank])
        # A cycle of one token is told as one of two.
        times = self.page_size * (2 if self.page_size * self.cycle_pages == 1 else 1)
        return RankShare(before * times, self.pages_of_rank[rank] * times, self.cycle_pages * times)

    def local_lens(self, seq_lens: Any, rank: int) -> np.ndarray:
        """Tokens of each row that the rank has, [batch_size] int32."""
        return self.of_rank(rank).of(check_seq_lens(seq_lens)).astype(np.int32)

    def local_pages(self, num_pages: int, rank: int) -> int:
        """How many of a row's first num_pages pages are the rank's."""
        full, rest = divmod(num_pages, self.cycle_pages)
        own, before = self.pages_of_rank[rank], sum(self.pages_of_rank[:rank])
        return full * own + min(max(rest - before, 0), own)

    def place(self, pages: Any) -> tuple[np.ndarray, np.ndarray]:
        """(rank, place among the rank's pages) of a row's pages, by their numbers in the row; int64, as `pages`."""
        pages = np.asarray(pages, np.int64)
        ends = np.cumsum(self.pages_of_rank)
        cycle, within = np.divmod(pages, self.cycle_pages)
        rank = np.searchsorted(ends, within, side="right")
        own = np.asarray(self.pages_of_rank, np.int64)[rank]
        return np.asarray(rank), cycle * own + within - (ends[rank] - own)


def interleaved(num_ranks: int, page_size: int, *, pages: int = 1) -> PageShares:
    """`pages` at a time to each rank in turn."""
    return PageShares(page_size, (check_int("pages", pages, 1),) * check_int("num_ranks", num_ranks, 1, MAX_RANKS))


def in_runs(num_ranks: int, page_size: int, *, max_tokens: int) -> PageShares:
    """A run for each rank, of rows of at most max_tokens: short rows are the first ranks' alone. Raises ValueError
    naming the argument."""
    num_ranks = check_int("num_ranks", num_ranks, 1, MAX_RANKS)
    page_size = check_int("page_size", page_size, 1, MAX_TOKENS)
    pages = -(-check_int("max_tokens", max_tokens, 1, MAX_TOKENS) // page_size)
    return PageShares(page_size, (-(-pages // num_ranks),) * num_ranks)


def in_proportion(weights: Sequence[float], page_size: int, *, cycle_pages: int = 64) -> PageShares:
    """Of every cycle_pages so many to each rank as its weight says, by the largest remainder; the ranks' bandwidths
    are the weights with which they take equally long. Raises ValueError naming the argument."""
    try:
        given = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        given = np.zeros(0)
    with np.errstate(over="ignore"):
        whole = given.sum()  # NaN or infinite where a weight is
    if given.ndim != 1 or (given < 0).any() or not 0 < whole < np.inf:
        raise ValueError(f"weights: expected numbers from 0 on, one of each rank, not all 0, got {weights!r}")
    wanted = given / whole * check_int("cycle_pages", cycle_pages, 1)
    pages = np.floor(wanted).astype(np.int64)
    left = np.argsort(pages - wanted, kind="stable")[:cycle_pages - int(pages.sum())]
    pages[left] += 1
    return PageShares(page_size, tuple(pages.tolist()))
