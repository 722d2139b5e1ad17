"""What each route serves, of shapes and of attention options, and what each reads of rows under a window."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.options import AttentionOptions
from pkvsim.schedule.make import skipped_tiles
from pkvsim.shapes import DecodeShape

# Of our own kernels (cuda_src/decode.cu); gpu.kernels.variant says which variant serves a shape on a GPU.
HEAD_DIMS = (64, 128, 192, 256)
MAX_GROUP_SIZE = 128
MAX_PAGE_SIZE = 256
# Of heads whose queries, logits and sums for 64 columns a warpgroup's registers hold; its tiles of 16 tokens lie in one
# page each (cuda_src/group_reads.cuh).
WARPGROUP_HEAD_DIMS = (64, 128)
WARPGROUP_TILE_TOKENS = 16
# FlashInfer 0.7.2, https://github.com/flashinfer-ai/flashinfer: DISPATCH_GQA_GROUP_SIZE in
# include/flashinfer/utils.cuh, of its CUDA-core kernels alone; xqa's pages in flashinfer/xqa.py.
FLASHINFER_HEAD_DIMS = (64, 128, 256)
CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8, 16)
XQA_PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Served:
    """What a route serves. None: whatever there is."""

    options: tuple[str, ...]  # fields of AttentionOptions that may differ from plain attention
    head_dims: tuple[int, ...]
    groups: tuple[int, ...] | None = None  # query heads of a KV head
    max_group: int | None = None
    pages: tuple[int, ...] | None = None  # tokens
    max_page: int | None = None


# FlashInfer 0.7.2: BatchDecodeWithPagedKVCacheWrapper.plan in flashinfer/decode.py refuses several query tokens without
# tensor cores, its kernels on both have no sinks, and it takes one head_dim; flashinfer/xqa.py has sinks, a window and
# q_seq_len, but neither soft cap nor a head_dim of V. All take FP8 pages with one scale each of K and V, but no route
# hands them on and their speed is in no constants.
SERVED = {
    "flashinfer_cuda_core": Served(("window", "soft_cap"), FLASHINFER_HEAD_DIMS, groups=CUDA_CORE_GROUPS),
    "flashinfer_tensor_core": Served(("window", "soft_cap", "query_tokens"), FLASHINFER_HEAD_DIMS),
    "xqa": Served(("window", "sinks", "query_tokens"), FLASHINFER_HEAD_DIMS, pages=XQA_PAGE_SIZES),
} | dict.fromkeys(
    OWN_ROUTES,
    Served(
        ("window", "soft_cap", "sinks", "query_tokens", "v_head_dim", "kv_dtype"), HEAD_DIMS,
        max_group=MAX_GROUP_SIZE, max_page=MAX_PAGE_SIZE,
    ),
)  # fmt: skip
# The CUDA-core kernel masks what lies before the window but walks all of the row (BatchDecodeWithPagedKVCacheDevice in
# include/flashinfer/attention/decode.cuh); the others start at the window's first tile.
WALKS_ALL = ("flashinfer_cuda_core",)


def reads_by_warpgroups(
    *, head_dim: int, v_head_dim: int, page_size: int, kv_dtype: str | None, compute_capability: tuple[int, int]
) -> bool:  # fmt: skip
    """Whether what rows have in common is read for them by wgmma, which compute capability 9.0 alone has: 16-bit pages.

    kv_dtype: of the pages, None where they have the queries' own.
    """
    return (
        compute_capability == (9, 0) and kv_dtype is None and head_dim == v_head_dim
        and head_dim in WARPGROUP_HEAD_DIMS and page_size % WARPGROUP_TILE_TOKENS == 0
    )  # fmt: skip


def asked(shape: DecodeShape, options: AttentionOptions) -> tuple[str, ...]:
    """The options that differ from plain attention, by field name."""
    on = {
        "window": options.window is not None,
        "soft_cap": options.soft_cap is not None,
        "sinks": options.sinks,
        "query_tokens": options.query_tokens > 1,
        "v_head_dim": options.value_dim(shape) != shape.head_dim,
        "kv_dtype": options.kv_dtype is not None,
    }
    return tuple(name for name, differs in on.items() if differs)


def why_not(route: str, shape: DecodeShape, options: AttentionOptions) -> str | None:
    """None where the route serves the shape with these options, else the reason why not."""
    served = SERVED[route]
    dims = {shape.head_dim: "head_dim", options.value_dim(shape): "v_head_dim"}
    dims[shape.head_dim] = "head_dim"
    for dim, name in dims.items():
        if dim not in served.head_dims:
            return f"{name} {dim} is not one of {', '.join(map(str, served.head_dims))}"
    if served.groups is not None and shape.group_size not in served.groups:
        return f"group size {shape.group_size} is not one of {', '.join(map(str, served.groups))}"
    if served.max_group is not None and shape.group_size > served.max_group:
        return f"group size {shape.group_size} is above {served.max_group}"
    if served.pages is not None and shape.page_size not in served.pages:
        return f"page size {shape.page_size} is not one of {', '.join(map(str, served.pages))}"
    if served.max_page is not None and shape.page_size > served.max_page:
        return f"page size {shape.page_size} is above {served.max_page}"
    missing = [name for name in asked(shape, options) if name not in served.options]
    return f"it does not serve {', '.join(missing)}" if missing else None


def serving_routes(
    shape: DecodeShape, options: AttentionOptions, available: Sequence[str] = ROUTES
) -> tuple[str, ...]:
    """Those of the available routes that serve the shape with these options."""
    return tuple(route for route in available if why_not(route, shape, options) is None)


def needs(shape: DecodeShape, options: AttentionOptions) -> str:
    """What a route must serve, in words: the shape where attention is plain, the options elsewhere."""
    heads = f"head_dim {shape.head_dim}, group size {shape.group_size}, page size {shape.page_size}"
    return ", ".join((*asked(shape, options), heads))


def unserved(shape: DecodeShape, options: AttentionOptions, routes: Sequence[str]) -> str:
    """Why none of the routes serves the shape, route by route; routes of the same reason together."""
    reasons: dict[str, list[str]] = {}
    for route in routes:
        reasons.setdefault(why_not(route, shape, options) or "it does", []).append(route)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def as_read(route: str, options: AttentionOptions) -> AttentionOptions:
    """The options by what the route reads for them: without the window where it walks all of a row all the same."""
    return replace(options, window=None) if route in WALKS_ALL and options.window is not None else options


def read_lens(seq_lens: np.ndarray, reach: int | None, tile_tokens: int) -> np.ndarray:
    """Tokens [batch_size] read of rows seq_lens [batch_size], from the first tile that holds one of the last `reach`
    tokens (AttentionOptions.reach) on; seq_lens themselves for None."""
    if reach is None:
        return seq_lens
    lens = seq_lens.astype(np.int64)
    return (lens - skipped_tiles(lens, reach, tile_tokens) * tile_tokens).astype(np.int32)
