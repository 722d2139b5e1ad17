"""Checks on what reaches the engine. Every failure is a ValueError that names the argument, before any launch."""
from __future__ import annotations

import math
import numbers

import numpy as np

from gpu.arrays import ArrayView
from gpu.config import DTYPES, TILE_TOKENS
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions


MAX_COST = 2**31  # the planner counts tiles in 32 bits


def expect(name: str, expected: str, got: object, ok: bool) -> None:
    """Raises ValueError naming the argument unless ok."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_lengths(seq_lens: np.ndarray, shape: DecodeShape, max_pages: int) -> None:
    """Host lengths: none negative, none longer than the block table has pages for."""
    if seq_lens.size == 0:
        return
    low, high, limit = int(seq_lens.min()), int(seq_lens.max()), max_pages * shape.page_size
    expect("seq_lens", "no negative length", low, low >= 0)
    expect("seq_lens", f"at most {limit} tokens (block_table has {max_pages} pages of {shape.page_size})", high,
           high <= limit)


def check_plan(seq_lens: ArrayView, block_table: ArrayView, device: int) -> None:
    """Shapes and dtypes of the plan's two arrays."""
    expect("seq_lens", "int32 [batch_size]", seq_lens, seq_lens.dtype == "int32" and len(seq_lens.shape) == 1)
    batch = seq_lens.shape[0]
    expect("seq_lens", "at least one row", seq_lens, batch > 0)
    expect("block_table", f"int32 [{batch}, max_pages]", block_table,
           block_table.dtype == "int32" and len(block_table.shape) == 2 and block_table.shape[0] == batch)
    expect("seq_lens", "contiguous", f"strides {seq_lens.strides}", seq_lens.strides == (1,) or batch == 1)
    expect("block_table", "contiguous rows", f"strides {block_table.strides}",
           block_table.strides[1] == 1 or block_table.shape[1] <= 1)
    for name, array in (("seq_lens", seq_lens), ("block_table", block_table)):
        expect(name, f"an array on the host or on cuda:{device}", array, array.device in (-1, device))


def check_room(block_table: ArrayView, heads: DecodeShape, *, segment_cost: int) -> None:
    """Rows as long as the table has room for are a cost that the planner can count."""
    batch, max_pages = block_table.shape
    tiles = batch * heads.num_kv_heads * (-(-max_pages * heads.page_size // TILE_TOKENS) + segment_cost)
    expect("block_table", f"room for fewer than {MAX_COST} tiles of {TILE_TOKENS} tokens over all rows and KV heads",
           tiles, tiles < MAX_COST)


def check_scale(scale: object) -> float:
    """The scale of the logits: a finite number on the host."""
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    return float(scale)


def check_routed(**given: object) -> None:
    """Arguments of run() that a route need not serve, by name."""
    for name, value in given.items():
        expect(name, "None with schedule='auto', whose routes need not serve it", type(value).__name__, value is None)


def check_page_ids(block_table: np.ndarray, seq_lens: np.ndarray, page_size: int, num_pages: int) -> None:
    """Every entry that a row owns is a page of the pool. Host arrays; entries past a row's end may hold anything."""
    owned = np.arange(block_table.shape[1])[None, :] < -(-seq_lens.astype(np.int64) // page_size)[:, None]
    bad = owned & ((block_table < 0) | (block_table >= num_pages))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"block_table: expected page ids in 0..{num_pages - 1}, got {int(block_table[row, column])} "
                         f"at row {row}, column {column}")


def check_run(shape: DecodeShape, dtype: str, options: AttentionOptions, layout: str, batch: int, device: int,
              given: dict[str, ArrayView]) -> None:
    """Shapes, dtypes, devices and strides of a run's arrays, by argument name; what was not given is not there."""
    rows = (batch,) if options.query_tokens == 1 else (batch, options.query_tokens)
    heads, v_dim = (*rows, shape.num_q_heads), options.value_dim(shape)
    expected = {"q": (dtype, (*heads, shape.head_dim)), "out": (dtype, (*heads, v_dim)), "lse": ("float32", heads),
                "sinks": ("float32", (shape.num_q_heads,)), "query_lens": ("int32", (batch,))}
    for name, (kind, wanted) in expected.items():
        array = given.get(name)
        if array is None:
            continue
        expect(name, f"{kind} {list(wanted)}", array, array.dtype == kind and array.shape == wanted)
        expect(name, "contiguous", f"strides {array.strides}", _contiguous(array))
    if options.kv_dtype is not None:  # read two pairs at a time
        expect("q", "an 8-byte boundary", f"address % 8 = {given['q'].pointer % 8}", given["q"].pointer % 8 == 0)
    expect("sinks", "float32 logits" if options.sinks else "None, without options.sinks", given.get("sinks"),
           ("sinks" in given) == options.sinks)
    expect("query_lens", "None with one query token per row", given.get("query_lens"),
           options.query_tokens > 1 or "query_lens" not in given)
    for name, head_dim in (("k_pages", shape.head_dim), ("v_pages", v_dim)):
        _check_pages(name, given[name], shape, head_dim, page_dtypes(dtype, options), layout)
    k, v = given["k_pages"], given["v_pages"]
    expect("v_pages", f"the page count of k_pages, {k.shape[0]}", v.shape[0], v.shape[0] == k.shape[0])
    library = given["q"].library
    for name, array in given.items():
        expect(name, f"an array on cuda:{device}", array, array.device == device)
        expect(name, f"an array of the same library as q ({library})", array.library, array.library == library)


def page_dtypes(dtype: str, options: AttentionOptions) -> tuple[str, ...]:
    """What the arrays of the cache may say they are of: CuPy has no FP8, so that its bytes serve as well."""
    if options.kv_dtype is None:
        return (dtype,)
    return (options.kv_dtype,) if options.kv_dtype == "int8" else (options.kv_dtype, "uint8")


def _check_pages(name: str, pages: ArrayView, shape: DecodeShape, head_dim: int, dtypes: tuple[str, ...],
                 layout: str) -> None:
    inner = (shape.num_kv_heads, shape.page_size) if layout == "HND" else (shape.page_size, shape.num_kv_heads)
    expect(name, f"{' or '.join(dtypes)} [num_pages, {', '.join(map(str, (*inner, head_dim)))}] ({layout})", pages,
           pages.dtype in dtypes and len(pages.shape) == 4 and pages.shape[1:] == (*inner, head_dim))
    expect(name, "a contiguous last axis", f"strides {pages.strides}", pages.strides[3] == 1)
    multiple = 8 if dtypes[0] in DTYPES else 16
    wanted = f"other strides in multiples of {multiple} elements, on a 16-byte boundary"
    expect(name, wanted, f"strides {pages.strides}",
           all(stride % multiple == 0 for stride in pages.strides[:3]) and pages.pointer % 16 == 0)
    expect(name, "head and token strides of 0 to 2^31 - 1 elements", f"strides {pages.strides}",
           all(0 <= stride < 2**31 for stride in pages.strides[1:3]))


def _contiguous(array: ArrayView) -> bool:
    """Whether elements lie in order; the strides of axes of one element do not matter."""
    step = 1
    for size, stride in zip(reversed(array.shape), reversed(array.strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
