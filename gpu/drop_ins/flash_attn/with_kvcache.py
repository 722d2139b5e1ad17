"""flash_attn_with_kvcache: FlashAttention's decode step by our append and decode kernels."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gpu.drop_ins.flash_attn.cache_pages import CachePages, lengths_of, pages_of
from gpu.drop_ins.flash_attn.checks import check_alike, check_options, describe, expect
from gpu.drop_ins.flash_attn.prefill import flash_attn_varlen_func, window_of
from gpu.drop_ins.flash_attn.writing import Rotation, Writers, make_writer, rotation_of
from gpu.drop_ins.refusals import check_served
from gpu.drop_ins.torch_decode import EngineCache, make_engine
from pkvsim.options import MAX_QUERY_TOKENS

# Of this process, as engines and writers outlive the calls.
ENGINES = EngineCache(make_engine, spares=True)
WRITERS = Writers(make_writer)


@torch.compiler.disable
def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None = None,
    v: torch.Tensor | None = None, rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None, cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None, block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0, return_softmax_lse: bool = False, *, s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the rows' new queries over their caches, into which k and v are written first, in place.

    q [batch_size, new_tokens, num_q_heads, head_dim] float16 or bfloat16. k_cache, v_cache [num_pages, page_size,
    num_kv_heads, head_dim] with block_table [batch_size, max_pages] int32, whose entries past a row's end may hold
    anything, -1 too; or [batch_size of the cache, tokens, num_kv_heads, head_dim], row r being entry r or
    cache_batch_idx[r]. k, v [batch_size, new_tokens, num_kv_heads, head_dim]: written behind the cache_seqlens tokens
    that a row has, int32 [batch_size] or a number for all; rows of -1 tokens are no rows, and nothing is written.
    rotary_cos, rotary_sin [max_positions, rotary_dim / 2] rotate k and q on the way, at the positions where they
    belong. causal, window_size: as flash_attn_varlen_func; softcap: 0 for none. num_splits: rows are split where that
    balances the CTAs, whatever it says. s_aux [num_q_heads]: sinks, as in GPT-OSS.

    Returns out like q, and with return_softmax_lse lse [batch_size, num_q_heads, new_tokens] float32 of natural log;
    rows without tokens give zeros and -inf. Steps of one query token, or of up to 8 causal ones, never wait for the GPU
    and may be captured in a CUDA graph after one call outside of any with the same shapes; lengths, tables and caches
    may change in place under it. Others take flash_attn_varlen_func's way.

    Raises ValueError or NotImplementedError naming the argument, before any launch.
    """
    check_served("cache_leftpad", cache_leftpad)
    check_served("alibi_slopes", alibi_slopes)
    expect("q", "float16 or bfloat16 [batch_size, new_tokens, num_q_heads, head_dim]", describe(q),
           isinstance(q, torch.Tensor) and q.dim() == 4 and min(q.shape) > 0
           and q.dtype in (torch.float16, torch.bfloat16))
    check_options(q, scale=softmax_scale, softcap=softcap, sinks=s_aux)
    batch_size, new_tokens = q.shape[:2]
    left, right = window_of(window_size, causal)
    cache = pages_of(k_cache, v_cache, block_table, cache_batch_idx, batch_size)
    _check_new(q, k, v, cache)
    rotation = rotation_of(rotary_cos, rotary_sin, rotary_interleaved)
    if rotation is not None:
        _check_rotated(q, k, rotation, causal or left >= 0 or right >= 0)
    lens = lengths_of(cache_seqlens, cache, batch_size)
    if k is not None:
        expect("cache_seqlens", "the tokens before k", cache_seqlens, cache_seqlens is not None)
        lens = lens + k.shape[1]
        turned = write(k, v, cache, lens, rotation, q)
        q = q if rotation is None else turned
    if new_tokens == 1 or (right == 0 and new_tokens <= MAX_QUERY_TOKENS):
        out, lse = decode(q, cache, lens, scale=softmax_scale, left=left, soft_cap=softcap or None, sinks=s_aux)
    else:
        out, lse = prefill(q, cache, lens, scale=softmax_scale, window=(left, right), soft_cap=softcap, sinks=s_aux)
    return (out, lse) if return_softmax_lse else out


