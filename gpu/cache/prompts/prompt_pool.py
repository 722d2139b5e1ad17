"""A pool of prompts' KV behind the pages of a drop-in's cache: host memory and disks, in this and in later processes.

    host, disks = parse_stores(["host:16GiB:50", "disk:200GiB:5=/mnt/nvme/kv"])
    pool = PromptPool(host=host, disks=disks, contents=contents_of(model, page_size=16))
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gpu.cache.tiers.device import Device, HostLayers
from gpu.cache.tiers.handles import LoadHandle, StoreHandle
from gpu.cache.tiers.stores import DiskStore, HostStore
from gpu.cache.tiers.tiered_cache import TieredKVCache
from pkvsim.memory.restarts import Flushed, check_flush_s

ComputeTimes = Callable[[np.ndarray], np.ndarray]  # blocks loaded [k] -> seconds to compute the rest of the prompt [k]


class PromptPool:
    """Tiers that hold KV of one model. One cache's pages at a time; close() it, or use it in a with statement."""

    def __init__(
        self, *, contents: str, host: Sequence[HostStore] = (), disks: Sequence[DiskStore] = (),
        prefill_tokens_per_s: float | None = None, flush_s: float = 0.0, **options: Any
    ) -> None:  # fmt: skip
        """contents: of gpu.drop_ins.transformers_prompts.contents_of; options: of TieredKVCache. prefill_tokens_per_s:
        at which the model computes prompts, so that nothing is loaded where computing is faster; None: all that is
        there is loaded. flush_s: most seconds of close() in which disks write what host memory holds, so that a later
        process finds prompts whole. ValueError naming the argument where it is none, and where there are no tiers."""
        if not host and not disks:
            raise ValueError("host, disks: expected at least one tier")
        if prefill_tokens_per_s is not None and not 0 < prefill_tokens_per_s < float("inf"):
            raise ValueError(f"prefill_tokens_per_s: expected tokens per second > 0, got {prefill_tokens_per_s!r}")
        self.prefill_tokens_per_s, self.flush_s = prefill_tokens_per_s, check_flush_s(flush_s)
        self.flushed: Flushed | None = None  # what close() has kept of host memory, None where it wrote nothing
        self.contents, self.host, self.disks, self.options = contents, host, disks, options
        self._cache: TieredKVCache | None = None
        self._first_pages: torch.Tensor | None = None  # K of layer 0 of the cache that uses it

    @property
    def is_open(self) -> bool:
        return self._cache is not None

    def serves(self, k_pages: torch.Tensor) -> bool:
        """Whether it is open and loads into the cache whose K of layer 0 lies in these pages."""
        return self._cache is not None and self._first_pages is k_pages

    def open(self, k_pages: Sequence[torch.Tensor], v_pages: Sequence[torch.Tensor]) -> None:
        """Puts the tiers behind the pages of all layers, [num_pages, num_kv_heads, page_size, head_dim] each, and takes
        in what disks kept. ValueError where they hold something else, or are in use."""
        if self._cache is not None:
            raise ValueError("tiers: expected a pool that no other cache uses, close() it first")
        device: Device
        if k_pages[0].is_cuda:
            from gpu.cache.tiers.transfer import CudaPages

            device = CudaPages(k_pages, v_pages)
        else:
            arrays = [[page.view(torch.uint8).numpy() for page in pages] for pages in (k_pages, v_pages)]
            device = HostLayers(*arrays)
        self._cache = TieredKVCache(
            device, host=self.host, disks=self.disks, contents=self.contents, flush_s=self.flush_s, **self.options
        )  # fmt: skip
        self._first_pages = k_pages[0]

    def lookup(self, keys: Sequence[bytes], compute_s: ComputeTimes | None = None) -> int:
        """Leading blocks that a load would bring, as TieredKVCache has it."""
        return self._opened().lookup(keys, compute_s)

    def compute_s(self, tokens: int, page_size: int) -> ComputeTimes | None:
        """Of a prompt of so many tokens, whose last one is computed in any case; None without a rate of prefill."""
        rate = self.prefill_tokens_per_s
        return None if rate is None else lambda blocks: np.maximum(tokens - blocks * page_size, 1) / rate

    def load(self, keys: Sequence[bytes], pages: np.ndarray) -> LoadHandle:
        """Begins to load the blocks into pages."""
        return self._opened().load(keys, pages)

    def store(self, keys: Sequence[bytes], pages: np.ndarray) -> StoreHandle:
        """Begins to store the blocks that are in pages."""
        return self._opened().store(keys, pages)

    def stats(self) -> dict[str, Any]:
        """As TieredKVCache has them."""
        return self._opened().stats()

    def close(self) -> None:
        """Finishes what is under way; disks keep what they hold, and what flush_s has time for of host memory."""
        if self._cache is not None:
            self._cache.close()
            self.flushed = self._cache.flush.found
            self._cache = self._first_pages = None

    def __enter__(self) -> PromptPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> TieredKVCache:
        if self._cache is None:
            raise ValueError("tiers: expected a pool behind a cache's pages, begin() or keep() opens it")
        return self._cache
