"""How far two engines' greedy tokens and log-probabilities agree, and whether that is what rounding explains.

What rounding explains differs by model and type: vLLM rounds logits to bfloat16 before their softmax, whose unit in the
last place is 0.125 from 16 to 32, so that gaps between SmolLM2's likely tokens are multiples of it. The yardstick is
therefore no constant but a pair of peers: two of vLLM's own backends on the same prompts.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

TIE = 0.05  # of log-probability: what engines may swap where no peers tell, fit for the small random model
FLOAT32_ERROR = 1e-4  # generously, of a sum of four log-probabilities that are kept with 24 bits
DIFFERENCE_OF_MEANS = 2 * math.sqrt(2)  # two standard errors of the difference of two means that scatter alike
TOLD = 6  # partings that a line names, the widest ones


@dataclass(frozen=True, slots=True)
class Agreement:
    """Greedy tokens of one engine against another's, until the first place of each row where they part.

    parted: (row, place, swing). Each engine holds its own token for the likelier one; the swing is the sum of the two
    gaps in log-probability, by which the engines disagree about the two tokens. It is None where an engine's token is
    not among the other's likely ones.
    """

    compared: int  # tokens
    rows: int
    parted: tuple[tuple[int, int, float | None], ...]
    largest_difference: float  # of log-probabilities of the tokens that agree
    mean_difference: float
    largest_swing: float  # of the other engine's two likeliest tokens at places that agree, and of partings
    mean_swing: float  # of those that are not 0: about a step of rounded logits
    standard_error: float  # of the mean, rows being what is drawn: tokens of a row are not independent; 0 for one row

    def beyond(self, swing: float) -> list[tuple[int, int, float | None]]:
        """The partings whose swing is more than so much, or unknown."""
        return [one for one in self.parted if one[2] is None or one[2] > swing + FLOAT32_ERROR]

    def __str__(self) -> str:
        widest = sorted(self.parted, key=lambda one: math.inf if one[2] is None else one[2], reverse=True)[:TOLD]
        told = ", ".join(f"row {row} at {place} by {'an unlikely token' if swing is None else f'{swing:.4g}'}"
                         for row, place, swing in widest)
        more = f" and {len(self.parted) - TOLD} more" if len(self.parted) > TOLD else ""
        return (f"{self.compared} tokens agree, log-probabilities within {self.largest_difference:.4f}, "
                f"{self.mean_difference:.5f} +- {self.standard_error:.5f} in the mean; "
                f"{len(self.parted)} of {self.rows} rows part" + (f" ({told}{more})" if told else ""))


@dataclass(frozen=True, slots=True)
class Verdict:
    """whether: ours is as near to the other engine as its peer is; None where nothing tells."""

    whether: bool | None
    reasons: str

    def __str__(self) -> str:
        return {True: "within", False: "NOT within", None: "not judged"}[self.whether] + ": " + self.reasons


def compare(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> Agreement:
    """own, other: rows of the same prompts, as vllm_bench.child writes them, read back from JSON or not."""
    parted: list[tuple[int, int, float | None]] = []
    differences: list[list[float]] = []
    swings: list[float] = []
    for row, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        differences.append([])
        for place, (a, b) in enumerate(zip(mine["tokens"], theirs["tokens"], strict=True)):
            held, seen = ({int(token): value for token, value in one["top"][place].items()} for one in (mine, theirs))
            pair = (a, b) if a != b else sorted(seen, key=seen.__getitem__)[-2:]
            swing = None
            if len(pair) == 2 and {*pair} <= held.keys() & seen.keys():
                gaps = [one[pair[0]] - one[pair[1]] for one in (held, seen)]
                swing = abs(gaps[0]) + abs(gaps[1]) if a != b else abs(gaps[0] - gaps[1])
            if swing is not None and swing > FLOAT32_ERROR:
                swings.append(swing)
            if a != b:
                parted.append((row, place, swing))
                break
            differences[-1].append(abs(held[a] - seen[a]))
    every = [one for row in differences for one in row]
    mean = sum(every) / max(1, len(every))
    return Agreement(len(every), len(differences), tuple(parted), max(every, default=0.0), mean,
                     max(swings, default=0.0), sum(swings) / max(1, len(swings)),
                     _standard_error([row for row in differences if row], mean))


def _standard_error(rows: list[list[float]], mean: float) -> float:
    """Of a mean over rows of unlike lengths, a ratio of sums: Cochran, Sampling Techniques (1977), chapter 6."""
    if len(rows) < 2:
        return 0.0
    squares = sum((sum(row) - len(row) * mean) ** 2 for row in rows)
    return math.sqrt(squares * len(rows) / (len(rows) - 1)) / sum(map(len, rows))


def judge(own: Agreement, peers: Agreement | None, tie: float | None = TIE) -> Verdict:
    """Whether one of our engines agrees with another as far as rounding explains.

    peers: of a peer of ours against the same other engine, on the same prompts. Ours is within what rounding explains:
    (a) no parting's swing passes the widest swing of the peers' two likeliest tokens at any place by more than their
        mean swing: rounded logits move by steps, and the widest of theirs may by chance be one step short;
    (b) no log-probability differs by more than twice the peers' largest difference: the largest of some hundred
        differences is passed by the next hundreds every other time, but not twofold where rounding makes them;
    (c) the mean difference passes the peers' by no more than two standard errors, which are of the peers' own rows, so
        that what is wrong in some of our rows does not widen the bound.
    tie: the bound of swings without peers, None where none is known.
    """
    if peers is None or not peers.compared:
        if tie is None:
            return Verdict(None, "no peer with this type of cache was run")
        beyond = own.beyond(tie)
        return Verdict(not beyond, f"{len(beyond)} of {len(own.parted)} partings beyond {tie}, the bound without peers")
    largest = 2 * peers.largest_difference
    mean = peers.mean_difference + DIFFERENCE_OF_MEANS * peers.standard_error
    swing = peers.largest_swing + peers.mean_swing
    beyond = own.beyond(swing)
    whether = own.compared > 0 and not beyond and own.largest_difference <= largest and own.mean_difference <= mean
    return Verdict(whether, f"{len(beyond)} of {len(own.parted)} partings beyond {swing:.4f} (the peers' swings reach "
                            f"{peers.largest_swing:.4f}); log-probabilities within {own.largest_difference:.4f}, "
                            f"wanted {largest:.4f} (peers {peers.largest_difference:.4f}); mean "
                            f"{own.mean_difference:.5f}, wanted {mean:.5f} (peers {peers.mean_difference:.5f} +- "
                            f"{peers.standard_error:.5f})")
