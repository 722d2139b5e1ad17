"""How much of a prompt's stored prefix to load, and how much to compute again, by the model's prices.

A hit counts only where everything before it is there, so the choice is one number: the first n of the blocks are loaded
and the rest is computed. All devices read at once, and layer l is attended to while layer l + 1 arrives.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pkvsim.memory.tiers import HOST, Tier


class Choice(NamedTuple):
    """Blocks to load, and the times that this choice gives."""

    blocks: int
    load_s: float
    compute_s: float
    total_s: float


def load_times_s(
    tiers_of_blocks: Sequence[int] | np.ndarray,
    block_bytes: float,
    bytes_per_s: Sequence[float] | np.ndarray,
    *,
    backlog_s: Sequence[float] | np.ndarray | None = None,
    link_bytes_per_s: float = float("inf"),
) -> np.ndarray:
    """Seconds to load the first n blocks, float64 [blocks + 1], all devices at once.

    tiers_of_blocks [blocks]; bytes_per_s [tiers]; backlog_s [tiers]: what a device still has to read for others, which
    costs those alone who need that device. link_bytes_per_s: what all of it goes through to the GPU.
    """
    tiers = np.asarray(tiers_of_blocks, np.int64)
    rates = np.asarray(bytes_per_s, np.float64)
    backlog = np.zeros(len(rates)) if backlog_s is None else np.asarray(backlog_s, np.float64)
    counts = np.zeros((len(tiers) + 1, len(rates)), np.int64)
    np.cumsum(tiers[:, None] == np.arange(len(rates)), axis=0, out=counts[1:])
    by_device = np.where(counts > 0, counts * block_bytes / rates + backlog, 0.0)
    link = np.arange(len(tiers) + 1) * block_bytes / link_bytes_per_s
    return np.maximum(by_device.max(axis=1, initial=0.0), link)


def in_layers(tiers: Sequence[Tier], places: Sequence[int]) -> bool:
    """Whether blocks at these tiers arrive layer by layer: a disk reads a block with all its layers at once, so that
    the first layer is whole when the last block is."""
    return all(tiers[place].kind == HOST for place in set(places))


def first_token_s(load_s: float | np.ndarray, compute_s: float | np.ndarray, num_layers: int = 1) -> np.ndarray:
    """Seconds [n] until all is loaded and the rest computed, of load_s and compute_s [n] each by itself.

    num_layers: that arrive one by one, where the slower of loading and computing hides all but one layer of the other;
    1 where computing begins when all is there.
    """
    load, compute = np.asarray(load_s, np.float64), np.asarray(compute_s, np.float64)
    return np.maximum(load + compute / num_layers, load / num_layers + compute)


def choose_prefix(load_s: np.ndarray, compute_s: Callable[[np.ndarray], np.ndarray], *, num_layers: int = 1) -> Choice:
    """The number of leading blocks to load that gives the first token soonest; the larger of two that tie.

    load_s [blocks + 1]: of load_times_s; compute_s(blocks loaded [n]) -> [n] seconds for the rest of the prompt.
    num_layers: as of first_token_s. ValueError where compute_s gives no seconds for each.
    """
    compute = np.asarray(compute_s(np.arange(len(load_s))), np.float64)
    if compute.shape != np.shape(load_s) or np.isnan(compute).any():
        raise ValueError(f"compute_s: expected seconds [{len(load_s)}], got {compute}")
    total = first_token_s(load_s, compute, num_layers)
    best = len(total) - 1 - int(np.argmin(total[::-1]))
    return Choice(best, float(load_s[best]), float(compute[best]), float(total[best]))
