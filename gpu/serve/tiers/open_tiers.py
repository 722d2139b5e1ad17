"""Opens tiers behind a served model's pages: whose KV they keep, and what a server asks of them."""
from __future__ import annotations

from collections.abc import Sequence

from gpu.cache.prompts.fingerprint import fingerprint
from gpu.cache.prompts.prompt_pool import PromptPool
from gpu.cache.tiers.stores import DiskStore, HostStore, parse_stores
from gpu.serve.attention import KVPages
from gpu.serve.model.config import ModelConfig
from gpu.serve.model.weights import Weights
from gpu.serve.runner import Runner
from gpu.serve.tiers.prompt_tiers import PromptTiers


def check_tiers(
    texts: Sequence[str], kv_dtype: str, *, pin: bool, flush_s: float = 0.0
) -> tuple[list[HostStore], list[DiskStore]]:  # fmt: skip
    """(host memory, disks) as parse_stores has them. ValueError naming the argument."""
    if texts and kv_dtype == "int8":  # scales lie beside the pages
        raise ValueError("tier: expected KV of 16 bits or FP8, which pages have all of, got int8")
    host, disks = parse_stores(texts, pin=pin) if texts else ([], [])
    if flush_s and not (host and disks):
        given = ", ".join(texts) or None
        raise ValueError(f"tier_flush: expected host memory and a disk to write it to, got tiers {given}")
    return host, disks


def open_tiers(
    stores: tuple[list[HostStore], list[DiskStore]], config: ModelConfig, weights: Weights, pages: KVPages,
    runner: Runner, *, flush_s: float,
) -> tuple[PromptPool, PromptTiers]:  # fmt: skip
    """A pool, which is to be closed, and the face of it for a server. flush_s: as PromptPool has it. ValueError where
    it cannot be opened, or its directories have another model's KV."""
    named = ((str(at), weight) for at, weight in enumerate(weights.tensors()))
    contents = f"gpu.serve {config.name} {pages.dtype} page {pages.page_size} {fingerprint(config.source, named)}"
    host, disks = stores
    pool = PromptPool(contents=contents, host=host, disks=disks, flush_s=flush_s)
    with runner.on_stream():
        pool.open(pages.k, pages.v)
    return pool, PromptTiers(pool, page_size=pages.page_size, on_stream=runner.on_stream)
