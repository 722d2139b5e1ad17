"""A paged KV pool on the GPU: allocate rows, append tokens, share, evict, free and reuse pages."""
from __future__ import annotations

from collections.abc import Sequence

import cupy
import numpy as np

from gpu.inputs import arrays
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.kv_types import KV_DTYPES
from pkvsim.memory.page_allocator import PageAllocator


class PagedKVCache:
    """K and V pages [num_pages, num_kv_heads, page_size, head_dim] and the rows that own them.

    combined=True keeps both in one tensor [num_pages, 2, ...], of which k_pages and v_pages are views.
    block_table and seq_lens are host arrays with device copies that device_tables() brings up to date.

    A cache of "float8_e4m3fn", "float8_e5m2" (uint8 arrays, as CuPy has no FP8) or "int8" has scales too, k_scales and
    v_scales as DecodeEngine.run() takes them: float32, by kv_scales [1] each ("tensor", ones to begin with),
    [num_pages, num_kv_heads] ("page") or [num_pages, num_kv_heads, page_size] ("token"); None without. reserve() makes
    room in it and CacheWriter fills it.

    Everything the pool does on the GPU goes to the current stream of one library, which must be the one that the runs
    reading its pages and tables go to.
    """

    __slots__ = ("shape", "k_pages", "v_pages", "k_scales", "v_scales", "_pages", "_table", "_lens", "_stale",
                 "_library", "_device")

    def __init__(self, shape: DecodeShape, *, num_pages: int, max_batch: int, max_seq_len: int,
                 dtype: str = "float16", kv_scales: str | None = None, combined: bool = False,
                 library: str = "cupy") -> None:
        """dtype: of the pages; kv_scales: as AttentionOptions has it. library: "cupy" or "torch", whichever the arrays
        of the runs come from.

        Raises ValueError naming the argument.
        """
        if library not in ("cupy", "torch"):
            raise ValueError(f"library: expected cupy or torch, got {library!r}")
        self._library, self._device = library, cupy.cuda.Device().id
        if dtype in ("float16", "bfloat16"):
            kind = AttentionOptions(kv_scales=kv_scales).kv_scales
            try:
                element = cupy.dtype(dtype)
            except TypeError as error:
                raise ValueError(f"dtype: this CuPy ({cupy.__version__}) has no {dtype}") from error
        elif dtype in KV_DTYPES:
            kind = AttentionOptions(kv_dtype=dtype, kv_scales=kv_scales).kv_scales
            element = cupy.dtype("int8" if dtype == "int8" else "uint8")
        else:
            raise ValueError(f"dtype: expected float16, bfloat16 or one of {', '.join(KV_DTYPES)}, got {dtype!r}")
        self.shape = shape
        self._pages = PageAllocator(num_pages=num_pages, page_size=shape.page_size, max_batch=max_batch,
                                    max_seq_len=max_seq_len)
        page = (shape.num_kv_heads, shape.page_size, shape.head_dim)
        scaled = {"tensor": (1,), "page": (num_pages, page[0]), "token": (num_pages, *page[:2])}.get(kind)
        self.k_scales = self.v_scales = None
        with arrays.on_stream(library, self._device):
            if combined:
                both = cupy.zeros((num_pages, 2, *page), dtype=element)
                self.k_pages, self.v_pages = both[:, 0], both[:, 1]
            else:
                self.k_pages = cupy.zeros((num_pages, *page), dtype=element)
                self.v_pages = cupy.zeros((num_pages, *page), dtype=element)
            if scaled is not None:
                self.k_scales, self.v_scales = cupy.ones(scaled, cupy.float32), cupy.ones(scaled, cupy.float32)
            self._table = cupy.asarray(self.block_table)
            self._lens = cupy.asarray(self.seq_lens)
        self._stale = False

    @property
    def block_table(self) -> np.ndarray:
        return self._pages.block_table  # [max_batch, max_pages] int32

    @property
    def seq_lens(self) -> np.ndarray:
        return self._pages.seq_lens  # [max_batch] int32

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free_pages

    def device_tables(self) -> tuple[cupy.ndarray, cupy.ndarray]:
        """(seq_lens, block_table) on the device; the same two arrays on every call."""
        if self._stale:
            with arrays.on_stream(self._library, self._device):
                self._table.set(self.block_table)
                self._lens.set(self.seq_lens)
            self._stale = False
        return self._lens, self._table

    def allocate(self, row: int | None = None) -> int:
        """Opens an empty row and returns it."""
        return self._pages.allocate(row)

    def fork(self, source: int, *, pages: int | None = None, row: int | None = None) -> int:
        """Opens a row that begins with another's first full pages (by default all), which both then have."""
        row = self._pages.fork(source, pages=pages, row=row)
        self._stale = True
        return row

    def evict(self, row: int, kept: object) -> np.ndarray:
        """A row keeps its pages at the places `kept` [n], ascending, such as pkvsim.selection.evictions gives; returns
        the ids of the pages that went back to the pool, those that no other row has.

        The row is then as long as what it keeps, and no page moves. Keys stay rotated as they are, so those that are
        appended later must come rotated by their true positions, which CacheWriter, counting by length, no longer
        knows; and a window counts kept tokens. Raises ValueError and changes nothing where places do not ascend.
        """
        return self.evict_rows([row], [kept])

    def evict_rows(self, rows: Sequence[int], kept: Sequence[object]) -> np.ndarray:
        """evict() of several rows, each with places of its own: all of them or, where one cannot be, none."""
        gone = self._pages.evict_rows(rows, kept)
        self._stale = True
        return gone

    def free(self, row: int) -> None:
        """Closes a row and gives its pages back, except those that another row has."""
        self._pages.free(row)
        self._stale = True

    def reserve(self, rows: object, counts: object) -> np.ndarray:
        """Lengthens rows [n] by counts [n] tokens, which CacheWriter.append then writes; returns the old lengths [n].

        Raises ValueError and changes nothing where rows or pages do not fit.
        """
        old = self._pages.extend(np.asarray(rows), np.asarray(counts))
        self._stale = True
        return old

    def append(self, rows, k: cupy.ndarray, v: cupy.ndarray) -> None:
        """One new token for each of rows [n]; k, v [n, num_kv_heads, head_dim]."""
        rows = np.asarray(rows, dtype=np.int64)
        self._check_tokens(k, v, len(rows))
        self._write(rows, 1, k, v)

    def fill(self, row: int, k: cupy.ndarray, v: cupy.ndarray) -> None:
        """A run of new tokens for one row; k, v [tokens, num_kv_heads, head_dim]."""
        self._check_tokens(k, v, len(k))
        self._write(np.array([row]), len(k), k, v)

    def fill_rows(self, rows, k: cupy.ndarray, v: cupy.ndarray) -> None:
        """A run of new tokens for each of rows [n]; k, v [n, tokens, num_kv_heads, head_dim]."""
        rows = np.asarray(rows, dtype=np.int64)
        if k.ndim != 4 or len(k) != len(rows) or v.shape != k.shape:
            raise ValueError(f"k, v: expected [{len(rows)}, tokens, {self.shape.num_kv_heads}, {self.shape.head_dim}], "
                             f"got {list(k.shape)} and {list(v.shape)}")
        tokens = k.shape[1]
        k, v = (new.reshape(-1, *new.shape[2:]) for new in (k, v))
        self._check_tokens(k, v, len(rows) * tokens)
        self._write(rows, tokens, k, v)

    def _write(self, rows: np.ndarray, tokens: int, k: cupy.ndarray, v: cupy.ndarray) -> None:
        """`tokens` new ones for each of rows; k, v [len(rows) * tokens, num_kv_heads, head_dim]."""
        old = self._pages.extend(rows, np.full(len(rows), tokens, dtype=np.int64))
        positions = old[:, None] + np.arange(tokens)
        self._store(np.repeat(rows, tokens), positions.reshape(-1), k, v)

    def _store(self, rows: np.ndarray, positions: np.ndarray, k: cupy.ndarray, v: cupy.ndarray) -> None:
        # 64-bit page ids: the element offsets that CuPy makes of them pass 2^32 in a large pool.
        pages = self.block_table[rows, positions // self.shape.page_size].astype(np.int64)
        slots = (positions % self.shape.page_size).astype(np.int64)
        with arrays.on_stream(self._library, self._device):
            pages, slots = cupy.asarray(pages), cupy.asarray(slots)
            self.k_pages[pages, :, slots] = k
            self.v_pages[pages, :, slots] = v
        self._stale = True

    def _check_tokens(self, k: cupy.ndarray, v: cupy.ndarray, tokens: int) -> None:
        if self.k_scales is not None:
            raise ValueError("dtype: expected a 16-bit cache; reserve() and CacheWriter.append() fill one of 8 bits")
        expected = (tokens, self.shape.num_kv_heads, self.shape.head_dim)
        for name, array in (("k", k), ("v", v)):
            if not isinstance(array, cupy.ndarray) or array.shape != expected or array.dtype != self.k_pages.dtype:
                found = f"{array.dtype} {list(array.shape)}" if hasattr(array, "dtype") else type(array).__name__
                raise ValueError(f"{name}: expected cupy {self.k_pages.dtype} {list(expected)}, got {found}")
