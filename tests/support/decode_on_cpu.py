"""Decode kernels built for the CPU (decode_harness.cpp), and steps for them with poison wherever no row reads."""
from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cpp
import ml_dtypes
import numpy as np

from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR
from gpu.kernels.launch import Arguments
from gpu.kernels.variant import RECORD_BYTES, KernelConfig, kernel_config, read_config
from pkvsim import AttentionOptions, DecodeShape, make_schedule
from pkvsim.reference.append import FP8_DTYPES, dequantize
from pkvsim.schedule.costs import BalancedCosts, SharedCosts
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.page_lists import PageList

HARNESS = Path(__file__).with_name("decode_harness.cpp")
LENGTHS = (0, 1, 15, 16, 17, 33, 70, 200)
CTAS = 3
LOG2_E = 1.4426950408889634
NAN_CODES = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7E, "int8": 0x7F}  # int8 has none: its largest number


@functools.cache
def build(config: KernelConfig, balanced: bool, converts_e4m3: bool, selected: bool = False,
          page_lse: bool = False) -> ctypes.CDLL:
    """converts_e4m3: whether the GPU that is played has the instruction, as those from sm_89 on."""
    folder = Path(tempfile.mkdtemp(prefix="pkv_decode_"))
    try:
        for path in SOURCE_DIR.glob("*.cu*"):
            shutil.copy(path, folder)
        for instructions in ("mma.cuh", "wgmma.cuh"):
            (folder / instructions).write_text("")
        defines = config.read_defines() if config.read_columns else config.defines()
        if selected or page_lse:
            defines = config.selected_defines(selected=selected, page_lse=page_lse)
        defines |= {"BALANCED": int(balanced), "CONVERTS_E4M3": int(converts_e4m3)}
        return cpp.build(HARNESS, folder / "decode.so", "-std=c++20", "-O1", "-w", f"-I{folder}", f"-I{HARNESS.parent}",
                         *(f"-D{name}={value}" for name, value in defines.items()))
    finally:
        shutil.rmtree(folder)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy on a 16-byte boundary."""
    whole = np.zeros(array.nbytes + 16, np.uint8)
    start = -whole.ctypes.data % 16
    placed = whole[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


@dataclass(slots=True)
class Step:
    """Arrays of a decode step; k, v and their scales as stored, k_values, v_values float64 as meant."""

    shape: DecodeShape
    options: AttentionOptions
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None
    table: np.ndarray
    lens: np.ndarray
    sinks: np.ndarray | None
    query_lens: np.ndarray | None
    groups: PrefixGroups | None = None  # of rows whose tables begin with the same pages
    lists: PageList | None = None  # the pages that each (row, KV head) reads, int32

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """(K, V) as float64; 0 for NaN, which only tokens without a row may hold."""
        kv_dtype, pairs = self.options.kv_dtype, ((self.k, self.k_scales), (self.v, self.v_scales))
        if kv_dtype is None:
            return tuple(np.nan_to_num(pages.astype(np.float64)) for pages, _ in pairs)
        return tuple(np.nan_to_num(dequantize(pages, kv_dtype, scales)) for pages, scales in pairs)


def make_step(shape: DecodeShape, dtype: str, options: AttentionOptions, *, seed: int, lens: tuple[int, ...] = LENGTHS,
              spread: float = 1.0, ragged: bool = False, groups: PrefixGroups | None = None) -> Step:
    """spread: the scales' powers of two reach so far up and down. ragged: rows have fewer query tokens than others.
    groups: rows that are long enough begin with the pages of their group's first such row.
    Raises ValueError where a row has tokens, but fewer than query tokens, which pkvsim.reference refuses."""
    rng, slots, kv_dtype = np.random.default_rng(seed), shape.page_size, options.kv_dtype
    lens = np.array(lens, np.int32)
    if not ragged and ((lens > 0) & (lens < options.query_tokens)).any():
        raise ValueError(f"lens: expected 0 or at least {options.query_tokens} query tokens of each row, got {lens}")
    pages = -(-lens // slots)
    count = int(pages.sum()) + 3
    table = np.full((len(lens), int(pages.max()) + 1), 0x7FFFFFFF, np.int32)
    table[np.arange(table.shape[1]) < pages[:, None]] = rng.permutation(count)[:pages.sum()]
    first: dict[int, int] = {}
    for row, group in enumerate(() if groups is None else groups.group_of_row.tolist()):
        prefix = int(groups.prefix_pages[group]) if group >= 0 else 0
        if 0 < prefix * slots <= lens[row]:
            table[row, :prefix] = table[first.setdefault(group, row), :prefix]
    owned = np.zeros((count, slots), bool)
    for row, length in enumerate(lens):
        at = np.arange(length)
        owned[table[row, at // slots], at % slots] = True
    pools, dtype = [], np.dtype(getattr(ml_dtypes, dtype, dtype))
    heads = shape.num_kv_heads
    for width in (shape.head_dim, options.value_dim(shape)):
        x, scales = rng.standard_normal((count, heads, slots, width)) * 0.5, None
        if kv_dtype is None:
            stored = x.astype(dtype)
        else:
            int8 = kv_dtype == "int8"
            steps = np.clip(np.rint(x * 64), -128, 127) if int8 else x * 8
            codes = steps.astype(np.int8 if int8 else FP8_DTYPES[kv_dtype])
            stored = codes.view(np.uint8)
            sized = {"tensor": (1,), "page": (count, heads), "token": (count, heads, slots)}[options.kv_scales]
            unit = 1 / 64 if int8 else 1 / 8
            scales = aligned((unit * np.exp2(rng.uniform(-spread, spread, sized))).astype(np.float32))
            if options.kv_scales == "page":
                scales[~owned.any(axis=1)] = np.nan
            if options.kv_scales == "token":
                scales.swapaxes(1, 2)[~owned] = np.nan
        stored.swapaxes(1, 2)[~owned] = np.nan if kv_dtype is None else NAN_CODES[kv_dtype]
        pools += [aligned(stored), scales]
    tokens = () if options.query_tokens == 1 else (options.query_tokens,)
    q = aligned(rng.standard_normal((len(lens), *tokens, shape.num_q_heads, shape.head_dim)).astype(dtype))
    sinks = rng.standard_normal(shape.num_q_heads).astype(np.float32) if options.sinks else None
    counts = np.minimum(lens, rng.integers(0, options.query_tokens + 1, len(lens))).astype(np.int32) if ragged else None
    return Step(shape, options, q, pools[0], pools[2], pools[1], pools[3], table, lens, sinks, counts, groups)


def run(step: Step, schedule: str, *, variant: tuple[int, int] | None = (2, 2), stages: int | None = None,
        read_stages: int | None = 2, converts_e4m3: bool = True, hurry: bool = False, ctas: int = CTAS,
        costs: BalancedCosts = BalancedCosts(1, 2),  # noqa: B008
        shared_costs: SharedCosts = SharedCosts(), before: tuple[np.ndarray, ...] | None = None,  # noqa: B008
        between: Callable[[np.ndarray], None] | None = None,
        page_lse: np.ndarray | None = None, plan_only: bool = False, capability: int = 90,
        turn_order: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) float64 of a step by schedule "balanced" or "workqueue", or, with groups, by the balanced kernel of
    shared reads, which serve shared_costs.columns, as a GPU of that compute capability has them. hurry: copies arrive as they are started.
    variant, read_stages: None of both is what such a GPU runs. stages: of a ring, where the variant's are too many. costs:
    of balanced. before: the lengths, page table and
    records of plans (and group_of_row, prefix_pages) that each CTA finds until the previous kernel ends.
    page_lse: float32, to be written; the kernel is then the one that does so. plan_only, of a step with lists: returns
    (tasks [num_tasks, 3] of list, tile_begin and tile_end, tasks of each CTA) as they are planned.
    between: changes the records [ctas, 64] int32 that the first of two launches left, by which the second need not give
    the same result any more. turn_order: of warps and CTAs, 32 random bits; by default it goes on from the last run's."""
    shape, options, balanced = step.shape, step.options, schedule == "balanced"
    dtype = step.q.dtype.name
    config = kernel_config(shape, dtype, 90, variant=variant, options=options)
    if stages is not None:
        config = replace(config, stages=stages)
    groups = step.groups
    if groups is not None:
        config = read_config(config, capability, columns=shared_costs.columns, stages=read_stages)
        shared_costs = shared_costs._replace(columns=config.read_columns)
    library = build(config, balanced, converts_e4m3, step.lists is not None, page_lse is not None)
    library.run.restype = ctypes.c_char_p
    ctypes.c_int.in_dll(library, "copies_hurry").value = int(hurry)
    if turn_order is not None:
        ctypes.c_uint.in_dll(library, "turn_order").value = turn_order
    out = np.full((*step.q.shape[:-1], options.value_dim(shape)), np.nan, step.q.dtype)
    lse = np.full(step.q.shape[:-1], np.nan, np.float32)
    heads = DecodeShape(shape.num_q_heads, shape.num_kv_heads * config.head_split, shape.head_dim, shape.page_size)
    if balanced:
        partials = aligned(np.full(config.workspace_bytes(ctas, len(step.lens) * heads.num_kv_heads), 0xFF, np.uint8))
    else:
        queue = make_schedule("workqueue", heads, step.lens, splits=3, tile_tokens=32, window=options.reach)
        tasks, offsets = np.ascontiguousarray(queue.tasks), queue.split_offsets.astype(np.int32)
        partials = aligned(np.zeros(max(1, int(offsets[-1])) * heads.num_kv_heads * config.state_bytes, np.uint8))
    base = shape.head_dim**-0.5
    cap = options.soft_cap
    scale, height = (base * LOG2_E, 0.0) if cap is None else (base / cap, cap * LOG2_E)
    strides = {f"{name}_{axis}_stride": pool.strides[i] // pool.itemsize
               for name, pool in (("k", step.k), ("v", step.v)) for i, axis in enumerate(("page", "head", "token"))}
    scale_strides = [stride // 4 for stride in step.k_scales.strides] if options.kv_scales in ("page", "token") else []
    values = {
        "q": address(step.q), "k_pages": address(step.k), "v_pages": address(step.v), "page_ids": address(step.table),
        "lengths": address(step.lens), "query_lens": address(step.query_lens), "sinks": address(step.sinks),
        "out": address(out), "lse": address(lse), "partials": address(partials), **strides,
        "batch_size": len(step.lens), "num_kv_heads": heads.num_kv_heads, "table_stride": step.table.shape[1],
        "num_pages": len(step.k), "window": options.window or 0, "scale": scale, "cap": height,
        "selected_pages": address(step.lists and step.lists.pages),
        "selected_counts": address(step.lists and step.lists.counts),
        "max_selected": step.lists.pages.shape[2] if step.lists else 0,
        "page_lse": address(page_lse), "page_lse_tiles": 0 if page_lse is None else page_lse.shape[2],
        "k_scales": address(step.k_scales), "v_scales": address(step.v_scales), "v_scale": 1.0,
        **dict(zip(("scale_page_stride", "scale_head_stride", "scale_token_stride"), (*scale_strides, 0, 0, 0)))}
    present = fields.present(fields.DECODE, config.selected_defines(selected=step.lists is not None,
                                                                    page_lse=page_lse is not None))
    written = Arguments(f"[{''.join(field.letter for field in present)}]")
    written.write(*(values[field.name] for field in present))
    (start,) = written.starts
    assert library.arguments_bytes() == written.num_bytes
    if plan_only:
        library.list_tasks.restype = ctypes.c_char_p
        sizes = (ctypes.c_int * 5)(*costs, step.table.shape[1] * shape.page_size)
        lines = np.zeros((len(step.lens) * heads.num_kv_heads + ctas, 3), np.int32)
        counts = np.zeros(ctas, np.int32)
        complaint = library.list_tasks(ctas, ctypes.c_void_p(start), sizes, *map(ctypes.c_void_p, map(address, (
            lines, counts))))
        assert complaint is None, complaint
        return lines[: counts.sum()], counts

    def write_late(array: np.ndarray, was: np.ndarray) -> None:
        assert array.shape == was.shape and was.flags.c_contiguous
        library.write_late(ctypes.c_void_p(address(array)), ctypes.c_void_p(address(was)), array.size)

    if balanced:
        max_tokens = step.table.shape[1] * shape.page_size
        pointers = () if groups is None else (groups.group_of_row, groups.prefix_pages)
        sizes = (*costs, max_tokens) if groups is None else (
            *costs, *shared_costs, len(groups.prefix_pages), max_tokens)  # fmt: skip
        first = None
        slots, records, step_records, row_slots = np.split(partials, np.cumsum(
            [config.slots_bytes(ctas), ctas * RECORD_BYTES, ctas * config.step_record_bytes * (groups is not None)]))
        for _ in range(2):  # the second finds the first one's records
            if before is not None:
                for array, was in zip((step.lens, step.table, records.view(np.int32), *pointers), before):
                    write_late(array, was)
            complaint = library.run(ctas, ctypes.c_void_p(start), (ctypes.c_int * len(sizes))(*sizes),
                                    *(ctypes.c_void_p(address(array)) for array in pointers))
            assert complaint is None, complaint
            assert (slots == 0xFF).all() and (row_slots == 0xFF).all()  # empty again, for the next launch
            if first is None:
                first = out.tobytes(), lse.tobytes()
                out[...], lse[...] = np.nan, np.nan
                if between is not None:
                    between((records if groups is None else step_records).view(np.int32).reshape(ctas, -1))
        assert between is not None or first == (out.tobytes(), lse.tobytes())
    else:
        rows = np.arange(len(step.lens), dtype=np.int32)
        complaint = library.run(ctas, ctypes.c_void_p(start), *map(ctypes.c_void_p, map(address, (tasks, offsets))),
                                (ctypes.c_int * 2)(len(tasks), 2), ctypes.c_void_p(address(rows)))
    assert complaint is None, complaint
    return out.astype(np.float64), lse.astype(np.float64)


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
