"""A paged KV pool whose pages hold one KV head of one layer: every head keeps pages, and a length, of its own."""
from __future__ import annotations

from collections.abc import Sequence

import cupy
import numpy as np

from gpu.cache.pool import PagedKVCache
from pkvsim import DecodeShape
from pkvsim.shapes import check_int


class PagedHeadCache:
    """Rows of all layers of a model over one pool: what a head of one layer gives up serves any other.

    A decode step takes each KV head for a row of its own:

    >>> engine = DecodeEngine(cache.head_shape)
    >>> engine.plan(*cache.device_tables(layer))
    >>> engine.run(cache.by_head(q), cache.k_pages, cache.v_pages)    # [max_batch * num_kv_heads, group_size, head_dim]

    k_pages, v_pages [num_pages, 1, page_size, head_dim], 16-bit. Streams as PagedKVCache has them.
    """

    __slots__ = ("shape", "num_layers", "max_batch", "pool")

    def __init__(self, shape: DecodeShape, *, num_layers: int = 1, num_pages: int, max_batch: int, max_seq_len: int,
                 dtype: str = "float16", library: str = "cupy") -> None:
        """shape: of the model's heads. num_pages: of one head each. Raises ValueError naming the argument."""
        if dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype: expected float16 or bfloat16, got {dtype!r}")
        self.shape = shape
        self.num_layers = check_int("num_layers", num_layers, 1)
        self.max_batch = check_int("max_batch", max_batch, 1)
        self.pool = PagedKVCache(DecodeShape(shape.group_size, 1, shape.head_dim, shape.page_size), num_pages=num_pages,
                                 max_batch=num_layers * max_batch * shape.num_kv_heads, max_seq_len=max_seq_len,
                                 dtype=dtype, library=library)

    @property
    def head_shape(self) -> DecodeShape:
        """Of the steps: a KV head alone with its group."""
        return self.pool.shape

    @property
    def k_pages(self) -> cupy.ndarray:
        return self.pool.k_pages

    @property
    def v_pages(self) -> cupy.ndarray:
        return self.pool.v_pages

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free_pages

    def lanes(self, layer: int, rows: object) -> np.ndarray:
        """The pool's rows of these rows' heads in a layer, int64 [len(rows) * num_kv_heads]."""
        check_int("layer", layer, 0, self.num_layers - 1)
        rows = np.asarray(rows, np.int64).reshape(-1)
        if ((rows < 0) | (rows >= self.max_batch)).any():
            raise ValueError(f"rows: expected rows in [0, {self.max_batch}), got {rows.tolist()}")
        heads = self.shape.num_kv_heads
        return ((layer * self.max_batch + rows[:, None]) * heads + np.arange(heads)).reshape(-1)

    def lengths(self, layer: int) -> np.ndarray:
        """Tokens that each head keeps, int32 [max_batch, num_kv_heads]."""
        return self.pool.seq_lens[self.lanes(layer, np.arange(self.max_batch))].reshape(self.max_batch, -1)

    def device_tables(self, layer: int) -> tuple[cupy.ndarray, cupy.ndarray]:
        """(lengths [max_batch * num_kv_heads], table [max_batch * num_kv_heads, max_pages]) of a layer on the device,
        at the same addresses on every call."""
        lanes = self.lanes(layer, np.arange(self.max_batch))
        lens, table = self.pool.device_tables()
        own = slice(int(lanes[0]), int(lanes[-1]) + 1)
        return lens[own], table[own]

    def by_head(self, q: object) -> object:
        """Queries [max_batch, num_q_heads, head_dim] as a step takes them; its outputs go back by a reshape, too."""
        return q.reshape(self.max_batch * self.shape.num_kv_heads, self.shape.group_size, self.shape.head_dim)

    def allocate(self, row: int) -> int:
        """Opens an empty row in all layers."""
        for layer in range(self.num_layers):
            for lane in self.lanes(layer, [row]).tolist():
                self.pool.allocate(lane)
        return row

    def fork(self, source: int, row: int) -> int:
        """Opens a row that has another's full pages, as many as each head of each layer keeps."""
        for layer in range(self.num_layers):
            for lane, new in zip(self.lanes(layer, [source]).tolist(), self.lanes(layer, [row]).tolist()):
                self.pool.fork(lane, row=new)
        return row

    def fill(self, layer: int, row: int, k: cupy.ndarray, v: cupy.ndarray) -> None:
        """A run of new tokens for one row; k, v [tokens, num_kv_heads, head_dim]."""
        self.pool.fill_rows(self.lanes(layer, [row]), *(new.swapaxes(0, 1)[:, :, None] for new in (k, v)))

    def append(self, layer: int, rows: object, k: cupy.ndarray, v: cupy.ndarray) -> None:
        """One new token for each of rows [n]; k, v [n, num_kv_heads, head_dim]."""
        lanes = self.lanes(layer, rows)
        self.pool.fill_rows(lanes, *(new.reshape(len(lanes), 1, 1, new.shape[-1]) for new in (k, v)))

    def evict(self, layer: int, row: int, kept: Sequence[object]) -> np.ndarray:
        """Each KV head keeps its pages at the places kept[head], ascending (pkvsim.selection.evictions.kept_pages);
        returns the pages that went back to the pool. Raises ValueError naming `kept`, and changes nothing."""
        lanes = self.lanes(layer, [row])
        if len(kept) != len(lanes):
            raise ValueError(f"kept: expected places of {len(lanes)} KV heads, got {len(kept)}")
        return self.pool.evict_rows(lanes.tolist(), kept)

    def free(self, row: int) -> None:
        """Closes a row in all layers and gives its pages back, except those that another row has."""
        for layer in range(self.num_layers):
            for lane in self.lanes(layer, [row]).tolist():
                self.pool.free(lane)
