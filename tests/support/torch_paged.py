"""Paged attention in plain torch on any device, and an engine made of it, to test the drop-ins on without a GPU."""
from __future__ import annotations

import functools

import torch

from pkvsim import DecodeShape
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.groups import PrefixGroups


def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
    sinks: torch.Tensor | None = None, group_of_row: torch.Tensor | None = None,
    prefix_pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What gpu.drop_ins.torch_decode.decode_attention gives, computed in float64. Groups must be of equal pages."""
    if group_of_row is not None:
        assert window is None
        PrefixGroups(group_of_row.numpy(), prefix_pages.numpy()).check(block_table.numpy(), seq_lens.numpy(),
                                                                       page_size=k_pages.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = q if q.dim() == 4 else q[:, None]  # [batch_size, query_tokens, num_q_heads, head_dim]
    count, heads = queries.shape[1:3]
    out = q.new_zeros((*queries.shape[:-1], v_pages.shape[-1]))
    lse = torch.full(queries.shape[:-1], float("-inf"), dtype=torch.float32, device=q.device)
    for row, length in enumerate(seq_lens.tolist()):
        ids = block_table[row, :-(-length // k_pages.shape[2])].long()
        group = heads // k_pages.shape[1]
        k, v = (pages[ids].transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(group, 0)
                for pages in (k_pages, v_pages))  # [num_q_heads, length, head_dim]
        for token, end in enumerate(range(length - count + 1, length + 1)):
            seen = slice(0 if window is None else max(0, end - window), max(0, end))
            if end <= 0:
                continue
            logits = torch.einsum("hd,htd->ht", queries[row, token].double(), k[:, seen]) * scale
            logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
            total = logits.logsumexp(-1)
            total = total if sinks is None else torch.logaddexp(total, sinks.double())
            lse[row, token] = total
            out[row, token] = torch.einsum("ht,htd->hd", (logits - total[:, None]).exp(), v[:, seen]).to(q.dtype)
    return out.view(*q.shape[:-1], -1), lse.view(q.shape[:-1])


def append_tokens(
    k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, token_offsets: torch.Tensor | None = None,
) -> None:
    """What gpu.drop_ins.torch_append.append_tokens does; tokens before a row's first position are passed over."""
    offsets = range(len(seq_lens) + 1) if token_offsets is None else token_offsets.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = offsets[row], offsets[row + 1]
        places = torch.arange(max(0, length - (end - begin)), length)
        pages, slots = block_table[row, places // k_pages.shape[2]].long(), places % k_pages.shape[2]
        for pool, new in ((k_pages, k_new), (v_pages, v_new)):
            pool[pages, :, slots] = new[end - len(places):end]


def table_of_csr(
    indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_table, seq_lens) of the same rows."""
    rows = [indices[begin:end] for begin, end in zip(indptr[:-1].tolist(), indptr[1:].tolist())]
    table = torch.zeros((len(rows), max(1, *map(len, rows))), dtype=indices.dtype)
    for row, ids in zip(table, rows):
        row[:len(ids)] = ids
    lens = [(len(ids) - 1) * page_size + last if len(ids) else 0 for ids, last in zip(rows, last_page_len.tolist())]
    return table, torch.tensor(lens, dtype=torch.int32)


class TorchEngine:
    """DecodeEngine's plan() and run() by paged_attention. As there, run() reads the planned tensors, not copies."""

    def __init__(self, shape: DecodeShape, dtype: str, options: AttentionOptions = PLAIN) -> None:
        self.shape, self.dtype, self.options = shape, dtype, options
        self.plans = self.runs = 0

    def plan(self, seq_lens=None, block_table=None, *, indptr=None, indices=None, last_page_len=None,
             groups=None) -> None:
        for array in (seq_lens, indptr, last_page_len):
            assert array is None or array.dtype == torch.int32
        self.tables = (block_table, seq_lens) if indptr is None else (indptr, indices, last_page_len)
        self.groups = groups
        self.plans += 1

    def release_arrays(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def run(self, q, k_pages, v_pages, *, out=None, lse=None, scale=None, sinks=None, v_scale=None):
        shape, options = self.shape, self.options
        assert q.shape[-2:] == (shape.num_q_heads, shape.head_dim) and q.is_contiguous()
        assert (q.shape[1] if q.dim() == 4 else 1) == options.query_tokens and options.sinks == (sinks is not None)
        assert k_pages.shape[1:] == (shape.num_kv_heads, shape.page_size, shape.head_dim)
        assert str(q.dtype) == f"torch.{self.dtype}" and str(k_pages.dtype) == f"torch.{options.kv_dtype or self.dtype}"
        self.runs += 1
        tables = self.tables if len(self.tables) == 2 else table_of_csr(*self.tables, shape.page_size)
        v_pages = v_pages.to(q.dtype) * (1.0 if v_scale is None else v_scale)
        window, soft_cap = options.window, options.soft_cap
        found = paged_attention(q, k_pages.to(q.dtype), v_pages, *tables, scale, window, soft_cap, sinks)
        return tuple(new if given is None else given.copy_(new) for given, new in zip((out, lse), found))


@functools.cache
def serve_op_on_cpu() -> None:
    """Gives our operators CPU kernels, which the package leaves out, for this process."""
    import gpu.drop_ins.torch_append  # noqa: F401  registers the operator
    import gpu.drop_ins.torch_decode  # noqa: F401

    torch.library.impl("pkv::decode_attention", "cpu")(paged_attention)
    torch.library.impl("pkv::append_tokens", "cpu")(append_tokens)
