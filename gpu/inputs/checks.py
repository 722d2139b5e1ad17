"""Checks on what reaches the engine. Every failure is a ValueError that names the argument, before any launch."""
from __future__ import annotations

import numbers

import numpy as np

from gpu.inputs.arrays import ArrayView
from gpu.inputs.block_tables import StepTables
from gpu.kernels.variant import DTYPES, TILE_TOKENS
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions
from pkvsim.shapes import check_int

MAX_COST = 2**31  # the planner counts tiles in 32 bits
MAX_WARPS, MAX_STAGES = 32, 64  # of a variant that is asked for; what fits is gpu.kernels.variant's to say
ID_DTYPES = ("int32", "int64")  # of page ids
MAX_FLOAT32 = 3.4028234663852886e38  # numbers travel to the kernels as float32


def expect(name: str, expected: str, got: object, ok: bool) -> None:
    """Raises ValueError naming the argument unless ok."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_lengths(seq_lens: np.ndarray, page_size: int, max_pages: int) -> None:
    """Host lengths: none negative, none longer than the block table has pages for."""
    if seq_lens.size == 0:
        return
    low, high, limit = int(seq_lens.min()), int(seq_lens.max()), max_pages * page_size
    expect("seq_lens", "no negative length", low, low >= 0)
    expect("seq_lens", f"at most {limit} tokens (block_table has {max_pages} pages of {page_size})", high,
           high <= limit)


def check_plan(views: dict[str, ArrayView], device: int) -> None:
    """Shapes, dtypes and places of StepTables.views()."""
    lengths = "last_page_len" if "last_page_len" in views else "seq_lens"
    batch = _check_row("batch_size", lengths, views[lengths])
    expect(lengths, "at least one row", views[lengths], batch > 0)
    if "block_table" in views:
        table = views["block_table"]
        expect("block_table", f"{' or '.join(ID_DTYPES)} [{batch}, max_pages]", table,
               table.dtype in ID_DTYPES and len(table.shape) == 2 and table.shape[0] == batch)
        expect("block_table", "contiguous rows", f"strides {table.strides}",
               table.strides[1] == 1 or table.shape[1] <= 1)
        expect("block_table", "rows less than 2^31 elements apart", table.strides[0], abs(table.strides[0]) < 2**31)
    else:
        _check_row(batch + 1, "indptr", views["indptr"])
        count = _check_row("num_indices", "indices", views["indices"], ID_DTYPES)
        expect("indices", "fewer than 2^31 entries", count, count < 2**31)
    for name, array in views.items():
        expect(name, f"an array on the host or on cuda:{device}", array, array.device in (-1, device))


def _check_row(size: int | str, name: str, array: ArrayView, dtypes: tuple[str, ...] = ("int32",)) -> int:
    """A contiguous array of one axis; its size. A size given as text may be any."""
    expect(name, f"{' or '.join(dtypes)} [{size}]", array,
           array.dtype in dtypes and len(array.shape) == 1 and (isinstance(size, str) or array.shape[0] == size))
    expect(name, "contiguous", f"strides {array.strides}", array.strides == (1,) or array.shape[0] <= 1)
    return array.shape[0]


def check_current(device: int, current: int) -> None:
    """The GPU of an engine is the current one, where tables on the host are copied to."""
    expect("device", f"cuda:{device}, where the engine was made, to be the current one, or tables that are there",
           f"cuda:{current}", current == device)


def check_contents(host: StepTables, page_size: int) -> None:
    """Lengths and row ends of tables on the host, where the page ids need not be."""
    if not host.is_csr:
        check_lengths(host.seq_lens, page_size, host.block_table.shape[1])
        return
    pages, last = np.diff(host.indptr.astype(np.int64)), int(host.indptr[-1])
    expect(
        "indptr",
        f"offsets that do not fall, from 0 on to at most {host.indices.shape[0]} indices",
        host.indptr.tolist(),
        host.indptr[0] >= 0 and bool((pages >= 0).all()) and last <= host.indices.shape[0],
    )
    name = "seq_lens" if host.last_page_len is None else "last_page_len"
    given = host.seq_lens if host.last_page_len is None else host.last_page_len
    low, high = (0, pages * page_size) if host.last_page_len is None else (1, page_size)
    wrong: np.ndarray = (given < low) | (given > high)
    if host.last_page_len is not None:
        wrong &= pages > 0  # rows without pages have no last one
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"{name}: expected {low} to {int(np.broadcast_to(high, pages.shape)[row])} tokens in row {row} "
            f"of {int(pages[row])} pages of {page_size}, got {int(given[row])}"
        )


def check_room(views: dict[str, ArrayView], heads: DecodeShape, *, segment_cost: int, tile_cost: int = 1) -> None:
    """Rows as long as the table has room for are a cost that the planner can count. tile_cost: of a tile, at most."""
    name = "indices" if "indices" in views else "block_table"
    if name == "indices":  # which no two rows share
        (pages,), (entries,) = views[name].shape, views["indptr"].shape
        tiles = -(-pages * heads.page_size // TILE_TOKENS) + entries * (1 + segment_cost)
    else:
        rows, pages = views[name].shape
        tiles = rows * (-(-pages * heads.page_size // TILE_TOKENS) + segment_cost)
    tiles *= heads.num_kv_heads * tile_cost
    expect(name, f"room for fewer than {MAX_COST} tiles of {TILE_TOKENS} tokens over all rows and KV heads",
           tiles, tiles < MAX_COST)


def check_engine(shape: object, dtype: object, schedule: object, schedules: tuple[str, ...], options: object,
                 layout: object, tile_tokens: object, variant: object) -> None:
    """What a DecodeEngine is made with, as far as no kernel's limits come in (gpu.kernels.variant)."""
    expect("shape", "a DecodeShape", repr(shape), isinstance(shape, DecodeShape))
    expect("dtype", f"one of {', '.join(DTYPES)}", repr(dtype), isinstance(dtype, str) and dtype in DTYPES)
    expect("schedule", f"one of {', '.join(schedules)}", repr(schedule),
           isinstance(schedule, str) and schedule in schedules)
    expect("options", "AttentionOptions", repr(options), isinstance(options, AttentionOptions))
    expect("layout", "HND or NHD", repr(layout), isinstance(layout, str) and layout in ("HND", "NHD"))
    tile_tokens = check_int("tile_tokens", tile_tokens, 1)
    expect("tile_tokens", f"a positive multiple of {TILE_TOKENS}", tile_tokens, tile_tokens % TILE_TOKENS == 0)
    if variant is not None:
        expect("variant", "(warps, stages) or None", repr(variant), isinstance(variant, tuple) and len(variant) == 2)
        for name, value, most in zip(("variant[0]", "variant[1]"), variant, (MAX_WARPS, MAX_STAGES)):
            check_int(name, value, 1, most)


