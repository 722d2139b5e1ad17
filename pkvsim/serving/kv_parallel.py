"""A server whose GPUs hold every row's KV together: what its decode attention is given, and what the exchange adds.

Pages go to the GPUs one after the other in turn, so that the first has the most of each row and is the slowest: a step
takes as long as its part, and the exchange of the states in every layer. Each GPU has all weights and does the rest of
the step, so a server has kv_parallel times the pages and, decode attention aside, the speed of one GPU.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pkvsim.compiled import inner
from pkvsim.devices.device import DeviceSpec
from pkvsim.options import AttentionOptions
from pkvsim.pricing.kv_parallel import exchange_us
from pkvsim.shapes import DecodeShape

POLICY = "balanced"  # whose kernel merges over GPUs


@inner
def first_ranks(lens, page_size, ranks):
    """Turns the tokens of rows into those that the first of so many ranks has of them."""
    cycle = page_size * ranks
    for row in range(len(lens)):
        lens[row] = lens[row] // cycle * page_size + min(lens[row] % cycle, page_size)


def check_kv_parallel(policy: str, kinds: Sequence[tuple[DecodeShape, AttentionOptions, int]]) -> None:
    """ValueError where no kernel serves the policy, or one of the model's kinds of layers, over several GPUs."""
    if policy != POLICY:
        raise ValueError(f"policies: expected {POLICY} alone with kv_parallel, got {policy}")
    for _, options, _ in kinds:
        if options.window is not None:
            raise ValueError(f"kv_parallel: expected 1 for layers with windows, which no kernel serves over several "
                             f"GPUs, got layers of {options.window} tokens")


def exchange_table(
    kinds: Sequence[tuple[DecodeShape, AttentionOptions, int]], device: DeviceSpec, *, ranks: int, max_batch: int
) -> np.ndarray:
    """us that a step of so many rows spends on exchanges over all layers, float64 [max_batch + 1]; [1] of one GPU."""
    if ranks == 1:
        return np.zeros(1)
    rows = np.arange(max_batch + 1)
    return sum(layers * exchange_us(shape, rows, device, ranks, options=options) for shape, options, layers in kinds)
