"""Which routes serve which attention options, and what each reads of rows under a window."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from pkvsim.devices.route_model import OWN_ROUTES, ROUTES
from pkvsim.options import AttentionOptions
from pkvsim.schedule.make import skipped_tiles
from pkvsim.shapes import DecodeShape

# FlashInfer 0.7.2, https://github.com/flashinfer-ai/flashinfer: BatchDecodeWithPagedKVCacheWrapper.plan in
# flashinfer/decode.py refuses several query tokens without tensor cores, its kernels on both have no sinks, and it
# takes one head_dim; flashinfer/xqa.py has sinks, a window and q_seq_len, but neither soft cap nor a head_dim of V.
# All take FP8 pages with one scale each of K and V, but no route hands them on and their speed is in no constants.
SERVED = {
    "flashinfer_cuda_core": ("window", "soft_cap"),
    "flashinfer_tensor_core": ("window", "soft_cap", "query_tokens"),
    "xqa": ("window", "sinks", "query_tokens"),
} | dict.fromkeys(OWN_ROUTES, ("window", "soft_cap", "sinks", "query_tokens", "v_head_dim", "kv_dtype"))
# The CUDA-core kernel masks what lies before the window but walks all of the row (BatchDecodeWithPagedKVCacheDevice in
# include/flashinfer/attention/decode.cuh); the others start at the window's first tile.
WALKS_ALL = ("flashinfer_cuda_core",)


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


def serving_routes(
    shape: DecodeShape, options: AttentionOptions, available: tuple[str, ...] = ROUTES
) -> tuple[str, ...]:
    """Those of the available routes that serve the options."""
    needs = set(asked(shape, options))
    return tuple(route for route in available if needs <= set(SERVED[route]))


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
