"""One vLLM step cut into rows that decode and rows that prefill, and the engines that decode. Needs no vLLM.

vLLM puts rows of at most `threshold` query tokens first. They decode here if all of them have as many query tokens;
otherwise the first rows that do. A captured graph is of decode rows alone, padded by rows of length 0.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from pkvsim import DecodeShape
from pkvsim.options import MAX_QUERY_TOKENS, AttentionOptions

KV_TYPES = {  # vLLM's cache types: ours, and what has a scale of its own
    "auto": (None, None),
    "float16": (None, None),
    "bfloat16": (None, None),
    "fp8": ("float8_e4m3fn", "tensor"),
    "fp8_e4m3": ("float8_e4m3fn", "tensor"),
    "fp8_e5m2": ("float8_e5m2", "tensor"),
    "fp8_per_token_head": ("float8_e4m3fn", "token"),
    "int8_per_token_head": ("int8", "token"),
}
SCALE_BYTES = 4  # vLLM lengthens each head of a cache with inline scales by one float32


@dataclass(slots=True, eq=False)
class DecodeRows:
    """The rows of one step that decode, all with the same number of query tokens."""

    seq_lens: torch.Tensor  # [num_rows] int32 on the GPU, the step's own tokens included
    block_table: torch.Tensor  # [num_rows, max_blocks] int32 on the GPU
    num_rows: int
    query_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.query_tokens


def count_decode_rows(query_start_loc: torch.Tensor, threshold: int) -> tuple[int, int]:
    """(rows, query tokens of each) of the rows at the front that can decode in one launch.

    query_start_loc: [batch_size + 1] int32 on the host. Rows without query tokens are padding, and may follow at the
    end. threshold: most query tokens of a row that decodes.
    """
    lens = np.diff(query_start_loc.numpy())
    if not len(lens) or not 0 < lens[0] <= threshold:
        return 0, 1
    alike = lens == lens[0]
    rows = len(lens) if alike.all() else int(alike.argmin())
    return (rows if lens[rows:].any() else len(lens)), int(lens[0])


@dataclass(slots=True, eq=False)
class EngineSlot:
    """An engine and the rows that it has planned."""

    engine: object
    rows: DecodeRows | None = None


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What layers must have in common to share an engine."""

    shape: DecodeShape
    dtype: str
    window: int | None
    soft_cap: float | None
    sinks: bool
    kv_dtype: str | None
    kv_scales: str | None
    scale: float

    def options(self, query_tokens: int) -> AttentionOptions:
        return AttentionOptions(window=self.window, soft_cap=self.soft_cap, sinks=self.sinks,
                                query_tokens=query_tokens, kv_dtype=self.kv_dtype, kv_scales=self.kv_scales)


@dataclass(slots=True, eq=False)
class Engines:
    """The engines of one device: those of layers of one kind share their workspace, as vLLM runs layers in turn."""

    made: dict[tuple[LayerKind, int], EngineSlot] = field(default_factory=dict)

    def of(self, kind: LayerKind, query_tokens: int) -> EngineSlot:
        """The engine of layers of this kind, made at the first call. Raises ValueError where no kernel serves it."""
        key = kind, query_tokens
        if key not in self.made:
            from gpu.decode_engine import DecodeEngine

            self.made[key] = EngineSlot(DecodeEngine(kind.shape, kind.dtype, "balanced", layout="NHD",
                                                     options=kind.options(query_tokens), scale=kind.scale))
        return self.made[key]


ENGINES: dict[int, Engines] = {}  # by device, of this process: captured graphs use them as long as it lives


def unserved(*, num_heads: int, num_kv_heads: int, alibi: bool, attention_type: str, kv_cache_dtype: str,
             context_ranks: int) -> str | None:
    """Why layers like these cannot decode here, or None. What only the kernels know, engines say when they are made."""
    reasons = {
        "ALiBi slopes": alibi,
        f"attention of type {attention_type}": attention_type != "decoder",
        f"a cache of type {kv_cache_dtype}": kv_cache_dtype not in KV_TYPES,
        "decode context parallelism": context_ranks > 1,
        f"{num_heads} query heads over {num_kv_heads} KV heads": num_heads % num_kv_heads != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def own_planes(cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, ...]:
    """Values and scales of a cache whose heads vLLM lengthens by a float32 scale, each in a plane of its own.

    cache: [num_blocks, 2, block_size, num_kv_heads, head_size + 4] of one byte an element, contiguous. The bytes of a
    block's K, and of its V, are laid out as all values, then all scales: values are aligned to 16 bytes so, which
    inline ones are not. Returns values [num_blocks, 2, block_size, num_kv_heads, head_size] like cache, k_scales and
    v_scales [num_blocks, block_size, num_kv_heads] float32, all views. Raises ValueError for another cache.
    """
    num_blocks, two, block_size, heads, padded = cache.shape
    if two != 2 or padded != head_size + SCALE_BYTES or cache.element_size() != 1 or not cache.is_contiguous():
        raise ValueError(f"kv_cache: expected contiguous bytes [num_blocks, 2, block_size, num_kv_heads, "
                         f"{head_size + SCALE_BYTES}], got {cache.dtype} {list(cache.shape)}")
    half = block_size * heads * padded  # bytes of a block's K, and of its V
    values = cache.as_strided((num_blocks, 2, block_size, heads, head_size),
                              (2 * half, half, heads * head_size, head_size, 1))
    words = cache.view(torch.uint8).view(-1).view(torch.float32)
    sizes, strides = (num_blocks, block_size, heads), (2 * half // 4, heads, 1)
    first = block_size * heads * head_size // 4
    return (values, *(words.as_strided(sizes, strides, words.storage_offset() + first + side * half // 4)
                      for side in (0, 1)))


def most_query_tokens(threshold: int | None) -> int:
    """Query tokens of a row up to which it decodes here: vLLM's own threshold, as far as a kernel serves it."""
    return min(threshold or 1, MAX_QUERY_TOKENS)
