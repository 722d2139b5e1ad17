"""Attention by our kernels: appends and decode steps whole, prompt chunks by FlashInfer where it runs, else PyTorch."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from gpu.cache.writer import CacheWriter
from gpu.decode_engine import DecodeEngine
from gpu.serve.attention import KVPages, StepRows, causal_mask, kernel_options
from gpu.serve.model.config import ModelConfig
from gpu.serve.step import Chunk
from pkvsim.kv_types import KV_DTYPES
from pkvsim.reference.rope import HALF, Rope

FLASHINFER_WORKSPACE_BYTES = 256 << 20
PLANS_UNDER_WAY = 3  # one more than steps that are launched and not waited for
FLASHINFER_BACKENDS = ("fa3", "fa2")  # FlashInfer's names, the faster first; fa3 needs Hopper
GATHERED_TOKENS = 1 << 15  # of chunks whose pages are gathered together; a longer one is gathered alone
# Not cuDNN's, which PyTorch prefers on Hopper: it builds an execution graph for every pair of lengths that it has not
# seen, 23 to 37 ms of the host each (pytorch: aten/src/ATen/native/cudnn/MHA.cpp, whose cache's key has both lengths,
# and cuda/sdp_utils.cpp, check_prefer_cudnn_attention), and keeps every one. Lengths of chunks hardly ever repeat.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class GpuAttention:
    """An engine planned once a step on the device, whose runs of all layers follow.

    A decode step's launches do not depend on anything that the host knows but the number of rows, so they can be
    captured: begin() before the capture, attend() in it. prefill: what computes chunks, in words.
    """

    __slots__ = ("pages", "prefill", "_config", "_writer", "_engine", "_lse", "_rows", "_chunks", "_append_scales",
                 "_run_scales")

    def __init__(self, config: ModelConfig, pages: KVPages, *, dtype: str, max_rows: int,
                 say: Callable[[str], None] = lambda line: None) -> None:
        """dtype: of queries, "float16" or "bfloat16". say: is told why FlashInfer does not compute chunks. ValueError
        where no kernel of ours serves the model."""
        shape, options = config.shape(pages.page_size), kernel_options(config, pages.dtype)
        kv_dtype = options.kv_dtype
        rope = Rope(style=HALF, inv_freq=config.rope.inv_freq, factor=config.rope.factor)
        self.pages, self._config = pages, config
        self._writer = CacheWriter(shape, dtype, kv_dtype=kv_dtype, rope=rope)
        self._engine = DecodeEngine(shape, dtype, "balanced", options=options)
        self._lse = torch.empty((max_rows, config.num_q_heads), dtype=torch.float32, device=pages.k[0].device)
        self._rows: StepRows | None = None
        self._chunks: Any = _chunk_attention(config, pages, getattr(torch, dtype), say)
        self.prefill = self._chunks.name
        layers = range(config.num_layers)
        self._append_scales: list[dict[str, object]] = [{} for _ in layers]
        self._run_scales: list[dict[str, object]] = [{} for _ in layers]
        if kv_dtype == "int8":
            for layer in layers:
                k, v = pages.k_scales[layer], pages.v_scales[layer]
                self._append_scales[layer] = {"k_token_scales": k, "v_token_scales": v}
                self._run_scales[layer] = {"k_scale": k, "v_scale": v}

    def begin(self, rows: StepRows) -> None:
        self._rows = rows
        if rows.num_decode:
            self._engine.plan(rows.seq_lens[: rows.num_decode], rows.block_table[: rows.num_decode])
        if rows.chunks:
            self._chunks.begin(rows.chunks)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, pages = self._rows, self.pages
        turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k_pages, v_pages = pages.k[layer], pages.v[layer]
        self._writer.append(k, v, k_pages, v_pages, seq_lens=rows.seq_lens, block_table=rows.block_table,
                            token_offsets=rows.token_offsets, q=q, q_out=turned, **self._append_scales[layer])
        out = torch.empty_like(turned)
        decode = rows.num_decode
        if decode:
            self._engine.run(turned[:decode], k_pages, v_pages, out=out[:decode], lse=self._lse[:decode],
                             **self._run_scales[layer])
        if rows.chunks:
            self._chunks.attend(layer, turned[decode:], out[decode:])
        return out


class _FlashInferChunks:
    """FlashInfer's prefill over pages, all chunks of a step in one launch a layer.

    A plan goes to the device from a pinned buffer of its wrapper's, which must not be written again before the copy is
    made; a step is planned while the one before may not have begun. So wrappers take turns.
    """

    __slots__ = ("name", "_config", "_pages", "_dtype", "_wrappers", "_planned")

    def __init__(self, config: ModelConfig, pages: KVPages, dtype: torch.dtype, backend: str) -> None:
        import flashinfer

        self._config, self._pages, self._dtype = config, pages, dtype
        workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=pages.k[0].device)
        self.name, self._planned = f"flashinfer {backend}", 0
        make = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._wrappers = [make(workspace, "HND", backend=backend) for _ in range(PLANS_UNDER_WAY)]

    def begin(self, chunks: list[Chunk]) -> None:
        page_size, c = self._pages.page_size, self._config
        tokens, kv_pages, ids, last = [0], [0], [], []
        for chunk in chunks:
            length = chunk.begin + len(chunk.tokens)
            count = -(-length // page_size)
            tokens.append(tokens[-1] + len(chunk.tokens))
            kv_pages.append(kv_pages[-1] + count)
            ids += chunk.page_ids[:count]
            last.append((length - 1) % page_size + 1)
        # On the host but for the page ids: what FlashInfer plans with it would copy back, and wait for.
        host = [torch.tensor(values, dtype=torch.int32) for values in (tokens, kv_pages, last)]
        page_ids = _sent(ids, torch.int32, self._pages.k[0].device)
        self._planned += 1
        self._wrappers[self._planned % PLANS_UNDER_WAY].plan(
            host[0], host[1], page_ids, host[2], c.num_q_heads, c.num_kv_heads, c.head_dim, page_size, causal=True,
            window_left=-1 if c.window is None else c.window - 1, q_data_type=self._dtype, kv_data_type=self._dtype,
        )  # fmt: skip

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        self._wrappers[self._planned % PLANS_UNDER_WAY].run(q, (self._pages.k[layer], self._pages.v[layer]), out=out)


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """A chunk: its queries [begin, end) of the step's chunks, its keys [first, first + length) of a gathering."""

    begin: int
    end: int
    first: int
    length: int
    mask: torch.Tensor | None  # what scaled_dot_product_attention takes, None where a query sees all keys
    windowed: bool  # and so the mask is one of values, with which only the slowest kernel takes fewer KV heads


