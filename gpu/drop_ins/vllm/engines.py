"""The engines that vLLM's attention layers decode on, and its caches as they read them. Needs no vLLM."""
from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu.drop_ins.vllm.engine_slot import EngineSlot
from gpu.drop_ins.vllm.step import DecodeRows
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

KV_TYPES = {  # vLLM's cache types: ours, and what has a scale of its own
    "auto": (None, None),
    "float16": (None, None),
    "bfloat16": (None, None),
    "fp8": ("float8_e4m3fn", "tensor"),
    "fp8_e4m3": ("float8_e4m3fn", "tensor"),
    "fp8_e5m2": ("float8_e4m3fn", "tensor"),  # vLLM's Triton kernels store e4m3 under either name
    "fp8_per_token_head": ("float8_e4m3fn", "token"),
    "int8_per_token_head": ("int8", "token"),
}
SCALE_BYTES = 4  # vLLM lengthens each head of a cache with inline scales by one float32
PIECE_BYTES = 16  # that kernels load at once: what values and blocks are aligned to


def is_eight_bit(kv_cache_dtype: str | None) -> bool:
    return KV_TYPES.get(kv_cache_dtype or "auto", (None, None))[0] is not None


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

    @property
    def stored_by_ours(self) -> bool:
        """Whether there is a kernel of ours that stores such keys and values: none has FP8 scales of every token."""
        return self.kv_scales != "token" or self.kv_dtype == "int8"

    def options(self, query_tokens: int) -> AttentionOptions:
        return AttentionOptions(window=self.window, soft_cap=self.soft_cap, sinks=self.sinks,
                                query_tokens=query_tokens, kv_dtype=self.kv_dtype, kv_scales=self.kv_scales)


def make_engine(kind: LayerKind, query_tokens: int) -> Any:
    """An engine on the current device. Raises ValueError where no kernel serves the kind."""
    from gpu.decode_engine import DecodeEngine

    return DecodeEngine(kind.shape, kind.dtype, "balanced", layout="NHD", options=kind.options(query_tokens),
                        scale=kind.scale)


def make_writer(kind: LayerKind) -> Any:
    """What stores keys and values, on the current device. Raises ValueError where no kernel does."""
    from gpu.cache.writer import CacheWriter

    return CacheWriter(kind.shape, kind.dtype, kv_dtype=kind.kv_dtype, layout="NHD")


def append(writer: Any, rows: DecodeRows, key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor,
           v_pages: torch.Tensor, k_scale: object = None, v_scale: object = None) -> None:
    """Stores the tokens of rows with one query token each, at the last position of each row; empty rows store nothing.

    key, value: [at least rows.num_rows, num_kv_heads, head_size]; pages [num_blocks, block_size, num_kv_heads,
    head_size]; scales: None of 16-bit pages, one float32 of FP8 ones, of INT8 ones what a token's and head's are
    written to, [num_blocks, block_size, num_kv_heads] float32.
    """
    names = ("k_token_scales", "v_token_scales") if writer.kv_dtype == "int8" else ("k_scale", "v_scale")
    scales = {} if k_scale is None else dict(zip(names, (k_scale, v_scale)))
    writer.append(key[:rows.num_rows], value[:rows.num_rows], k_pages, v_pages, seq_lens=rows.seq_lens,
                  block_table=rows.block_table, **scales)


