"""Requests and replicas: who holds which pages, in bookkeeping that no policy is part of."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. Times in us."""

    number: int
    arrival_us: float
    prompt: int
    output: int
    home: int = -1  # the replica that runs it
    generated: int = 0
    cached: int = 0  # tokens whose KV is there
    pages: dict[int, int] = field(default_factory=dict)  # by the replica that holds them
    available_us: float = 0.0  # when its KV has arrived, where that is on its way
    swapped: bool = False  # its KV is in host memory
    first_us: float = -1.0
    end_us: float = -1.0

    @property
    def tokens(self) -> int:
        """Of prompt and answer so far: what must be cached before the next token."""
        return self.prompt + self.generated

    def lent(self) -> int:
        """Pages that other replicas hold for it."""
        return sum(pages for replica, pages in self.pages.items() if replica != self.home)


@dataclass(slots=True, eq=False)
class Replica:
    """A server: its free pages, what runs in order of admission, what waits in order of turn."""

    free: int
    running: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    stepping: list[Job] = field(default_factory=list)  # who gets a token in the step that runs
    ready_us: float = 0.0  # when that ends
    debt_us: float = 0.0  # attention over lent pages that its next step has to make up for


@dataclass(slots=True)
class Tally:
    """What happened, over all replicas."""

    borrowed_pages: int = 0
    moves: int = 0
    swaps: int = 0
    recomputes: int = 0
    recomputed_tokens: int = 0
    rejected: int = 0
    steps: int = 0
    busy_us: float = 0.0
    lent_us: float = 0.0  # of lenders' steps, spent on others' rows
    exchange_us: float = 0.0


class Cluster:
    """Equal replicas. Pages are taken and given back here alone."""

    __slots__ = ("replicas", "page_size", "capacity", "tally")

    def __init__(self, replicas: int, *, pages: int, page_size: int) -> None:
        self.replicas = [Replica(pages) for _ in range(replicas)]
        self.page_size, self.capacity, self.tally = page_size, pages, Tally()

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, job: Job, replica: int, pages: int) -> None:
        held = self.replicas[replica]
        if pages > held.free:
            raise ValueError(f"pages: expected at most the {held.free} free ones of replica {replica}, got {pages}")
        held.free -= pages
        if pages:
            job.pages[replica] = job.pages.get(replica, 0) + pages

    def give_back(self, job: Job) -> None:
        for replica, pages in job.pages.items():
            self.replicas[replica].free += pages
        job.pages = {}

    def roomiest(self, but: int) -> int:
        """The other replica with the most free pages, the first of equals; -1 where there is no other."""
        others = [at for at in range(len(self.replicas)) if at != but]
        return max(others, key=lambda at: self.replicas[at].free, default=-1)
