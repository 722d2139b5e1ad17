"""flash_attn_varlen_func and flash_attn_func: attention of many new tokens, by what PyTorch brings.

On a GPU that is its own FlashAttention 2, whose masks align to the ends of queries and keys as these functions promise;
elsewhere, and with soft caps or sinks, plain products one sequence after the other, which waits for the GPU.
"""
from __future__ import annotations

import torch

from gpu.drop_ins.flash_attn.checks import check_alike, check_options, check_tensor, describe, expect
from gpu.drop_ins.flash_attn.dense import dense_attention
from gpu.drop_ins.refusals import check_served

HALF_TYPES = (torch.float16, torch.bfloat16)


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None, *, s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attention of packed sequences, [total_q, num_q_heads, head_dim].

    q [total_q, num_q_heads, head_dim]; k, v [total_k, num_kv_heads, head_dim], or with block_table [batch_size,
    max_pages] int32 pages [num_pages, page_size, num_kv_heads, head_dim], which are gathered (this waits for the GPU).
    cu_seqlens_q, cu_seqlens_k [batch_size + 1] int32: where sequences begin and the last one ends. Query i of n sees
    keys up to i + keys - n if causal; window_size: keys to the left and right of that one, -1 for all. softcap: 0 for
    none. s_aux [num_q_heads]: sinks, as in GPT-OSS. deterministic: forward passes are. With return_attn_probs (out,
    lse [num_q_heads, total_q] float32 of natural log, None), as without dropout there; lse of queries that see nothing
    is inf or -inf.

    Raises ValueError or NotImplementedError naming the argument.
    """
    check_served("dropout_p", dropout_p)
    check_served("alibi_slopes", alibi_slopes)
    for name, array in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        expect(name, "int32 [batch_size + 1]", describe(array),
               isinstance(array, torch.Tensor) and array.dim() == 1 and array.dtype == torch.int32 and len(array) > 1)
    expect("cu_seqlens_k", f"as many entries as cu_seqlens_q, {len(cu_seqlens_q)}", describe(cu_seqlens_k),
           len(cu_seqlens_k) == len(cu_seqlens_q))
    if block_table is not None:
        expect("block_table", f"[{len(cu_seqlens_q) - 1}, max_pages]", describe(block_table),
               isinstance(block_table, torch.Tensor) and block_table.dim() == 2
               and len(block_table) == len(cu_seqlens_q) - 1)
        k, v = gather(k, v, block_table, cu_seqlens_k.diff())
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, "[tokens, heads, head_dim]", array, 3)
    check_alike(q, k, v)
    check_options(q, scale=softmax_scale, softcap=softcap, sinks=s_aux)
    left, right = window_of(window_size, causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    fused = q.is_cuda and q.dtype in HALF_TYPES and not softcap and s_aux is None and v.shape[-1] == q.shape[-1]
    if fused:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), 0.0, right == 0, False,
            scale=scale, window_size_left=left, window_size_right=right)
    else:
        q_begins, k_begins = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for name, begins, array in (("cu_seqlens_q", q_begins, q), ("cu_seqlens_k", k_begins, k)):
            expect(name, f"ascending from 0 to at most {len(array)} tokens", begins,
                   0 <= begins[0] and begins[-1] <= len(array) and begins == sorted(begins))
        out, lse = one_by_one(q, k, v, q_begins, k_begins, scale=scale, left=left, right=right,
                              soft_cap=softcap or None, sinks=s_aux)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False, *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """The same of sequences of one length, [batch_size, new_tokens, num_q_heads, head_dim], and lse [batch_size,
    num_q_heads, new_tokens].

    q [batch_size, new_tokens, num_q_heads, head_dim]; k, v [batch_size, tokens, num_kv_heads, head_dim].
    """
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, "[batch_size, tokens, heads, head_dim]", array, 4)
        expect(name, "q's batch_size, at least 1", describe(array), len(array) == len(q) > 0)
    check_alike(q, k, v)
    (batch_size, new_tokens), tokens = q.shape[:2], k.shape[1]
    begins = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device)
    q, k, v = (array.flatten(0, 1) for array in (q, k, v))
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, begins * new_tokens, begins * tokens, new_tokens, tokens,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, True, s_aux=s_aux)
    out = out.unflatten(0, (batch_size, new_tokens))
    return (out, lse.unflatten(1, (batch_size, new_tokens)).transpose(0, 1), None) if return_attn_probs else out


def window_of(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """(keys to the left of a query's own place, to the right of it), -1 for all."""
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    expect("window_size", "two numbers, -1 for all keys", window_size,
           pair and all(isinstance(side, int) for side in window_size))
    left, right = (max(-1, side) for side in window_size)
    return left, 0 if causal else right


def gather(k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor,
           lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' keys and values packed, [sum of lens, num_kv_heads, head_dim] each. Waits for the GPU.

    k, v pages [num_pages, page_size, num_kv_heads, head_dim]; block_table [batch_size, max_pages]; lens [batch_size].
    """
    for name, pages in (("k", k), ("v", v)):
        check_tensor(name, "[num_pages, page_size, num_kv_heads, head_dim] with a block_table", pages, 4)
    page_size, long = k.shape[1], lens.long()
    row = torch.repeat_interleave(long)
    place = torch.arange(len(row), device=row.device) - (long.cumsum(0) - long)[row]
    expect("block_table", f"pages of {page_size} for all keys of a row", describe(block_table),
           not len(row) or int(place.max()) < block_table.shape[1] * page_size)
    page, slot = block_table[row, place // page_size].long(), place % page_size
    return k[page, slot], v[page, slot]


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_begins: list[int], k_begins: list[int], *, scale: float,
    left: int, right: int, soft_cap: float | None, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [total_q, num_q_heads, head_dim], lse [num_q_heads, total_q]) by dense_attention; a query that sees nothing
    gives zeros and -inf."""
    out = q.new_zeros((*q.shape[:2], v.shape[-1]))
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32, device=q.device)
    for q_begin, q_end, k_begin, k_end in zip(q_begins, q_begins[1:], k_begins, k_begins[1:]):
        queries, keys = q_end - q_begin, k_end - k_begin
        if not queries or not keys:
            continue
        own = torch.arange(queries, device=q.device)[:, None] + keys - queries  # a query's place among the keys
        place = torch.arange(keys, device=q.device)
        mask = torch.ones((queries, keys), dtype=torch.bool, device=q.device)
        if left >= 0:
            mask &= place >= own - left
        if right >= 0:
            mask &= place <= own + right
        of_q, of_k, of_v = (array[begin:end].transpose(0, 1)[None]
                            for array, begin, end in ((q, q_begin, q_end), (k, k_begin, k_end), (v, k_begin, k_end)))
        found, sums = dense_attention(of_q, of_k, of_v, mask[None, None], scale=scale, soft_cap=soft_cap, sinks=sinks)
        seen = mask.any(1)
        out[q_begin:q_end] = torch.where(seen[:, None, None], found[0], 0)
        lse[:, q_begin:q_end] = torch.where(seen, sums[0], float("-inf"))
    return out, lse