def _check_new(q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, cache: CachePages) -> None:
    """That q, k, v are alike and fit the cache. Raises ValueError naming the argument."""
    check_alike(q, cache.k, cache.v, ("k_cache", "v_cache"))
    if k is None and v is None:
        return
    for name, new, pages in (("k", k, cache.k), ("v", v, cache.v)):
        ok = (isinstance(new, torch.Tensor) and new.dim() == 4
              and (new.shape[0], new.dtype, new.device) == (q.shape[0], q.dtype, q.device))
        expect(name, f"{str(q.dtype).removeprefix('torch.')} [{q.shape[0]}, new tokens, {pages.shape[2]}, "
                     f"{pages.shape[3]}]", describe(new), ok and new.shape[2:] == pages.shape[2:] and new.shape[1] > 0)
    expect("v", f"k's {k.shape[1]} tokens", describe(v), v.shape[1] == k.shape[1])


def _check_rotated(q: torch.Tensor, k: torch.Tensor | None, rotation: Rotation, advances: bool) -> None:
    """That the tables are q's, and every query is rotated as the key beside it. advances: whether queries have
    positions of their own."""
    for name, table in (("rotary_cos", rotation.cos), ("rotary_sin", rotation.sin)):
        expect(name, f"1 to {q.shape[3] // 2} columns on {q.device}", describe(table),
               0 < 2 * table.shape[1] <= q.shape[3] and table.device == q.device)
    expect("rotary_cos", "None without k", "a tensor", k is not None)
    expect("q", f"as many tokens as k, {k.shape[1]}, with rotary_cos", describe(q), q.shape[1] == k.shape[1])
    if q.shape[1] > 1 and not advances:
        raise NotImplementedError(f"causal: expected True with rotary_cos and {q.shape[1]} query tokens per row, which "
                                  "would else all be rotated alike, got False")


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[tuple[int, bool]]:
    """Makes the device current: (its current stream, whether a CUDA graph captures that)."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()


def write(k: torch.Tensor, v: torch.Tensor, cache: CachePages, lens: torch.Tensor, rotation: Rotation | None,
          q: torch.Tensor) -> torch.Tensor | None:
    """Writes k and v as the last tokens of rows of `lens` tokens; q rotated, where there is a rotation."""
    with current_stream(q.device) as (_, capturing):
        return WRITERS.append(k, v, cache, lens, rotation, None if rotation is None else q, capturing=capturing)


def decode(
    q: torch.Tensor, cache: CachePages, lens: torch.Tensor, *, scale: float | None, left: int, soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [batch_size, new_tokens, num_q_heads, head_dim], lse [batch_size, num_q_heads, new_tokens]) of causal
    queries that are the rows' last tokens."""
    one = q.shape[1] == 1
    sinks = None if sinks is None else sinks.detach().float()
    k_pages, v_pages = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    with current_stream(q.device) as (stream, capturing):
        out, lse = ENGINES.run(q[:, 0] if one else q, k_pages, v_pages, cache.block_table, lens, scale,
                               None if left < 0 else left + 1, soft_cap, sinks, stream=stream, capturing=capturing)
    return (out[:, None], lse[:, :, None]) if one else (out, lse.transpose(1, 2))


def prefill(
    q: torch.Tensor, cache: CachePages, lens: torch.Tensor, *, scale: float | None, window: tuple[int, int],
    soft_cap: float, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of any queries, on gathered pages."""
    batch_size, new_tokens = q.shape[:2]
    lens = lens.clamp(0, cache.max_tokens)
    begins = torch.zeros(batch_size + 1, dtype=torch.int32, device=q.device)
    torch.cumsum(lens, 0, dtype=torch.int32, out=begins[1:])
    q_begins = torch.arange(0, (batch_size + 1) * new_tokens, new_tokens, dtype=torch.int32, device=q.device)
    out, lse, _ = flash_attn_varlen_func(
        q.flatten(0, 1), cache.k, cache.v, q_begins, begins, new_tokens, int(lens.max()), softmax_scale=scale,
        causal=window[1] == 0, window_size=window, softcap=soft_cap, return_attn_probs=True,
        block_table=cache.block_table, s_aux=sinks)
    grouped = batch_size, new_tokens
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))  # what FlashAttention has of queries that see nothing
    return out.unflatten(0, grouped), lse.unflatten(1, grouped).transpose(0, 1)
