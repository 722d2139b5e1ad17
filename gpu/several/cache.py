"""A paged KV pool on each of several GPUs that hold rows together."""
from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gpu.cache.pool import PagedKVCache
from gpu.several.group import Group
from pkvsim import DecodeShape
from pkvsim.memory.page_allocator import ShardedAllocator
from pkvsim.schedule.shares import PageShares, interleaved


class ShardedCache:
    """Pages of 16 bits on every rank's device, and the rows that they hold together; each rank keeps its own tokens.

    pools: this process's ranks', by rank. All processes of the group make the same calls, so that all know the same
    rows. Everything runs on the ranks' streams (group.use).
    """

    __slots__ = ("shape", "group", "rows", "pools", "_lens", "_stale")

    def __init__(self, shape: DecodeShape, group: Group, *, num_pages: int, max_batch: int, max_seq_len: int,
                 shares: PageShares | None = None, dtype: str = "float16") -> None:
        """num_pages: of each rank's pool; shares: page by page in turn by default. Raises ValueError naming the
        argument."""
        shares = interleaved(group.num_ranks, shape.page_size) if shares is None else shares
        if shares.num_ranks != group.num_ranks or shares.page_size != shape.page_size:
            raise ValueError(f"shares: expected {group.num_ranks} ranks and pages of {shape.page_size}, got {shares}")
        if dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype: expected float16 or bfloat16, got {dtype!r}")
        self.shape, self.group = shape, group
        self.rows = ShardedAllocator(shares, num_pages=num_pages, max_batch=max_batch, max_seq_len=max_seq_len)
        self.pools: dict[int, PagedKVCache] = {}
        self._lens: dict[int, cupy.ndarray] = {}
        for rank in group.ranks:
            with group.use(rank):
                self.pools[rank] = PagedKVCache(shape, num_pages=num_pages, max_batch=max_batch, dtype=dtype,
                                                max_seq_len=self.rows.ranks[rank].max_seq_len)
                self._lens[rank] = cupy.asarray(self.rows.seq_lens)
        self._stale = False

    def allocate(self, row: int | None = None) -> int:
        """Opens an empty row and returns it."""
        row = self.rows.allocate(row)
        for pool in self.pools.values():
            pool.allocate(row)
        return row

    def free(self, row: int) -> None:
        self.rows.free(row)
        for rank, pool in self.pools.items():
            with self.group.use(rank):
                pool.free(row)
        self._stale = True

    def fill(self, row: int, k: Any, v: Any) -> None:
        """A run of new tokens of one row: k, v [tokens, num_kv_heads, head_dim], the same on every rank, CuPy arrays in
        a list with an entry for each of this process's ranks. Raises ValueError and changes nothing where they do not
        fit."""
        count = self._check_tokens(k, v)
        begin = int(self.rows.extend([row], [count])[0])
        for (rank, pool), own_k, own_v in zip(self.pools.items(), k, v):
            own = self.rows.tokens_of(rank, begin, begin + count)
            if len(own):
                with self.group.use(rank):
                    picked = cupy.asarray(own)
                    pool.fill(row, own_k[picked], own_v[picked])
        self._stale = True

    def append(self, rows: Any, k: Any, v: Any) -> None:
        """One new token for each of rows [n]; k, v [n, num_kv_heads, head_dim] in lists and refused as of fill()."""
        rows = np.asarray(rows, np.int64)
        counts = self.rows.local_counts(rows, np.ones(rows.shape, np.int64))
        self._check_tokens(k, v, len(rows))
        self.rows.extend(rows, np.ones(len(rows), np.int64))
        for (rank, pool), own_k, own_v in zip(self.pools.items(), k, v):
            own = np.flatnonzero(counts[rank])
            if len(own):
                with self.group.use(rank):
                    picked = cupy.asarray(own)
                    pool.append(rows[own], own_k[picked], own_v[picked])
        self._stale = True

    def _check_tokens(self, k: Any, v: Any, tokens: int | None = None) -> int:
        """How many tokens all arrays have, before any rank takes some. Raises ValueError naming k or v."""
        ranks, shape = len(self.pools), self.shape
        for name, of_ranks in (("k", k), ("v", v)):
            listed = isinstance(of_ranks, (list, tuple))
            if not listed or len(of_ranks) != ranks:
                found = f"{type(of_ranks).__name__} of {len(of_ranks)}" if listed else type(of_ranks).__name__
                raise ValueError(f"{name}: expected a list with an array for each of {ranks} ranks, got {found}")
            for (rank, pool), own in zip(self.pools.items(), of_ranks):
                device, dtype = self.group.device(rank), pool.k_pages.dtype
                if tokens is None and isinstance(own, cupy.ndarray) and own.ndim == 3:
                    tokens = len(own)
                if (not isinstance(own, cupy.ndarray) or own.shape != (tokens, shape.num_kv_heads, shape.head_dim)
                        or own.dtype != dtype or own.device.id != device):
                    found = (f"{own.dtype} {list(own.shape)} on cuda:{own.device.id}" if isinstance(own, cupy.ndarray)
                             else type(own).__name__)
                    count = "tokens" if tokens is None else tokens
                    raise ValueError(f"{name}[{rank}]: expected cupy {dtype} [{count}, {shape.num_kv_heads}, "
                                     f"{shape.head_dim}] on cuda:{device}, got {found}")
        return 0 if tokens is None else tokens

    def device_tables(self) -> tuple[list[cupy.ndarray], list[cupy.ndarray]]:
        """(seq_lens, block_table) as ShardedDecode.plan() takes them; the same arrays on every call."""
        tables = []
        for rank, pool in self.pools.items():
            with self.group.use(rank):
                if self._stale:
                    self._lens[rank].set(self.rows.seq_lens)
                tables.append(pool.device_tables()[1])
        self._stale = False
        return list(self._lens.values()), tables
