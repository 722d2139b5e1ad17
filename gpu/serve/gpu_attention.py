"""Attention by our kernels: appends and decode steps whole, prompt chunks by FlashInfer where it runs, else PyTorch."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpu.cache.writer import CacheWriter
from gpu.decode_engine import DecodeEngine
from gpu.serve.attention import KVPages, StepRows, attend_to
from gpu.serve.model.config import ModelConfig
from gpu.serve.step import Chunk
from pkvsim import AttentionOptions
from pkvsim.kv_types import KV_DTYPES
from pkvsim.reference.rope import HALF, Rope

FLASHINFER_WORKSPACE_BYTES = 256 << 20
PLANS_UNDER_WAY = 3  # one more than steps that are launched and not waited for
FLASHINFER_BACKENDS = ("fa3", "fa2")  # FlashInfer's names, the faster first; fa3 needs Hopper


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
        shape, kv_dtype = config.shape(pages.page_size), pages.dtype if pages.dtype in KV_DTYPES else None
        options = AttentionOptions(window=config.window).with_cache(kv_dtype, None)
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


class _TorchChunks:
    """PyTorch's attention over gathered pages, chunk by chunk."""

    name = "torch"
    __slots__ = ("_config", "_pages", "_spans")

    def __init__(self, config: ModelConfig, pages: KVPages) -> None:
        self._config, self._pages = config, pages
        self._spans: list[tuple[int, int, torch.Tensor, int]] = []

    def begin(self, chunks: list[Chunk]) -> None:
        self._spans, at, device = [], 0, self._pages.k[0].device
        for chunk in chunks:
            length = chunk.begin + len(chunk.tokens)
            ids = _sent(chunk.page_ids[: -(-length // self._pages.page_size)], torch.int64, device)
            self._spans.append((at, at + len(chunk.tokens), ids, length))
            at += len(chunk.tokens)

    def attend(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        for begin, end, ids, length in self._spans:
            k, v = self._pages.read(layer, ids, length)
            out[begin:end] = attend_to(q[begin:end], k, v, window=self._config.window)


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
