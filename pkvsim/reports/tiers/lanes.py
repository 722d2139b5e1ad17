"""The devices of a run's tiers over time: a lane of reads and a lane of writes each."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pkvsim.serving.tiers.tier_result import TierResult


class LaneEvent(NamedTuple):
    """What a device did for one request. lane: twice the device's place, plus 1 for writes."""

    lane: int
    name: str
    begin_us: float
    end_us: float
    num_bytes: int


def lane_names(result: TierResult) -> list[str]:
    """Of every lane."""
    return [f"{tier.name} {way}" for tier in result.tiers for way in ("reads", "writes")]


def lane_events(result: TierResult, most: int) -> tuple[Iterator[LaneEvent], int]:
    """(events, how many were left out): where there are more than `most`, one in so many is kept."""
    work = result.log.work
    stride = max(1, -(-len(work) // max(1, most)))
    kept = work[::stride]
    events = (
        LaneEvent(
            2 * one.tier + one.is_write, f"{'store' if one.is_write else 'load'} of request {one.request}",
            one.begin_s * 1e6, one.end_s * 1e6, one.num_bytes,
        ) for one in kept
    )  # fmt: skip
    return events, len(work) - len(kept)
