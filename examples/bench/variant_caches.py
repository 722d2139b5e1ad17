"""8-bit caches of bench_variants: the pool's values as codes, their scales, and what the codes stand for.

Every scale is a power of two, so that pages of 16 bits hold the same values exactly and a result over them is
comparable.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gpu.measure.pools import BenchPool
from pkvsim import AttentionOptions, DecodeShape

UNIT = {"float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 16, "int8": 1 / 32}  # scale of pages of about normal values
CHUNK_ELEMENTS = 1 << 28
MAX_ERROR = 2e-2  # against 16-bit pages of the same values, and of FlashInfer, whose XQA calculates in FP8


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's K and V [num_pages, ...] in the variant's layout, and the scales that DecodeEngine.run() takes."""

    k: torch.Tensor
    v: torch.Tensor
    scales: dict[str, torch.Tensor] = field(default_factory=dict)


def coded_pool(plain: BenchPool, kv_dtype: str) -> BenchPool:
    """The pool's values as 8-bit codes of UNIT each: int8, or uint8 for FP8."""
    pool = BenchPool(pool_gib=0, dtype=plain.flat.dtype, seed=0)
    pool.flat = torch.empty_like(plain.flat, dtype=torch.int8 if kv_dtype == "int8" else torch.uint8)
    for to, values in zip(pool.flat.split(CHUNK_ELEMENTS), plain.flat.split(CHUNK_ELEMENTS)):
        to.copy_(codes_of(values, kv_dtype))
    return pool


def codes_of(values: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """The codes nearest to the values: int8, or uint8 for FP8."""
    steps = values.float() / UNIT[kv_dtype]
    if kv_dtype == "int8":
        return steps.round().clamp(-127, 127).to(torch.int8)
    return steps.to(getattr(torch, kv_dtype)).view(torch.uint8)


def scales_of(pages: torch.Tensor, shape: DecodeShape, options: AttentionOptions) -> dict[str, torch.Tensor]:
    """Scales of HND pages [num_pages, ...], all UNIT, as the options store them; none of a 16-bit cache."""
    if options.kv_dtype is None:
        return {}
    whole = len(pages), shape.num_kv_heads, shape.page_size
    size = {"tensor": (1,), "page": whole[:2], "token": whole}[options.kv_scales]
    return {name: torch.full(size, UNIT[options.kv_dtype], device=pages.device) for name in ("k_scale", "v_scale")}


def factors_of(options: AttentionOptions) -> dict[str, float]:
    """The scales as FlashInferDecode.run() takes them: numbers on the host, none of a 16-bit cache."""
    return {} if options.kv_dtype is None else dict.fromkeys(("k_scale", "v_scale"), UNIT[options.kv_dtype])


def values_of(pages: torch.Tensor, kv_dtype: str | None, dtype: torch.dtype) -> torch.Tensor:
    """What the pages stand for, exactly; 16-bit ones as they are."""
    if kv_dtype is None:
        return pages
    return (pages.view(getattr(torch, kv_dtype)).float() * UNIT[kv_dtype]).to(dtype)


def error_over_16_bit(shape: DecodeShape, options: AttentionOptions, q: torch.Tensor, out: torch.Tensor,
                      lens: np.ndarray, table: np.ndarray, layer: Layer) -> float:
    """The largest difference of `out` from what DecodeEngine makes of a 16-bit cache of the same values.

    One KV head after the other, so that a small GPU has room for the values beside the pools.
    """
    from gpu import DecodeEngine

    used, places = np.unique(table, return_inverse=True)
    ids = torch.from_numpy(used.astype(np.int64)).cuda()
    group = shape.group_size
    engine = DecodeEngine(replace(shape, num_q_heads=group, num_kv_heads=1), str(q.dtype).removeprefix("torch."),
                          options=replace(options, kv_dtype=None, kv_scales=None))
    engine.plan(torch.from_numpy(lens).cuda(), torch.from_numpy(places.reshape(table.shape).astype(np.int32)).cuda())
    worst = 0.0
    for head in range(shape.num_kv_heads):
        values = [values_of(pages[ids, head : head + 1], options.kv_dtype, q.dtype) for pages in (layer.k, layer.v)]
        own = slice(head * group, (head + 1) * group)
        found = engine.run(q[..., own, :].contiguous(), *values)[0]
        worst = np.maximum(worst, float((out[..., own, :].float() - found.float()).abs().max()))  # a NaN stays one
    return float(worst)
