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
from pkvsim.models.decode_groups import DecodeGroup
from pkvsim.pricing.kv_parallel import exchange_us

POLICY = "balanced"  # whose kernel merges over GPUs


@inner
def first_ranks(lens, page_size, ranks, found):
    """The tokens that the first of so many ranks has of rows of these lengths, in `found`, which may be `lens`."""
    cycle = page_size * ranks
    for row in range(len(lens)):
        found[row] = lens[row] // cycle * page_size + min(lens[row] % cycle, page_size)
    return found


def check_kv_parallel(policy: str, groups: Sequence[DecodeGroup]) -> None:
    """ValueError where no kernel serves the policy, or one of the model's kinds of layers, over several GPUs."""
    if policy != POLICY:
        raise ValueError(f"policies: expected {POLICY} alone with kv_parallel, got {policy}")
    if not groups:
        raise ValueError("kv_parallel: expected 1 for a model without grouped-query attention")
    for group in groups:
        if group.options is not None and group.options.window is not None:
            raise ValueError(f"kv_parallel: expected 1 for layers with windows, which no kernel serves over several "
                             f"GPUs, got layers of {group.options.window} tokens")


def exchange_table(groups: Sequence[DecodeGroup], device: DeviceSpec, *, ranks: int, max_batch: int) -> np.ndarray:
    """us that a step of so many rows spends on exchanges over all layers, float64 [max_batch + 1]; [1] of one GPU."""
    table = np.zeros(max_batch + 1 if ranks > 1 else 1)
    for group in groups if ranks > 1 else ():
        if group.shape is not None and group.options is not None:
            table += group.count * exchange_us(group.shape, np.arange(max_batch + 1), device, ranks,
                                               options=group.options)
    return table