class LayerDecoder:
    """Decode attention of one layer, by an engine for each number of query tokens that a row may have."""

    __slots__ = ("kind", "most_rows", "slots", "sinks")

    def __init__(self, kind: LayerKind, most_rows: int, slots: dict[int, EngineSlot],
                 sinks: torch.Tensor | None) -> None:
        """sinks: [num_q_heads] of any type, with kind.sinks; those in float32 are read where they are."""
        self.kind, self.most_rows, self.slots = kind, most_rows, slots
        self.sinks = None if sinks is None else sinks.detach().float().contiguous()

    def run(self, rows: DecodeRows, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor,
            k_scale: object, v_scale: object) -> None:
        """q, out: [rows.num_tokens, num_heads, head_size]; pages [num_blocks, block_size, num_kv_heads, head_size].

        A step plans each engine at its first layer. Under capture this must not be the engine's first run.
        """
        slot = self.slots[rows.query_tokens]
        slot.plan(rows)
        if not q.is_contiguous():
            q = q.contiguous()  # without torch.compile, a slice of the product that gave q, k and v
        if rows.query_tokens > 1:
            grouped = rows.num_rows, rows.query_tokens, *q.shape[1:]
            q, out = q.view(grouped), out.view(grouped)
        slot.engine.run(q, k_pages, v_pages, out=out, lse=slot.lse[:rows.num_rows], sinks=self.sinks, k_scale=k_scale,
                        v_scale=v_scale)