@dataclass(frozen=True, slots=True, eq=False)
class _Gathering:
    page_ids: torch.Tensor  # [pages] int64, of its chunks one after the other
    tokens: int  # that the pages have room for
    spans: list[_Span]


class _TorchChunks:
    """PyTorch's attention over gathered pages, a call for each chunk and layer.

    Its time is that of launches, as most chunks are short. So what all layers share is made once a step, pages are
    gathered for many chunks at once, and neither masks nor repeated KV heads are written where a kernel needs none.
    """

    name = "torch"
    __slots__ = ("_config", "_pages", "_gatherings")

    def __init__(self, config: ModelConfig, pages: KVPages) -> None:
        self._config, self._pages = config, pages
        self._gatherings: list[_Gathering] = []

    def begin(self, chunks: list[Chunk]) -> None:
        """Takes the chunks of a step, whose queries come in the same order."""
        page_size, device, window = self._pages.page_size, self._pages.k[0].device, self._config.window
        self._gatherings = []
        ids: list[int] = []
        spans: list[_Span] = []

        def gather() -> None:
            if spans:
                self._gatherings.append(_Gathering(_sent(ids, torch.int64, device), len(ids) * page_size, spans.copy()))
            ids.clear()
            spans.clear()

        at = 0
        for chunk in chunks:
            count, length = len(chunk.tokens), chunk.begin + len(chunk.tokens)
            pages = chunk.page_ids[: -(-length // page_size)]
            if (len(ids) + len(pages)) * page_size > GATHERED_TOKENS:
                gather()
            windowed = window is not None and window < length
            mask = (causal_mask(count, length, window=window, device=device) if windowed
                    else causal_lower_right(count, length) if count > 1 else None)
            spans.append(_Span(at, at + count, len(ids) * page_size, length, mask, windowed))
            ids += pages
            at += count
        gather()

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """Fills out with what q attends to; both [tokens, num_q_heads, head_dim], rotated, of chunks alone."""
        with sdpa_kernel(BACKENDS):
            for gathering in self._gatherings:
                k, v = (part.to(q.dtype)[None]
                        for part in self._pages.read(layer, gathering.page_ids, gathering.tokens))
                for span in gathering.spans:
                    keys, values = (part[:, :, span.first : span.first + span.length] for part in (k, v))
                    if span.windowed:
                        group = q.shape[1] // k.shape[1]
                        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
                    attended = scaled_dot_product_attention(
                        q[span.begin : span.end].transpose(0, 1)[None], keys, values, attn_mask=span.mask,
                        enable_gqa=keys.shape[1] != q.shape[1],
                    )  # fmt: skip
                    out[span.begin : span.end] = attended[0].transpose(0, 1)


def _sent(values: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _chunk_attention(config: ModelConfig, pages: KVPages, dtype: torch.dtype,
                     say: Callable[[str], None]) -> _FlashInferChunks | _TorchChunks:
    """FlashInfer's where it is installed and runs a chunk of one page here; else PyTorch's, and why."""
    if pages.dtype in KV_DTYPES:
        say(f"prompt chunks: PyTorch computes them, as the cache is of {pages.dtype}")
        return _TorchChunks(config, pages)
    if importlib.util.find_spec("flashinfer") is None:
        say("prompt chunks: PyTorch computes them, as FlashInfer is not installed")
        return _TorchChunks(config, pages)
    from gpu.routes.flashinfer_builds import build_failure

    device, reasons = pages.k[0].device, []
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for backend in FLASHINFER_BACKENDS if hopper else FLASHINFER_BACKENDS[1:]:
        try:
            chunks = _FlashInferChunks(config, pages, dtype, backend)
            chunks.begin([_first_page(pages.page_size)])
            q = torch.zeros(pages.page_size, config.num_q_heads, config.head_dim, dtype=dtype, device=device)
            chunks.attend(0, q, torch.empty_like(q))
            torch.cuda.synchronize(device)
        except (ImportError, RuntimeError, OSError, ValueError, TypeError, AttributeError) as error:
            reasons.append(build_failure(error) or f"{type(error).__name__}: {str(error)[:160]}")
            continue
        return chunks
    say(f"prompt chunks: PyTorch computes them, FlashInfer's kernels do not run: {'; '.join(reasons)}")
    return _TorchChunks(config, pages)


def _first_page(page_size: int) -> Chunk:
    """A chunk of the pool's first page."""
    return Chunk(slot=0, begin=0, tokens=np.zeros(page_size, np.int32), ends=False, page_ids=[0])
