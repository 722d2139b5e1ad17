"""Paged attention in plain torch on any device, and an engine made of it, to test the drop-ins on without a GPU."""
from __future__ import annotations

import functools

import torch

from pkvsim import DecodeShape


def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, lse [batch_size, num_q_heads] float32), computed in float64; zeros and -inf for empty rows."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k_pages.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for row, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        ids = block_table[row, :-(-length // k_pages.shape[2])].long()
        k, v = (pages[ids].transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(group, 0)
                for pages in (k_pages, v_pages))  # [num_q_heads, length, head_dim]
        logits = torch.einsum("hd,htd->ht", q[row].double(), k) * scale
        lse[row] = logits.logsumexp(-1)
        out[row] = torch.einsum("ht,htd->hd", logits.softmax(-1), v).to(q.dtype)
    return out, lse


def append_tokens(
    k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, token_offsets: torch.Tensor | None = None,
) -> None:
    """What gpu.torch_append.append_tokens does; tokens before a row's first position are passed over."""
    offsets = range(len(seq_lens) + 1) if token_offsets is None else token_offsets.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = offsets[row], offsets[row + 1]
        places = torch.arange(max(0, length - (end - begin)), length)
        pages, slots = block_table[row, places // k_pages.shape[2]].long(), places % k_pages.shape[2]
        for pool, new in ((k_pages, k_new), (v_pages, v_new)):
            pool[pages, :, slots] = new[end - len(places):end]


class TorchEngine:
    """DecodeEngine's plan() and run() by paged_attention. As there, run() reads the planned tensors, not copies."""

    def __init__(self, shape: DecodeShape, dtype: str, *, scale: float | None = None) -> None:
        self.shape, self.dtype, self.scale = shape, dtype, scale
        self.plans = self.runs = 0

    def plan(self, seq_lens: torch.Tensor, block_table: torch.Tensor) -> None:
        assert seq_lens.dtype == block_table.dtype == torch.int32
        self.tables = block_table, seq_lens
        self.plans += 1

    def release_arrays(self) -> None:
        pass

    def run(self, q, k_pages, v_pages, *, out=None, lse=None):
        shape = self.shape
        assert q.shape[1:] == (shape.num_q_heads, shape.head_dim) and q.is_contiguous()
        assert k_pages.shape[1:] == v_pages.shape[1:] == (shape.num_kv_heads, shape.page_size, shape.head_dim)
        assert str(q.dtype) == str(k_pages.dtype) == f"torch.{self.dtype}"
        self.runs += 1
        found = paged_attention(q, k_pages, v_pages, *self.tables, self.scale)
        return tuple(new if given is None else given.copy_(new) for given, new in zip((out, lse), found))


@functools.cache
def serve_op_on_cpu() -> None:
    """Gives our operators CPU kernels, which the package leaves out, for this process."""
    import gpu.torch_append  # noqa: F401  registers the operator
    import gpu.torch_op  # noqa: F401

    torch.library.impl("pkv::decode_attention", "cpu")(paged_attention)
    torch.library.impl("pkv::append_tokens", "cpu")(append_tokens)
