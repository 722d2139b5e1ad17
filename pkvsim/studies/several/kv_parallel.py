"""One decode step whose rows' pages are spread over several GPUs: every rank's part, and what the merge adds."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.pricing.kv_parallel import Link, exchange_bytes, exchange_us, rank_lens
from pkvsim.schedule.shares import PageShares, interleaved
from pkvsim.shapes import DecodeShape, check_seq_lens
from pkvsim.studies.explain_step import StepReport, explain_step

ROUTE = "balanced"  # whose kernel merges over GPUs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVParallelStep:
    """A step of one layer or more on every rank. Times are of a layer, us."""

    shares: PageShares
    owner: str  # of the outputs
    link: Link
    whole: StepReport  # the same step on one GPU that had all pages
    ranks: tuple[StepReport, ...]  # each of the rank's own tokens
    exchange_bytes: int  # that a rank sends in a layer
    exchange_us: float

    @property
    def attention_us(self) -> float:
        """The slowest rank's, which all wait for."""
        return max(rank.routes[0].closed_us for rank in self.ranks)

    @property
    def layer_us(self) -> float:
        return self.attention_us + self.exchange_us

    @property
    def step_us(self) -> float:
        """All layers, the host's part included."""
        return max(rank.routes[0].step_us for rank in self.ranks) + self.whole.layers * self.exchange_us

    def to_dict(self) -> dict[str, Any]:
        """What `pkvsim step --kv-parallel N --json` prints."""
        return {
            "pages_of_rank": list(self.shares.pages_of_rank),
            "owner": self.owner,
            "link": asdict(self.link),
            "exchange_bytes": self.exchange_bytes,
            "exchange_us": self.exchange_us,
            "attention_us": self.attention_us,
            "layer_us": self.layer_us,
            "step_us": self.step_us,
            "one_gpu": self.whole.to_dict(),
            "ranks": [rank.to_dict() for rank in self.ranks],
        }


def explain_kv_parallel(
    shape: DecodeShape, seq_lens: Sequence[int] | np.ndarray, device: DeviceSpec, *, num_ranks: int = 2,
    shares: PageShares | None = None, owner: str = "head", layers: int = 1, options: AttentionOptions = PLAIN,
) -> KVParallelStep:  # fmt: skip
    """Prices and simulates a step on every rank by the balanced route. shares: which pages are whose, by default one
    after the other in turn. Raises ValueError naming the argument."""
    lens = check_seq_lens(seq_lens)
    shares = interleaved(num_ranks, shape.page_size) if shares is None else shares
    if not isinstance(shares, PageShares) or shares.page_size != shape.page_size:
        raise ValueError(f"shares: expected PageShares of pages of {shape.page_size} tokens, got {shares!r}")
    for name, plain, given in (("window", None, options.window), ("query_tokens", 1, options.query_tokens)):
        if given != plain:
            raise ValueError(f"{name}: expected {plain} with kv_parallel, as its kernel serves no other, got {given}")
    rows = int((lens > 0).sum())

    def step(tokens: np.ndarray) -> StepReport:
        return explain_step(shape, tokens, device, routes=(ROUTE,), layers=layers, options=options)

    return KVParallelStep(
        shares=shares, owner=owner, link=Link.of(device), whole=step(lens),
        ranks=tuple(step(tokens) for tokens in rank_lens(lens, shares)),
        exchange_bytes=int(exchange_bytes(shape, rows, shares.num_ranks, owner=owner, options=options)),
        exchange_us=float(exchange_us(shape, rows, device, shares.num_ranks, owner=owner, options=options)),
    )
