"""Attention that calibration times: FlashInfer's kernels over pages where they run here, PyTorch's otherwise."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLASHINFER, SDPA = "flashinfer", "sdpa"
PAGE = 16
WORKSPACE_BYTES = 256 << 20
TENSOR_CORE_GROUP = 4  # query heads a KV head from which FlashInfer's decode is better off on tensor cores
Attend = Callable[[int, Any], Any]  # (layer, queries [tokens, Hq, d]) -> [tokens, Hq, d]


@dataclass(frozen=True, slots=True)
class Heads:
    query: int
    kv: int
    dim: int


def chunk_attention(
    chunk: int, past: int, heads: Heads, *, layers: int, device: str, kernel: str
) -> Attend:
    """Causal attention of the last `chunk` of past + chunk tokens; every layer has a cache of its own."""
    return (_flashinfer_chunk if kernel == FLASHINFER else _sdpa_chunk)(chunk, past, heads, layers, device)


def rows_attention(rows: int, context: int, heads: Heads, *, layers: int, device: str, kernel: str) -> Attend:
    """Decode attention of `rows` sequences of `context` tokens; every layer has a cache of its own."""
    return (_flashinfer_rows if kernel == FLASHINFER else _sdpa_rows)(rows, context, heads, layers, device)


def runs(attention: Callable[..., Attend], *, heads: Heads, device: str, say: Callable[[str], None]) -> str:
    """FLASHINFER where its kernel for these heads runs here, else SDPA, with a note why."""
    if device == "cpu":
        return SDPA
    import torch

    from gpu.routes.flashinfer_builds import build_failure

    try:
        attend = attention(PAGE, PAGE, heads, layers=1, device=device, kernel=FLASHINFER)
        attend(0, torch.zeros(PAGE, heads.query, heads.dim, device=device, dtype=torch.float16))
        torch.cuda.synchronize()
    except ImportError:
        say(f"{attention.__name__}: FlashInfer is not installed, PyTorch's kernel is timed")
        return SDPA
    except (RuntimeError, OSError, ValueError, TypeError, AttributeError) as error:
        why = build_failure(error) or f"{type(error).__name__}: {str(error)[:160]}"
        say(f"{attention.__name__}: PyTorch's kernel is timed, FlashInfer's does not run: {why}")
        return SDPA
    return FLASHINFER


def _pages(tokens: int, heads: Heads, device: str) -> torch.Tensor:
    """[pages, 2, PAGE, Hkv, d] of random keys and values."""
    import torch

    return torch.randn(-(-tokens // PAGE), 2, PAGE, heads.kv, heads.dim, device=device, dtype=torch.float16)


def _flashinfer_chunk(chunk: int, past: int, heads: Heads, layers: int, device: str) -> Attend:
    import flashinfer
    import torch

    tokens = past + chunk
    caches = [_pages(tokens, heads, device) for _ in range(layers)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD"
    )
    ends = [torch.tensor([0, end], dtype=torch.int32, device=device) for end in (chunk, len(caches[0]))]
    wrapper.plan(
        ends[0], ends[1], torch.arange(len(caches[0]), dtype=torch.int32, device=device),
        torch.tensor([(tokens - 1) % PAGE + 1], dtype=torch.int32, device=device), heads.query, heads.kv, heads.dim,
        PAGE, causal=True, q_data_type=torch.float16, kv_data_type=torch.float16,
    )  # fmt: skip
    return lambda layer, q: wrapper.run(q, caches[layer])


def _flashinfer_rows(rows: int, context: int, heads: Heads, layers: int, device: str) -> Attend:
    import flashinfer
    import torch

    pages = -(-context // PAGE)
    caches = [_pages(rows * pages * PAGE, heads, device) for _ in range(layers)]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD",
        use_tensor_cores=heads.query // heads.kv >= TENSOR_CORE_GROUP,
    )  # fmt: skip
    wrapper.plan(
        torch.arange(rows + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(rows * pages, dtype=torch.int32, device=device),
        torch.full((rows,), (context - 1) % PAGE + 1, dtype=torch.int32, device=device),
        heads.query, heads.kv, heads.dim, PAGE, q_data_type=torch.float16, kv_data_type=torch.float16,
    )  # fmt: skip
    return lambda layer, q: wrapper.run(q, caches[layer])


def _sdpa_chunk(chunk: int, past: int, heads: Heads, layers: int, device: str) -> Attend:
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    tokens, group = past + chunk, heads.query // heads.kv
    caches = [
        torch.randn(2, 1, heads.kv, tokens, heads.dim, device=device, dtype=torch.float16)
        .repeat_interleave(group, dim=2)
        for _ in range(layers)
    ]  # fmt: skip
    mask: Any = None
    if past:
        mask = causal_lower_right(chunk, tokens)
        if device == "cpu":
            mask = torch.ones(chunk, tokens, dtype=torch.bool).tril(past)

    def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
        k, v = caches[layer]
        out = scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, is_causal=not past
        )
        return out.squeeze(0).transpose(0, 1)

    return attend


def _sdpa_rows(rows: int, context: int, heads: Heads, layers: int, device: str) -> Attend:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    caches = [
        torch.randn(2, rows, heads.kv, context, heads.dim, device=device, dtype=torch.float16) for _ in range(layers)
    ]

    def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
        k, v = caches[layer]
        return scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    return attend