def check_scale(scale: object) -> float:
    """The scale of the logits: a finite number on the host, in the range of float32."""
    if not isinstance(scale, numbers.Real) or not abs(scale) <= MAX_FLOAT32:
        raise ValueError(f"scale: expected a finite number in the range of float32, got {scale!r}")
    return float(scale)


def check_routed(**given: object) -> None:
    """Arguments of run() that a route need not serve, by name."""
    for name, value in given.items():
        expect(name, "None with schedule='auto', whose routes need not serve it", type(value).__name__, value is None)


def check_page_ids(host: StepTables, seq_lens: np.ndarray, page_size: int, num_pages: int) -> None:
    """Every entry that a row owns is a page of the pool. Host arrays; entries past a row's end may hold anything."""
    rows, places, ids = host.owned_ids(seq_lens, page_size)
    bad = np.flatnonzero((ids < 0) | (ids >= num_pages))
    if len(bad):
        first = bad[0]
        raise ValueError(f"{'indices' if host.is_csr else 'block_table'}: expected page ids in 0..{num_pages - 1}, got "
                         f"{int(ids[first])} at row {int(rows[first])}, column {int(places[first])}")


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
    # Kernels read queries in pairs, of 8-bit pages two pairs at a time, and write four elements at once.
    for name, boundary in (("q", 4 if options.kv_dtype is None else 8), ("out", 8)):
        if name in given:
            check_boundary(name, given[name], boundary)
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


def check_boundary(name: str, array: ArrayView, boundary: int) -> None:
    """ValueError unless the array begins at a multiple of so many bytes, as wide loads and stores must."""
    at = array.pointer % boundary
    expect(name, f"an address in multiples of {boundary} bytes", f"address % {boundary} = {at}", at == 0)


def check_contiguous(name: str, array: ArrayView) -> None:
    """ValueError unless the elements lie in order."""
    expect(name, "contiguous", f"strides {array.strides}", _contiguous(array))


def _contiguous(array: ArrayView) -> bool:
    """Whether elements lie in order; the strides of axes of one element do not matter."""
    step = 1
    for size, stride in zip(reversed(array.shape), reversed(array.strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
