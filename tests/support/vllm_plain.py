"""Our engine and writer as vLLM's adapter calls them, computed in float64 on the CPU over NHD pages."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch_paged import paged_attention

from gpu.drop_ins.vllm import engines as vllm_engines

if TYPE_CHECKING:
    from fake_vllm import FakeVllm

INT8_SCALE = 0.125  # of every token and head that a stand-in stores


class PlainEngine:
    """DecodeEngine's plan() and run() with NHD pages, computed in float64. `plans` counts; `shared`: rows of those that
    were planned with groups."""

    def __init__(self, vllm: FakeVllm, kind: vllm_engines.LayerKind, query_tokens: int) -> None:
        self.vllm, self.kind, self.query_tokens, self.plans, self.tables = vllm, kind, query_tokens, 0, None
        self.shared: list[int] = []

    def plan(self, seq_lens: torch.Tensor, block_table: torch.Tensor, *, groups: str | None = None) -> None:
        assert groups in (None, "auto")
        if groups and self.kind.window is not None:
            raise ValueError("window: expected None with groups, of whose pages it may hide some")
        if groups and len(seq_lens) > self.vllm.most_grouped:
            raise ValueError(f"groups: expected at most {self.vllm.most_grouped} rows, got {len(seq_lens)}")
        self.shared += [len(seq_lens)] if groups else []
        assert seq_lens.dtype == block_table.dtype == torch.int32 and len(seq_lens) == len(block_table) > 0
        self.tables, self.plans = (block_table, seq_lens), self.plans + 1

    def run(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, out: torch.Tensor,
            lse: torch.Tensor, sinks: torch.Tensor | None, k_scale: Any, v_scale: Any) -> None:
        kind, shape = self.kind, self.kind.shape
        rows = (len(self.tables[1]),) if self.query_tokens == 1 else (len(self.tables[1]), self.query_tokens)
        assert q.shape == out.shape == (*rows, shape.num_q_heads, shape.head_dim)
        assert q.is_contiguous() and out.is_contiguous() and lse.is_contiguous() and lse.shape == q.shape[:-1]
        assert (sinks is not None) == kind.sinks and (sinks is None or sinks.dtype == torch.float32)
        assert k_pages.shape[1:] == (shape.page_size, shape.num_kv_heads, shape.head_dim)
        if kind.kv_scales == "token":
            assert k_scale.shape == k_pages.shape[:-1] and k_scale.stride() == v_scale.stride()
        assert (k_scale is None) == (kind.kv_dtype is None)
        pages = [stored(pages, kind.kv_dtype, scale).transpose(1, 2) for pages, scale in
                 ((k_pages, k_scale), (v_pages, v_scale))]
        found, sums = paged_attention(q, *pages, *self.tables, kind.scale, kind.window, kind.soft_cap, sinks)
        out.copy_(found), lse.copy_(sums)
        self.vllm.writes.append(("ours", out.data_ptr(), out.numel() // (shape.num_q_heads * shape.head_dim)))


class PlainWriter:
    """CacheWriter's append() of a token a row, into NHD pages; a token's scale is the one that _store() gives it."""

    def __init__(self, vllm: FakeVllm, kind: vllm_engines.LayerKind) -> None:
        self.vllm, self.kind, self.kv_dtype = vllm, kind, kind.kv_dtype or kind.dtype

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *,
               seq_lens: torch.Tensor, block_table: torch.Tensor, **scales: torch.Tensor) -> None:
        shape, kind = self.kind.shape, self.kind
        names = {None: (), "tensor": ("k_scale", "v_scale"), "token": ("k_token_scales", "v_token_scales")}
        assert (*scales,) == names[kind.kv_scales] and kind.stored_by_ours
        assert k_new.shape == v_new.shape == (len(seq_lens), shape.num_kv_heads, shape.head_dim)
        assert seq_lens.dtype == block_table.dtype == torch.int32 and len(block_table) == len(seq_lens)
        for row, length in enumerate(seq_lens.tolist()):
            if length:
                block, place = divmod(length - 1, shape.page_size)
                for side, (pages, new) in enumerate(((k_pages, k_new), (v_pages, v_new))):
                    at, own = (block_table[row, block], place), new[row]
                    if kind.kv_scales == "token":
                        scales[names["token"][side]][at] = INT8_SCALE
                        own = (own / INT8_SCALE).to(torch.int8)
                    elif kind.kv_scales == "tensor":
                        own = (own / scales[names["tensor"][side]]).to(torch.float8_e4m3fn).view(pages.dtype)
                    pages[at] = own
        self.vllm.stored += [len(seq_lens)] * bool(seq_lens.any())


def stored(pages: torch.Tensor, kv_dtype: str | None, scale: Any) -> torch.Tensor:
    """Values of pages as they are stored."""
    if kv_dtype is None:
        return pages
    values = pages.view(torch.int8 if kv_dtype == "int8" else torch.float8_e4m3fn).double()
    return values * (scale if scale.dim() == 0 else scale[..., None])
