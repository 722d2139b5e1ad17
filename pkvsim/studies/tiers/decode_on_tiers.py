"""A decode step whose KV lies on tiers: all of it is read, what was selected is read, or it is attended to in place.

read     every layer's KV comes to the GPU through the link.
select   chunks of tokens have an abstract each (the largest and the smallest key, by which a query bounds its weights);
         the GPU scores them and has only the chunks of the largest weights come. LeoAM (arXiv 2506.20187) keeps the
         abstracts on the tier, `abstracts_in_hbm` keeps them in the GPU's memory.
near     a tier attends to what it holds, at its internal rate; queries go there, outputs with their LSE come back, and
         the GPU merges them. InstInfer's computational storage (arXiv 2409.04992).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pkvsim.memory.placement import share_counts
from pkvsim.memory.tiers import Tier, check_tiers
from pkvsim.models.model_spec import FULL, ModelSpec

READ, SELECT, NEAR = "read", "select", "near"
METHODS = (READ, SELECT, NEAR)
ELEMENT_BYTES = 2  # of keys, values, queries and outputs
LSE_BYTES = 4


@dataclass(frozen=True, slots=True)
class DecodeOnTiers:
    """Seconds of the attention of one step over all layers. device_s [t], link_s and gpu_s: what each has to do;
    step_s: the slowest of them, and one layer of the others, as layers follow each other through all of them."""

    method: str
    step_s: float
    device_s: tuple[float, ...]
    link_s: float
    gpu_s: float
    link_bytes: float


def decode_on_tiers(
    model: ModelSpec,
    seq_lens: Sequence[int] | np.ndarray,
    tiers: Sequence[Tier],
    *,
    link_bytes_per_s: float,
    hbm_bytes_per_s: float,
    method: str = READ,
    selected_share: float = 0.1,
    chunk_tokens: int = 64,
    abstracts_in_hbm: bool = False,
    internal_bytes_per_s: Sequence[float] = (),
) -> DecodeOnTiers:
    """seq_lens [batch_size]: tokens that are on the tiers, spread by their rates (internal ones where they compute).
    selected_share: of the chunks; internal_bytes_per_s [t]: at which each tier attends, with `near`. Raises ValueError
    naming the argument."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < selected_share <= 1 or chunk_tokens < 1:
        raise ValueError(f"selected_share, chunk_tokens: expected (0, 1], >= 1, got {selected_share}, {chunk_tokens}")
    lens = np.asarray(seq_lens)
    if lens.ndim != 1 or not lens.size or lens.dtype.kind not in "iu" or lens.min() < 1:
        raise ValueError(f"seq_lens: expected integers >= 1 [batch_size], got {seq_lens}")
    check_tiers(tiers)
    for name, rate in (("link_bytes_per_s", link_bytes_per_s), ("hbm_bytes_per_s", hbm_bytes_per_s)):
        if not rate > 0:
            raise ValueError(f"{name}: expected > 0, got {rate!r}")
    if method == NEAR and (len(internal_bytes_per_s) != len(tiers)
                           or not all(0 < rate < np.inf for rate in internal_bytes_per_s)):  # fmt: skip
        raise ValueError(f"internal_bytes_per_s: expected a finite one > 0 of each tier, got {internal_bytes_per_s}")
    groups = [(attention, count) for attention, count in model.attention_groups if attention.kind == FULL]
    if not groups or sum(count for _, count in groups) < model.num_layers:
        raise ValueError(f"model: expected full attention in all layers, got {model.name}")
    rows, tokens = len(lens), int(lens.sum())
    kv_bytes = sum(attention.bytes_per_token(ELEMENT_BYTES) * count for attention, count in groups) * tokens
    key_bytes = sum(attention.num_kv_heads * attention.head_dim * count for attention, count in groups) * ELEMENT_BYTES
    abstract_bytes = 2 * key_bytes * tokens / chunk_tokens
    rates = np.array(internal_bytes_per_s if method == NEAR else [tier.read_bytes_per_s for tier in tiers], np.float64)
    shares = share_counts(10**6, rates, [10**6] * len(tiers)) / 10**6
    if method == NEAR:
        heads = sum(attention.num_q_heads * count for attention, count in groups)
        query_bytes = sum(attention.num_q_heads * attention.head_dim * count for attention, count in groups)
        used = int(np.count_nonzero(shares))
        answers = query_bytes * ELEMENT_BYTES + heads * LSE_BYTES
        link_bytes = 1.0 * rows * used * (query_bytes * ELEMENT_BYTES + answers)
        device_s, gpu_s = kv_bytes * shares / rates, rows * used * answers / hbm_bytes_per_s
    else:
        come = kv_bytes if method == READ else kv_bytes * selected_share
        if method == SELECT and not abstracts_in_hbm:
            come += abstract_bytes
        device_s, link_bytes = come * shares / rates, come
        gpu_s = (come + (abstract_bytes if method == SELECT and abstracts_in_hbm else 0.0)) / hbm_bytes_per_s
    link_s = link_bytes / link_bytes_per_s
    stages = sorted((float(device_s.max()), link_s, gpu_s))
    step_s = stages[-1] + (stages[0] + stages[1]) / model.num_layers
    return DecodeOnTiers(method, step_s, tuple(device_s.tolist()), link_s, gpu_s, link_bytes)
