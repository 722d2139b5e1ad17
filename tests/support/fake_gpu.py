"""A CuPy of NumPy memory and kernels of Python: the engine's host side, whole, on a machine without a GPU.

A kernel gets what the real one gets, addresses and numbers by the names of gpu.kernels.fields, and computes float64
attention from what lies there. So a value under the wrong name, a wrong stride or a copy that was freed shows.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
import types
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from gpu.kernels import fields, this_gpu
from pkvsim import AttentionOptions, DecodeShape, PageList, reference
from pkvsim.schedule import prefixes
from pkvsim.selection import by_name, rules, summaries

LOG2_E = 1.4426950408889634
ENGINE_MODULES = (
    "gpu.decode_engine",
    "gpu.engine.prefixes",
    "gpu.engine.shared_reads",
    "gpu.engine.schedule_engine",
    "gpu.engine.task_list",
    "gpu.engine.plan",
    "gpu.engine.decode_kernels",
    "gpu.cache.writer",
    "gpu.cache.pool",
    "gpu.cache.head_pool",
    "gpu.several.cache",
    "gpu.several.collectives",
    "gpu.several.one_process",
    "gpu.several.rank_engine",
    "gpu.several.sharded_decode",
    "gpu.selection.page_summaries",
    "gpu.selection.page_selector",
)
FLOATS = {0: np.dtype(np.float16), 1: np.dtype(ml_dtypes.bfloat16)}  # by DTYPE_BF16


class FakeArray:
    """A cupy.ndarray as far as the engine looks at one. `host` is its memory."""

    __slots__ = ("host", "device")

    def __init__(self, host: np.ndarray, device: int = 0) -> None:
        self.host, self.device = host, types.SimpleNamespace(id=device)

    @property
    def data(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(ptr=self.host.ctypes.data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.host, name)

    def __getitem__(self, index: object) -> FakeArray:
        return FakeArray(self.host[_host(index)], self.device.id)

    def __setitem__(self, index: object, value: object) -> None:
        index = tuple(_host(part) for part in index) if isinstance(index, tuple) else _host(index)
        self.host[index] = _host(value)

    def __len__(self) -> int:
        return len(self.host)

    def reshape(self, *shape: object) -> FakeArray:
        return FakeArray(self.host.reshape(*shape), self.device.id)

    def swapaxes(self, one: int, other: int) -> FakeArray:
        return FakeArray(self.host.swapaxes(one, other), self.device.id)

    def set(self, host: np.ndarray) -> None:
        self.host[...] = host

    def get(self) -> np.ndarray:
        return self.host.copy()


def _host(array: object) -> object:
    return array.host if isinstance(array, FakeArray) else array


def memory(address: int, dtype: object, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> np.ndarray:
    """The array at an address; strides in elements, contiguous without them."""
    dtype = np.dtype(dtype)
    if strides is None:
        strides = tuple(int(np.prod(shape[axis + 1:])) for axis in range(len(shape)))
    first = np.frombuffer((ctypes.c_ubyte * dtype.itemsize).from_address(address), dtype)
    return np.lib.stride_tricks.as_strided(first, shape, tuple(stride * dtype.itemsize for stride in strides))


@dataclass(slots=True)
class FakeKernel:
    """A launchable kernel; `launches` counts, `grids` has (grid, whether its CTAs go in pairs) of each launch."""

    name: str
    defines: dict[str, int]
    given: tuple[str, ...] | None  # names of the values of a launch, see gpu.kernels.compile.load_kernel
    file_name: str = ""
    launches: int = 0
    grids: list[tuple[object, bool]] = field(default_factory=list)

    def __call__(self, grid: object, args: tuple, stream: int, pairs: bool = False) -> None:
        names = fields.names(self.name, self.defines) if self.given is None else self.given
        assert len(names) == len(args), f"{self.name}: {len(args)} values of {names}"
        values = dict(zip(names, args))
        letters = fields.signature(self.name, self.defines).replace("[", "").replace("]", "")
        for name, letter in zip(fields.names(self.name, self.defines), letters, strict=True):
            assert isinstance(values[name], float if letter == "f" else (int, np.integer)), (name, letter, values[name])
        self.launches += 1
        self.grids.append((grid, pairs))
        if self.name == "pkv_find_prefixes":
            find_prefixes(self.defines, types.SimpleNamespace(**values))
        if self.name == "pkv_summarize_pages":
            summarize(self.defines, types.SimpleNamespace(**values))
        if self.name == "pkv_select_pages":
            select(self.defines, types.SimpleNamespace(**values))
        if self.name.startswith("pkv_decode"):
            decode(self.defines, types.SimpleNamespace(**values), tasks=self.name == "pkv_decode_tasks")


def decode(defines: dict[str, int], given: types.SimpleNamespace, *, tasks: bool) -> None:
    """What the decode kernels leave in out and lse: of all rows, or of those that the tasks name and the empty ones.

    given: the kernel's arguments by name (gpu.kernels.fields).
    """
    batch, heads, stride = given.batch_size, given.num_kv_heads, given.table_stride
    split, tokens, dim = defines["HEAD_SPLIT"], defines["QUERY_TOKENS"], FLOATS[defines["DTYPE_BF16"]]
    page_size, widths = defines["PAGE_SIZE"], (defines["HEAD_DIM"], defines["V_DIM"])
    kv_heads, q_heads = heads // split, heads * defines["GROUP_SIZE"]
    ids = np.int64 if defines.get("TABLE_INT64") else np.int32
    if defines.get("TABLE_CSR"):
        begins = memory(given.row_begins, np.int32, (batch + 1,))
        indices = memory(given.page_ids, ids, (stride,))
        rows = [indices[begin:end] for begin, end in zip(begins, begins[1:])]
    else:
        wide = stride * np.dtype(ids).itemsize
        rows = [memory(given.page_ids + row * wide, ids, (stride,)) for row in range(batch)]
    lens = memory(given.lengths, np.int32, (batch,)).copy()
    if defines.get("LAST_PAGE_LENGTHS"):
        lens = np.array(
            [(len(row) - 1) * page_size + last if len(row) else 0 for row, last in zip(rows, lens)], np.int32
        )
    if not tasks:
        lens = np.minimum(lens, given.max_tokens)
    table = np.zeros((batch, max(1, int((-(-lens // page_size)).max()))), np.int64)
    for line, row, length in zip(table, rows, lens):
        owned = -(-int(length) // page_size)
        line[:owned] = row[:owned]
    pools = [
        memory(at, dim, (given.num_pages, kv_heads, page_size, width), (page, head, token, 1))
        for at, width, page, head, token in (
            (given.k_pages, widths[0], given.k_page_stride, given.k_head_stride, given.k_token_stride),
            (given.v_pages, widths[1], given.v_page_stride, given.v_head_stride, given.v_token_stride),
        )
    ]
    axes = (batch, q_heads) if tokens == 1 else (batch, tokens, q_heads)
    soft_cap = given.cap / LOG2_E if defines["SOFT_CAP"] else None
    options = AttentionOptions(window=given.window if defines["WINDOWED"] else None, soft_cap=soft_cap,
                               sinks=bool(defines["SINKS"]), query_tokens=tokens, v_head_dim=widths[1])
    arrays = (
        DecodeShape(q_heads, kv_heads, widths[0], page_size),
        memory(given.q, dim, (*axes, widths[0])).astype(np.float64),
        *(pool.astype(np.float64) for pool in pools), table, lens)  # fmt: skip
    scale = given.scale * soft_cap if soft_cap else given.scale / LOG2_E
    more = {"scale": scale, "options": options,
            "sinks": memory(given.sinks, np.float32, (q_heads,)) if given.sinks else None,
            "query_lens": memory(given.query_lens, np.int32, (batch,)) if given.query_lens else None}
    if defines.get("SELECTED"):
        lists = PageList(memory(given.selected_pages, np.int32, (batch, kv_heads, given.max_selected)),
                         memory(given.selected_counts, np.int32, (batch, kv_heads)))
        out, lse = reference.selected_attention(*arrays, lists, **more)
    else:
        out, lse = reference.attention(*arrays, **more)
    if defines.get("PAGE_LSE") and not defines.get("SELECTED"):
        found = reference.page_lse(*arrays[:3], *arrays[4:], tokens=16, scale=scale, options=options)
        to = memory(given.page_lse, np.float32, (*found.shape[:2], given.page_lse_tiles, *found.shape[3:]))
        to[:, :, : found.shape[2]] = found
    live = np.ones(batch, bool)
    if tasks:
        live = lens == 0
        live[memory(given.tasks, np.int32, (given.num_tasks, 5))[:, 0]] = True
    memory(given.out, dim, out.shape)[live] = out[live].astype(dim)
    memory(given.lse, np.float32, lse.shape)[live] = lse[live]


def find_prefixes(defines: dict[str, int], given: types.SimpleNamespace) -> None:
    """What pkv_find_prefixes writes, of an int32 block table with lengths."""
    assert not any(defines.get(name) for name in ("TABLE_CSR", "TABLE_INT64", "LAST_PAGE_LENGTHS"))
    rows = given.batch_size
    lens = memory(given.lengths, np.int32, (rows,))
    table = memory(given.page_ids, np.int32, (rows, given.table_stride))
    rule = prefixes.SharingRule(given.tokens_per_member, given.least_tokens)
    found = prefixes.find_prefixes(table, lens, page_size=defines["PAGE_SIZE"], query_tokens=given.query_tokens,
                                   rule=rule)
    memory(given.group_of_row, np.int32, (rows,))[:] = found.group_of_row
    pages = memory(given.prefix_pages, np.int32, (max(1, rows // 2),))
    pages[:] = 0
    pages[: len(found.prefix_pages)] = found.prefix_pages


def summarize(defines: dict[str, int], given: types.SimpleNamespace) -> None:
    """What pkv_summarize_pages writes, of an int32 block table."""
    kind = {1: summaries.MEAN_STD, 2: summaries.MIN_MAX}[defines["SCORING"]]
    size, width, dim = defines["PAGE_SIZE"], defines["HEAD_DIM"], FLOATS[defines["DTYPE_BF16"]]
    table = memory(given.page_ids, np.int32, (given.batch_size, given.table_stride))
    pages = memory(given.k_pages, dim, (given.num_pages, given.num_kv_heads, size, width),
                   (given.k_page_stride, given.k_head_stride, given.k_token_stride, 1))
    to = memory(given.summaries, dim, (given.num_pages, given.num_kv_heads, 2, width))
    for row, length in enumerate(memory(given.lengths, np.int32, (given.batch_size,)).tolist()):
        for page in range(max(0, length - given.new_tokens) // size, -(-length // size)):
            for head in range(given.num_kv_heads):
                keys = pages[table[row, page], head, : length - page * size]
                to[table[row, page], head] = summaries.summarize(keys, kind).astype(dim)


def select(defines: dict[str, int], given: types.SimpleNamespace) -> None:
    """What pkv_select_pages writes, of an int32 block table."""
    rule = {0: None, 1: by_name.method("mean_std"), 2: by_name.method("quest")}[defines["SCORING"]]
    group, width, dim = defines["GROUP_SIZE"], defines["HEAD_DIM"], FLOATS[defines["DTYPE_BF16"]]
    heads, pins = given.num_kv_heads, rules.Pins(given.sink_pages, given.recent_pages)
    table = memory(given.page_ids, np.int32, (given.batch_size, given.table_stride))
    pages = memory(given.pages, np.int32, (given.batch_size, heads, given.max_selected))
    counts = memory(given.counts, np.int32, (given.batch_size, heads))
    for row, length in enumerate(memory(given.lengths, np.int32, (given.batch_size,)).tolist()):
        row_pages = -(-length // defines["PAGE_SIZE"])
        for head in range(heads):
            if rule is None:
                scores = memory(given.scores, np.float32, (given.batch_size, heads, given.score_stride))
                scores = scores[row, head, :row_pages]
            elif row_pages:
                q = memory(given.q, dim, (given.batch_size, heads, group, width))[row, head].astype(np.float64)
                kept = memory(given.summaries, dim, (given.num_pages, heads, 2, width))
                kept = kept[table[row, :row_pages], head].astype(np.float64)
                scores = rule.scores(q, kept, given.scale)
            asked = max(given.least_pages, -(-row_pages * given.parts // 2**16))
            if given.budgets:
                asked = int(memory(given.budgets, np.int32, (given.batch_size, heads))[row, head])
            count = min(max(asked, pins.sink_pages + pins.recent_pages), row_pages, given.max_selected)
            counts[row, head] = count
            pages[row, head, :count] = rules.top_pages(scores, count, pins) if row_pages else ()


@dataclass(slots=True)
class FakeGpu:
    """What the test sees of the device."""

    cupy: types.ModuleType
    kernels: list[FakeKernel] = field(default_factory=list, repr=False)
    capturing: bool = False
    torch: types.ModuleType | None = None

    def array(self, host: object, *, device: int = 0) -> FakeArray:
        return FakeArray(np.asarray(host), device)


@contextlib.contextmanager
def fake_gpu(*, compute_capability: int = 90, num_sms: int = 4, memory_bytes: int = 80 << 30):
    """Installs it for the modules of the engine, which are imported anew inside and forgotten afterwards."""
    stream = types.SimpleNamespace(ptr=0, synchronize=lambda: None)
    device = types.SimpleNamespace(id=0, synchronize=lambda: None)
    major, minor = divmod(compute_capability, 10)
    properties = {"name": b"Fake GPU", "major": major, "minor": minor, "multiProcessorCount": num_sms,
                  "totalGlobalMem": memory_bytes}
    cupy = types.ModuleType("cupy")
    gpu = FakeGpu(cupy)
    cupy.__dict__.update(
        ndarray=FakeArray, asarray=lambda host: FakeArray(np.array(host, order="C")), uint8=np.uint8, int32=np.int32,
        float16=np.float16, float32=np.float32, dtype=np.dtype, __version__="fake",
        empty=lambda shape, dtype: FakeArray(np.empty(shape, _dtype(dtype))),
        zeros=lambda shape, dtype: FakeArray(np.zeros(shape, _dtype(dtype))),
        full=lambda shape, value, dtype: FakeArray(np.full(shape, value, _dtype(dtype))),
        cuda=types.SimpleNamespace(Device=lambda index=0: device, get_current_stream=lambda: stream,
                                   runtime=types.SimpleNamespace(getDeviceProperties=lambda index: properties,
                                                           streamIsCapturing=lambda handle: gpu.capturing)))

    def load_kernel(file_name, kernel_name, defines, *, given=None, **launch):
        gpu.kernels.append(FakeKernel(kernel_name, dict(defines), given, file_name))
        return gpu.kernels[-1]

    kept = {name: sys.modules.pop(name, None) for name in (*ENGINE_MODULES, "cupy")}
    sys.modules["cupy"] = cupy
    this_gpu._properties.cache_clear()
    try:
        for name in ENGINE_MODULES:
            module = importlib.import_module(name)
            if hasattr(module, "load_kernel"):
                module.load_kernel = load_kernel
        yield gpu
    finally:
        this_gpu._properties.cache_clear()
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def _dtype(name: object) -> np.dtype:
    return FLOATS[1] if name == "bfloat16" else np.dtype(name)
