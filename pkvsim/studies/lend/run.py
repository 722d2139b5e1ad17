"""Serves a trace on replicas that help each other out of a full memory in one of four ways.

Each replica runs continuous batching: it admits in order of arrival while pages are free, computes a prompt whole in
the step that admits it, and every running row gets a token a step. A request goes to the replica with the fewest tokens
of what it holds and waits for. Where a running row needs a page and its replica has none free:

    borrow     the page lies on the replica with the most free ones; every later step of the row is as long as the
               longer of both attentions, plus an exchange, and the lender's next step is longer by its part
    preempt    the row admitted last goes to host memory, and comes back when its replica has room again
    move       the row admitted last goes to the replica with the most free pages, with its KV
    recompute  the row admitted last gives its pages back, and its tokens are computed again in its next turn

A way that finds no room recomputes. A request that a replica alone could never hold is rejected, but of borrow, which
spreads it from its admission on.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from pkvsim.shapes import check_int
from pkvsim.studies.lend.cluster import Cluster, Job, Tally
from pkvsim.traces.requests import RequestTrace

WAYS = ("borrow", "preempt", "move", "recompute")
ENDS, SENT, BEGINS = range(3)  # what happens at an instant, in this order


class Prices(Protocol):
    """As pkvsim.studies.lend.prices.LendPrices; times in us."""

    def rest_us(self, rows: int, chunk_tokens: int) -> float: ...
    def prefill_us(self, tokens: int) -> float: ...
    def attention_us(self, tokens: int) -> float: ...
    def exchange_us(self, rows: int) -> float: ...
    def move_us(self, tokens: int) -> float: ...
    def swap_us(self, tokens: int) -> float: ...


@dataclass(frozen=True, slots=True, eq=False)
class LendResult:
    """Of one way. Arrays are by request, NaN where it was rejected; us."""

    way: str
    first_token_us: np.ndarray  # [n] float64, from arrival
    latency_us: np.ndarray  # [n] float64, from arrival to the last token
    makespan_us: float
    output_tokens: int
    tally: Tally

    def to_dict(self) -> dict[str, Any]:
        served = np.isfinite(self.latency_us)

        def at(values: np.ndarray, percent: float) -> float | None:
            return float(np.percentile(values[served], percent)) / 1e3 if served.any() else None

        return {
            "way": self.way, "served": int(served.sum()),
            "tokens_per_s": self.output_tokens / self.makespan_us * 1e6 if self.makespan_us else 0.0,
            "first_token_p50_ms": at(self.first_token_us, 50), "first_token_p99_ms": at(self.first_token_us, 99),
            "latency_p50_ms": at(self.latency_us, 50), "latency_p99_ms": at(self.latency_us, 99),
            "makespan_s": self.makespan_us / 1e6, **asdict(self.tally),
        }  # fmt: skip


def serve_lending(
    trace: RequestTrace, prices: Prices, *, way: str, replicas: int, pages: int, page_size: int = 16,
    max_batch: int = 256, progress: Callable[[int], None] | None = None,
) -> LendResult:  # fmt: skip
    """pages: of each replica. Raises ValueError naming the argument."""
    if way not in WAYS:
        raise ValueError(f"lend: expected some of {', '.join(WAYS)}, got {way!r}")
    check_int("replicas", replicas, 2, 1024)
    check_int("pages", pages, 1)
    check_int("max_batch", max_batch, 1)
    if trace.concurrency is not None or trace.after is not None:
        raise ValueError("trace: expected requests that wait for no other with lend, got sessions or clients that do")
    run = _Run(Cluster(replicas, pages=pages, page_size=check_int("page_size", page_size, 1)), prices, way, max_batch)
    jobs = [Job(i, arrival * 1e6, int(prompt), int(output)) for i, (arrival, prompt, output) in enumerate(
        zip(trace.arrival_s.tolist(), trace.prompt_tokens, trace.output_tokens))]
    run.serve(jobs, progress)
    ends = np.array([job.end_us if job.end_us >= 0 else np.nan for job in jobs])
    arrivals = np.array([job.arrival_us for job in jobs])
    return LendResult(
        way=way,
        first_token_us=np.array([job.first_us if job.end_us >= 0 else np.nan for job in jobs]) - arrivals,
        latency_us=ends - arrivals,
        makespan_us=float(np.nanmax(ends) - arrivals[0]) if np.isfinite(ends).any() else 0.0,
        output_tokens=sum(job.generated for job in jobs),
        tally=run.cluster.tally,
    )


class _Run:
    """The replicas' steps, in order of the times at which they begin."""

    def __init__(self, cluster: Cluster, prices: Prices, way: str, max_batch: int) -> None:
        self.cluster, self.prices, self.way, self.max_batch = cluster, prices, way, max_batch
        # Steps of equally many rows and tokens come again and again.
        self._rest_us = functools.lru_cache(1 << 16)(prices.rest_us)
        self._exchange_us = functools.lru_cache(1 << 10)(prices.exchange_us)

    def serve(self, jobs: list[Job], progress: Callable[[int], None] | None) -> None:
        """At an instant steps end first, then what is due is sent, and then idle replicas begin a step."""
        replicas, sent, now_us = self.cluster.replicas, 0, 0.0
        while True:
            events = [(replica.ready_us, ENDS, at) if replica.stepping else (self._begins_us(at, now_us), BEGINS, at)
                      for at, replica in enumerate(replicas)]
            if sent < len(jobs):
                events.append((jobs[sent].arrival_us, SENT, sent))
            now_us, kind, which = min(events)
            if now_us == math.inf:
                return
            if kind == ENDS:
                self._end(which, now_us)
            elif kind == SENT:
                self._send(jobs[which])
                sent += 1
                if progress is not None:
                    progress(sent)
            else:
                self._begin(which, now_us)

    def _begins_us(self, at: int, now_us: float) -> float:
        """When the replica's next step can begin, as things stand."""
        replica = self.cluster.replicas[at]
        there = [job.available_us for job in replica.running]
        if replica.waiting and self._fits(at, replica.waiting[0]):
            there.append(replica.waiting[0].available_us)
        return max(now_us, min(there)) if there else math.inf

    def _send(self, job: Job) -> None:
        cluster = self.cluster
        most = cluster.capacity * (len(cluster.replicas) if self.way == "borrow" else 1)
        if cluster.pages_of(job.prompt + job.output) > most:
            cluster.tally.rejected += 1
            return

        def load(at: int) -> int:
            replica = cluster.replicas[at]
            return sum(other.tokens for other in (*replica.running, *replica.waiting))

        job.home = min(range(len(cluster.replicas)), key=load)
        cluster.replicas[job.home].waiting.append(job)

    def _fits(self, at: int, job: Job) -> bool:
        replica, need = self.cluster.replicas[at], self.cluster.pages_of(job.tokens + 1)
        if len(replica.running) >= self.max_batch:
            return False
        if need <= replica.free:
            return True
        return self._spreads(job) and need <= sum(other.free for other in self.cluster.replicas)

    def _spreads(self, job: Job) -> bool:
        """Whether its home alone could never hold it."""
        return self.way == "borrow" and self.cluster.pages_of(job.prompt + job.output) > self.cluster.capacity

    def _admit(self, at: int, now_us: float) -> list[Job]:
        """Who begins in this step; those whose KV comes from host memory begin when it is there."""
        cluster, begun = self.cluster, []
        replica = cluster.replicas[at]
        while replica.waiting and replica.waiting[0].available_us <= now_us and self._fits(at, replica.waiting[0]):
            job = replica.waiting.pop(0)
            need = cluster.pages_of(job.tokens + 1)
            own = min(need, replica.free)
            cluster.take(job, at, own)
            while own < need:
                lender = cluster.roomiest(at)
                lent = min(need - own, cluster.replicas[lender].free)
                cluster.take(job, lender, lent)
                cluster.tally.borrowed_pages += lent
                own += lent
            replica.running.append(job)
            if job.swapped:
                job.swapped, job.available_us = False, now_us + self.prices.swap_us(job.cached)
            else:
                begun.append(job)
        return begun

    def _grow(self, at: int, now_us: float) -> None:
        """A page for every running row whose next token has none."""
        cluster = self.cluster
        replica = cluster.replicas[at]
        for job in list(replica.running):
            if job not in replica.running or job.available_us > now_us:
                continue
            while job in replica.running and sum(job.pages.values()) < cluster.pages_of(job.tokens + 1):
                if replica.free:
                    cluster.take(job, at, 1)
                elif self.way == "borrow" and (lender := cluster.roomiest(at)) >= 0 and cluster.replicas[lender].free:
                    cluster.take(job, lender, 1)
                    cluster.tally.borrowed_pages += 1
                else:
                    self._evict(at, now_us)

    def _evict(self, at: int, now_us: float) -> None:
        """The row admitted last leaves the replica."""
        cluster, tally = self.cluster, self.cluster.tally
        replica = cluster.replicas[at]
        job = replica.running.pop()
        if self.way == "move" and job.available_us <= now_us:
            target = cluster.roomiest(at)
            other = cluster.replicas[target]
            need = cluster.pages_of(job.tokens + 1)
            if need <= other.free and len(other.running) < self.max_batch:
                cluster.give_back(job)
                cluster.take(job, target, need)
                job.home, job.available_us = target, now_us + self.prices.move_us(job.cached)
                other.running.append(job)
                tally.moves += 1
                return
        cluster.give_back(job)
        if self.way == "preempt":
            job.swapped, job.available_us = True, max(now_us, job.available_us) + self.prices.swap_us(job.cached)
            tally.swaps += 1
        else:
            tally.recomputes += 1
            tally.recomputed_tokens += job.cached
            job.cached, job.available_us = 0, now_us
        replica.waiting.insert(0, job)

    def _begin(self, at: int, now_us: float) -> None:
        cluster, prices, tally = self.cluster, self.prices, self.cluster.tally
        replica = cluster.replicas[at]
        self._grow(at, now_us)
        begun = self._admit(at, now_us)
        # Rows whose KV is on its way wait, and a replica whose memory is lent waits for it.
        rows = [job for job in replica.running if job.available_us <= now_us and job.cached and job not in begun]
        if not rows and not begun:
            return
        chunk = sum(job.tokens for job in begun)
        lent: dict[int, int] = {}
        own = borrowers = 0
        for job in rows:
            left, away = job.cached, False  # its pages are filled in the order in which replicas came to hold some
            for holder, pages in job.pages.items():
                tokens = min(pages * cluster.page_size, left)
                left -= tokens
                if holder == at:
                    own += tokens
                elif tokens:
                    lent[holder], away = lent.get(holder, 0) + tokens, True
            borrowers += away
        step_us = self._rest_us(len(rows), chunk) + sum(prices.prefill_us(job.tokens) for job in begun)
        lent_us = {lender: prices.attention_us(tokens) for lender, tokens in lent.items()}
        exchange_us = self._exchange_us(borrowers) if borrowers else 0.0
        step_us += max([prices.attention_us(own), *lent_us.values()]) + exchange_us + replica.debt_us
        replica.debt_us = 0.0
        for lender, us in lent_us.items():
            if cluster.replicas[lender].running:
                cluster.replicas[lender].debt_us += us
                tally.lent_us += us
        tally.exchange_us += exchange_us
        tally.steps += 1
        tally.busy_us += step_us
        replica.ready_us, replica.stepping = now_us + step_us, [*rows, *begun]

    def _end(self, at: int, now_us: float) -> None:
        """A token for every row of the step; pages of those that have their last one come back."""
        replica = self.cluster.replicas[at]
        for job in replica.stepping:
            job.cached = job.tokens
            job.generated += 1
            if job.first_us < 0:
                job.first_us = now_us
            if job.generated == job.output:
                job.end_us = now_us
                replica.running.remove(job)
                self.cluster.give_back(job)
        replica.stepping = []
