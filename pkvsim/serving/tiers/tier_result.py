"""What the tiers did in a run, in sum and by request."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pkvsim.memory.tiers import Tier
from pkvsim.serving.tiers.tier_server import TierLog

Percentiles = Callable[[np.ndarray], dict[str, "float | None"]]


@dataclass(frozen=True, slots=True, eq=False)
class TierResult:
    """The tiers of a run and their log. compute_s [n] float64: from the moment at which a request's loaded blocks
    were there to its first token, so that queue, exposed load and this add up to its TTFT; NaN where it had none."""

    tiers: tuple[Tier, ...]
    log: TierLog
    compute_s: np.ndarray


def make_tier_result(
    tiers: tuple[Tier, ...], log: TierLog, *, queue_s: np.ndarray, ttft_s: np.ndarray
) -> TierResult:  # fmt: skip
    """queue_s, ttft_s [n] of the run's requests, seconds from being sent."""
    return TierResult(tiers, log, ttft_s - queue_s - log.exposed_s)


def tier_summary(result: TierResult, prompt_tokens: int, makespan_s: float, percentiles: Percentiles) -> dict[str, Any]:
    """What `pkvsim whatif --json` has of the tiers. prompt_tokens: of all requests that were served; percentiles: of an
    array's numbers."""
    log = result.log
    loads = log.tokens.any(axis=1)
    devices = {}
    for at, tier in enumerate(result.tiers):
        reads = [work for work in log.work if work.tier == at and not work.is_write]
        asked = log.tokens[:, at] > 0
        devices[tier.name] = {
            "loaded_tokens": int(log.tokens[:, at].sum()),
            "read_bytes": sum(work.num_bytes for work in reads),
            "written_bytes": sum(work.num_bytes for work in log.work if work.tier == at and work.is_write),
            "busy_share": sum(work.end_s - work.begin_s for work in reads) / makespan_s if makespan_s else None,
            "blocked_s": percentiles(log.blocked_s[asked, at]),
            "blocked_total_s": float(log.blocked_s[:, at].sum()),
        }
    loaded = int(log.tokens.sum())
    return {
        "loads": int(loads.sum()),
        "loaded_tokens": loaded,
        "loaded_share": loaded / prompt_tokens if prompt_tokens else None,
        "load_s": percentiles(log.load_s[loads]),
        "ttft_load_s": percentiles(log.exposed_s),
        "ttft_compute_s": percentiles(result.compute_s),
        "blocks": asdict(log.counts),
        "devices": devices,
    }