@dataclass(slots=True, eq=False)
class Engines:
    """The engines of layers that get the same metadata: those of one kind share them, as vLLM runs layers in turn.

    shared_prefixes: whether rows with one query token read the pages that they begin with in common once, together.
    """

    device: torch.device
    shared_prefixes: bool = False
    made: dict[tuple[LayerKind, int, int], EngineSlot] = field(default_factory=dict)
    writers: dict[LayerKind, Any] = field(default_factory=dict)

    def writer(self, kind: LayerKind) -> Any:
        """The writer of layers of this kind. It has run once, so that a capture may follow; ValueError without one."""
        if kind not in self.writers:
            heads = kind.shape.num_kv_heads, kind.shape.head_dim
            with torch.cuda.device(self.device):
                self.writers[kind] = make_writer(kind)
                new = torch.zeros(1, *heads, dtype=getattr(torch, kind.dtype), device=self.device)
                pages, scales = self._one_page(kind)
                append(self.writers[kind], self._empty_rows(1, 1), new, new, pages, pages, scales, scales)
                torch.cuda.synchronize(self.device)
        return self.writers[kind]

    def decoder(self, kind: LayerKind, query_tokens: Iterable[int], most_rows: int, sinks: torch.Tensor | None,
                known: LayerDecoder | None = None) -> LayerDecoder:
        """The decoder of a layer of this kind: the known one where it serves, since captured graphs may use it.

        Its engines have run once, so that their kernels are compiled and a capture may follow. Raises ValueError where
        no kernel serves the kind.
        """
        wanted = tuple(query_tokens)
        if known is not None and (known.kind, known.most_rows) == (kind, most_rows) and {*wanted} <= {*known.slots}:
            self.made.update({(kind, tokens, most_rows): known.slots[tokens] for tokens in wanted})
            return known
        new = [tokens for tokens in wanted if (kind, tokens, most_rows) not in self.made]
        with torch.cuda.device(self.device):
            for tokens in new:
                heads = (kind.shape.num_q_heads,) if tokens == 1 else (tokens, kind.shape.num_q_heads)
                lse = torch.empty(most_rows, *heads, dtype=torch.float32, device=self.device)
                self.made[kind, tokens, most_rows] = EngineSlot(make_engine(kind, tokens), lse)
            decoder = LayerDecoder(kind, most_rows, {tokens: self.made[kind, tokens, most_rows] for tokens in wanted},
                                   sinks)
            for tokens in new:
                self._try_out(decoder, 1, tokens)
                if self.shared_prefixes:
                    try_out = functools.partial(self._try_out, decoder, query_tokens=tokens)
                    decoder.slots[tokens].prepare_sharing(most_rows, tokens, try_out)
        return decoder

    def _empty_rows(self, num_rows: int, query_tokens: int) -> DecodeRows:
        return DecodeRows(torch.zeros(num_rows, dtype=torch.int32, device=self.device),
                          torch.zeros(num_rows, 1, dtype=torch.int32, device=self.device), num_rows, query_tokens)

    def _one_page(self, kind: LayerKind) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A pool of one page of such layers, and its scales."""
        shape = kind.shape
        stored = {None: getattr(torch, kind.dtype), "int8": torch.int8}.get(kind.kv_dtype, torch.uint8)
        pages = torch.zeros(1, shape.page_size, shape.num_kv_heads, shape.head_dim, dtype=stored, device=self.device)
        if kind.kv_scales is None:
            return pages, None
        return pages, torch.ones(pages.shape[:-1] if kind.kv_scales == "token" else (), device=self.device)

    def _try_out(self, decoder: LayerDecoder, num_rows: int, query_tokens: int) -> None:
        """One run over empty rows: the engine compiles, and knows from whose library arrays come."""
        kind, shape, device = decoder.kind, decoder.kind.shape, self.device
        dtype = getattr(torch, kind.dtype)
        pages, scales = self._one_page(kind)
        q = torch.zeros(num_rows * query_tokens, shape.num_q_heads, shape.head_dim, dtype=dtype, device=device)
        decoder.run(self._empty_rows(num_rows, query_tokens), q, pages, pages, torch.empty_like(q), scales, scales)
        torch.cuda.synchronize(device)


def unserved(*, num_heads: int, num_kv_heads: int, head_size: int, head_size_v: int, alibi: bool, attention_type: str,
             kv_cache_dtype: str, dtype: str, context_ranks: int) -> str | None:
    """Why layers like these cannot decode here, or None. What only the kernels know, engines say when they are made.

    dtype: of the queries; context_ranks: over which the tokens of a row are spread.
    """
    reasons = {
        "ALiBi slopes": alibi,
        f"attention of type {attention_type}": attention_type != "decoder",
        f"a cache of type {kv_cache_dtype}": kv_cache_dtype not in KV_TYPES,
        f"a cache of {kv_cache_dtype} under queries of {dtype}":
            kv_cache_dtype in ("float16", "bfloat16") and kv_cache_dtype != dtype,
        f"values of {head_size_v} beside keys of {head_size}": head_size_v != head_size,
        "context parallelism": context_ranks > 1,
        f"{num_heads} query heads over {num_kv_heads} KV heads": num_heads % num_kv_heads != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def own_planes(cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and scales of a cache whose heads vLLM lengthens by a float32 scale, each in a plane of its own.

    cache: [num_blocks, 2, block_size, num_kv_heads, head_size + 4] of one byte an element, each block NHD or HND
    without gaps. The bytes of a block's K, and of its V, are laid out as all values, then all scales: values are
    aligned to 16 bytes so, which inline ones are not, and a head's scales of a block lie side by side, since a kernel
    that reads one head would otherwise fetch a sector of 32 bytes for each token's 4. Returns values [num_blocks, 2,
    block_size, num_kv_heads, head_size] like cache, k_scales and v_scales [num_blocks, block_size, num_kv_heads]
    float32, all views. Raises ValueError for another cache.
    """
    num_blocks, two, block_size, heads, padded = cache.shape
    block, half = cache.stride(0), block_size * heads * padded  # bytes from block to block, of a block's K or V
    dense = cache[0].is_contiguous() or cache[0].transpose(1, 2).is_contiguous()
    aligned = all(number % PIECE_BYTES == 0 for number in (block, half, cache.storage_offset()))
    if two != 2 or padded != head_size + SCALE_BYTES or cache.element_size() != 1 or not dense or not aligned:
        raise ValueError(f"kv_cache: expected bytes [num_blocks, 2, block_size, num_kv_heads, {head_size + SCALE_BYTES}"
                         f"] in blocks without gaps, aligned to {PIECE_BYTES}, got {cache.dtype} {list(cache.shape)} "
                         f"of strides {cache.stride()} from {cache.storage_offset()} on")
    values = cache.as_strided((num_blocks, 2, block_size, heads, head_size),
                              (block, half, heads * head_size, head_size, 1))
    words = torch.empty(0, dtype=torch.float32, device=cache.device).set_(cache.untyped_storage())
    first = cache.storage_offset() + block_size * heads * head_size
    k_scales, v_scales = (words.as_strided((num_blocks, block_size, heads), (block // 4, 1, block_size),
                                           (first + side * half) // 4) for side in (0, 1))
    return values, k_scales, v_scales
