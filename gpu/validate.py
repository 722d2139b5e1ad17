"""Checks on what reaches the engine. Every failure is a ValueError that names the argument, before any launch."""
from __future__ import annotations

import numpy as np

from gpu.arrays import ArrayView
from pkvsim import DecodeShape


def _expect(name: str, expected: str, got: object, ok: bool) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_lengths(seq_lens: np.ndarray, shape: DecodeShape, max_pages: int) -> None:
    """Host lengths: none negative, none longer than the block table has pages for."""
    if seq_lens.size == 0:
        return
    low, high, limit = int(seq_lens.min()), int(seq_lens.max()), max_pages * shape.page_size
    _expect("seq_lens", "no negative length", low, low >= 0)
    _expect("seq_lens", f"at most {limit} tokens (block_table has {max_pages} pages of {shape.page_size})", high, high <= limit)


def check_plan(seq_lens: ArrayView, block_table: ArrayView, device: int) -> None:
    """Shapes and dtypes of the plan's two arrays."""
    _expect("seq_lens", "int32 [batch_size]", seq_lens, seq_lens.dtype == "int32" and len(seq_lens.shape) == 1)
    batch = seq_lens.shape[0]
    _expect("seq_lens", "at least one row", seq_lens, batch > 0)
    _expect("block_table", f"int32 [{batch}, max_pages]", block_table,
            block_table.dtype == "int32" and len(block_table.shape) == 2 and block_table.shape[0] == batch)
    _expect("seq_lens", "contiguous", f"strides {seq_lens.strides}", seq_lens.strides == (1,) or batch == 1)
    _expect("block_table", "contiguous rows", f"strides {block_table.strides}",
            block_table.strides[1] == 1 or block_table.shape[1] <= 1)
    for name, array in (("seq_lens", seq_lens), ("block_table", block_table)):
        _expect(name, f"an array on the host or on cuda:{device}", array, array.device in (-1, device))


def check_page_ids(block_table: np.ndarray, seq_lens: np.ndarray, page_size: int, num_pages: int) -> None:
    """Every entry that a row owns is a page of the pool. Host arrays; entries past a row's end may hold anything."""
    owned = np.arange(block_table.shape[1])[None, :] < -(-seq_lens.astype(np.int64) // page_size)[:, None]
    bad = owned & ((block_table < 0) | (block_table >= num_pages))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"block_table: expected page ids in 0..{num_pages - 1}, got {int(block_table[row, column])} "
                         f"at row {row}, column {column}")


def check_run(shape: DecodeShape, dtype: str, batch: int, device: int, q: ArrayView, k: ArrayView, v: ArrayView,
              out: ArrayView | None, lse: ArrayView | None) -> None:
    """Shapes, dtypes, devices and strides of a run's arrays."""
    row = (batch, shape.num_q_heads, shape.head_dim)
    page = (shape.num_kv_heads, shape.page_size, shape.head_dim)
    _expect("q", f"{dtype} {list(row)}", q, q.dtype == dtype and q.shape == row)
    for name, pages in (("k_pages", k), ("v_pages", v)):
        _expect(name, f"{dtype} [num_pages, {', '.join(map(str, page))}]", pages,
                pages.dtype == dtype and len(pages.shape) == 4 and pages.shape[1:] == page)
        inner = (shape.head_dim, 1)
        _expect(name, "each page of a head contiguous", f"strides {pages.strides}",
                pages.strides[2:] == inner or (shape.page_size == 1 and pages.strides[3] == 1))
        _expect(name, "page and head strides in multiples of 8 elements, on a 16-byte boundary", f"strides {pages.strides}",
                pages.strides[0] % 8 == 0 and pages.strides[1] % 8 == 0 and pages.pointer % 16 == 0)
        _expect(name, "a head stride of 0 to 2^31 - 1 elements", pages.strides[1], 0 <= pages.strides[1] < 2**31)
    _expect("v_pages", f"the page count and strides of k_pages, {k.shape[0]} and {k.strides}",
            f"{v.shape[0]} and {v.strides}", v.shape == k.shape and v.strides == k.strides)
    arrays = [("q", q), ("k_pages", k), ("v_pages", v)]
    contiguous = (shape.num_q_heads * shape.head_dim, shape.head_dim, 1)
    _expect("q", "contiguous", f"strides {q.strides}", q.strides == contiguous or batch == 1 and q.strides[1:] == contiguous[1:])
    if out is not None:
        arrays.append(("out", out))
        _expect("out", f"{dtype} {list(row)}", out, out.dtype == dtype and out.shape == row)
        _expect("out", "contiguous", f"strides {out.strides}",
                out.strides == contiguous or batch == 1 and out.strides[1:] == contiguous[1:])
    if lse is not None:
        arrays.append(("lse", lse))
        _expect("lse", f"float32 {list(row[:2])}", lse, lse.dtype == "float32" and lse.shape == row[:2])
        _expect("lse", "contiguous", f"strides {lse.strides}",
                lse.strides == (shape.num_q_heads, 1) or batch == 1 and lse.strides[1] == 1)
    for name, array in arrays:
        _expect(name, f"an array on cuda:{device}", array, array.device == device)
        _expect(name, f"an array of the same library as q ({q.library})", array.library, array.library == q.library)
